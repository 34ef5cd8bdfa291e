"""Make this device's part in a run: as it is founded, joined, or found on disk after a restart."""

from __future__ import annotations

import contextlib
import random
import shutil
from dataclasses import dataclass
from pathlib import Path

from p2ptrain.agreement.run_journal import RunJournalRecord, ViewRecord
from p2ptrain.agreement.run_machine import RunMachine
from p2ptrain.agreement.view import View
from p2ptrain.engine.contract import Engine
from p2ptrain.errors import CheckpointError, P2PTrainError, PeerLost
from p2ptrain.ids import DeviceId
from p2ptrain.planner.plan import Plan
from p2ptrain.runtime.driver import Driver
from p2ptrain.runtime.home.home_duty import HomeSession
from p2ptrain.runtime.home.progress import ProgressTracker
from p2ptrain.runtime.journal import RunJournal
from p2ptrain.runtime.keeping.run_state import JOURNAL_FILE, RunState
from p2ptrain.runtime.planning.job import Job, reopened_job
from p2ptrain.runtime.planning.offers import Prepared
from p2ptrain.runtime.runs.founding import Founding
from p2ptrain.runtime.runs.run_member import RunMember
from p2ptrain.runtime.services import Services
from p2ptrain.store.bundles import Bundle, load_bundle
from p2ptrain.store.replicas import FOLDER as REPLICAS_FOLDER
from p2ptrain.store.runs import RunDirectory
from p2ptrain.store.weights import Weights, open_weights
from p2ptrain.training.contract import Contract
from p2ptrain.training.messages import Stamp


@dataclass(frozen=True, slots=True, kw_only=True)
class InterruptedRun:
    """A run that was under way here when the process ended."""

    view: View
    records: tuple[RunJournalRecord, ...]
    bundle: Bundle
    engine: Engine | None
    """None: it is only to give what is kept here."""
    job: Job | None
    """Where this device has the run's data."""
    weights: Weights | None


class RunOpener:
    """Makes run members out of what a device has."""

    def __init__(self, services: Services) -> None:
        self._services = services

    def founded(
        self, plan: Plan, contract: Contract, prepared: Prepared | None, founding: Founding | None
    ) -> RunMember | None:
        """Our part in a first view; None when what it needs is not there any more.

        `founding` is ours where this device founds the run; then it may have no engine.
        """
        engine: Engine | None = None
        if prepared is not None:
            bundle, engine = prepared.bundle, prepared.engine
        elif founding is not None:
            bundle = founding.job.bundle
        else:
            return None
        state = RunState(
            run=plan.run, bundle=bundle, contract=contract, engine=engine, services=self._services
        )
        state.offered_data = None if prepared is None else prepared.data
        return self._open(state, None if founding is None else founding.session(), founding=plan)

    def joined(self, view: View, prepared: Prepared) -> RunMember:
        """Our part in a run that is under way and has taken this device in.

        It was offered the run in this process's life, so it never voted in this view and may.
        """
        state = self._state(view, prepared.bundle, prepared.engine)
        member = self._open(state, None, founding=None)
        member.driver.call(RunMachine.found, view, member.driver.now())
        return member

    def interrupted(self) -> InterruptedRun | None:
        """The newest run that a restart of this process interrupted; blocking.

        What is damaged is left alone: the others go on without this device and take it in again.
        """
        journals = self._services.runs_path.glob(f"*/{JOURNAL_FILE}")
        for path in sorted(journals, key=_modified, reverse=True):
            with contextlib.suppress(P2PTrainError, OSError):
                return self._read_interrupted(path.parent)
        return None

    def left(self, stamp: Stamp) -> InterruptedRun | None:
        """A run that went on without this device, if replicas of it are still here; blocking."""
        path = self._services.runs_path / stamp.run
        if not (path / REPLICAS_FOLDER).is_dir():
            return None
        with contextlib.suppress(P2PTrainError, OSError):
            records = RunJournal(path / JOURNAL_FILE, lambda: ()).read()
            views = [record.view for record in records if isinstance(record, ViewRecord)]
            if views and views[-1].lineage == stamp.lineage:
                return InterruptedRun(
                    view=views[-1],
                    records=tuple(records),
                    bundle=load_bundle(RunDirectory(path).bundle_path),
                    engine=None,
                    job=None,
                    weights=None,
                )
        return None

    def restored(self, found: InterruptedRun) -> RunMember:
        """Our part in an interrupted run: what was durable is here, the stage's state is lost."""
        state = self._state(found.view, found.bundle, found.engine)
        session = None
        if found.job is not None and found.weights is not None:
            session = HomeSession(
                job=found.job,
                weights=found.weights,
                progress=ProgressTracker(
                    job=found.job,
                    plan=found.view.plan,
                    contract=found.view.contract,
                    services=self._services,
                    emit=lambda name, report: None,
                    first_step=found.view.resume_step,
                ),
            )
            state.take_session(session)
        member = self._open(state, session, founding=None)
        member.driver.call(RunMachine.restore, found.records, member.driver.now())
        member.is_restored = True
        return member

    def _read_interrupted(self, path: Path) -> InterruptedRun:
        records = RunJournal(path / JOURNAL_FILE, lambda: ()).read()
        views = [record.view for record in records if isinstance(record, ViewRecord)]
        if not views or self._services.device not in views[-1].members:
            raise CheckpointError("the journal names no view with this device")
        view, directory = views[-1], RunDirectory(path)
        ended = directory.read_ended()
        if ended is not None and ended.lineage >= view.lineage:
            (path / JOURNAL_FILE).unlink()
            shutil.rmtree(path / REPLICAS_FOLDER, ignore_errors=True)
            raise CheckpointError("the run has ended")
        bundle = load_bundle(directory.bundle_path)
        job = reopened_job(directory, bundle, view) if directory.exists() else None
        return InterruptedRun(
            view=view,
            records=tuple(records),
            bundle=bundle,
            engine=self._services.open_engine(view.contract.threads),
            job=job,
            weights=None if job is None else open_weights(bundle),
        )

    def _state(self, view: View, bundle: Bundle, engine: Engine | None) -> RunState:
        return RunState(
            run=view.run,
            bundle=bundle,
            contract=view.contract,
            engine=engine,
            services=self._services,
        )

    def _open(
        self, state: RunState, session: HomeSession | None, *, founding: Plan | None
    ) -> RunMember:
        if session is not None:
            state.take_session(session)
        return RunMember(
            state=state, open_driver=self._open_driver, home=session, founding=founding
        )

    def _open_driver(self, member: RunMember) -> Driver[RunMachine]:
        volatile = self._services.steps_in_memory()
        machine = RunMachine(
            device=self._services.device,
            rng=random.Random(),
            inventory=member.state.inventory,
            volatile=volatile,
        )
        journal = RunJournal(
            member.state.path / JOURNAL_FILE,
            machine.snapshot,
            volatile=volatile,
        )
        return Driver(
            machine,
            send=self._send_or_drop,
            on_event=member.follow,
            on_violation=self._services.drop_link,
            persist=journal.append,
        )

    def _send_or_drop(self, device: DeviceId, message: object) -> None:
        with contextlib.suppress(PeerLost):
            self._services.outlet.send(device, message)


def _modified(path: Path) -> float:
    return path.stat().st_mtime

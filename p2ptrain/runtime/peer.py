"""The peer: everything this device does in one group, composed here and nowhere else."""

from __future__ import annotations

import contextlib
import functools
import os
import random
import sys
import time
from collections.abc import Callable, Iterator, Sequence

import trio

from p2ptrain import limits
from p2ptrain.agreement.machine import Agreement
from p2ptrain.agreement.messages import Accept, Decided, Propose, Refuse, Withdraw
from p2ptrain.agreement.run_messages import RUN_MESSAGES
from p2ptrain.engine.contract import Array
from p2ptrain.engine.onnxruntime_engine import open_engine, runtime_build
from p2ptrain.errors import ConfigError, PeerLost, RemoteProtocolError
from p2ptrain.ids import DeviceId, short
from p2ptrain.membership.accusation import LEFT, REFUSED, RESTARTED
from p2ptrain.membership.events import AddressLearned, MemberDown, MemberUp, RecordChanged
from p2ptrain.membership.machine import Membership
from p2ptrain.membership.messages import MembershipMessage
from p2ptrain.membership.record import MemberRecord
from p2ptrain.net.addresses import reachable_addresses, wifi_medium
from p2ptrain.net.discovery import DiscoveryState, discover
from p2ptrain.net.inviting import Inviting
from p2ptrain.net.links import LinkDown, Links, LinkUp
from p2ptrain.net.listener import split_address
from p2ptrain.net.sponsor import EnrolmentServer
from p2ptrain.planner.links import LinkFigure
from p2ptrain.planner.plan import Plan
from p2ptrain.power.battery import battery_now, battery_percent
from p2ptrain.power.cgroups import cpu_quota
from p2ptrain.power.host import available_memory_bytes, host_identity, power_source, quota_identity
from p2ptrain.power.meter import open_meter
from p2ptrain.runtime.config import (
    PeerConfig,
    default_threads,
    given_data,
    power_settings,
    step_setting,
)
from p2ptrain.runtime.credentials.trust_service import TRUST_MESSAGES, TrustHooks, TrustService
from p2ptrain.runtime.device.battery_watch import spare_battery
from p2ptrain.runtime.device.link_figures import link_figures
from p2ptrain.runtime.device.link_watch import LOOK_EVERY_S, LinkWatch
from p2ptrain.runtime.device.own_record import keep_own_record, read_own_state
from p2ptrain.runtime.device.suspension import SuspensionWatch
from p2ptrain.runtime.driver import Driver
from p2ptrain.runtime.exchange.blobs import BlobExchange
from p2ptrain.runtime.exchange.bodies import BodyReader
from p2ptrain.runtime.journal import Journal, record_ns, steps_in_memory
from p2ptrain.runtime.planning.job import CACHE_FOLDER
from p2ptrain.runtime.reporting.energy_report import energy_report
from p2ptrain.runtime.reporting.usage import PeerMeter, RunMeter, Traffic
from p2ptrain.runtime.reports import EnergyReport, PeerStatus, TrainRequest, TrainResult
from p2ptrain.runtime.runs.ballots import Ballots, follow_ballot
from p2ptrain.runtime.runs.run_service import RunService
from p2ptrain.runtime.services import Emit, Services
from p2ptrain.runtime.status import status_report
from p2ptrain.store.codes import code_ends_s, create_code
from p2ptrain.store.groups import Group, create_invite, load_addresses, save_addresses
from p2ptrain.store.home import Home, read_config
from p2ptrain.wire.frames import BulkHeader, TensorHeader

SWITCH_INTERVAL_S = 0.0005
"""Short, so that a thread that holds Python does not hold up the links."""
MEMORY_UNKNOWN_BYTES = 1024**3
"""What a run may use where the platform does not say what is free."""
SURE_ENDS = (LEFT, REFUSED, RESTARTED)
"""Of `MemberDown.kind`: no silence that might still end."""
SELF_QUEUE_MAX = 4 * limits.CONTROL_QUEUE_MAX


class Peer:
    """One device in one group: links, membership, agreement, runs.

    Made by `open_peer`. `run` owns every task and ends when it is cancelled.
    """

    def __init__(self, *, home: Home, group: Group, config: PeerConfig) -> None:
        self.home, self.group, self.config = home, group, config
        self.started_s = time.time()
        self.discovery = DiscoveryState()
        self._rng = random.Random()
        self._build = runtime_build()
        self._host, self._cores = host_identity(), os.cpu_count() or 1
        self._threads_max = config.threads or self._cores
        self._to_self, self._from_self = trio.open_memory_channel[object](SELF_QUEUE_MAX)
        self._addresses = load_addresses(group)
        self.inviting = Inviting(lambda: code_ends_s(group))
        self.trust = TrustService(group, self._trust_hooks(), rng=self._rng)
        self._left = trio.Event()
        self.links = Links(
            credentials=group.credentials,
            build=self._build,
            listen_host=config.listen_host,
            listen_port=config.port,
            enrolment=EnrolmentServer(
                group, on_code_changed=self.inviting.look, now=self.trust.now
            ),
            on_tensor=self._tensor_arrived,
            on_bulk=self._bulk_arrived,
            objection=self.trust.objection,
            on_refused=self.trust.look,
        )
        self.meter = self._peer_meter(group, home)
        in_memory, writing_ns = _step_place(home)
        self.blobs = BlobExchange(send=self.send, send_bulk=self.links.send_bulk)
        self.membership: Driver[Membership]
        self.agreement: Driver[Agreement]
        self.runs = RunService(
            Services(
                device=group.device,
                directory=self,
                outlet=self,
                blobs=self.blobs,
                runs_path=home.runs,
                cache_path=home.path / CACHE_FOLDER,
                open_engine=lambda threads: open_engine(threads=threads),
                open_meter=self._open_run_meter,
                clock_ns=time.perf_counter_ns,
                link_figures=self._link_figures,
                memory_bytes=self._memory_bytes,
                host=self._host,
                own_cores=quota_identity(),
                cores=self._cores,
                cpu_quota=cpu_quota,
                battery=lambda: battery_now(reserve_percent=config.battery_reserve_percent),
                power=self.meter.power,
                threads_max=self._threads_max,
                drop_link=self._violation,
                say_activity=self._say_activity,
                steps_in_memory=lambda: in_memory,
                record_ns=writing_ns,
                given_data=given_data(read_config(home), config.data),
            ),
            proposals=Ballots(lambda: self.agreement),
            default_threads=lambda: default_threads(self.alive()),
        )

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Serve until cancelled; started when the peer listens.

        Raises:
            PortInUse: another program has the port.
        """
        sys.setswitchinterval(SWITCH_INTERVAL_S)
        journal = Journal(self.group.folder / "agreement.jsonl")
        async with trio.open_nursery() as nursery:
            await nursery.start(self.trust.run)
            await nursery.start(self.links.run)
            self._open_machines(journal)
            await nursery.start(self.membership.run)
            await nursery.start(self.agreement.run)
            await nursery.start(self.runs.run)
            nursery.start_soon(self._follow_links)
            nursery.start_soon(self._follow_inbox)
            nursery.start_soon(self._follow_self)
            nursery.start_soon(self._find_others)
            nursery.start_soon(self._book_energy)
            nursery.start_soon(self._watch_links)
            nursery.start_soon(self._keep_own_record)
            nursery.start_soon(self._spare_battery)
            for address in self.config.peers:
                split_address(address)  # a wrong one ends the start
                self._dial_hint(address)
            for address in self._addresses:
                self._dial_hint(address)
            task_status.started()

    # The public API (through open_peer).

    async def serve(self) -> None:
        """Take part in the group until cancelled, or until this peer has left by `leave`."""
        await self._left.wait()

    async def leave(self) -> str | None:
        """Go without costing anybody a step: hand over this peer's part of a run, then end `serve`.

        Returns:
            Why nothing could be handed over, in words; None when nothing was lost. Cancelled: the
            peer stays, and the others take it back.
        """
        problem = await self._hand_over()
        self._left.set()
        return problem

    async def leave_group(self) -> str | None:
        """Leave for good: hand over, tell the members that our keys are void, then end `serve`.

        Returns:
            As `leave`. Keys and certificates stay on disk: whoever asked removes them.
        """
        problem = await self._hand_over()
        await self.trust.leave()
        with trio.move_on_after(limits.LEAVE_TOLD_S):
            while self.links.devices():  # noqa: ASYNC110 they close the links when they have heard
                await trio.sleep(limits.LEAVE_POLL_S)
        self._left.set()
        return problem

    async def _hand_over(self) -> str | None:
        self._say_leaving(True)
        try:
            with trio.move_on_after(limits.LEAVE_TIMEOUT_S) as scope:
                problem = await self.runs.leave()
        except trio.Cancelled:
            self._say_leaving(False)
            raise
        if scope.cancelled_caught:
            return f"the others did not take over within {limits.LEAVE_TIMEOUT_S:.0f} s"
        return problem

    def _say_leaving(self, leaving: bool) -> None:
        self.membership.machine.update_own(leaving=leaving)
        self.membership.poke()

    async def train(
        self, request: TrainRequest, on_event: Emit = lambda name, report: None
    ) -> TrainResult:
        """Train as the run's home peer; see `RunService.train` for what it raises."""
        return await self.runs.train(request, on_event)

    def stop_training(self) -> None:
        """End the run this peer conducts after the step that has begun; it can be resumed."""
        self.runs.stop()

    def status(self) -> PeerStatus:
        """Who is there, what runs, and why this peer is alone if it is."""
        return status_report(self)

    def energy(self) -> EnergyReport:
        """What the last run that this peer conducted cost, all its peers together; before the
        first one, what this peer has used since it started."""
        if self.runs.last_energy is not None:
            return self.runs.last_energy
        self.meter.settle()
        return energy_report([self.meter.booking()])

    def invite(self, *, ttl_s: float, addresses: Sequence[str] = ()) -> bytes:
        """An invite file's content for one more device."""
        return create_invite(self.group, tuple(addresses) or self.addresses(), ttl_s)

    def invite_by_code(self, *, admits: bool = True) -> str:
        """A code for one more device, good for ten minutes and three tries."""
        code = create_code(self.group, admits=admits)
        self.inviting.look()
        return code

    def addresses(self) -> tuple[str, ...]:
        """Where other devices may reach this peer, most useful first."""
        host, port = self.links.address
        return reachable_addresses(host, port)

    # What runs need of the peer (runtime.services).

    def alive(self) -> tuple[MemberRecord, ...]:
        """Every member that answers and has told about itself, this device first."""
        machine = self.membership.machine
        records = (machine.record_of(device) for device in machine.alive())
        return (machine.own, *(record for record in records if record is not None))

    def linked(self) -> tuple[DeviceId, ...]:
        """Other devices that answer and to which there is a whole link now, sorted."""
        there = set(self.membership.machine.alive())
        return tuple(sorted(there.intersection(self.links.devices())))

    def leaving(self) -> tuple[DeviceId, ...]:
        """Devices that have said that they are about to go."""
        return tuple(record.device for record in self.alive() if record.leaving)

    def name_of(self, device: DeviceId) -> str:
        """What people call a device; its short id when unknown."""
        record = self.membership.machine.record_of(device)
        return short(device) if record is None else record.name

    def send(self, device: DeviceId, message: object) -> None:
        """Queue a control message to a member or to ourselves; PeerLost without a link."""
        if device == self.group.device:
            try:
                self._to_self.send_nowait(message)
            except trio.WouldBlock as error:
                raise PeerLost("this peer is too busy to hear itself") from error
        else:
            with self._naming(device):
                self.links.send_control(device, message)

    async def send_tensor(self, device: DeviceId, header: TensorHeader, *arrays: Array) -> None:
        """Send one tensor to a member, or hand it to our own stage."""
        if device == self.group.device:
            await trio.lowlevel.checkpoint()
            for array in arrays:
                self.runs.deliver(header, array)
        else:
            with self._naming(device):
                await self.links.send_tensor(device, header, *(array.data for array in arrays))

    @contextlib.contextmanager
    def _naming(self, device: DeviceId) -> Iterator[None]:
        try:
            yield
        except PeerLost as error:
            name = self.name_of(device)
            raise PeerLost(f"peer {name} ({short(device)}) is gone: {error.message}") from error

    # What arrives.

    async def _follow_links(self) -> None:
        async for event in self.links.events:
            now = trio.current_time()
            match event:
                case LinkUp(device=device, address=address):
                    self.trust.link_up(device, event.clock_ahead_s, now)
                    self.membership.call(Membership.link_up, device, now)
                    self._remember(device, address)
                    self.runs.peer_up(device)
                case LinkDown(device=device, reason=reason, refused=refused):
                    self.trust.link_down(device)
                    self.membership.call(Membership.link_down, device, refused, now)
                    self.runs.peer_down(device, reason, sure=refused)
                    self.agreement.call(Agreement.member_down, device, now)

    async def _follow_inbox(self) -> None:
        async for device, message in self.links.inbox:
            await self._dispatch(device, message)

    async def _follow_self(self) -> None:
        async for message in self._from_self:
            await self._dispatch(self.group.device, message)

    async def _dispatch(self, device: DeviceId, message: object) -> None:
        match message:
            case _ if isinstance(message, MembershipMessage):
                await self.membership.deliver(device, message)
            case Propose() | Accept() | Refuse() | Decided() | Withdraw():
                await self.agreement.deliver(device, message)
            case _ if isinstance(message, TRUST_MESSAGES):
                await self.trust.deliver(device, message)
            case _ if isinstance(message, RUN_MESSAGES):
                await self.runs.receive_agreement(device, message)
            case _:
                self.runs.receive(device, message)

    async def _tensor_arrived(
        self, device: DeviceId, header: TensorHeader, length: int, reader: BodyReader
    ) -> None:
        self.membership.call(Membership.heard, device, trio.current_time())
        await self.runs.receive_tensor(device, header, length, reader)

    async def _bulk_arrived(self, device: DeviceId, header: BulkHeader, chunk: bytes) -> None:
        self.membership.call(Membership.heard, device, trio.current_time())
        self.blobs.chunk_received(device, header, chunk)
        await trio.lowlevel.checkpoint()

    # What the machines say.

    def _open_machines(self, journal: Journal) -> None:
        self.membership = Driver(
            Membership(own=self._own_record(), rng=self._rng),
            send=self._send_or_drop,
            on_event=self._membership_event,
            on_violation=self._violation,
            lag=lambda seconds, now: self.membership.machine.lag(seconds, now),
        )
        agreement = Agreement(device=self.group.device, rng=self._rng)
        agreement.restore(journal.read(), trio.current_time())
        self.agreement = Driver(
            agreement,
            send=self._send_or_drop,
            on_event=self._agreement_event,
            on_violation=self._violation,
            persist=journal.append,
        )

    def _membership_event(self, event: object) -> None:
        match event:
            case MemberDown(device=device, reason=reason, kind=kind):
                self.runs.peer_down(device, reason, sure=kind in SURE_ENDS)
                self.agreement.call(Agreement.member_down, device, trio.current_time())
            case AddressLearned(device=device, addresses=addresses):
                for address in addresses:
                    self._dial_hint(address, device)
            case MemberUp(record=record) | RecordChanged(record=record):
                self.runs.peer_up(record.device)

    def _agreement_event(self, event: object) -> None:
        follow_ballot(event, runs=self.runs, agreement=self.agreement)

    def _say_activity(self, activity: str) -> None:
        self.membership.machine.update_own(activity=activity)
        self.membership.poke()

    def _send_or_drop(self, device: DeviceId, message: object) -> None:
        """Machines repeat themselves: a message without a link is a lost one."""
        with contextlib.suppress(PeerLost):
            self.send(device, message)

    def _violation(self, device: DeviceId, error: RemoteProtocolError) -> None:
        self.links.close(device, error.message)

    def _trust_hooks(self) -> TrustHooks:
        return TrustHooks(
            send=self._send_or_drop,
            use=lambda credentials: self.links.use(credentials),
            dial=self._dial_again,
            refusals=lambda: {**self.links.failures(), **self.links.refusals()},
            expel=self._expel,
            violation=self._violation,
        )

    def _dial_again(self, addresses: Sequence[str]) -> None:
        self.links.forgive()
        for address in addresses:
            self._dial_hint(address)

    def _expel(self, device: DeviceId, reason: str) -> None:
        """A member is out: what it had here ends now, without waiting for suspicion."""
        self.links.close(device, reason)
        self.runs.peer_down(device, reason, sure=True)
        self.membership.call(Membership.link_down, device, True, trio.current_time())

    # Finding others.

    async def _find_others(self) -> None:
        if not self.config.discovery:
            self.discovery.text = "switched off"
            await trio.lowlevel.checkpoint()
            return
        send, receive = trio.open_memory_channel[str](limits.DISCOVERED_ADDRESSES_MAX)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._discover, send)
            async for address in receive:
                self._dial_hint(address)

    def _dial_hint(self, address: str, device: DeviceId | None = None) -> None:
        """Dial what others say; what is no address is no reason to stop."""
        self.trust.hint(address)
        if self.trust.away:
            return  # dialled when our certificates are valid again
        with contextlib.suppress(ConfigError):
            self.links.dial(address, device=device)

    def _remember(self, device: DeviceId, address: str | None) -> None:
        if address is None or self._addresses.get(address) == device:
            return
        self._addresses.pop(address, None)
        self._addresses[address] = device
        with contextlib.suppress(OSError):  # a hint for the next start, no more
            save_addresses(self.group, self._addresses)

    async def _discover(self, found: trio.MemorySendChannel[str]) -> None:
        await discover(
            group=self.group.id,
            device=self.group.device,
            port=self.links.address[1],
            interfaces=self.config.interfaces,
            found=found,
            state=self.discovery,
            inviting=self.inviting,
        )

    # About this device.

    def _traffic(self) -> Traffic:
        statistics = self.links.statistics()
        return Traffic(statistics.bytes_sent, statistics.bytes_received)

    def _link_figures(self) -> tuple[LinkFigure, ...]:
        views = self.membership.machine.members(trio.current_time())
        return link_figures(views, self.links.statistics().peers, wifi_medium)

    def _peer_meter(self, group: Group, home: Home) -> PeerMeter:
        return PeerMeter(
            device=group.device,
            name=group.device_name,
            meter=open_meter(config=power_settings(read_config(home))),
            sent=lambda run: self.links.sent(run),
            traffic=self._traffic,
        )

    def _open_run_meter(self, plan: Plan, samples_per_step: int) -> RunMeter:
        return RunMeter(self.meter, plan, samples_per_step=samples_per_step)

    async def _book_energy(self) -> None:
        """Book idle time too: a meter's counter must not wrap unread between two steps."""
        while True:
            await trio.sleep(limits.ENERGY_BOOKED_EVERY_S)
            self.meter.settle()

    async def _keep_own_record(self) -> None:
        await keep_own_record(
            self.membership,
            self.links,
            read=lambda: read_own_state(self.addresses()),
            watch=SuspensionWatch(),
        )

    async def _spare_battery(self) -> None:
        await spare_battery(
            read=lambda: (power_source(), battery_percent()),
            reserve_percent=self.config.battery_reserve_percent,
            hand_over=self._hand_over,
            stay=lambda: self._say_leaving(False),
        )

    async def _watch_links(self) -> None:
        """Close what has become silent between members of a run that others still reach."""
        watch = LinkWatch()
        while True:
            await trio.sleep(LOOK_EVERY_S)
            now, member = trio.current_time(), self.runs.member
            plan = None if member is None else member.plan
            members = () if plan is None else plan.members
            views = [v for v in self.membership.machine.members(now) if v.device in members]
            for device in watch.look(views, now):
                self.links.close(device, "nothing came over it, though others reach it")

    def _own_record(self) -> MemberRecord:
        state = read_own_state(self.addresses())
        return MemberRecord(
            device=self.group.device,
            name=self.config.name or self.group.device_name,
            incarnation=int(self.started_s),
            version=0,
            addresses=state.addresses,
            host=self._host,
            cores=self._cores,
            threads_max=self._threads_max,
            memory_bytes=self._memory_bytes(),
            power_source=state.power_source,
            battery_percent=state.battery_percent,
            build=self._build,
            activity="idle",
        )

    def _memory_bytes(self) -> int:
        if self.config.memory_bytes is not None:
            return self.config.memory_bytes
        available = available_memory_bytes()
        return MEMORY_UNKNOWN_BYTES if available is None else available // 2


def _step_place(home: Home) -> tuple[bool, Callable[[], int]]:
    """Whether records of steps stay in memory, as config.toml says or the disk's speed; and what
    writing one takes, measured when it is first asked for."""
    if steps_in_memory(step_setting(read_config(home)), home.runs):
        return True, lambda: 0
    return False, functools.cache(lambda: record_ns(home.runs))

"""The demonstration: a group is founded, three peers find each other, agree, train and write."""

from __future__ import annotations

import contextlib
import shutil
import signal
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol

import trio

from p2ptrain.bundle.reading import parse_manifest
from p2ptrain.demo.baselines import Baselines, baselines
from p2ptrain.demo.corpus import standard_corpus, write_corpus
from p2ptrain.demo.generate import Sampling, write_text
from p2ptrain.demo.group import (
    DemoPeer,
    loopback_multicast_works,
    make_peers,
    run_peer,
    wait_started,
    wait_together,
    write_invites,
)
from p2ptrain.errors import BundleError, ConfigError, Interrupted, PeerLost
from p2ptrain.net.control_socket import call
from p2ptrain.runtime.reports import TrainRequest, TrainResult
from p2ptrain.training.contract import OptimizerChoice
from p2ptrain.wire.codec import from_plain, to_plain

STEPS: Final = 120
STEPS_LONG: Final = 1000
MICROBATCHES: Final = 8
MICROBATCH_SIZE: Final = 2
HELDOUT_MICROBATCHES: Final = 32
LEARNING_RATE: Final = 3e-3
DISCOVERY_S: Final = 10.0
TOGETHER_S: Final = 30.0
PROMPT: Final = b"The function returns "
WRITTEN_BYTES: Final = 240

Summary = dict[str, Any]  # Any: JSON values of `p2ptrain demo --json`


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoOptions:
    """What to demonstrate."""

    peers: int = 3
    steps: int = STEPS
    directory: Path | None = None

    @classmethod
    def chosen(
        cls, *, peers: int, steps: int | None, long: bool, directory: Path | None
    ) -> DemoOptions:
        """The options of the command line; given steps win over --long."""
        planned = STEPS_LONG if long else STEPS
        return cls(peers=peers, steps=planned if steps is None else steps, directory=directory)


class Display(Protocol):
    """Where the demonstration shows what happens."""

    def event(self, name: str, data: dict[str, Any]) -> None:  # Any: JSON values
        """An event of the run: plan, step, evaluation, note."""

    def note(self, text: str) -> None:
        """One line about what happens."""

    def result(self, result: TrainResult) -> None:
        """The summary of the run."""

    def baselines(self, counted: Baselines, result: TrainResult) -> None:
        """The losses that counting alone reaches, beside ours."""

    def written(self, text: str) -> None:
        """What the trained model wrote."""


def run_demo(options: DemoOptions, display: Display) -> Summary:
    """Run it all; gives what `--json` prints. Every process that it started has ended then.

    Raises:
        Interrupted: Ctrl-C.
        P2PTrainError: what failed, as the peers reported it.
    """
    return trio.run(_interruptible, options, display)


async def _interruptible(options: DemoOptions, display: Display) -> Summary:
    with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_raise_on_signal, signals)
            with _workplace(options.directory) as directory:
                summary = await _demonstrate(options, directory, display)
            nursery.cancel_scope.cancel()
    return summary


async def _raise_on_signal(signals: Any) -> None:  # Any: trio's receiver has no public type
    async for _ in signals:
        raise Interrupted("the demo was stopped and its peers were ended", hint="")


@contextlib.contextmanager
def _workplace(directory: Path | None) -> Iterator[Path]:
    """A folder for all of it; homes with keys are removed unless the folder was asked for."""
    if directory is not None:
        directory.mkdir(parents=True, exist_ok=True)
        if any(directory.iterdir()):
            raise ConfigError(f"{directory} is not empty", hint="choose another --directory")
        yield directory.absolute()
        return
    made = Path(tempfile.mkdtemp(prefix="p2ptrain-demo-"))
    try:
        yield made
    except BaseException:
        shutil.rmtree(made, ignore_errors=True)
        raise
    for home in made.glob("peer-*"):
        shutil.rmtree(home, ignore_errors=True)


async def _demonstrate(options: DemoOptions, directory: Path, display: Display) -> Summary:
    started_s = time.monotonic()
    bundle = demo_bundle()
    peers = make_peers(directory, options.peers)
    display.note(f"made a throwaway group with its trust certificate in {directory}")
    async with trio.open_nursery() as nursery:
        await _start_group(nursery, peers, display)
        corpus = await trio.to_thread.run_sync(standard_corpus)
        train, heldout = write_corpus(corpus, directory)
        display.note(
            f"{len(corpus.train)} bytes of English to train on, {len(corpus.heldout)} held out, "
            f"from {corpus.documents} documents of this Python"
        )
        request = _request(options, bundle, train, heldout, directory / "trained.onnx")
        answer = await call(peers[0].socket(), "train", to_plain(request), display.event)
        nursery.cancel_scope.cancel()
    result = from_plain(TrainResult, answer)
    display.result(result)
    counted = baselines(corpus.train.encode(), corpus.heldout.encode())
    display.baselines(counted, result)
    if result.model_path is not None:
        display.written(await trio.to_thread.run_sync(_write, Path(result.model_path), bundle))
    return _summary(result, counted, time.monotonic() - started_s)


async def _start_group(
    nursery: trio.Nursery, peers: tuple[DemoPeer, ...], display: Display
) -> None:
    """Start every peer and wait until each sees all; with given addresses if it must be.

    The peers run in `nursery` and end when that is cancelled.
    """
    await nursery.start(run_peer, peers[0])
    first = await wait_started(peers[0])
    write_invites(peers, first.address)
    multicast = await trio.to_thread.run_sync(loopback_multicast_works)
    given = () if multicast else (first.address,)
    if not multicast:
        display.note("multicast does not work on loopback; the peers are given an address")
    scopes = [await nursery.start(run_peer, peer, given) for peer in peers[1:]]
    if not await wait_together(peers, DISCOVERY_S if multicast else TOGETHER_S):
        display.note("the peers do not see each other yet; starting them with an address")
        for scope in scopes:
            scope.cancel()
        for peer in peers[1:]:
            await nursery.start(run_peer, peer, (first.address,))
        if not await wait_together(peers, TOGETHER_S):
            raise PeerLost("the peers of the demo do not find each other on loopback")
    found = await wait_started(peers[0])
    display.note(f"{len(peers)} peers see each other over mutual TLS 1.3; {found.discovery}")


def demo_bundle() -> Path:
    """The gpt-nano bundle: inside the installed package, or in a checkout's onnx_models.

    Raises:
        BundleError: it is in neither place.
    """
    package = Path(__file__).resolve().parents[1]
    for place in (package / "bundles", package.parent / "onnx_models"):
        if (place / "gpt-nano" / "manifest.json").is_file():
            return place / "gpt-nano"
    raise BundleError(
        "the gpt-nano bundle is missing from this installation", hint="pip install p2ptrain again"
    )


def _request(
    options: DemoOptions, bundle: Path, train: Path, heldout: Path, out: Path
) -> TrainRequest:
    return TrainRequest(
        bundle=str(bundle),
        data=str(train),
        heldout=str(heldout),
        steps=options.steps,
        stages=options.peers,
        microbatches=MICROBATCHES,
        microbatch_size=MICROBATCH_SIZE,
        threads=1,
        dropout=0.0,
        heldout_microbatches=HELDOUT_MICROBATCHES,
        optimizer=OptimizerChoice(
            peak_learning_rate=LEARNING_RATE,
            final_learning_rate=LEARNING_RATE / 10,
            warmup_steps=min(20, max(1, options.steps // 8)),
        ),
        checkpoint_every=max(1, options.steps),
        out=str(out),
    )


def _write(model: Path, bundle: Path) -> str:
    manifest = parse_manifest((bundle / "manifest.json").read_bytes())
    return write_text(model, manifest, Sampling(prompt=PROMPT, count=WRITTEN_BYTES))


def _summary(result: TrainResult, counted: Baselines, seconds: float) -> Summary:
    return {
        "peers": result.peers,
        "stages": result.stages,
        "steps": result.first_step + len(result.losses),
        "loss_first": result.losses[0],
        "loss_last": result.losses[-1],
        "heldout_loss": result.heldout_last,
        "unigram_loss": counted.unigram,
        "bigram_loss": counted.bigram,
        "samples_per_s": result.samples_per_s,
        "joules_per_sample": result.energy.joules_per_sample,
        "bytes_sent": result.bytes_sent,
        "model_path": result.model_path,
        "seconds": seconds,
    }

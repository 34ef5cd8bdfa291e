"""A whole group in one process: real run services, agreement and engine; links in memory.

What is real: `RunService` with everything below it, the agreement machine under its driver, the
control codec, frame headers, the tensor inbox, worker threads, files. What is not: TLS, membership
and discovery. A tensor passes hand to hand (no socket buffers), so whoever waits for a receiver
really waits.
"""

from __future__ import annotations

import contextlib
import dataclasses
import random
import struct
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import trio
import trio.testing

from p2ptrain.agreement.machine import Agreement
from p2ptrain.agreement.messages import Accept, Decided, Propose, Refuse, Withdraw
from p2ptrain.agreement.run_messages import RUN_MESSAGES
from p2ptrain.data.options import GivenData
from p2ptrain.energy.meter import MeterIdentity
from p2ptrain.engine.contract import Array, Engine
from p2ptrain.errors import PeerLost, RemoteProtocolError
from p2ptrain.ids import DeviceId, short
from p2ptrain.membership.record import MemberRecord
from p2ptrain.planner.links import LinkFigure
from p2ptrain.planner.plan import Plan
from p2ptrain.planner.profile import Battery
from p2ptrain.power.meter import Meter
from p2ptrain.power.model import PowerConfig, model_for
from p2ptrain.runtime.driver import Driver
from p2ptrain.runtime.exchange.blobs import BlobExchange
from p2ptrain.runtime.reporting.usage import PeerMeter, RunMeter, Traffic
from p2ptrain.runtime.reports import TrainRequest, TrainResult
from p2ptrain.runtime.runs.ballots import Ballots, follow_ballot
from p2ptrain.runtime.runs.run_service import RunService
from p2ptrain.runtime.services import Services
from p2ptrain.runtime.signal import Signal
from p2ptrain.store.bundles import Bundle
from p2ptrain.wire import frames
from p2ptrain.wire.codec import decode, encode
from p2ptrain.wire.flows import Flow
from p2ptrain.wire.frames import BulkHeader, TensorHeader
from tests.bundles import write_bundle
from tests.counted_work import CountedEngine, WorkClock
from tests.sim.plans import device, make_record

AGREEMENT = (Propose, Accept, Refuse, Decided, Withdraw)
MEMORY_BYTES = 1 << 34
SECONDS_MAX = 20.0
LOOK_S = 0.05
"""How often at least `until` looks, for what no task changes."""


class MemoryReader:
    """The body of one frame; the handler takes exactly all of it."""

    def __init__(self, content: memoryview) -> None:
        self.left = content

    async def read_into(self, view: memoryview) -> None:
        await trio.lowlevel.checkpoint()
        view[:] = self.left[: len(view)]
        self.left = self.left[len(view) :]


def model_meter() -> Meter:
    """A meter without a sensor: the model says it all."""
    model = model_for(machine="x86_64", cores=2, config=PowerConfig())
    identity = MeterIdentity(
        meter="test/model", scope="model", quality="estimated", error_band=0.5, source="a model"
    )
    return Meter(identity=identity, model=model, counter=None, machine_cpu_ns=lambda: None)


@dataclass
class Member:
    """One peer of the group, and what a test may change about it."""

    group: MemoryGroup
    device: DeviceId
    name: str
    runs_path: Path
    memory_bytes: Callable[[], int] = lambda: MEMORY_BYTES
    battery: Battery | None = None
    threads_max: int = 2
    open_engine: Callable[[int], Engine] | None = None
    """In place of an engine that counts its work on `work`."""
    work: WorkClock = field(default_factory=WorkClock)
    """By which it measures itself, so that plans are the same however busy the machine is."""
    drops: Callable[[object], bool] = lambda message: False
    """Which of its messages to others never leave it."""
    durable: Callable[[Sequence[object]], Awaitable[None]] | None = None
    """Awaited before journal records count as durable."""
    activities: list[str] = field(default_factory=list)
    received: list[object] = field(default_factory=list)
    senders: list[DeviceId] = field(default_factory=list)
    """Of each received message."""
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)
    link_figures: tuple[LinkFigure, ...] = ()
    steps_in_memory: bool = False
    data: GivenData | None = None
    """What it feeds in runs whose peers feed their own."""
    lives: bool = True
    leaves: bool = False
    ended: trio.Event = field(default_factory=trio.Event)
    """Once it was killed: nothing of it runs any more, no thread either."""

    def __post_init__(self) -> None:
        self.blobs = BlobExchange(send=self.send, send_bulk=self._send_bulk)
        traffic = Traffic(0, 0)
        self.meter = PeerMeter(
            device=self.device,
            name=self.name,
            meter=model_meter(),
            traffic=lambda: traffic,
            sent=lambda run: {},
        )
        self.runs = RunService(
            Services(
                device=self.device,
                directory=self,
                outlet=self,
                blobs=self.blobs,
                runs_path=self.runs_path,
                cache_path=self.runs_path.with_name(f"cache-{self.name}"),
                open_engine=self._open_engine,
                open_meter=self._open_meter,
                clock_ns=self.work,
                link_figures=lambda: self.link_figures,
                memory_bytes=lambda: self.memory_bytes(),
                battery=lambda: self.battery,
                host=self.name,
                cores=2,
                power=lambda threads: self.meter.power(threads),
                threads_max=self.threads_max,
                drop_link=lambda peer, error: self.group.break_link(self.device, peer),
                say_activity=self.activities.append,
                steps_in_memory=lambda: self.steps_in_memory,
                given_data=self.data,
            ),
            proposals=Ballots(lambda: self.agreement),
            default_threads=lambda: 1,
        )
        self.agreement = Driver(
            Agreement(device=self.device, rng=random.Random(self.name)),
            send=self._send_or_drop,
            on_event=self._event,
            on_violation=lambda peer, error: self.group.break_link(self.device, peer),
            persist=self._persist,
        )
        self._inbox_in, self._inbox = trio.open_memory_channel[tuple[DeviceId, object]](10_000)

    async def run(self, *, task_status: trio.TaskStatus[None]) -> None:
        try:
            with self.scope:
                async with trio.open_nursery() as nursery:
                    await nursery.start(self.agreement.run)
                    await nursery.start(self.runs.run)
                    task_status.started()
                    async for sender, message in self._inbox:
                        await self._dispatch(sender, message)
        finally:
            self.ended.set()

    # Directory.

    def alive(self) -> tuple[MemberRecord, ...]:
        return self.group.alive()

    def name_of(self, device: DeviceId) -> str:
        return self.group.name_of(device)

    def linked(self) -> tuple[DeviceId, ...]:
        return self.group.linked(self.device)

    def leaving(self) -> tuple[DeviceId, ...]:
        return tuple(m.device for m in self.group.members.values() if m.leaves)

    def record(self) -> MemberRecord:
        base = make_record(self.device)
        return dataclasses.replace(base, name=self.name, threads_max=self.threads_max)

    async def train(self, request: TrainRequest) -> TrainResult:
        return await self.runs.train(request, self.group.note)

    # Outlet.

    def send(self, to: DeviceId, message: object) -> None:
        self.group.check_link(self.device, to)
        if to == self.device or not self.drops(message):
            body = encode(message)
            if to != self.device:
                self.group.on_sent(self.device, body)
            self.group.members[to]._inbox_in.send_nowait((self.device, decode(body)))

    async def send_tensor(self, to: DeviceId, header: TensorHeader, *arrays: Array) -> None:
        if to == self.device:
            await trio.lowlevel.checkpoint()
            for array in arrays:
                self.runs.deliver(header, array)
            return
        body = b"".join(array.tobytes() for array in arrays)
        parsed = frames.parse_tensor_header(frames.encode_header(header), body_length=len(body))
        self.group.tensors.append((self.device, to, parsed))
        self.group.on_sent(self.device, frames.encode_header(header) + body)
        self.group.changed.notify()
        receiver = self.group.members[to]
        async with self.group.data_link(self.device, to):
            reader = MemoryReader(memoryview(body))
            await receiver.runs.receive_tensor(self.device, parsed, len(body), reader)
            assert not reader.left

    async def _send_bulk(
        self, to: DeviceId, header: BulkHeader, chunk: memoryview, flow: Flow
    ) -> None:
        async with self.group.data_link(self.device, to):
            await trio.lowlevel.checkpoint()
            content = bytes(chunk)
            parsed = frames.parse_bulk_header(
                frames.encode_header(header), body_length=len(content)
            )
            frames.check_chunk(parsed, content)
            if to != self.device:
                self.group.on_sent(self.device, frames.encode_header(header) + content)
            self.group.members[to].blobs.chunk_received(self.device, parsed, content)

    def _send_or_drop(self, to: DeviceId, message: object) -> None:
        with contextlib.suppress(PeerLost):
            self.send(to, message)

    async def _dispatch(self, sender: DeviceId, message: object) -> None:
        self.received.append(message)
        self.senders.append(sender)
        self.group.changed.notify()
        if isinstance(message, AGREEMENT):
            await self.agreement.deliver(sender, message)
        elif isinstance(message, RUN_MESSAGES):
            await self.runs.receive_agreement(sender, message)
        else:
            self.runs.receive(sender, message)

    def _event(self, event: object) -> None:
        follow_ballot(event, runs=self.runs, agreement=self.agreement)

    async def _persist(self, records: Sequence[object]) -> None:
        await trio.lowlevel.checkpoint()
        if self.durable is not None:
            await self.durable(records)

    def _open_engine(self, threads: int) -> Engine:
        if self.open_engine is not None:
            return self.open_engine(threads)
        return CountedEngine(self.work, threads)

    def _open_meter(self, plan: Plan, samples_per_step: int) -> RunMeter:
        return RunMeter(self.meter, plan, samples_per_step=samples_per_step)


class MemoryGroup:
    """Members that all have links with each other; also everybody's directory."""

    def __init__(self, path: Path, count: int, data: Sequence[GivenData | None] = ()) -> None:
        self.path = path
        self.members: dict[DeviceId, Member] = {}
        self.events: list[tuple[str, object]] = []
        self.tensors: list[tuple[DeviceId, DeviceId, TensorHeader]] = []
        """Every tensor that began to travel: (from, to, header)."""
        self.on_sent: Callable[[DeviceId, bytes], None] = lambda sender, content: None
        """Told what leaves a member for another: control bodies, and whole frames."""
        self.changed = Signal()
        self.broken: set[frozenset[DeviceId]] = set()
        self.nursery: trio.Nursery | None = None
        self._locks: dict[tuple[DeviceId, DeviceId], trio.Lock] = defaultdict(trio.Lock)
        self._scopes: dict[frozenset[DeviceId], set[trio.CancelScope]] = defaultdict(set)
        for index in range(count):
            self.members[device(index)] = Member(
                self, device(index), f"peer-{index}", path / f"runs-{index}",
                data=data[index] if index < len(data) else None,
            )  # fmt: skip

    def __getitem__(self, index: int) -> Member:
        return self.members[device(index)]

    def note(self, name: str, report: object) -> None:
        self.events.append((name, report))
        self.changed.notify()

    def reports(self, name: str) -> list[object]:
        return [report for event, report in self.events if event == name]

    async def wait(self, predicate: Callable[[], bool]) -> None:
        await self.changed.wait_until(predicate)

    # Directory.

    def alive(self) -> tuple[MemberRecord, ...]:
        return tuple(member.record() for member in self.members.values() if member.lives)

    def name_of(self, device: DeviceId) -> str:
        return self.members[device].name

    def linked(self, device: DeviceId) -> tuple[DeviceId, ...]:
        return tuple(
            other for other in sorted(self.members)
            if other != device and frozenset((device, other)) not in self.broken
        )  # fmt: skip

    # Links.

    def check_link(self, here: DeviceId, there: DeviceId) -> None:
        if here != there and frozenset((here, there)) in self.broken:
            raise PeerLost(f"there is no link with peer {short(there)}")

    @contextlib.asynccontextmanager
    async def data_link(self, here: DeviceId, there: DeviceId) -> AsyncIterator[None]:
        """One frame at a time; a frame that is cut short breaks the link, as over TLS."""
        self.check_link(here, there)
        pair = frozenset((here, there))
        async with self._locks[here, there]:
            self.check_link(here, there)
            scope = trio.CancelScope()
            self._scopes[pair].add(scope)
            try:
                with scope:
                    yield
            except RemoteProtocolError:
                self.break_link(here, there)
            except trio.Cancelled:
                self.break_link(here, there)
                raise
            finally:
                self._scopes[pair].discard(scope)
            self.check_link(here, there)

    def is_sending(self, here: DeviceId, there: DeviceId) -> bool:
        """Whether a tensor or chunk is on its way from one to the other."""
        return self._locks[here, there].locked()

    @contextlib.asynccontextmanager
    async def held_link(self, here: DeviceId, there: DeviceId) -> AsyncIterator[None]:
        """Nothing but control messages goes from one to the other meanwhile: a run stands still."""
        async with self._locks[here, there]:
            yield

    def break_link(self, here: DeviceId, there: DeviceId) -> None:
        """Both sides see the other go."""
        pair = frozenset((here, there))
        if pair in self.broken:
            return
        self.broken.add(pair)
        for scope in self._scopes[pair]:
            scope.cancel()
        for one, other in ((here, there), (there, here)):
            member = self.members[one]
            if member.lives:
                member.runs.peer_down(other, "its link broke")
                member.agreement.call(Agreement.member_down, other, member.agreement.now())
        self.changed.notify()

    def heal_link(self, here: DeviceId, there: DeviceId) -> None:
        """Both sides see each other again."""
        self.broken.discard(frozenset((here, there)))
        for one, other in ((here, there), (there, here)):
            self.members[one].runs.peer_up(other)

    def leave_out(self, member: Member) -> None:
        """As if it had not been started yet: nobody knows of it or has a link with it."""
        member.lives = False
        self.broken |= {frozenset((member.device, d)) for d in self.members if d != member.device}

    def let_in(self, member: Member) -> None:
        """It is there now."""
        member.lives = True
        for other in self.members:
            if other != member.device and self.members[other].lives:
                self.heal_link(member.device, other)

    async def restart(self, member: Member) -> Member:
        """A new process on the same device, with what the old one left on the disk.

        What the old one has in a thread is waited for: kill -9 leaves nothing that still writes, or
        speaks in the name of the new one.
        """
        await member.ended.wait()
        fresh = Member(
            self, member.device, member.name, member.runs_path,
            steps_in_memory=member.steps_in_memory, data=member.data,
        )  # fmt: skip
        self.members[member.device] = fresh
        assert self.nursery is not None
        await self.nursery.start(fresh.run)
        self.let_in(fresh)
        return fresh

    def kill(self, member: Member) -> None:
        """As kill -9 does: its tasks are gone, and everybody's link with it."""
        member.lives = False
        member.scope.cancel()
        for other in self.members:
            if other != member.device:
                self.break_link(member.device, other)


@contextlib.asynccontextmanager
async def memory_group(
    path: Path, count: int, data: Sequence[GivenData | None] = ()
) -> AsyncIterator[MemoryGroup]:
    """A group whose members run for the length of the block; an error in any of them ends it.

    `data`: by member, what it feeds of its own.
    """
    group = MemoryGroup(path, count, data)
    async with trio.open_nursery() as nursery:
        group.nursery = nursery
        for member in group.members.values():
            await nursery.start(member.run)
        yield group
        nursery.cancel_scope.cancel()


class _Look(trio.abc.Instrument):
    """Looks at a condition after every step of every task, as seldom as it can change."""

    def __init__(self, condition: Callable[[], bool]) -> None:
        self._condition, self.met = condition, trio.Event()

    def after_task_step(self, task: trio.lowlevel.Task) -> None:
        try:
            met = self.met.is_set() or self._condition()
        except Exception:  # whoever waits gets it, too
            met = True
        if met:
            self.met.set()


async def until(condition: Callable[[], bool]) -> None:
    """Wait while other tasks work; the virtual clock stands still, the real one fails the test.

    Going round on the real clock would take half of the time from those tasks' threads.
    """
    give_up_s, look = time.monotonic() + SECONDS_MAX, _Look(condition)
    virtual = isinstance(trio.lowlevel.current_clock(), trio.testing.MockClock)
    trio.lowlevel.add_instrument(look)
    try:
        while not condition() and (virtual or not look.met.is_set()):
            assert time.monotonic() < give_up_s, "it never came true"
            if virtual:
                await trio.lowlevel.checkpoint()
                continue
            with trio.move_on_after(LOOK_S):
                await look.met.wait()
    finally:
        trio.lowlevel.remove_instrument(look)


def tiny_text(length: int = 4096) -> bytes:
    """Bytes with some structure: a random walk over a few letters."""
    rng = np.random.Generator(np.random.Philox(3))
    return bytes((np.cumsum(rng.integers(-2, 3, length)) % 26 + 97).astype(np.uint8))


def request_for(path: Path, made: Bundle, /, **changes: object) -> TrainRequest:
    """A request for a bundle that is written below `path`, over `tiny_text`; or to resume."""
    folder, data = path / "bundle", path / "data.txt"
    if not folder.exists():
        write_bundle(folder, made)
        data.write_bytes(tiny_text())
    base = TrainRequest(
        bundle=str(folder), data=str(data), steps=6, microbatches=4, microbatch_size=2, threads=1,
        heldout_microbatches=2, checkpoint_every=0, dropout=0.2,
    )  # fmt: skip
    if "resume" in changes:
        base = dataclasses.replace(base, bundle="", data="")
    return dataclasses.replace(base, **changes)  # type: ignore[arg-type]  # fields by name


def float_bits(values: Sequence[float]) -> bytes:
    """The bits of losses, for comparisons that no tolerance blurs."""
    return struct.pack(f"<{len(values)}d", *values)


async def stopped_after(group: MemoryGroup, step: int, wanted: TrainRequest) -> TrainResult:
    """A session that ends soon after the group has reported so many steps in all."""
    results: list[TrainResult] = []

    async def conduct() -> None:
        results.append(await group[0].train(wanted))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(conduct)
        await group.wait(lambda: len(group.reports("step")) >= step)
        group[0].runs.stop()
    return results[0]

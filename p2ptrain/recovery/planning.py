"""Work out, from the promises, how a new view gets every segment's state (DESIGN 7, rules 4 to 6).

A segment is live where its stage's memory has it at the step where the view resumes. What is live
nowhere is lost: each gap-free range of lost segments is loaded from the newest replicas from which
its inputs are logged up to that step, and replayed by whoever runs its first segment next (what
takes a private run's labels by its home peer). Where nothing else helps, live segments whose logs
are gone are made again together with the lost ones.
Of tensor shards no segment is live anywhere: where all of them go on as they are nothing is to be
done, and else the whole model is loaded and every step since made again by one peer, which
computes all of the shards in their order.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from p2ptrain.agreement.view import View
from p2ptrain.ids import DeviceId, short
from p2ptrain.planner.plan import Plan
from p2ptrain.recovery.inventory import Inventory, LiveShard, LiveStage, LogKind, SegmentSpan
from p2ptrain.recovery.restoration import (
    BoundaryKind,
    LogPart,
    Replay,
    Restoration,
    SpanAt,
    TiedAt,
)
from p2ptrain.training.step_record import StepRecord

Promises = Mapping[DeviceId, Inventory]


@dataclass(frozen=True, slots=True, kw_only=True)
class Unrecoverable:
    """The state cannot be had from those that promised; the run pauses and says so."""

    devices_needed: tuple[DeviceId, ...]
    """Whose return suffices; empty: only going back to a whole replica set helps."""
    sentence: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Losses:
    """What a restoration is worked out for."""

    base: View
    """The view before."""
    plan: Plan
    """Of the view to propose."""
    promises: Promises
    records: Sequence[StepRecord]
    """Consecutive, up to `resume_step`: a replay needs each step's clip scale."""
    resume_step: int
    tie_segments: Sequence[Collection[int]] = ()
    """Groups of segments that hold copies of one tensor."""
    remakes_live: bool = False
    """Whether live segments may be replayed, too, where a lost one cannot be without them."""


def restoration(losses: Losses) -> Restoration | Unrecoverable:
    """Sources of all segments and the replays that some need first; deterministic."""
    if _shards_stay(losses):
        stage = losses.plan.stages[0]
        return Restoration(
            replays=(), sources=(SpanAt(span=_span(stage.segments), device=stage.device),)
        )
    live = {
        segment: device
        for segment, owner in _owners(losses.plan)
        if (device := _live(losses, segment, owner)) is not None
    }
    lost = {segment for segment, _ in _owners(losses.plan)} - set(live)
    tried = _try_replays(losses, lost)
    if losses.remakes_live:
        tried = _widened(losses, tried)
    found = [replay for replay in tried.values() if replay is not None]
    if len(found) < len(tried):
        return _unrecoverable(losses, [span for span in tried if tried[span] is None])
    made = {segment for span in tried for segment in span}
    sources = {segment: device for segment, device in live.items() if segment not in made}
    replays = [*(_advanced(losses, sources) if losses.base.aim else ()), *found]
    for replay in replays:
        sources |= dict.fromkeys(replay.span.segments, replay.replayer)
    return Restoration(replays=tuple(replays), sources=_merged(sources))


def _shards_stay(losses: Losses) -> bool:
    """Whether every tensor shard of the plan is where it shall be, at the resumed step."""
    stage = losses.plan.stages[0]
    if stage.split != "tensor":
        return False
    told = [losses.promises.get(device) for device in stage.devices]
    shards = [None if held is None else held.shard for held in told]
    return all(
        shard is not None
        and (shard.weights, shard.rank) == (stage.weights, rank)
        and _reaches(shard, losses.resume_step)
        for rank, shard in enumerate(shards)
    )


_Tried = Mapping[range, Replay | None]
"""Gap-free ranges that are to be made again, and how; None: it cannot be done."""


def _try_replays(losses: Losses, segments: Collection[int]) -> _Tried:
    return {span: _replay(losses, span) for span in _ranges(sorted(segments))}


def _widened(losses: Losses, tried: _Tried) -> _Tried:
    """The same with as few live segments beside the lost ones as the replays take, if that helps.

    What is live and what a replay makes have the same bits, so either may count.
    """
    while (hopeless := next((s for s in tried if tried[s] is None), None)) is not None:
        made = {segment for span in tried for segment in span}
        wider = _wider(losses, hopeless, made)
        if wider is None:
            break
        tried = _try_replays(losses, made | set(wider))
    return tried


def _wider(losses: Losses, span: range, made: Collection[int]) -> range | None:
    """The range to replay in place of a hopeless one, from the newest step that allows it.

    That is the least replay: what is logged since an older step is logged since a newer one, too.
    """
    for step in _replica_steps(losses):
        wider = _closed(losses, span, step, made)
        if _replay_from(losses, wider, step) is not None:
            return wider
    return None


def _closed(losses: Losses, span: range, step: int, made: Collection[int]) -> range:
    """The span, widened until whatever crosses its ends after `step` is logged: over live segments
    one by one, over others that are replayed whole, and over tied copies without a log."""
    count = losses.plan.stages[-1].segments.stop
    while True:
        first, end = span.start, span.stop
        unknown = _untold(losses, span, step)
        if first > 0 and (first - 1 in made or not _crossed(losses, "activation", span, step)):
            span = range(first - 1, end)
        elif end < count and (end in made or not _crossed(losses, "cotangent", span, step)):
            span = range(first, end + 1)
        elif unknown:
            span = range(min(first, *unknown), max(end, *(each + 1 for each in unknown)))
        else:
            return span


def _crossed(losses: Losses, kind: BoundaryKind, span: range, step: int) -> bool:
    """Whether what came into a span at one of its ends is logged in every step after `step`."""
    if step == losses.resume_step:
        return True
    replayer = _replayer(losses, span)
    segment = span.start - 1 if kind == "activation" else span.stop - 1
    if _giver(losses, kind, segment, step, replayer) is not None:
        return True
    return _parts(losses, kind, segment, step, replayer) is not None


def last_whole_set(promises: Promises, segment_count: int) -> int:
    """The newest step of which these members keep every segment's state; 0: draw again.

    What `--force-view` falls back to.
    """
    segments = range(segment_count)
    steps = {held.step for each in promises.values() for held in each.states}
    return max(
        (step for step in steps if all(_keepers(promises, s, step) for s in segments)), default=0
    )


def _advanced(losses: Losses, live: Mapping[int, DeviceId]) -> list[Replay]:
    """Replays in place of a move: where the states came in advance (`recovery.advance`), whoever
    gets live segments already keeps them and is sent no state."""
    found = []
    for stage in losses.plan.stages:
        moved = [s for s in stage.segments if live.get(s, stage.device) != stage.device]
        for span in _ranges(moved):
            replay = _kept_replay(losses, span, stage.device)
            if replay is not None:
                found.append(replay)
    return found


def _kept_replay(losses: Losses, span: range, device: DeviceId) -> Replay | None:
    """From the newest replicas that the device itself keeps; None: they do not suffice."""
    held = losses.promises.get(device)
    steps = set() if held is None else {each.step for each in held.states}
    for step in sorted(steps, reverse=True):
        if step <= losses.resume_step:
            replay = _replay_from(losses, span, step)
            if replay is not None and all(at.device == device for at in replay.replicas):
                return replay
    return None


def _owners(plan: Plan) -> Iterator[tuple[int, DeviceId]]:
    return ((segment, stage.device) for stage in plan.stages for segment in stage.segments)


def _live(losses: Losses, segment: int, owner: DeviceId) -> DeviceId | None:
    """Who has the segment at the resumed step, or can apply that step's update to it."""
    found = [
        device
        for device, held in sorted(losses.promises.items())
        if held.live is not None
        and segment in held.live.segments
        and _reaches(held.live, losses.resume_step)
    ]
    return _preferred(losses.promises, found, owner)


def _reaches(live: LiveStage | LiveShard, step: int) -> bool:
    return live.step == step or (live.step == step - 1 and live.gradients_complete)


def _preferred(
    promises: Promises, devices: Iterable[DeviceId], receiver: DeviceId
) -> DeviceId | None:
    """The receiver itself, else the first that is linked to it, as far as it has told."""
    told = promises.get(receiver)
    usable = [d for d in devices if told is None or d == receiver or d in told.linked]
    return receiver if receiver in usable else next(iter(usable), None)


def _ranges(segments: Sequence[int]) -> Iterator[range]:
    """Gap-free ranges of ascending segments."""
    first = 0
    for index in range(1, len(segments) + 1):
        if index == len(segments) or segments[index] != segments[index - 1] + 1:
            yield range(segments[first], segments[index - 1] + 1)
            first = index


def _replay(losses: Losses, span: range) -> Replay | None:
    """From the newest replicas whose inputs since are all there; None: there are none."""
    replays = (_replay_from(losses, span, step) for step in _replica_steps(losses))
    return next((replay for replay in replays if replay is not None), None)


def _replica_steps(losses: Losses) -> list[int]:
    """Steps of which somebody keeps a replica, the newest first; 0: the beginning."""
    steps = {held.step for each in losses.promises.values() for held in each.states} | {0}
    return sorted((step for step in steps if step <= losses.resume_step), reverse=True)


def _replayer(losses: Losses, span: range) -> DeviceId:
    """Who runs the span's first segment next; what takes labels stays where a private run's are."""
    plan = losses.plan
    if plan.private and span.stop == plan.stages[-1].segments.stop:
        return plan.home
    return plan.stages[plan.stage_of_segment(span.start)].device


def _replay_from(losses: Losses, span: range, step: int) -> Replay | None:
    replayer = _replayer(losses, span)
    replicas = _replicas(losses.promises, span, step, replayer)
    shares = _shares(losses, span, step)
    if replicas is None or not _recorded(losses, step) or shares is None:
        return None
    ends = _ends(losses, span)
    if step == losses.resume_step:
        return Replay(
            span=_span(span), step=step, replayer=replayer, replicas=replicas,
            activations_from=None, cotangents_from=None, tied_from=(), data_from=None,
        )  # fmt: skip
    before = None if ends.begins else _giver(losses, "activation", span.start - 1, step, replayer)
    after = None if ends.ends else _giver(losses, "cotangent", span.stop - 1, step, replayer)
    shared: dict[BoundaryKind, tuple[LogPart, ...] | None] = {}
    if before is None and not ends.begins:
        shared["activation"] = _parts(losses, "activation", span.start - 1, step, replayer)
    if after is None and not ends.ends:
        shared["cotangent"] = _parts(losses, "cotangent", span.stop - 1, step, replayer)
    ties = _tied(losses, span, step, replayer)
    data = _data_giver(losses, replayer) if ends.begins or ends.ends else None
    parts = [part for parts in shared.values() for part in parts or ()]
    if None in shared.values() or ties is None or (data is None and (ends.begins or ends.ends)):
        return None
    return Replay(
        span=_span(span), step=step, replayer=replayer, replicas=replicas, activations_from=before,
        cotangents_from=after, tied_from=ties, data_from=data, cuts=_cuts(losses.base.plan, span),
        parts=tuple(parts), shares=shares,
    )  # fmt: skip


def _cuts(plan: Plan, span: range) -> tuple[int, ...]:
    """Segments inside the span that ended a stage in the view whose steps are replayed."""
    ends = (stage.segments[-1] for stage in plan.stages)
    return tuple(end for end in ends if end in span[:-1])


@dataclass(frozen=True, slots=True, kw_only=True)
class _Ends:
    """Whether a range begins or ends the model."""

    begins: bool
    ends: bool


def _ends(losses: Losses, span: range) -> _Ends:
    count = losses.plan.stages[-1].segments.stop
    return _Ends(begins=span.start == 0, ends=span.stop == count)


def _span(segments: range) -> SegmentSpan:
    return SegmentSpan(first=segments.start, count=len(segments))


def _recorded(losses: Losses, step: int) -> bool:
    """Whether every step after `step` has its record."""
    if step == losses.resume_step:
        return True
    return bool(losses.records) and losses.records[0].step <= step + 1


def _keepers(promises: Promises, segment: int, step: int) -> list[DeviceId]:
    return [
        device
        for device, held in sorted(promises.items())
        if any(s.step == step and segment in s.span.segments for s in held.states)
    ]


def _replicas(
    promises: Promises, span: range, step: int, replayer: DeviceId
) -> tuple[SpanAt, ...] | None:
    """Who gives each segment's replica; empty at step 0, where states are drawn."""
    if step == 0:
        return ()
    givers: dict[int, DeviceId] = {}
    for segment in span:
        giver = _preferred(promises, _keepers(promises, segment, step), replayer)
        if giver is None:
            return None
        givers[segment] = giver
    return _merged(givers)


def _merged(givers: Mapping[int, DeviceId]) -> tuple[SpanAt, ...]:
    """Consecutive segments of one device as one span."""
    found: list[SpanAt] = []
    for segment, device in sorted(givers.items()):
        last = found[-1] if found else None
        if last is not None and last.device == device and last.span.segments.stop == segment:
            span = SegmentSpan(first=last.span.first, count=last.span.count + 1)
            found[-1] = SpanAt(span=span, device=device)
        else:
            found.append(SpanAt(span=SegmentSpan(first=segment, count=1), device=device))
    return tuple(found)


def _giver(
    losses: Losses, kind: LogKind, segment: int, step: int, replayer: DeviceId
) -> DeviceId | None:
    """Who logged this boundary in every step after `step`."""
    found = [
        device
        for device, held in sorted(losses.promises.items())
        if any(
            (log.kind, log.segment) == (kind, segment)
            and not log.microbatches
            and log.first_step <= step + 1
            and log.last_step >= losses.resume_step
            for log in held.logs
        )
    ]
    return _preferred(losses.promises, found, replayer)


def _parts(
    losses: Losses, kind: BoundaryKind, segment: int, step: int, replayer: DeviceId
) -> tuple[LogPart, ...] | None:
    """Who of several logged which microbatches in every step after `step`; None: some lack."""
    every = range(losses.base.contract.microbatches)
    found: list[LogPart] = []
    for at in range(step + 1, losses.resume_step + 1):
        by_device: dict[DeviceId, list[int]] = {}
        for microbatch in every:
            loggers = _loggers(losses, kind, segment, at, microbatch)
            giver = _preferred(losses.promises, loggers, replayer)
            if giver is None:
                return None
            by_device.setdefault(giver, []).append(microbatch)
        for device, own in sorted(by_device.items()):
            _extend(found, LogPart(
                kind=kind, device=device, first_step=at, last_step=at, microbatches=tuple(own)
            ))  # fmt: skip
    return tuple(found)


def _extend(parts: list[LogPart], part: LogPart) -> None:
    """Add one step's part to what its device gives in the step before, where that is the same."""
    for index, before in enumerate(parts):
        grown = replace(before, last_step=part.last_step)
        if before.last_step + 1 == part.first_step and grown == replace(
            part, first_step=before.first_step
        ):
            parts[index] = grown
            return
    parts.append(part)


def _loggers(
    losses: Losses, kind: BoundaryKind, segment: int, step: int, microbatch: int
) -> list[DeviceId]:
    return [
        device
        for device, held in sorted(losses.promises.items())
        if any(
            (log.kind, log.segment) == (kind, segment)
            and log.first_step <= step <= log.last_step
            and (not log.microbatches or microbatch in log.microbatches)
            for log in held.logs
        )
    ]


def _shares(losses: Losses, span: range, step: int) -> tuple[int, ...] | None:
    """How the steps after `step` are made again with the same bits: by one peer (empty), or by the
    tensor shards of these weights; None: in no way, since several that shared the span added
    gradients up in another order."""
    base = losses.base
    if step == losses.resume_step:
        return ()
    again = _being_replayed(losses)
    if again is not None and again.span.segments == span and step >= again.step:
        return again.shares
    if step < base.exact_from:
        return None
    shared = [s for s in base.plan.stages if s.split != "none" and set(s.segments) & set(span)]
    if not shared:
        return ()
    whole = shared[0].split == "tensor" and shared[0].segments == span
    return shared[0].weights if whole else None


def _being_replayed(losses: Losses) -> Replay | None:
    """The replay of shards by which the view before was to begin, where it has made no step."""
    restoring = losses.base.restoration
    if restoring is None or losses.resume_step != losses.base.resume_step:
        return None
    return next((replay for replay in restoring.replays if replay.shares), None)


def _tied(losses: Losses, span: range, step: int, replayer: DeviceId) -> tuple[TiedAt, ...] | None:
    """Who logged the gradients of copies outside the range whose tensor it shares."""
    found = []
    for segment in _tied_outside(losses, span):
        giver = _giver(losses, "tied", segment, step, replayer)
        if giver is None:
            return None
        found.append(TiedAt(segment=segment, device=giver))
    return tuple(found)


def _tied_outside(losses: Losses, span: range) -> list[int]:
    outside = {
        segment
        for group in losses.tie_segments
        if any(segment in span for segment in group)
        for segment in group
        if segment not in span
    }
    return sorted(outside)


def _untold(losses: Losses, span: range, step: int) -> list[int]:
    """Segments outside with tied copies whose gradients nobody has logged."""
    replayer = _replayer(losses, span)
    return [
        segment
        for segment in _tied_outside(losses, span)
        if step < losses.resume_step and _giver(losses, "tied", segment, step, replayer) is None
    ]


def _data_giver(losses: Losses, replayer: DeviceId) -> DeviceId | None:
    found = [device for device, held in sorted(losses.promises.items()) if held.has_data]
    home_first = sorted(found, key=lambda device: device != losses.plan.home)
    return _preferred(losses.promises, home_first, replayer)


def _unrecoverable(losses: Losses, spans: Sequence[range]) -> Unrecoverable:
    """Name devices whose return suffices: with the stages, or with the replicas they keep."""
    base, promises = losses.base.plan, losses.promises
    needed: set[DeviceId] = set()
    for segment in (segment for span in spans for segment in span):
        stage = base.stage_of_segment(segment)
        owners = base.stages[stage].devices
        keeper = base.replicas[stage] if base.replicas else None
        gone = next((owner for owner in owners if owner not in promises), None)
        needed |= {gone or keeper or owners[0]}
    devices = tuple(sorted(needed - set(promises) or set(base.members) - set(promises)))
    where = ", ".join(f"{span.start} to {span[-1]}" for span in spans)
    back = last_whole_set(promises, losses.plan.stages[-1].segments.stop)
    return_ = f"{', '.join(map(short, devices))} back, or " if devices else ""
    return Unrecoverable(
        devices_needed=devices,
        sentence=f"the state of segments {where} is lost: it takes {return_}"
        f"--force-view to go back to step {back}",
    )

"""The tensors a peer sent, kept so that a neighbour's lost stage can be replayed.

One log per run: what was sent in a step does not depend on the view it was sent in. Tensors are
kept as they were encoded for the wire, so a replay reads the bits that the lost stage read. The
bound never drops anything; a log that has reached it says so, and steps become provisional.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass

from p2ptrain.recovery.inventory import HeldLog, LogKind


@dataclass(frozen=True, slots=True, kw_only=True)
class LogKey:
    """Names one tensor of a step, as `HeldLog` names its boundary."""

    kind: LogKind
    step: int
    microbatch: int
    """0 for tied gradients."""
    segment: int
    index: int
    """Position among the tensors of that boundary or tie."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepLogStatistics:
    """What a log holds now."""

    held_bytes: int
    bytes_max: int
    tensor_count: int
    first_step: int | None
    """None: no whole step is held."""
    last_step: int | None


_Place = tuple[LogKind, int]
_Tensors = dict[tuple[int, int], bytes]


class StepLog:
    """Encoded tensors by (kind, segment) and step; one thread at a time.

    Args:
        bytes_max: Where `full` begins; what is put is kept all the same.
        microbatches: Of a step; a replica sends, and logs, only some of them.
    """

    def __init__(self, *, bytes_max: int, microbatches: int = 1) -> None:
        self._bytes_max, self._every = bytes_max, set(range(microbatches))
        self._whole: dict[_Place, dict[int, _Tensors]] = {}
        self._open: dict[int, dict[_Place, _Tensors]] = {}
        self._bytes = 0

    @property
    def full(self) -> bool:
        """Whether the bound is reached: steps are provisional until something is released."""
        return self._bytes >= self._bytes_max

    def put(self, key: LogKey, tensor: bytes | bytearray | memoryview) -> None:
        """Copy one encoded tensor into a step that is not finished; a second copy replaces it."""
        places = self._open.setdefault(key.step, {})
        tensors = places.setdefault((key.kind, key.segment), {})
        place = (key.microbatch, key.index)
        self._bytes += len(memoryview(tensor).cast("B")) - len(tensors.get(place, b""))
        tensors[place] = bytes(tensor)

    def finish(self, step: int) -> None:
        """Everything this peer sends in the step (or a replay of it) has been put."""
        for place, tensors in self._open.pop(step, {}).items():
            steps = self._whole.setdefault(place, {})
            self._bytes -= _size(steps.get(step, {}))
            steps[step] = tensors

    def read(
        self, kind: LogKind, segment: int, step: int, microbatches: Collection[int] = ()
    ) -> tuple[bytes, ...] | None:
        """All tensors of a whole step at one place by microbatch and index, or those of some
        microbatches; None: not held."""
        tensors = self._whole.get((kind, segment), {}).get(step)
        if tensors is None:
            return None
        wanted = set(microbatches)
        return tuple(tensors[p] for p in sorted(tensors) if not wanted or p[0] in wanted)

    def release(self, up_to_step: int) -> None:
        """Forget steps that a whole replica set covers."""
        self._drop(step for step in self._steps() if step <= up_to_step)

    def truncate(self, after_step: int) -> None:
        """Forget steps that a decided view leaves out; they are made again."""
        self._drop(step for step in self._steps() if step > after_step)

    def inventory(self) -> tuple[HeldLog, ...]:
        """What is held of whole steps, each gap-free stretch on its own."""
        found = []
        for kind, segment in sorted(self._whole):
            by_share: dict[tuple[int, ...], list[int]] = {}
            for step, tensors in self._whole[kind, segment].items():
                by_share.setdefault(self._share(kind, tensors), []).append(step)
            for share, steps in sorted(by_share.items()):
                found += [
                    HeldLog(
                        kind=kind, segment=segment, first_step=first, last_step=last,
                        microbatches=share,
                    )
                    for first, last in _stretches(steps)
                ]  # fmt: skip
        return tuple(found)

    def _share(self, kind: LogKind, tensors: _Tensors) -> tuple[int, ...]:
        """Whose microbatches' tensors these are; empty: all of a step's."""
        held = {microbatch for microbatch, _ in tensors}
        return () if kind == "tied" or held >= self._every else tuple(sorted(held))

    def statistics(self) -> StepLogStatistics:
        """Sizes and steps."""
        steps = {step for held in self._whole.values() for step in held}
        areas = [tensors for held in self._whole.values() for tensors in held.values()]
        areas += [tensors for places in self._open.values() for tensors in places.values()]
        return StepLogStatistics(
            held_bytes=self._bytes,
            bytes_max=self._bytes_max,
            tensor_count=sum(map(len, areas)),
            first_step=min(steps, default=None),
            last_step=max(steps, default=None),
        )

    def _steps(self) -> set[int]:
        return {step for held in self._whole.values() for step in held} | set(self._open)

    def _drop(self, steps: Iterable[int]) -> None:
        for step in sorted(steps):
            for tensors in self._open.pop(step, {}).values():
                self._bytes -= _size(tensors)
            for held in self._whole.values():
                self._bytes -= _size(held.pop(step, {}))
        self._whole = {place: held for place, held in self._whole.items() if held}


def _size(tensors: _Tensors) -> int:
    return sum(map(len, tensors.values()))


def _stretches(steps: Iterable[int]) -> Iterator[tuple[int, int]]:
    """Consecutive steps as (first, last), in order."""
    first = last = None
    for step in sorted(steps):
        if first is None or last is None or step != last + 1:
            if first is not None and last is not None:
                yield first, last
            first = step
        last = step
    if first is not None and last is not None:
        yield first, last

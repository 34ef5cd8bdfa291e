"""Every kind of segment in both modes of sharding, as the manifest tells it."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Final

from p2ptrain.bundle import sharding as words
from p2ptrain.graph.ir import Type
from p2ptrain.graph.kinds import Files, Kind
from p2ptrain.graph.sharding.partition import Ask, NotSharded, Partition, Slice, partition
from p2ptrain.graph.sharding.parts import Cut, Meeting, Side, cut
from p2ptrain.graph.source import LABELS, LOSS_WEIGHT

SEQUENCE: Final = "sequence"


def describe_sharding(
    kinds: Iterable[Kind], sequences: Collection[str], files: Files
) -> dict[str, words.Sharding]:
    """Both modes for all kinds; the parts' graphs go into `files`.

    Args:
        sequences: The sequence symbols; without exactly one, positions cannot be
            divided.
    """
    kinds = list(kinds)
    symbol = next(iter(sequences)) if len(sequences) == 1 else None
    found = {"tensor": _mode(kinds, None)}
    if symbol is None:
        reason = f"the model has {len(sequences)} sequence axes instead of one"
        found[SEQUENCE] = _Mode(cuts={}, whole={kind.name: reason for kind in kinds})
    else:
        found[SEQUENCE] = _mode(kinds, symbol)
        _keep_chain(kinds, found[SEQUENCE])
    return {
        mode: words.Sharding(
            kinds={
                kind.name: _described(kind, mode, *each.cuts[kind.name], symbol, files)
                for kind in kinds
                if kind.name in each.cuts
            },
            whole=each.whole,
        )
        for mode, each in found.items()
    }


@dataclass(frozen=True, slots=True, kw_only=True)
class _Mode:
    """What came out for each kind in one mode."""

    cuts: dict[str, tuple[Partition, Cut]]
    whole: dict[str, str]


def _mode(kinds: Iterable[Kind], symbol: str | None) -> _Mode:
    found = _Mode(cuts={}, whole={})
    for kind in kinds:
        try:
            found.cuts[kind.name] = _cut(kind, symbol)
        except NotSharded as reason:
            found.whole[kind.name] = str(reason)
    return found


def _cut(kind: Kind, symbol: str | None) -> tuple[Partition, Cut]:
    local = kind.local
    if local.running:
        raise NotSharded("it has running statistics, which are of whole microbatches")
    ask = Ask(
        pair=kind.forms["portable"],
        ports=local.inputs,
        fed=frozenset(local.inputs if local.first else (LABELS, LOSS_WEIGHT)),
        outputs=local.outputs,
        parameters=tuple(local.parameters),
        masks=tuple(local.masks),
        sequence=symbol,
    )
    found = partition(ask)
    return found, cut(found, outputs=list(local.outputs))


def _keep_chain(kinds: Iterable[Kind], found: _Mode) -> None:
    """Divide positions everywhere or nowhere: a segment that needs all would have to be given
    them, and what is refused here is not worth that."""
    ports = {kind.name: {**kind.local.inputs, **kind.local.outputs} for kind in kinds}
    broken = next((name for name in found.whole if any(ports[name].values())), None)
    if broken is not None:
        reason = f"kind {broken:.80} needs all positions"
        found.whole.update(dict.fromkeys(found.cuts, reason))
        found.cuts.clear()


def _described(
    kind: Kind, mode: str, found: Partition, cut_: Cut, symbol: str | None, files: Files
) -> words.ShardedKind:
    def parts(side: Side, what: str) -> tuple[words.ShardPart, ...]:
        return tuple(
            words.ShardPart(
                graph=files.put(graph, f"{kind.name}.{mode}.{what}{index}", free=kind.local.frozen),
                outputs=tuple(graph.outputs),
                collectives=tuple(map(_collective, meetings)),
            )
            for index, (graph, meetings) in enumerate(side)
        )

    return words.ShardedKind(
        axes={name: str(count or symbol) for name, count in found.units.items()},
        slices=_slices(found),
        summed=found.summed,
        values=_values(cut_),
        stash=cut_.stash,
        forward=parts(cut_.forward, "forward"),
        backward=parts(cut_.backward, "backward"),
    )


def _slices(found: Partition) -> dict[str, words.ShardSlice]:
    return {
        name: _slice(each)
        for name, each in sorted(found.slices.items())
        if not name.startswith("gradient.")
    }


def _slice(each: Slice) -> words.ShardSlice:
    return words.ShardSlice(units_of=each.units_of, axis=each.axis, blocks=each.blocks)


def _collective(meeting: Meeting) -> words.Collective:
    return words.Collective(
        kind=meeting.kind,
        sent=meeting.sent,
        got=meeting.got,
        axis=meeting.axis,
        shape=_shape(meeting.whole),
        dtype=meeting.whole.dtype_name,
    )


def _values(cut_: Cut) -> tuple[words.ShardValue, ...]:
    return tuple(
        words.ShardValue(name=name, shape=_shape(known), dtype=known.dtype_name)
        for name, known in cut_.values.items()
    )


def _shape(known: Type) -> tuple[str, ...]:
    return tuple(map(str, known.axes))

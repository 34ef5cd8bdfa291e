"""Headers of the tensors that travel in an item of a view."""

from __future__ import annotations

from p2ptrain.training.messages import Stamp
from p2ptrain.training.program import Item
from p2ptrain.wire.frames import TensorHeader


def header_of(stamp: Stamp, item: Item, kind: str, microbatch: int, segment: int) -> TensorHeader:
    """Of the first tensor of its kind at one place in an item."""
    return TensorHeader(
        run=stamp.run,
        lineage=stamp.lineage,
        view=stamp.view,
        plan=stamp.plan,
        kind=kind,
        phase=item.kind,
        step=item.step,
        microbatch=microbatch,
        segment=segment,
        index=0,
    )

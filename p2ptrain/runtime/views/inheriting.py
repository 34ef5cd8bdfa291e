"""Take over what a member that leaves had logged, so that a later loss finds it in one place.

It hands over its stage's state; what it had sent would go with it, and until the next replica set
no log would tell a lost neighbour's stage what had come in (DESIGN section 7, rules 4 and 5).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import trio

from p2ptrain.agreement.view import View
from p2ptrain.ids import DeviceId
from p2ptrain.recovery.restoration import SpanAt
from p2ptrain.runtime.exchange.asking import Asker, NotThere
from p2ptrain.runtime.keeping.run_state import RunState
from p2ptrain.training.replay_inputs import StepPlace, sent_places


async def inherit_logs(view: View, state: RunState, asker: Asker) -> None:
    """Fetch the logs of those that leave and whose segments this member takes over.

    Every step since the last whole replica set is asked for; what the leaver never logged stays
    away. Cancelled: what has come is kept.

    Raises:
        PeerLost: the leaver is gone; the view must change.
        RemoteProtocolError: what came is no log of that step.
    """
    for left in _left_to_us(view, state):
        for place in sent_places(state.manifest, left.span.segments):
            for record in view.records:
                await _inherit(state, asker, left.device, place, record.step)


async def _inherit(
    state: RunState, asker: Asker, leaver: DeviceId, place: StepPlace, step: int
) -> None:
    if await trio.to_thread.run_sync(state.read_log, place, step) is not None:
        return
    with contextlib.suppress(NotThere):
        content = await asker.fetch(leaver, place.kind, place.segment, step)
        await trio.to_thread.run_sync(state.inherit_log, place, step, content)


def _left_to_us(view: View, state: RunState) -> Iterator[SpanAt]:
    """Segments with a source that is no member any more, of which some are ours now."""
    ours = view.plan.segments_of(state.services.device)
    if not ours or view.restoration is None:
        return
    for at in view.restoration.sources:
        if at.device not in view.plan.members and set(at.span.segments) & set(ours):
            yield at

"""What members of a run write down and send each other, apart from the machine that decides."""

from __future__ import annotations

import pytest

from p2ptrain import limits
from p2ptrain.agreement.ballot import Ballot
from p2ptrain.agreement.run_journal import decode_run_record
from p2ptrain.agreement.run_memory import Memory
from p2ptrain.agreement.run_messages import ViewPromise
from p2ptrain.errors import CheckpointError
from p2ptrain.wire.codec import decode, encode
from tests.sim.plans import RUN, device
from tests.sim.run_views import CONTRACT, NOTHING, first_view, make_step

A = device(0)


def test_damaged_journal_is_refused() -> None:
    with pytest.raises(CheckpointError, match="version 9"):
        decode_run_record(b'{"version": 9, "kind": "view", "record": {}}')
    with pytest.raises(CheckpointError, match="damaged"):
        decode_run_record(b'{"version": 1, "kind": "view", "record"')


def test_promise_of_a_long_history_fits_in_a_message() -> None:
    records = tuple(make_step(step) for step in range(1, limits.STEP_RECORDS_MAX + 1))
    place = {"run": RUN, "lineage": 0, "view": 1, "plan": first_view(A).plan.digest}
    promise = ViewPromise(
        **place, ballot=Ballot(round=1, device=A), accepted=None, records=records,  # type: ignore[arg-type]
        inventory=NOTHING, memory=Memory(journal=1 << 61, start=1, count=9), votes=True,
    )  # fmt: skip
    room = limits.CONTROL_BODY_BYTES_MAX - limits.VIEW_BYTES_MAX
    assert len(encode(promise)) < room - limits.HOLDINGS_MAX * 80
    assert decode(encode(promise)) == promise
    assert CONTRACT.digest == first_view(A).plan.contract

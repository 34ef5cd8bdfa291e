"""Runs on the disk, as a home peer leaves them."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

from p2ptrain.ids import Digest, Lineage, RunId, ViewNumber
from p2ptrain.runtime.home.trained_weights import TrainedRun
from p2ptrain.store.bundles import Bundle
from p2ptrain.store.runs import CheckpointRecord, RunDirectory, SavedSegment
from p2ptrain.store.weights import open_weights
from p2ptrain.training.contract import Contract
from p2ptrain.training.segment_state import SegmentState, StateHeader

RUN, LINEAGE, VIEW, PLAN = RunId("r" * 26), Lineage(0), ViewNumber(1), Digest("3" * 64)


def store_run(
    path: Path, bundle: Bundle, contract: Contract, states: Sequence[SegmentState]
) -> TrainedRun:
    """Write the segments' states as a whole checkpoint of a run in `path`."""
    directory, step = RunDirectory(path / RUN), states[0].step
    saved = []
    for index, state in enumerate(states):
        header = StateHeader(
            run=RUN, lineage=LINEAGE, view=VIEW, plan=PLAN, step=step, segment=index,
            bundle=bundle.digest,
        )  # fmt: skip
        content = state.to_bytes(header)
        directory.write_segment(step, index, content)
        blob = Digest(hashlib.sha256(content).hexdigest())
        saved.append(
            SavedSegment(segment=index, blob=blob, blob_bytes=len(content), state=state.digest())
        )
    checkpoint = CheckpointRecord(
        run=RUN, lineage=LINEAGE, view=VIEW, plan=PLAN, step=step, bundle=bundle.digest,
        contract=contract.digest, segments=tuple(saved),
    )  # fmt: skip
    directory.commit_checkpoint(checkpoint)
    return TrainedRun(
        bundle=bundle, weights=open_weights(bundle), contract=contract, directory=directory,
        checkpoint=checkpoint,
    )  # fmt: skip

"""A device's segment times: from the disk where they are known, measured where they are not."""

from __future__ import annotations

import time

from p2ptrain.engine.contract import Engine
from p2ptrain.planner.batch_costs import cost_for, second_size
from p2ptrain.planner.profile import KindCost
from p2ptrain.runtime.profiling import profile_kinds
from p2ptrain.runtime.stopwatch import Stopwatch
from p2ptrain.store.bundles import Bundle
from p2ptrain.store.profiles import ProfileStore, profile_key
from p2ptrain.training.messages import Offer

PROFILE_REPEATS = 5


def known_or_measured(
    store: ProfileStore, engine: Engine, bundle: Bundle, offer: Offer, stopwatch: Stopwatch
) -> dict[str, KindCost]:
    """Each distinct segment's cost for the offer's microbatch size; blocking.

    What is not known yet is measured for two sizes and kept, so that any other size near them
    follows. Times of two sizes in one file may be of different days, but not older than it.
    """
    manifest, now_s = bundle.manifest, time.time()
    keys = {
        kind: profile_key(
            manifest, kind, form=offer.form, build=engine.build, threads=offer.threads
        )
        for kind in manifest.kinds
    }
    known = {kind: store.read(key, now_s=now_s) for kind, key in keys.items()}
    batch, in_parts = offer.microbatch_size, offer.in_parts
    found = {kind: cost_for(known[kind], batch, in_parts=in_parts) for kind in keys}
    lacking = {kind for kind, cost in found.items() if cost is None}
    if lacking:
        for size in (second_size(batch), batch):
            measured = profile_kinds(
                engine,
                bundle,
                offer.form,
                size,
                PROFILE_REPEATS,
                in_parts,
                kinds=lacking,
                stopwatch=stopwatch,
            )
            for kind, cost in measured.items():
                known[kind].pop(size, None)
                known[kind][size] = cost
        for kind in sorted(lacking):
            store.write(keys[kind], known[kind], now_s=now_s)
    return {kind: cost or known[kind][batch] for kind, cost in found.items()}

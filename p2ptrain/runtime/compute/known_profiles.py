"""A device's segment times: from the disk where they are known, measured where they are not."""

from __future__ import annotations

import time
from dataclasses import dataclass

from p2ptrain import limits
from p2ptrain.engine.contract import Engine
from p2ptrain.errors import BundleError
from p2ptrain.planner.batch_costs import cost_for, second_size
from p2ptrain.planner.profile import KindCost, SizedCosts
from p2ptrain.runtime.compute.profiling import first_optimizer, profile_kinds
from p2ptrain.runtime.compute.stopwatch import Stopwatch
from p2ptrain.store.bundles import Bundle
from p2ptrain.store.profiles import ProfileStore, profile_key
from p2ptrain.training.messages import Offer

PROFILE_REPEATS = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class KnownCosts:
    """Each distinct segment's cost, for the offer's microbatch size and for others."""

    kinds: dict[str, KindCost]
    other_sizes: tuple[SizedCosts, ...]
    """Those that follow from what was measured."""


def known_or_measured(
    store: ProfileStore, engine: Engine, bundle: Bundle, offer: Offer, stopwatch: Stopwatch
) -> KnownCosts:
    """Each distinct segment's cost for the offer's microbatch sizes; blocking.

    What is not known yet is measured for two sizes and kept, so that any other size near them
    follows. Times of two sizes in one file may be of different days, but not older than it.

    Raises:
        BundleError: the model has no such optimizer.
    """
    manifest, now_s = bundle.manifest, time.time()
    optimizer = offer.optimizer or first_optimizer(manifest)
    if optimizer not in manifest.updates:
        raise BundleError(f"the model has no optimizer {optimizer!r:.40}")
    keys = {
        kind: profile_key(
            manifest,
            kind,
            form=offer.form,
            optimizer=optimizer,
            build=engine.build,
            threads=offer.threads,
            quota_cores=stopwatch.cores,
        )
        for kind in manifest.kinds
    }
    known = {kind: store.read(key, now_s=now_s) for kind, key in keys.items()}
    batch, in_parts = offer.microbatch_size, offer.in_parts
    found = {kind: cost_for(known[kind], batch, in_parts=in_parts) for kind in keys}
    lacking = {kind for kind, cost in found.items() if cost is None}
    if lacking:
        parts_until_ns = stopwatch.clock_ns() + limits.PROFILE_PARTS_NS
        for size in (second_size(batch), batch):
            measured = profile_kinds(
                engine,
                bundle,
                offer.form,
                size,
                PROFILE_REPEATS,
                in_parts,
                optimizer=optimizer,
                kinds=lacking,
                stopwatch=stopwatch,
                parts_until_ns=parts_until_ns,
            )
            for kind, cost in measured.items():
                known[kind].pop(size, None)
                known[kind][size] = cost
        for kind in sorted(lacking):
            store.write(keys[kind], known[kind], now_s=now_s)
    return KnownCosts(
        kinds={kind: cost or known[kind][batch] for kind, cost in found.items()},
        other_sizes=_other_sizes(known, offer),
    )


def _other_sizes(known: dict[str, dict[int, KindCost]], offer: Offer) -> tuple[SizedCosts, ...]:
    found = []
    for size in offer.other_sizes[: limits.MICROBATCH_SIZES_MAX]:
        costs = {
            kind: cost_for(sizes, size, in_parts=offer.in_parts) for kind, sizes in known.items()
        }
        whole = {kind: cost for kind, cost in costs.items() if cost is not None}
        if size >= 1 and len(whole) == len(costs):
            found.append(SizedCosts(microbatch_size=size, kinds=whole))
    return tuple(found)

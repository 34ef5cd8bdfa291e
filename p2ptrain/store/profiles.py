"""Measured segment times on disk, so that a device measures nothing twice.

    cache/profiles/<key>.json    one distinct segment under one runtime build, optimizer, thread
                                 count, quota

The key names everything that the times follow from. A file that is damaged, foreign or old is as
good as none: it is measured again and replaced.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from p2ptrain.bundle.manifest import Manifest
from p2ptrain.planner.profile import KindCost
from p2ptrain.store.atomic import write_atomic
from p2ptrain.training.contract import RuntimeBuild

PROFILE_VERSION: Final = 3
"""2: below a CPU quota a time is what many calls in a row take; 3: with the end of a step."""
PROFILE_BYTES_MAX: Final = 8192
PROFILES_MAX: Final = 2048
"""Files; beyond them the oldest go."""
SIZES_MAX: Final = 8
"""Microbatch sizes of one segment; beyond them the first ones go."""
KEPT_S: Final = 14 * 86_400.0
"""A device's cooling, power limits and system change; runs under way notice it by themselves."""
_TIME_NS_MAX: Final = 10**15
_SAMPLES_MAX: Final = 1 << 20


def profile_key(
    manifest: Manifest,
    kind: str,
    *,
    form: str,
    optimizer: str,
    build: RuntimeBuild,
    threads: int,
    quota_cores: float | None,
) -> str:
    """Names all that the time of a segment follows from.

    That is its graphs and axis sizes, the optimizer's graph, the build, threads, and the quota of
    processor seconds per second (None: there is none), to a hundredth.
    """
    sizes = {name: symbol.size for name, symbol in manifest.symbols.items()}
    document = [
        PROFILE_VERSION,
        list(manifest.kinds[kind].forms[form].graphs),
        sizes,
        manifest.updates[optimizer].graph,
        dataclasses.asdict(build),
        threads,
        None if quota_cores is None else round(quota_cores * 100),
    ]
    return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()


class ProfileStore:
    """The files below one folder; every call blocks."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def read(self, key: str, *, now_s: float) -> dict[int, KindCost]:
        """Costs by microbatch size; empty when nothing usable is known.

        Args:
            key: As `profile_key` gives it.
            now_s: Seconds since 1970; what is older than KEPT_S, or of the future, is not used.
        """
        try:
            with (self._folder / f"{key}.json").open("rb") as file:
                content = file.read(PROFILE_BYTES_MAX + 1)
            return _parse(content, now_s) if len(content) <= PROFILE_BYTES_MAX else {}
        except (OSError, ValueError, TypeError, KeyError, RecursionError):
            return {}

    def write(self, key: str, sizes: Mapping[int, KindCost], *, now_s: float) -> None:
        """Keep the last SIZES_MAX of these costs; a disk that refuses costs a measurement later."""
        kept = list(sizes.items())[-SIZES_MAX:]
        document = {
            "version": PROFILE_VERSION,
            "measured_at_s": now_s,
            "sizes": {str(size): dataclasses.asdict(cost) for size, cost in kept},
        }
        with contextlib.suppress(OSError):
            self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            write_atomic(self._folder / f"{key}.json", [json.dumps(document).encode()])
            self._prune(besides=f"{key}.json")

    def _prune(self, *, besides: str) -> None:
        files = [path for path in self._folder.glob("*.json") if path.name != besides]
        too_many = len(files) + 1 - PROFILES_MAX
        if too_many > 0:
            files.sort(key=lambda path: path.stat().st_mtime)
            for path in files[:too_many]:
                path.unlink(missing_ok=True)


def _parse(content: bytes, now_s: float) -> dict[int, KindCost]:
    document = json.loads(content)
    if not isinstance(document["sizes"], dict):
        raise ValueError("sizes are a map")
    if document["version"] != PROFILE_VERSION or len(document["sizes"]) > SIZES_MAX:
        return {}
    if not 0.0 <= now_s - document["measured_at_s"] <= KEPT_S:
        return {}
    sizes = {int(size): _cost(times) for size, times in document["sizes"].items()}
    return sizes if all(1 <= size <= _SAMPLES_MAX for size in sizes) else {}


def _cost(times: dict[str, int | None]) -> KindCost:
    return KindCost(
        forward_ns=_time(times["forward_ns"]),
        backward_ns=_time(times["backward_ns"]),
        cotangents_ns=None if times["cotangents_ns"] is None else _time(times["cotangents_ns"]),
        gradients_ns=_time(times["gradients_ns"]),
        norm_ns=_time(times["norm_ns"]),
        update_ns=_time(times["update_ns"]),
    )


def _time(value: int | None) -> int:
    if type(value) is not int or not 0 <= value <= _TIME_NS_MAX:
        raise ValueError("this is no time")
    return value

"""What the study runs: models, groups of peers, links, and kinds of parallelism; pure."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from p2ptrain.planner.kinds import KINDS, RUNTIME_KINDS, Kind
from p2ptrain.units import MIB
from tools.bench.workload import ModelShape
from tools.throttle.cgroups import Limits
from tools.throttle.group import Cable, Network, Place
from tools.wifi_emulator.medium import Air

MICROBATCHES: Final = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """A Transformer, and the cap under which its peers live."""

    name: str
    words: str
    memory_bytes: int
    """What a peer may use for runs (`join --memory`)."""
    cap_bytes: int
    """Of its control group: that, an idle peer, and what the kernel counts beside."""
    microbatch_size: int
    steps: int
    cores: float = 0.3
    """Of every peer, so that four need 1.2; with more peers a group has more processors."""
    shape: ModelShape | None = None
    """To be exported; None: a bundle that is shipped under this name."""

    @property
    def samples_per_step(self) -> int:
        return MICROBATCHES * self.microbatch_size


@dataclass(frozen=True, slots=True, kw_only=True)
class Link:
    """What peers are connected by."""

    name: str
    words: str
    network: Network


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One run of the study."""

    model: Model
    kind: Kind
    peers: int
    link: Link

    @property
    def key(self) -> str:
        """Names it in the file of results."""
        return f"{self.model.name}/{self.kind}/{self.peers}/{self.link.name}"


MODELS: Final = (
    Model(
        name="gpt-nano",
        words="A byte-level GPT of 1.9 million parameters, which fits one peer",
        memory_bytes=320 * MIB,
        cap_bytes=512 * MIB,
        microbatch_size=4,
        steps=7,
    ),
    Model(
        name="gpt-wide",
        words="A GPT of 6.9 million parameters, eight blocks of width 256, too large for one peer",
        memory_bytes=240 * MIB,
        cap_bytes=400 * MIB,
        microbatch_size=2,
        steps=6,
        shape=ModelShape(layers=8, width=256, heads=8, vocabulary=1024, context=128),
    ),
)
SHORT: Final = (dataclasses.replace(MODELS[0], microbatch_size=1, steps=4, cores=0.8),)
"""For a quick look whether everything still works."""
LINKS: Final = (
    Link(name="1-gbit", words="cables of 1 Gbit/s", network=Cable(rate_mbit=1000)),
    Link(name="100-mbit", words="cables of 100 Mbit/s", network=Cable(rate_mbit=100)),
    Link(
        name="wifi",
        words="one emulated Wi-Fi of 100 Mbit/s for all, 3 ms, 1 % of frames lost",
        network=Air(rate_mbit=100, delay_ms=3, loss_percent=1),
    ),
)
PEERS: Final = (2, 3, 4)


def cells(models: Sequence[Model] = MODELS) -> tuple[Cell, ...]:
    """The whole study, cells of one group of peers together; one device has neither links nor
    company, and stands before each model's others."""
    found: list[Cell] = []
    for model in models:
        found.append(Cell(model=model, kind="one device", peers=1, link=LINKS[0]))
        for link in LINKS:
            for peers in PEERS:
                found += [
                    Cell(model=model, kind=kind, peers=peers, link=link)
                    for kind in KINDS
                    if kind != "one device" and not (kind == "hybrid" and peers < 3)
                ]
    return tuple(found)


def place(model: Model) -> Place:
    """Where each peer of a model lives."""
    return Place(
        limits=Limits(cores=model.cores, memory_bytes=model.cap_bytes), memory=model.memory_bytes
    )


def runs(kind: Kind) -> bool:
    """Whether this version can run such plans."""
    return kind in RUNTIME_KINDS


def plan_text(kind: Kind, names: Sequence[str], segments: int) -> str | None:
    """The file of the plan that a cell asks for; None: the planner chooses as many stages.

    Data, tensor and sequence parallelism have one stage on everybody. A hybrid has two stages,
    the first on more peers than the second where they are odd, each with its part of the model.
    """
    if kind in ("one device", "pipeline"):
        return None
    if kind != "hybrid":
        split = "replicas" if kind == "data" else kind
        return stage_text(names, segments, split)
    first = (len(names) + 1) // 2
    ahead = round(segments * first / len(names))
    stages = ((names[:first], ahead), (names[first:], segments - ahead))
    return "\n".join(stage_text(own, count, "replicas") for own, count in stages)


def stage_text(names: Sequence[str], segments: int, split: str) -> str:
    """One stage of a plan file."""
    devices = ", ".join(f'"{name}"' for name in names)
    lines = ["[[stage]]", f"devices = [{devices}]", f"segments = {segments}"]
    return "\n".join([*lines, *([f'split = "{split}"'] if len(names) > 1 else []), ""])

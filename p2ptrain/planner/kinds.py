"""Kinds of plan, which of them this version runs, and which a run may have."""

from __future__ import annotations

from typing import Final, Literal

from p2ptrain.errors import PlanInfeasible

Kind = Literal["one device", "data", "pipeline", "hybrid", "tensor", "sequence"]
KINDS: Final[tuple[Kind, ...]] = (
    "one device", "pipeline", "data", "hybrid", "tensor", "sequence",
)  # fmt: skip
RUNTIME_KINDS: Final[tuple[Kind, ...]] = KINDS
"""What this version can run; others would be what-if."""
BY_NAME_ONLY: Final[dict[Kind, str]] = {
    "tensor": "such a run takes nobody in",
    "sequence": "such a run takes nobody in",
}
"""Kinds that a run has only where somebody asks for them, and why."""
EXACT_KINDS: Final[tuple[Kind, ...]] = ("one device", "pipeline")
"""Those whose runs have the bits of one peer, wherever their stages are."""


def kinds_at_start(asked: str) -> tuple[Kind, ...]:
    """Kinds of a run's first plan: exactly what is asked for, where that is one kind.

    Args:
        asked: One of `training.contract.PARALLELISMS`.
    """
    if asked == "pipeline":
        return EXACT_KINDS
    if asked == "auto":
        return tuple(kind for kind in RUNTIME_KINDS if kind not in BY_NAME_ONLY)
    return tuple(kind for kind in KINDS if kind == asked)


def kinds_later(asked: str) -> tuple[Kind, ...]:
    """Kinds of its later plans: after a loss fewer devices may have to do."""
    if asked in ("pipeline", "auto"):
        return kinds_at_start(asked)
    smaller: dict[str, tuple[Kind, ...]] = {"hybrid": ("pipeline", "data")}
    wanted = {"one device", *kinds_at_start(asked), *smaller.get(asked, ())}
    return tuple(kind for kind in KINDS if kind in wanted)


def kinds_compared(asked: str) -> tuple[Kind, ...]:
    """Kinds that this version runs and that nobody has asked for: worth a word where faster."""
    own = kinds_at_start(asked)
    open_choice = asked in ("pipeline", "auto")
    return tuple(kind for kind in RUNTIME_KINDS if open_choice and kind not in own)


def refuse_what_if(kind: Kind) -> None:
    """Let pass what this version runs.

    Raises:
        PlanInfeasible: it only prices such plans.
    """
    if kind not in RUNTIME_KINDS:
        raise PlanInfeasible(
            f"this version does not run plans of the kind {kind} yet",
            hint=f"it runs: {', '.join(RUNTIME_KINDS)}; p2ptrain plan prices all kinds",
        )

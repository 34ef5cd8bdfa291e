"""Errors that are not ours, where they would otherwise end the peer instead of a run."""

from __future__ import annotations

from p2ptrain.errors import EngineError, P2PTrainError, first_error, unwrap

SURVIVABLE = (
    P2PTrainError, OSError, MemoryError, ValueError, TypeError, LookupError, ArithmeticError,
)  # fmt: skip
"""What a run may die of; anything else (InvariantBroken above all) stops the peer."""


def as_ours(error: BaseException) -> P2PTrainError:
    """The error to show for what a run died of; one of ours explains more than any other."""
    if isinstance(error, BaseExceptionGroup):
        ours = error.subgroup(P2PTrainError)
        if ours is not None:
            return first_error(ours)
    cause = unwrap(error)
    if isinstance(cause, P2PTrainError):
        return cause
    if isinstance(cause, MemoryError):
        return EngineError(
            f"not enough memory{f': {cause}' if str(cause) else ''}",
            hint="use smaller microbatches, or give the run less with --memory",
        )
    return P2PTrainError(f"{type(cause).__name__}: {cause}")

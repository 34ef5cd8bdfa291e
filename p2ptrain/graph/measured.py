"""Rows of the exporter's check, and how far a gradient may be off."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

import numpy as np

from p2ptrain.errors import GraphError
from p2ptrain.graph.runner import Arrays

LOSS_ERROR_MAX: Final = 1e-6
GRADIENT_ERROR_MAX: Final = 1e-5
EXACT_ERROR_MAX: Final = 1e-7
"""Of graphs in float64: what is left are constants such as sqrt(1/2), which they hold in float32.
MobileNetV2 has 2e-13."""
TORCH_ERRORS_MAX: Final = 4.0
"""How often torch's own float32 error ours may be, where it is over the usual limit."""
TRULY_ZERO: Final = 1e-12


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """One row of the check's table."""

    name: str
    error: float
    limit: float
    worst: str = ""
    """Where the largest error is."""
    note: str = ""
    """What the limit follows from, unless it is the usual one."""

    @property
    def passed(self) -> bool:
        return self.error <= self.limit


def refuse_failed(rows: Iterable[Measured]) -> None:
    """Nothing may be written when a row is over its limit.

    Raises:
        GraphError: names every such row.
    """
    failed = [
        f"{row.name}: error {row.error:.2e}, over {row.limit:.0e}"
        + "".join(f", {said}" for said in (row.worst and f"worst in {row.worst}", row.note) if said)
        for row in rows
        if not row.passed
    ]
    if failed:
        raise GraphError(
            f"the bundle differs from its model: {'; '.join(failed)}",
            hint="an operator's gradient or lowering rule is wrong; nothing was written",
        )


def gradient_error(measured: Arrays, reference: Arrays) -> tuple[float, str]:
    """DESIGN section 10: max|d| / max(max|ref|, 1e-4 x the largest gradient), and its tensor.

    A gradient that is zero in exact arithmetic (attention's key bias), which the float64 reference
    shows, has rounding noise only, in torch as here: it is measured against the largest gradient.
    """
    largest = max(float(np.abs(value).max()) for value in reference.values())
    errors = {}
    for name, value in reference.items():
        size = float(np.abs(value).max())
        scale = largest if size < TRULY_ZERO * largest else max(size, 1e-4 * largest)
        errors[name] = float(np.abs(measured[name] - value).max()) / scale
    worst = max(errors, key=lambda name: errors[name])
    return errors[worst], worst


def relative_error(measured: Arrays, reference: Arrays) -> tuple[float, str]:
    """Largest difference relative to each array's largest value, and the array's name."""
    errors = {
        name: float(np.abs(measured[name] - value).max() / max(np.abs(value).max(), 1e-30))
        for name, value in reference.items()
    }
    worst = max(errors, key=lambda name: errors[name])
    return errors[worst], worst

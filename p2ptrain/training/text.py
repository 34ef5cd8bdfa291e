"""Text as byte tokens, and the part of it that is kept for evaluation."""

from __future__ import annotations

from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from p2ptrain.errors import DataError

HELDOUT_FRACTION: Final = 0.05

Tokens = NDArray[Any]  # Any: uint8, uint16 or uint32


class SplitText(NamedTuple):
    """Tokens to train on and tokens to evaluate on, disjoint."""

    training: Tokens
    heldout: Tokens


def byte_tokens(content: bytes) -> NDArray[np.uint8]:
    """One token per byte, read only and without a copy.

    Raises:
        DataError: there is nothing in it.
    """
    if not content:
        raise DataError("the text is empty")
    return np.frombuffer(content, np.uint8)


def split_heldout(tokens: Tokens, fraction: float = HELDOUT_FRACTION, *, context: int) -> SplitText:
    """The last `fraction` of the text for evaluation, at least one sample; the rest to train on.

    Raises:
        DataError: the text does not hold one sample for each.
    """
    need = context + 1
    if tokens.size < 2 * need:
        raise DataError(
            f"the text has {tokens.size} tokens; to train and to evaluate takes {2 * need}",
            hint="give a longer text, or a second one with --heldout",
        )
    wanted = int(tokens.size * fraction)
    cut = int(tokens.size) - min(max(wanted, need), int(tokens.size) - need)
    return SplitText(tokens[:cut], tokens[cut:])

"""Attention masks of transformers computed with operators that have gradients and no indexing.

transformers writes masks with advanced indexing, booleans chosen by `where` and a search for
packed sequences in the position ids. While `plain_masks()` is entered it builds the same masks by
comparing positions and adding one large negative number for each reason to hide a token.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, Final
from unittest import mock

import torch
from transformers import masking_utils

HIDDEN: Final = -1e30
"""Added to a score: exp of it is 0, and the sum of two is still finite in float32."""


@contextlib.contextmanager
def plain_masks() -> Iterator[None]:
    """Replace what the eager attention uses; the module's other code is its own."""
    functions = masking_utils.ALL_MASK_ATTENTION_FUNCTIONS
    with (
        mock.patch.dict(functions._global_mapping, {"eager": additive_mask}),
        mock.patch.object(masking_utils, "find_packed_sequence_indices", return_value=None),
    ):
        yield


def additive_mask(
    *,
    q_length: int,
    kv_length: int,
    mask_function: Callable[..., Any],  # Any: torch tensors
    attention_mask: Any = None,  # Any: a torch tensor (B, T)
    q_offset: int = 0,
    kv_offset: int = 0,
    dtype: Any = torch.float32,  # Any: a torch dtype
    allow_is_bidirectional_skip: bool = False,
    **_: object,
) -> Any:  # Any: a torch tensor that broadcasts to (B, H, T, T), or None
    """0 where a query may look, `HIDDEN` for each reason why it may not.

    Two-dimensional patterns only follow from positions; padding is added as (B, 1, 1, T).
    """
    hidden = None
    if not (allow_is_bidirectional_skip and _sees_everything(mask_function)):
        query = torch.arange(q_length)[None, None, :, None] + q_offset
        key = torch.arange(kv_length)[None, None, None, :] + kv_offset
        origin = torch.zeros((1, 1, 1, 1), dtype=torch.int64)
        visible = mask_function(origin, origin, query, key)
        hidden = (1.0 - visible.to(dtype)) * HIDDEN
    if attention_mask is not None:
        padding = (1.0 - attention_mask[:, None, None, :].to(dtype)) * HIDDEN
        hidden = padding if hidden is None else hidden + padding
    return hidden


def _sees_everything(mask_function: Callable[..., Any]) -> bool:  # Any: as above
    return mask_function is masking_utils.bidirectional_mask_function

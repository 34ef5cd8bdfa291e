"""Masked language modelling: which tokens of a sample are hidden, and behind what.

Of the tokens to predict 80 % become the mask token, 10 % a random one and 10 % stay as they are.

Shapes: B samples of a microbatch, T tokens of each.
Source: Devlin et al. 2018, section 3.1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np

from p2ptrain.training.sampling import Numbers, Windows

HIDDEN_STREAM: Final = 6 << 56
"""Second word of the Philox key: keeps hidden tokens apart from everything else that is drawn."""
_HALF: Final = 1 << 32
_MASKED_BELOW: Final = round(0.8 * _HALF)
_RANDOM_BELOW: Final = round(0.9 * _HALF)


@dataclass(frozen=True, slots=True, kw_only=True)
class HidingRule:
    """What a bundle's data section says about masked windows."""

    probability: float
    mask_token: int
    vocabulary: int
    ignore_index: int


def hide_tokens(
    tokens_BT: Numbers, rule: HidingRule, *, seed: int, step: int, first_sample: int
) -> Windows:
    """Inputs with some tokens hidden, and labels that count at those alone.

    Every sample predicts at least one token. What is hidden is a function of (seed, step, sample).
    """
    inputs, labels = tokens_BT.copy(), np.full_like(tokens_BT, rule.ignore_index)
    for index in range(len(tokens_BT)):
        _hide(inputs[index], labels[index], rule, seed, step, first_sample + index)
    return Windows(inputs, labels)


def _hide(
    inputs_T: Numbers, labels_T: Numbers, rule: HidingRule, seed: int, step: int, sample: int
) -> None:
    """Two words per token: one says whether and how (upper and lower half), one what instead."""
    generator = np.random.Philox(
        key=np.array([seed, HIDDEN_STREAM], np.uint64),
        counter=np.array([0, sample, step, 0], np.uint64),
    )
    decisions, instead = generator.random_raw(2 * inputs_T.size).reshape(2, -1)
    chance, action = decisions >> np.uint64(32), decisions & np.uint64(_HALF - 1)
    hidden = chance < np.uint64(round(rule.probability * _HALF))
    hidden[chance.argmin()] = True
    labels_T[hidden] = inputs_T[hidden]
    masked = hidden & (action < np.uint64(_MASKED_BELOW))
    random = hidden & ~masked & (action < np.uint64(_RANDOM_BELOW))
    inputs_T[masked] = rule.mask_token
    drawn = ((instead >> np.uint64(32)) * np.uint64(rule.vocabulary)) >> np.uint64(32)
    inputs_T[random] = drawn[random].astype(np.int64)

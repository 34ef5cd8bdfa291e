"""Sums have the same bits, whoever owns which piece and in whatever order terms come."""

from __future__ import annotations

import functools

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from p2ptrain.training.collectives import Array, add_by_rank, even_lengths, pieces_of

ELEMENTS = 12


@st.composite
def reduced(draw: st.DrawFn) -> tuple[list[Array], list[int], int]:
    """Everybody's vectors, the lengths of their pieces, and an order of arrival."""
    ranks = draw(st.integers(2, 5))
    rng = np.random.Generator(np.random.Philox(draw(st.integers(0, 2**32))))
    scales = 10.0 ** rng.integers(-6, 7, (ranks, ELEMENTS))
    vectors = [(v * rng.standard_normal(ELEMENTS)).astype(np.float32) for v in scales]
    ends = sorted(draw(st.lists(st.integers(0, ELEMENTS), min_size=ranks - 1, max_size=ranks - 1)))
    lengths = [b - a for a, b in zip([0, *ends], [*ends, ELEMENTS], strict=True)]
    return vectors, lengths, draw(st.integers(0, 2**32))


def total(vectors: list[Array], lengths: list[int], seed: int) -> bytes:
    """What the owners of pieces of these lengths add up to."""
    rng = np.random.Generator(np.random.Philox(seed))
    whole = np.empty(ELEMENTS, np.float32)
    for owner, piece in enumerate(pieces_of(whole, lengths)):
        terms = [pieces_of(vector, lengths)[owner].copy() for vector in vectors]
        arrived = [int(r) for r in rng.permutation(len(vectors)) if r != owner]
        add_by_rank(terms[owner], owner, {rank: terms[rank] for rank in arrived})
        piece[:] = terms[owner]
    return whole.tobytes()


@given(reduced())
def test_sum_has_the_same_bits_for_every_layout(case: tuple[list[Array], list[int], int]) -> None:
    vectors, lengths, seed = case
    wanted = functools.reduce(np.add, vectors).tobytes()
    assert total(vectors, lengths, seed) == wanted
    assert total(vectors, list(even_lengths(ELEMENTS, len(vectors))), seed + 1) == wanted

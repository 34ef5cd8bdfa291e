"""Flat layouts of a segment's tensors."""

from __future__ import annotations

import dataclasses

import pytest

from p2ptrain.bundle.manifest import Manifest, Tensor
from p2ptrain.errors import GraphError
from p2ptrain.training.layout import flat_layout
from tests.bundles import WIDTH, tiny_bundle
from tests.varied_bundle import varied_bundle

MANIFEST = tiny_bundle(blocks=2).manifest


def with_tensor(name: str, **changes: object) -> Manifest:
    def changed(tensor: Tensor) -> Tensor:
        return dataclasses.replace(tensor, **changes) if tensor.name == name else tensor

    return dataclasses.replace(MANIFEST, tensors=tuple(changed(t) for t in MANIFEST.tensors))


def test_layout_puts_decayed_tensors_first_and_leaves_frozen_ones_out() -> None:
    layout = flat_layout(MANIFEST, 1)
    assert [(p.local, p.start) for p in layout.places] == [("w", 0), ("b", WIDTH * WIDTH)]
    assert (layout.decay_stop, layout.length) == (256, 272)
    swapped = flat_layout(with_tensor("block0.w", decay=False), 1)
    assert (swapped.decay_stop, swapped.length) == (0, 272)
    frozen = flat_layout(with_tensor("block0.w", binding="frozen"), 1)
    assert [(p.local, p.start) for p in frozen.places] == [("b", 0)]
    assert (frozen.decay_stop, frozen.length) == (0, 16)


def test_layout_gives_running_values_a_vector_of_their_own() -> None:
    layout = flat_layout(varied_bundle().manifest, 1)
    assert [place.local for place in layout.places] == ["scale"]
    assert [(p.local, p.start) for p in layout.running] == [("mean", 0)]
    assert (layout.length, layout.running_length) == (WIDTH, WIDTH)


def test_layout_lets_a_tied_copy_decay_as_its_owner() -> None:
    tied = with_tensor("block1.b", tied_to="block0.w", shape=(WIDTH, WIDTH), decay=False)
    assert [p.start for p in flat_layout(tied, 2).places] == [0, WIDTH * WIDTH]
    assert flat_layout(tied, 2).decay_stop == 2 * WIDTH * WIDTH


def test_layout_starts_every_tensor_on_a_cache_line() -> None:
    layout = flat_layout(with_tensor("block0.b", shape=(3,), decay=True), 1)
    assert all(place.start % 16 == 0 for place in layout.places)
    assert layout.length == 272


def test_layout_refuses_to_train_what_is_not_float32() -> None:
    with pytest.raises(GraphError, match=r"block0\.w"):
        flat_layout(with_tensor("block0.w", dtype="int64"), 1)
    assert flat_layout(with_tensor("block0.w", dtype="int64", binding="frozen"), 1).length == 16

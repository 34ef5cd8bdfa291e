"""Tied weights: who shares a gradient, and in which order it is summed."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from p2ptrain.bundle.manifest import Manifest, Tensor
from p2ptrain.errors import InvariantBroken
from p2ptrain.training.ties import TieGroup, TieHolder, tie_groups, tied_gradient
from tests.bundles import tiny_bundle

MANIFEST = tiny_bundle(blocks=4).manifest
GROUP = TieGroup(
    owner="b", holders=tuple(TieHolder(segment=i, tensor=n) for i, n in enumerate("abc"))
)


def tied(binding: str = "trainable", **owners: str) -> Manifest:
    """Blocks' matrices tied as `copy=owner`, where a name is its block's number."""

    def changed(tensor: Tensor) -> Tensor:
        block = tensor.name.removesuffix(".w").removeprefix("block")
        if not tensor.name.endswith(".w"):
            return tensor
        owner = owners.get(f"b{block}")
        return dataclasses.replace(
            tensor, binding=binding, tied_to=None if owner is None else f"block{owner}.w"
        )

    return dataclasses.replace(MANIFEST, tensors=tuple(changed(t) for t in MANIFEST.tensors))


def test_tie_groups_hold_every_copy_in_segment_order() -> None:
    (group,) = tie_groups(tied(b3="0", b1="0"))
    assert group.owner == "block0.w"
    assert group.tensors == ("block0.w", "block1.w", "block3.w")
    assert [holder.segment for holder in group.holders] == [1, 2, 4]


def test_tie_groups_come_in_the_owners_manifest_order() -> None:
    groups = tie_groups(tied(b2="1", b3="0"))
    assert [group.owner for group in groups] == ["block0.w", "block1.w"]


def test_tie_groups_need_a_gradient_and_a_copy() -> None:
    assert tie_groups(MANIFEST) == ()
    assert tie_groups(tied("frozen", b1="0")) == ()


def test_tied_gradient_is_added_in_segment_order() -> None:
    big = np.float32(1 << 24)
    gradients = {"c": np.float32([1.0]), "b": np.float32([-big]), "a": np.float32([big + 2])}
    assert tied_gradient(GROUP, gradients) == [3.0]
    rounded = {"a": np.float32([1.0]), "b": np.float32([big]), "c": np.float32([-big])}
    assert tied_gradient(GROUP, rounded) == [0.0]
    assert rounded["a"] == [1.0], "what it was given stays"


def test_tied_gradient_misses_no_copy() -> None:
    with pytest.raises(InvariantBroken, match=r"'b' lacks \['c'\]"):
        tied_gradient(GROUP, {"a": np.float32([1.0]), "b": np.float32([1.0])})

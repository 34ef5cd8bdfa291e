"""Parameters drawn on the device: golden bits, independence, moments."""

from __future__ import annotations

import hashlib
from dataclasses import replace

import numpy as np
import pytest

from p2ptrain.bundle.manifest import Initialiser, Tensor
from p2ptrain.errors import BundleError
from p2ptrain.ids import Digest
from p2ptrain.training.random import draw_parameter, draw_tensor, parameters_digest
from tests.varied_bundle import varied_bundle


def tensor(kind: str, shape: tuple[int, ...], scale: float = 0.0) -> Tensor:
    return Tensor(
        name="w",
        shape=shape,
        dtype="float32",
        binding="trainable",
        initialiser=Initialiser(kind=kind, scale=scale),
        decay=True,
    )


def digest(array: np.ndarray) -> str:
    return hashlib.sha256(array.astype("<f4").tobytes()).hexdigest()


def test_drawn_parameters_keep_their_golden_bits() -> None:
    normal = draw_parameter(7, tensor("normal", (300, 1000), 0.02), 3)
    uniform = draw_parameter(7, tensor("uniform", (300, 1000), 0.5), 3)
    assert digest(normal) == GOLDEN_NORMAL
    assert digest(uniform) == GOLDEN_UNIFORM


def test_normal_has_the_asked_moments_and_bound() -> None:
    drawn = draw_parameter(1, tensor("normal", (400, 1000), 0.02), 0) / 0.02
    assert abs(drawn.mean()) < 0.01
    assert abs(drawn.std() - 1.0) < 0.01
    assert abs((drawn**4).mean() - 2.9) < 0.05  # a sum of 12 uniforms: kurtosis 3 - 0.1
    assert np.abs(drawn).max() < 6.0


def test_uniform_fills_its_interval_symmetrically() -> None:
    drawn = draw_parameter(1, tensor("uniform", (100_000,), 0.5), 0)
    assert np.abs(drawn).max() <= 0.5
    assert drawn.min() < -0.499
    assert drawn.max() > 0.499
    assert abs(drawn.mean()) < 0.005


def test_draws_do_not_depend_on_the_shape_or_the_length_after() -> None:
    flat = draw_parameter(5, tensor("normal", (600_000,), 1.0), 2)
    shorter = draw_parameter(5, tensor("normal", (300_000,), 1.0), 2)
    square = draw_parameter(5, tensor("normal", (600, 1000), 1.0), 2)
    assert np.array_equal(flat[:262_144], shorter[:262_144])
    assert np.array_equal(flat.reshape(600, 1000), square)


@pytest.mark.parametrize(("seed", "index"), [(6, 2), (5, 3)])
def test_another_seed_or_tensor_draws_other_values(seed: int, index: int) -> None:
    first = draw_parameter(5, tensor("normal", (1000,), 1.0), 2)
    other = draw_parameter(seed, tensor("normal", (1000,), 1.0), index)
    assert abs(float(np.corrcoef(first, other)[0, 1])) < 0.15


def test_zeros_and_ones_are_exact() -> None:
    assert (draw_parameter(0, tensor("zeros", (3, 2)), 0) == 0.0).all()
    assert (draw_parameter(0, tensor("ones", (3, 2)), 0) == 1.0).all()


def test_what_cannot_be_drawn_is_refused() -> None:
    with pytest.raises(BundleError, match="initialiser"):
        draw_parameter(0, tensor("orthogonal", (3,)), 0)
    with pytest.raises(BundleError, match="float32"):
        draw_parameter(0, replace(tensor("zeros", (3,)), dtype="int64"), 0)


GOLDEN_NORMAL = "8f10e3b4e65665a5bf0a9433dfcabb39f4d060cc9f88ec4ce4b2aa86999438e7"
GOLDEN_UNIFORM = "8d74b5ed63185cf22a15ccf8db8f0489688f5ed5aba6854e3f29989e3d07f071"


def test_tied_copies_are_drawn_as_their_owner() -> None:
    manifest = varied_bundle().manifest
    last = len(manifest.tensors) - 1
    assert manifest.tensors[last].tied_to == manifest.tensors[0].name
    owner = draw_parameter(7, manifest.tensors[0], 0)
    assert draw_tensor(manifest, 7, 0).tobytes() == owner.tobytes()
    assert draw_tensor(manifest, 7, last).tobytes() == owner.tobytes()


def test_parameters_digest_leaves_out_what_comes_from_weights() -> None:
    digests = {Digest("5" * 64), Digest("6" * 64)}
    drawn = {parameters_digest(varied_bundle(frozen_digest=d).manifest, 0) for d in digests}
    assert len(drawn) == 1
    assert parameters_digest(varied_bundle().manifest, 0) not in drawn

"""What the data holder sends: every port, labels with their weight, microbatch by microbatch."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
import trio

from p2ptrain.bundle.manifest import Loss
from p2ptrain.engine.contract import Array
from p2ptrain.errors import DataError
from p2ptrain.ids import DeviceId
from p2ptrain.runtime.home.feeder import Feeder
from p2ptrain.runtime.signal import Signal
from p2ptrain.training.feed import Feed
from p2ptrain.training.program import Intervals, Program
from p2ptrain.wire.frames import TensorHeader
from tests.bundles import contract_for, tiny_bundle
from tests.sim.plans import device, make_plan

BUNDLE = tiny_bundle()
FIRST, LAST = device(0), device(1)
PLAN = make_plan(FIRST, LAST)
CONTRACT = dataclasses.replace(
    contract_for(BUNDLE, steps=2, microbatch_size=2, microbatches=3), heldout_microbatches=2
)
IGNORED = -100


class NumberedSamples:
    """Sample n of step s has inputs s * 100 + n; `ignored` samples have no label that counts."""

    def __init__(self, ignored: tuple[int, ...] = (), heldout_ignored: int = 0) -> None:
        self.ignored, self.heldout_ignored = ignored, heldout_ignored
        self.read: list[tuple[str, int, int]] = []

    def training(self, *, seed: int, step: int, first_sample: int, count: int) -> Feed:
        assert seed == CONTRACT.seed
        self.read.append(("train", step, first_sample))
        numbers = np.arange(first_sample, first_sample + count)
        return _feed(100 * step + numbers, np.isin(numbers, self.ignored))

    def heldout(self, *, sample_count: int, first_sample: int, count: int) -> Feed:
        assert sample_count == 4
        self.read.append(("evaluate", 0, first_sample))
        numbers = np.arange(first_sample, first_sample + count)
        return _feed(numbers, numbers < self.heldout_ignored)


def _feed(values: Array, ignored: Array) -> Feed:
    labels = np.repeat(values[:, None], 3, axis=1)
    labels[ignored] = IGNORED
    return Feed(inputs=(values, values % 2 == 0), labels=labels)


class Recorder:
    """An outlet that keeps what is sent."""

    def __init__(self) -> None:
        self.sent: list[tuple[DeviceId, TensorHeader, Array]] = []

    def send(self, device: DeviceId, message: object) -> None:
        raise AssertionError("the feeder sends no messages")

    async def send_tensor(self, device: DeviceId, header: TensorHeader, *arrays: Array) -> None:
        await trio.lowlevel.checkpoint()
        (array,) = arrays
        self.sent.append((device, header, array))


async def fed(
    samples: NumberedSamples, loss: Loss | None = None
) -> list[tuple[DeviceId, TensorHeader, Array]]:
    manifest = BUNDLE.manifest
    if loss is not None:
        manifest = dataclasses.replace(manifest, loss=loss)
    job = SimpleNamespace(bundle=SimpleNamespace(manifest=manifest), samples=samples)
    outlet = Recorder()
    feeder = Feeder(
        job=job,  # type: ignore[arg-type]  # the part of it that is read
        plan=PLAN, contract=CONTRACT, outlet=outlet, signal=Signal(), completed=lambda: 100,
        program=Program(
            CONTRACT, first_step=0, intervals=Intervals(checkpoint_every=0, replica_every=100)
        ),
    )  # fmt: skip
    await feeder.run()
    return outlet.sent


def weights(sent: list[tuple[DeviceId, TensorHeader, Array]]) -> dict[tuple[str, int], set[bytes]]:
    """The bits of the loss weight by item."""
    found: dict[tuple[str, int], set[bytes]] = {}
    for _, header, array in sent:
        if (header.kind, header.index) == ("labels", 1):
            assert (array.dtype, array.shape) == (np.dtype(np.float64), (1,))
            found.setdefault((header.phase, header.step), set()).add(array.tobytes())
    return found


def bits(weight: float) -> set[bytes]:
    return {np.float64(weight).tobytes()}


async def test_every_item_is_fed_whole_and_in_order() -> None:
    samples = NumberedSamples()
    sent = await fed(samples)
    items = [("evaluate", 0, 2), ("train", 1, 3), ("train", 2, 3), ("evaluate", 2, 2)]
    expected = [
        (to, phase, step, microbatch, kind, index)
        for phase, step, count in items
        for microbatch in range(count)
        for to, kind in ((FIRST, "input"), (LAST, "labels"))
        for index in (0, 1)
    ]
    found = [(to, h.phase, h.step, h.microbatch, h.kind, h.index) for to, h, _ in sent]
    assert found == expected
    by_key = {(h.phase, h.step, h.microbatch, h.kind, h.index): a for _, h, a in sent}
    np.testing.assert_array_equal(by_key["train", 2, 1, "input", 0], [202, 203])
    np.testing.assert_array_equal(by_key["train", 2, 1, "input", 1], [True, False])
    np.testing.assert_array_equal(by_key["train", 2, 1, "labels", 0][:, 0], [202, 203])
    assert len(samples.read) == len(set(samples.read)) + 2, "only the held-out set is read again"


async def test_weight_is_one_over_the_labels_of_the_whole_minibatch() -> None:
    found = weights(await fed(NumberedSamples()))
    assert found == {
        ("evaluate", 0): bits(1 / 12), ("train", 1): bits(1 / 18), ("train", 2): bits(1 / 18),
        ("evaluate", 2): bits(1 / 12),
    }  # fmt: skip


async def test_ignored_labels_weigh_nothing_wherever_they_lie() -> None:
    found = weights(await fed(NumberedSamples(ignored=(0, 1, 5), heldout_ignored=1)))
    assert found["train", 1] == bits(1 / 9)
    assert found["evaluate", 0] == bits(1 / 9)


async def test_losses_other_than_cross_entropy_ignore_nothing() -> None:
    found = weights(await fed(NumberedSamples(ignored=(0, 1, 5)), Loss(kind="mse")))
    assert found["train", 1] == bits(1 / 18)


@pytest.mark.parametrize(
    ("samples", "item"),
    [
        (NumberedSamples(ignored=tuple(range(6))), "train step 1"),
        (NumberedSamples(heldout_ignored=4), "evaluate step 0"),
    ],
)
async def test_item_without_any_label_is_refused_by_name(
    samples: NumberedSamples, item: str
) -> None:
    with pytest.raises(DataError, match=f"{item}: no label counts"):
        await fed(samples)

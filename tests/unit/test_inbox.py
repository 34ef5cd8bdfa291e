"""Where tensors land: fed ahead, in their buffers, or nowhere."""

from __future__ import annotations

import dataclasses
from typing import Literal

import numpy as np
import pytest
import trio
import trio.testing

from p2ptrain.engine.contract import Array
from p2ptrain.errors import RemoteProtocolError
from p2ptrain.ids import DeviceId, Digest, Lineage, RunId, ViewNumber
from p2ptrain.runtime.exchange.bodies import discard
from p2ptrain.runtime.exchange.inbox import DECODED_IN_PLACE_BYTES, FED_AHEAD_MAX, TensorInbox
from p2ptrain.runtime.signal import Signal
from p2ptrain.training.arrivals import Arrivals, FedValue, TieKey
from p2ptrain.training.program import Item
from p2ptrain.training.tensor_codec import decode, encode
from p2ptrain.wire.frames import TensorHeader
from tests.memory_group import MemoryReader

SENDER = DeviceId("s" * 26)
SHAPE = (2, 3)
FED_BYTES = 2 * 3 * 8
TIE = TieKey(segment=2, tensor_index=5)
OTHER_TIE = TieKey(segment=3, tensor_index=7)
ARRIVALS = Arrivals(
    fed={
        "input": (FedValue(shape=SHAPE, dtype="int64"),),
        "labels": (
            FedValue(shape=SHAPE, dtype="int64"), FedValue(shape=(1,), dtype="float64"),
        ),
    },
    microbatches={"train": range(2), "evaluate": range(1)},
    tied={TIE: (2, 2), OTHER_TIE: (3,)},
)  # fmt: skip


class Targets:
    """Two ports of four float32 for activations; releases have none."""

    def __init__(self) -> None:
        self.arrays = [np.zeros(4, np.float32), np.zeros(4, np.float32)]

    def __call__(self, kind: str, microbatch: int) -> tuple[Array, ...]:
        if kind == "cotangent":
            raise RemoteProtocolError("a cotangent that this stage does not expect")
        return () if kind == "release" else tuple(self.arrays)


def header(
    kind: str, *, step: int = 1, microbatch: int = 0, index: int = 0, segment: int = 0
) -> TensorHeader:
    return TensorHeader(
        run=RunId("r" * 26), lineage=Lineage(0), view=ViewNumber(1), plan=Digest("0" * 64),
        kind=kind, phase="train", step=step, microbatch=microbatch, segment=segment, index=index,
    )  # fmt: skip


def train(step: int, kind: Literal["train", "evaluate"] = "train") -> Item:
    return Item(kind=kind, step=step)


def inbox() -> TensorInbox:
    return TensorInbox(Signal(), arrivals=ARRIVALS)


def tokens(value: int) -> Array:
    return np.full(SHAPE, value, np.int64)


async def take(box: TensorInbox, what: TensorHeader, content: bytes) -> None:
    reader = MemoryReader(memoryview(content))
    await box.receive(SENDER, what, len(content), reader)
    assert not reader.left, "part of the body was left unread"


def fed(box: TensorInbox, kind: str, microbatch: int) -> tuple[Array, ...]:
    arrays = box.fed(kind, microbatch)
    assert arrays is not None
    return arrays


async def test_fed_tensors_wait_for_their_item() -> None:
    box = inbox()
    assert box.fed("input", 0) is None
    await take(box, header("input", step=2), tokens(5).tobytes())
    box.deliver(header("input", step=1), tokens(4))
    box.deliver(header("labels", step=1, microbatch=1), tokens(6))
    box.deliver(header("labels", step=1, microbatch=1, index=1), np.array([0.25]))
    box.open(train(1), Targets())
    assert box.begun()
    np.testing.assert_array_equal(fed(box, "input", 0)[0], tokens(4))
    np.testing.assert_array_equal(fed(box, "labels", 1)[0], tokens(6))
    assert fed(box, "labels", 1)[1] == 0.25
    assert box.fed("input", 1) is None
    box.open(train(2), Targets())
    np.testing.assert_array_equal(fed(box, "input", 0)[0], tokens(5))
    box.open(train(1), Targets())
    assert box.fed("input", 0) is None, "a finished item's inputs are forgotten"
    assert not box.begun()


async def test_delivered_array_is_copied() -> None:
    box, mine = inbox(), tokens(1)
    box.deliver(header("input"), mine)
    mine.fill(9)
    box.open(train(1), Targets())
    np.testing.assert_array_equal(fed(box, "input", 0)[0], tokens(1))


async def test_feeding_is_bounded() -> None:
    box = inbox()
    for step in range(1, FED_AHEAD_MAX + 1):
        box.deliver(header("input", step=step), tokens(0))
    with pytest.raises(RemoteProtocolError, match="out of turn"):
        box.deliver(header("input", step=FED_AHEAD_MAX + 1), tokens(0))
    with pytest.raises(RemoteProtocolError, match="out of turn"):
        await take(box, header("input", step=1), tokens(0).tobytes())


@pytest.mark.parametrize("length", [0, FED_BYTES - 1, FED_BYTES + 8])
async def test_fed_tensor_of_another_size_is_refused(length: int) -> None:
    with pytest.raises(RemoteProtocolError, match="bytes"):
        await take(inbox(), header("labels"), bytes(length))


async def test_inputs_of_several_ports_keep_their_shapes_and_dtypes() -> None:
    image, mask = FedValue(shape=(2, 4), dtype="float32"), FedValue(shape=(2,), dtype="bool")
    box = TensorInbox(
        Signal(),
        arrivals=Arrivals(fed={"input": (image, mask)}, microbatches={"train": range(1)}, tied={}),
    )
    box.open(train(1), Targets())
    await take(box, header("input", index=1), np.array([True, False]).tobytes())
    assert box.fed("input", 0) is None, "one port is still missing"
    await take(box, header("input"), np.arange(8, dtype=np.float32).tobytes())
    pixels, kept = fed(box, "input", 0)
    np.testing.assert_array_equal(pixels, np.arange(8, dtype=np.float32).reshape(2, 4))
    np.testing.assert_array_equal(kept, [True, False])
    with pytest.raises(RemoteProtocolError, match="out of turn"):
        await take(box, header("input", index=1), bytes(2))


@pytest.mark.parametrize(
    "what",
    [
        header("input", index=1),
        header("labels", index=2),
        header("input", microbatch=2),
        dataclasses.replace(header("input", microbatch=1), phase="evaluate"),
    ],
)
async def test_fed_tensor_that_no_port_takes_is_refused(what: TensorHeader) -> None:
    with pytest.raises(RemoteProtocolError, match="does not expect"):
        await take(inbox(), what, bytes(FED_BYTES))


async def test_stage_in_the_middle_is_fed_nothing() -> None:
    box = TensorInbox(Signal(), arrivals=dataclasses.replace(ARRIVALS, fed={}))
    with pytest.raises(RemoteProtocolError, match="does not expect"):
        await take(box, header("input"), bytes(FED_BYTES))


@pytest.mark.parametrize("weight", [0.0, -0.5, 1.5, np.inf, np.nan])
async def test_loss_weight_that_is_no_share_is_refused(weight: float) -> None:
    with pytest.raises(RemoteProtocolError, match="a loss weight of"):
        await take(inbox(), header("labels", index=1), np.array([weight]).tobytes())


async def test_tied_gradients_are_complete_when_every_copy_has_come() -> None:
    box = inbox()
    box.open(train(1), Targets())
    assert box.tied() is None
    first = np.arange(4, dtype=np.float32)
    await take(box, header("tied", segment=2, index=5), first.tobytes())
    assert box.tied() is None
    await take(box, header("tied", segment=3, index=7), np.ones(3, np.float32).tobytes())
    arrived = box.tied()
    assert arrived is not None
    np.testing.assert_array_equal(arrived[TIE], first.reshape(2, 2))
    np.testing.assert_array_equal(arrived[OTHER_TIE], np.ones(3))
    with pytest.raises(RemoteProtocolError, match="came twice"):
        await take(box, header("tied", segment=2, index=5), first.tobytes())
    box.open(train(2), Targets())
    assert box.tied() is None, "the next step has its own"
    await take(box, header("tied", step=2, segment=2, index=5), first.tobytes())


async def test_tied_gradient_of_a_later_step_waits_for_it(
    mock_clock: trio.testing.MockClock,
) -> None:
    box = inbox()
    box.open(train(1), Targets())
    later = header("tied", step=2, segment=3, index=7)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(take, box, later, np.ones(3, np.float32).tobytes())
        await trio.testing.wait_all_tasks_blocked()
        await take(box, header("tied", segment=2, index=5), bytes(16))
        assert box.tied() is None
        box.open(train(2), Targets())
    await take(box, header("tied", step=2, segment=2, index=5), bytes(16))
    assert box.tied() is not None


@pytest.mark.parametrize(
    ("what", "length"),
    [
        (header("tied", segment=2, index=5), 12),
        (header("tied", segment=2, index=5), 0),
        (header("tied", segment=2, index=5, microbatch=1), 16),
        (header("tied", segment=2, index=7), 12),
        (header("tied", segment=9, index=5), 16),
    ],
)
async def test_tied_gradient_that_the_plan_does_not_predict_is_refused(
    what: TensorHeader, length: int
) -> None:
    box = inbox()
    box.open(train(1), Targets())
    with pytest.raises(RemoteProtocolError, match="tied gradient"):
        await take(box, what, bytes(length))


async def test_evaluation_has_no_tied_gradients() -> None:
    box = inbox()
    box.open(train(1, "evaluate"), Targets())
    what = dataclasses.replace(header("tied", segment=2, index=5), phase="evaluate")
    with pytest.raises(RemoteProtocolError, match="tied gradient"):
        await take(box, what, bytes(16))


async def test_boundary_tensor_lands_in_its_buffer() -> None:
    box, targets = inbox(), Targets()
    box.open(train(1), targets)
    assert not box.begun()
    await take(box, header("activation", index=1), np.arange(4, dtype=np.float32).tobytes())
    assert box.begun()
    assert not box.arrived("activation", 0, 2)
    await take(box, header("activation", index=0), np.ones(4, np.float32).tobytes())
    assert box.arrived("activation", 0, 2)
    assert not box.arrived("activation", 1, 2)
    np.testing.assert_array_equal(targets.arrays[0], np.ones(4, np.float32))
    np.testing.assert_array_equal(targets.arrays[1], np.arange(4, dtype=np.float32))


async def test_release_has_no_body() -> None:
    box = inbox()
    box.open(train(1), Targets())
    await take(box, header("release"), b"")
    assert box.arrived("release", 0, 1)
    with pytest.raises(RemoteProtocolError, match="came twice"):
        await take(box, header("release"), b"")


@pytest.mark.parametrize(
    ("what", "length"),
    [
        (header("activation"), 12),
        (header("activation"), 0),
        (header("activation", index=2), 16),
        (header("release"), 16),
        (header("release", index=1), 0),
        (header("cotangent"), 16),
    ],
)
async def test_tensor_that_the_plan_does_not_predict_is_refused(
    what: TensorHeader, length: int
) -> None:
    box = inbox()
    box.open(train(1), Targets())
    with pytest.raises(RemoteProtocolError):
        await take(box, what, bytes(length))


async def test_same_tensor_twice_is_refused() -> None:
    box = inbox()
    box.open(train(1), Targets())
    await take(box, header("activation"), bytes(16))
    with pytest.raises(RemoteProtocolError, match="came twice"):
        await take(box, header("activation"), bytes(16))


async def test_tensor_of_a_later_item_holds_up_its_own_link(
    mock_clock: trio.testing.MockClock,
) -> None:
    box, targets = inbox(), Targets()
    box.open(train(1), targets)
    later = dataclasses.replace(header("activation", step=1), phase="evaluate")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(take, box, later, np.full(4, 7, np.float32).tobytes())
        await trio.testing.wait_all_tasks_blocked()
        assert targets.arrays[0].sum() == 0
        await take(box, header("activation", index=1), bytes(16))  # another link goes on
        box.open(train(1, "evaluate"), targets)
    assert targets.arrays[0].sum() == 28
    assert box.arrived("activation", 0, 1)


async def test_closed_inbox_discards_what_waits_and_what_comes(
    mock_clock: trio.testing.MockClock,
) -> None:
    box = inbox()
    box.open(train(1), Targets())
    async with trio.open_nursery() as nursery:
        nursery.start_soon(take, box, header("activation", step=2), bytes(16))
        await trio.testing.wait_all_tasks_blocked()
        box.close()
    await take(box, header("input", step=3), bytes(FED_BYTES))
    await take(box, header("cotangent"), bytes(1 << 18))
    box.deliver(header("labels", step=3), tokens(1))
    box.open(train(3), Targets())
    assert box.fed("labels", 0) is None


@pytest.mark.parametrize("length", [0, 1, 64 * 1024, 64 * 1024 + 1, 200_000])
async def test_discard_reads_exactly_the_body(length: int) -> None:
    reader = MemoryReader(memoryview(bytes(length + 5)))
    await discard(reader, length)
    assert len(reader.left) == 5


class Rounded(Targets):
    """One float32 tensor of any size and one of integers, which go raw under every codec."""

    def __init__(self, count: int) -> None:
        self.arrays = [np.zeros(count, np.float32), np.zeros(count, np.int64)]


def rounded_inbox(codec: str) -> TensorInbox:
    return TensorInbox(Signal(), arrivals=dataclasses.replace(ARRIVALS, codec=codec))


@pytest.mark.parametrize("codec", ["fp32", "bf16", "int8"])
@pytest.mark.parametrize("count", [4, DECODED_IN_PLACE_BYTES])
async def test_encoded_tensors_are_decoded_into_their_buffers(codec: str, count: int) -> None:
    box, targets = rounded_inbox(codec), Rounded(count)
    box.open(train(1), targets)
    sent = np.linspace(-3, 5, count, dtype=np.float32), np.arange(count)
    encoded = [encode(codec, array).tobytes() for array in sent]
    for index, content in enumerate(encoded):
        await take(box, header("activation", index=index), content)
    assert box.arrived("activation", 0, 2)
    expected = np.empty_like(sent[0])
    decode(codec, np.frombuffer(encoded[0], np.uint8), expected)
    np.testing.assert_array_equal(targets.arrays[0], expected)
    np.testing.assert_array_equal(targets.arrays[1], sent[1])
    assert len(encoded[0]) <= {"fp32": 4, "bf16": 2, "int8": 1.1}[codec] * count + 4


@pytest.mark.parametrize("codec", ["bf16", "int8"])
async def test_encoded_tensor_of_another_size_closes_the_link(codec: str) -> None:
    box = rounded_inbox(codec)
    box.open(train(1), Rounded(300))
    whole = encode(codec, np.ones(300, np.float32)).tobytes()
    for wrong in (whole[:-1], whole + b"\0", bytes(1200), b""):
        with pytest.raises(RemoteProtocolError, match="not what the plan says"):
            await take(box, header("activation"), wrong)


async def test_encoded_tensor_with_a_scale_out_of_range_closes_the_link() -> None:
    box = rounded_inbox("int8")
    box.open(train(1), Rounded(300))
    content = bytearray(encode("int8", np.ones(300, np.float32)).tobytes())
    content[0:4] = np.float32(np.inf).tobytes()
    with pytest.raises(RemoteProtocolError, match="scale"):
        await take(box, header("activation"), bytes(content))
    assert not box.arrived("activation", 0, 1)

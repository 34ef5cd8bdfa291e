"""What a link carries, worked out from what a simulated kernel takes."""

from __future__ import annotations

import random

import pytest

from p2ptrain.wire.throughput import KEPT_S, SAMPLE_BYTES_MIN, SAMPLES_MIN, Throughput

KIB = 1024
CHUNK = 512 * KIB


class Kernel:
    """A send buffer that drains at a rate; a blocked sender wakes with a third of it free."""

    def __init__(self, rate: float, buffer: int, rng: random.Random) -> None:
        self.rate, self.buffer, self.rng = rate, buffer, rng
        self.now, self.filled = 0.0, 0.0
        self.throughput = Throughput()

    def pass_time(self, seconds: float) -> None:
        self.now += seconds
        self.filled = max(0.0, self.filled - self.rate * self.rng.uniform(0.6, 1.4) * seconds)

    def send(self, size: int) -> None:
        """As `TlsLink._flush` does."""
        left = size
        while left:
            began_s = self.now
            if self.filled >= self.buffer - 1:
                while self.filled > 2 * self.buffer / 3:
                    self.pass_time(0.02 * self.buffer / self.rate)
            taken = min(left, int(self.buffer - self.filled))
            self.filled += taken
            self.throughput.handed(taken, left, began_s=began_s, ended_s=self.now)
            left -= taken


@pytest.mark.parametrize("seed", range(12))
def test_rate_of_a_busy_link_is_found_whatever_its_buffer(seed: int) -> None:
    rng = random.Random(seed)
    rate = 10 ** rng.uniform(5, 8)
    kernel = Kernel(rate, int(2 ** rng.uniform(15, 22)), rng)
    for _ in range(200):
        kernel.send(CHUNK)
        kernel.pass_time(rng.uniform(0.0, 0.0002))  # encrypting the next
    found = kernel.throughput.bytes_per_s(kernel.now)
    assert found is not None
    assert found == pytest.approx(rate, rel=0.15)


@pytest.mark.parametrize("seed", range(6))
def test_pauses_of_the_sender_do_not_count(seed: int) -> None:
    rng = random.Random(seed)
    kernel = Kernel(1e6, 128 * KIB, rng)
    for _ in range(100):
        kernel.send(2 * CHUNK)
        kernel.pass_time(rng.uniform(0.5, 5.0))  # computing
    assert kernel.throughput.bytes_per_s(kernel.now) == pytest.approx(1e6, rel=0.15)


def test_a_link_that_takes_everything_at_once_has_no_figure() -> None:
    kernel = Kernel(1e9, 4 * CHUNK, random.Random(0))
    for _ in range(1000):
        kernel.send(CHUNK)
        kernel.pass_time(0.01)
    assert kernel.throughput.bytes_per_s(kernel.now) is None


def test_a_few_bytes_are_no_sample_and_old_samples_are_forgotten() -> None:
    kernel = Kernel(1e6, 64 * KIB, random.Random(0))
    kernel.send(SAMPLE_BYTES_MIN * (SAMPLES_MIN - 1))
    assert kernel.throughput.bytes_per_s(kernel.now) is None
    kernel.send(SAMPLE_BYTES_MIN * 4)
    assert kernel.throughput.bytes_per_s(kernel.now) is not None
    assert kernel.throughput.bytes_per_s(kernel.now + KEPT_S + 60) is None


def test_one_stall_does_not_move_the_figure_and_a_lasting_change_does() -> None:
    kernel = Kernel(2e6, 64 * KIB, random.Random(0))
    kernel.send(20 * SAMPLE_BYTES_MIN)
    kernel.rate = 1e3  # the other side stands still for a minute
    kernel.send(64 * KIB)
    kernel.rate = 2e6
    kernel.send(4 * SAMPLE_BYTES_MIN)
    assert kernel.throughput.bytes_per_s(kernel.now) == pytest.approx(2e6, rel=0.15)
    kernel.rate = 5e5
    kernel.send(20 * SAMPLE_BYTES_MIN)
    assert kernel.throughput.bytes_per_s(kernel.now) == pytest.approx(5e5, rel=0.15)


def test_what_the_kernel_has_timed_counts_where_no_buffer_was_ever_full() -> None:
    seen = Throughput()
    told = [(0.1, 9e6), (0.2, 2e6), (0.25, 7e7), (0.3, 3e6), (0.4, 3.1e6)]
    acked = [70_000, 400_000, 410_000, 800_000, 1_200_000]
    for (now, rate), bytes_ in zip(told[:2], acked, strict=False):
        seen.delivered(bytes_, rate, now=now)
    assert seen.bytes_per_s(0.2) is None  # too few
    for (now, rate), bytes_ in list(zip(told, acked, strict=True))[2:]:
        seen.delivered(bytes_, rate, now=now)
    assert seen.bytes_per_s(0.4) == 3_050_000  # 7e7 was told after too few bytes
    assert seen.bytes_per_s(0.5 + KEPT_S) is None


def test_full_buffers_say_more_than_what_the_kernel_has_timed() -> None:
    kernel = Kernel(1e6, 64 * KIB, random.Random(1))
    for number in range(1, 10):
        kernel.throughput.delivered(number * CHUNK, 5e6, now=kernel.now)
    for _ in range(20):
        kernel.send(CHUNK)
    assert kernel.throughput.bytes_per_s(kernel.now) == pytest.approx(1e6, rel=0.15)

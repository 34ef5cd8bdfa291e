"""The Wi-Fi emulator's pure parts on a clock of the test's own: airtime, loss, cuts, commands."""

from __future__ import annotations

import random

import pytest

from tools.wifi_emulator import __main__ as command_line
from tools.wifi_emulator.commands import (
    Change,
    CommandError,
    Counts,
    Cut,
    Heal,
    Partition,
    Stop,
    parse_command,
    parse_script,
)
from tools.wifi_emulator.cuts import Cuts
from tools.wifi_emulator.hub import Hub
from tools.wifi_emulator.medium import FRAME_OVERHEAD_BYTES, Air, Channel, Medium
from tools.wifi_emulator.namespaces import Unavailable
from tools.wifi_emulator.wifi import air_options

STATIONS = ("a", "b", "c")
MACS = {name: bytes([2, 0, 0, 0, 0, index]) for index, name in enumerate(STATIONS)}
FRAME_BYTES = 1226
"""With its overhead 1250 bytes: a millisecond at 10 Mbit/s."""
AIR = Air(rate_mbit=10, delay_ms=5, queue_ms=10)


def frame(source: str, to: str | bytes, size: int = FRAME_BYTES) -> bytes:
    destination = to if isinstance(to, bytes) else MACS[to]
    return (destination + MACS[source] + b"\x08\x00").ljust(size, b"x")


def hub(air: Air = AIR, *, seed: int = 1) -> Hub:
    """A hub that has heard every station once, so that it knows who is where."""
    made = Hub(STATIONS, air, seed=seed)
    for station in STATIONS:
        made.receive(station, frame(station, b"\xff" * 6, 14), 0.0)
    made.advance(0.9)
    return made


def test_frame_occupies_the_air_for_its_bits() -> None:
    assert FRAME_BYTES + FRAME_OVERHEAD_BYTES == 1250
    assert AIR.airtime_s(FRAME_BYTES) == pytest.approx(1e-3)


def test_frame_arrives_after_its_airtime_and_the_delay() -> None:
    made = hub()
    made.receive("a", frame("a", "b"), 1.0)
    assert made.deadline() == 1.0
    assert made.advance(1.0) == []
    assert made.deadline() == pytest.approx(1.006)
    assert made.advance(1.0059) == []
    assert made.advance(1.0061) == [("b", frame("a", "b"))]
    assert made.deadline() is None


def test_stations_share_one_medium_in_turn() -> None:
    channel = Channel(STATIONS, AIR)
    for station in ("a", "a", "a", "b", "c"):
        channel.offer(station, bytes(FRAME_BYTES), 0.0)
    begun = channel.advance(1.0)
    assert [sent.source for sent in begun] == ["a", "b", "c", "a", "a"]
    assert [sent.ends_at_s for sent in begun] == pytest.approx([1e-3, 2e-3, 3e-3, 4e-3, 5e-3])


def test_late_call_gives_the_times_of_a_prompt_one() -> None:
    prompt, late = Channel(STATIONS, AIR), Channel(STATIONS, AIR)
    for at_s, station in ((0.0, "a"), (0.0, "b"), (0.0105, "c")):
        prompt.offer(station, bytes(FRAME_BYTES), at_s)
        late.offer(station, bytes(FRAME_BYTES), at_s)
    times = (0.0, 0.001, 0.002, 0.011)
    assert [sent for at_s in times for sent in prompt.advance(at_s)] == late.advance(1.0)


def test_separate_media_do_not_wait_for_each_other() -> None:
    medium = Medium(STATIONS, Air(rate_mbit=10, shared=False), random.Random(1))
    for station in STATIONS:
        medium.offer(station, bytes(FRAME_BYTES), 0.0)
    assert [sent.ends_at_s for sent in medium.advance(0.0)] == pytest.approx([1e-3] * 3)


def test_full_queue_drops_and_says_so() -> None:
    made = hub()
    for _ in range(12):
        made.receive("a", frame("a", "b"), 1.0)
    assert made.counts().queue_drops == {"a": 2, "b": 0, "c": 0}
    assert len(made.advance(2.0)) == 10
    made.receive("a", frame("a", "b"), 2.0)
    assert len(made.advance(3.0)) == 1


def test_one_stations_full_queue_leaves_room_for_the_others() -> None:
    made = hub()
    for _ in range(100):
        made.receive("a", frame("a", "c"), 1.0)
    made.receive("b", frame("b", "c"), 1.0)
    arrived = made.advance(2.0)
    assert [delivered[6:12] for _, delivered in arrived].index(MACS["b"]) == 1


def test_loss_is_as_asked_and_follows_from_the_seed() -> None:
    counts = []
    for seed in (1, 1, 2):
        made = hub(Air(rate_mbit=1000, loss_percent=1), seed=seed)
        lost_before = made.counts().pairs["a>b"].lost_frames
        for number in range(10_000):
            made.receive("a", frame("a", "b", 60), 1 + number * 1e-5)
            made.advance(1 + number * 1e-5)
        counts.append(made.counts().pairs["a>b"].lost_frames - lost_before)
    assert counts[0] == counts[1] != counts[2]
    assert all(70 <= lost <= 130 for lost in counts)


def test_loss_is_drawn_for_each_receiver() -> None:
    made = hub(Air(rate_mbit=1000, loss_percent=50))
    received: list[tuple[str, bytes]] = []
    for number in range(100):
        made.receive("a", frame("a", b"\xff" * 6, 60 + number), 1 + number * 1e-3)
        received += made.advance(1 + number * 1e-3)
    received += made.advance(9.0)
    at_b, at_c = ({body for at, body in received if at == name} for name in "bc")
    assert 0 < len(at_b) < 100
    assert at_b - at_c
    assert at_c - at_b


def test_jitter_delays_without_reordering_a_pair() -> None:
    made = hub(Air(rate_mbit=1000, delay_ms=5, jitter_ms=20))
    sent = [frame("a", "b", 60 + number) for number in range(50)]
    for number, each in enumerate(sent):
        made.receive("a", each, 1 + number * 1e-4)
    assert made.advance(1.005) == []
    early, late = made.advance(1.015), made.advance(1.031)
    assert early
    assert late
    assert [body for _, body in early + late] == sent


def test_unknown_receiver_is_flooded_and_a_known_one_is_not() -> None:
    made = Hub(STATIONS, AIR, seed=1)
    made.receive("a", frame("a", "b"), 1.0)
    assert [station for station, _ in made.advance(2.0)] == ["b", "c"]
    made.receive("b", frame("b", "a"), 3.0)
    assert [station for station, _ in made.advance(4.0)] == ["a"]
    made.receive("a", frame("a", "a"), 5.0)
    made.receive("a", b"runt", 5.0)
    assert made.advance(6.0) == []


def test_filtered_multicast_is_not_passed_on_but_broadcast_is() -> None:
    made = hub(Air(multicast=False))
    made.receive("a", frame("a", b"\x01\x00\x5e\x00\x00\xfb"), 1.0)
    assert made.advance(2.0) == []
    assert made.counts().pairs["a>b"].filtered_frames == 1
    made.receive("a", frame("a", b"\xff" * 6), 3.0)
    assert [station for station, _ in made.advance(4.0)] == ["b", "c"]


def test_partition_cuts_both_ways_and_heals() -> None:
    cuts = Cuts()
    cuts.partition([["a"], ["b", "c"]])
    assert cuts.pairs() == (("a", "b"), ("a", "c"), ("b", "a"), ("c", "a"))
    assert cuts.passes("b", "c")
    cuts.partition([["a", "b"], ["c"]])
    assert cuts.passes("a", "b")
    assert not cuts.passes("c", "b")
    cuts.heal()
    assert cuts.pairs() == ()


def test_one_way_cut_is_one_way() -> None:
    made = hub()
    made.apply(parse_command("cut a>b", STATIONS))
    made.receive("a", frame("a", "b"), 1.0)
    made.receive("b", frame("b", "a"), 1.0)
    assert [station for station, _ in made.advance(2.0)] == ["a"]
    assert made.counts().pairs["a>b"].cut_frames == 1
    made.apply(parse_command("heal a>b", STATIONS))
    made.receive("a", frame("a", "b"), 3.0)
    assert [station for station, _ in made.advance(4.0)] == ["b"]


def test_counts_are_per_pair_in_frames_and_bytes() -> None:
    made = hub()
    before = made.counts().pairs["a>b"]
    made.receive("a", frame("a", "b", 100), 1.0)
    made.receive("a", frame("a", "b", 200), 1.0)
    made.advance(2.0)
    after = made.counts().pairs["a>b"]
    assert after.delivered_frames - before.delivered_frames == 2
    assert after.delivered_bytes - before.delivered_bytes == 300


def test_rate_changes_while_frames_wait() -> None:
    made = hub()
    for _ in range(2):
        made.receive("a", frame("a", "b"), 1.0)
    made.advance(1.0)
    made.apply(parse_command("set rate=1 delay=0", STATIONS))
    assert made.medium.deadline() == pytest.approx(1.001)
    made.advance(1.001)
    assert made.advance(1.0109) == [("b", frame("a", "b"))]
    assert made.advance(1.0111) == [("b", frame("a", "b"))]


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("partition a b,c", Partition(groups=(("a",), ("b", "c")))),
        ("partition b", Partition(groups=(("b",), ("a", "c")))),
        ("cut a b", Cut(pairs=(("a", "b"), ("b", "a")))),
        ("cut c>a", Cut(pairs=(("c", "a"),))),
        ("heal", Heal(pairs=None)),
        ("heal a b", Heal(pairs=(("a", "b"), ("b", "a")))),
        ("set loss=5 multicast=off", Change(fields=(("loss_percent", 5.0), ("multicast", False)))),
        ("counts", Counts()),
        ("stop", Stop()),
    ],
)
def test_command_is_read(text: str, wanted: object) -> None:
    assert parse_command(text, STATIONS) == wanted


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "is no command"),
        ("explode", "is no command"),
        ("stop now", "is no command"),
        ("cut a", "name two stations"),
        ("cut a d", "there is no station 'd'"),
        ("cut a a", "always hears itself"),
        ("partition a,b b", "in two groups"),
        ("set loss=much", "needs a number"),
        ("set colour=3", "sets nothing"),
    ],
)
def test_wrong_command_is_refused_with_its_reason(text: str, said: str) -> None:
    with pytest.raises(CommandError, match=said):
        parse_command(text, STATIONS)


def test_change_out_of_range_changes_nothing() -> None:
    made = hub()
    with pytest.raises(CommandError, match="loss is 0 to 100"):
        made.apply(parse_command("set loss=101", STATIONS))
    assert made.medium.air == AIR


def test_script_is_in_order_of_time_and_names_its_wrong_line() -> None:
    text = "# first\n20 heal\n  2.5 partition a b,c  # alone\n\n"
    assert parse_script(text, STATIONS) == (
        (2.5, Partition(groups=(("a",), ("b", "c")))),
        (20.0, Heal(pairs=None)),
    )
    for wrong in ("1 heal\nsoon heal", "1 heal\n2 explode", "1 heal\n-1 heal"):
        with pytest.raises(CommandError, match="line 2"):
            parse_script(wrong, STATIONS)


@pytest.mark.parametrize("wrong", [{"rate_mbit": 0}, {"delay_ms": -1}, {"loss_percent": 101}])
def test_impossible_air_is_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=r"must|loss"):
        Air(**wrong)  # type: ignore[arg-type]  # numbers only


def test_options_say_what_the_air_is() -> None:
    air = Air(rate_mbit=20, delay_ms=1, loss_percent=2, shared=False, multicast=False)
    line = ["run", "--station", "a", *air_options(air)]
    assert command_line._air(command_line.parser().parse_args(line)) == air


def test_reason_is_said_where_it_is_not_permitted(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse() -> None:
        raise Unavailable("network namespaces need root")

    monkeypatch.setattr(command_line, "require_permitted", refuse)
    assert command_line.main(["run", "--station", "a"]) == 3
    assert "not possible here: network namespaces need root" in capsys.readouterr().err
    assert command_line.main(["run", "--station", "a", "--loss", "101"]) == 2

"""Energy sums hold exactly whatever is booked."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from p2ptrain.energy.ledger import Interval, measure
from p2ptrain.energy.phases import PHASES, PhaseClock
from p2ptrain.energy.power_model import PowerModel, split

_COUNT = st.integers(0, 10**12)


@given(total=_COUNT, weights=st.lists(_COUNT, min_size=1, max_size=8))
def test_split_parts_add_up_and_follow_the_weights(total: int, weights: list[int]) -> None:
    parts = split(total, weights)
    assert sum(parts) == total
    whole = sum(weights)
    if whole:
        exact = [total * weight / whole for weight in weights]
        assert all(abs(p - e) <= 1 + 1e-6 * e for p, e in zip(parts, exact, strict=True))


@given(
    walls=st.lists(_COUNT, min_size=4, max_size=4),
    cpu_ns=_COUNT,
    sent=_COUNT,
    counter_uj=st.none() | _COUNT,
    watts=st.floats(0, 1000),
)
def test_phases_add_up_to_the_interval(
    walls: list[int], cpu_ns: int, sent: int, counter_uj: int | None, watts: float
) -> None:
    model = PowerModel(
        idle_watts=watts, core_watts=watts / 3, joules_per_byte=1e-7, cores=4, source="random"
    )
    interval = Interval(
        phase_ns=dict(zip(PHASES, walls, strict=True)),
        cpu_ns=cpu_ns,
        bytes_sent=sent,
        bytes_received=0,
        counter_uj=counter_uj,
    )
    amounts = measure(interval, model)
    assert amounts.whole.wall_ns == sum(walls)
    if counter_uj is None:
        assert amounts.whole.idle_uj == model.idle_uj(sum(walls))
        assert amounts.whole.marginal_uj == model.compute_uj(cpu_ns) + model.bytes_uj(sent)
    else:
        assert amounts.whole.total_uj <= counter_uj


@given(
    events=st.lists(
        st.tuples(st.sampled_from(PHASES), st.booleans(), st.floats(0, 100)), max_size=30
    )
)
def test_phase_clock_parts_add_up_to_wall_time(
    events: list[tuple[str, bool, float]],
) -> None:
    clock, begun, now = PhaseClock(0.0), dict.fromkeys(PHASES, 0), 0.0
    for name, begins, after_s in events:
        phase = next(one for one in PHASES if one == name)
        now += after_s
        if begins:
            clock.begin(phase, now)
            begun[phase] += 1
        elif begun[phase]:
            clock.end(phase, now)
            begun[phase] -= 1
    assert sum(clock.take(now + 1).values()) == round((now + 1) * 1e9)

"""The fuzzer's targets in small: its corpus, and seeds that were damaged at random."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tools.fuzz.targets import BYTES_PER_BYTE, TARGETS, Target, check, corpus
from tools.fuzz_wire import keep_new, report


@pytest.mark.parametrize("name", TARGETS)
def test_corpus_is_read_or_refused_within_its_memory(name: str) -> None:
    inputs = corpus(TARGETS[name])
    assert len(inputs) > 1
    for data in inputs:
        check(TARGETS[name], data)


@pytest.mark.parametrize("name", TARGETS)
@settings(max_examples=60)
@given(data=st.data())
def test_damaged_input_is_read_or_refused_within_its_memory(name: str, data: st.DataObject) -> None:
    inputs = corpus(TARGETS[name])
    damaged = bytearray(data.draw(st.sampled_from(inputs)))
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(damaged)))
        until = at + data.draw(st.integers(0, 8))
        damaged[at:until] = data.draw(st.binary(max_size=8))
    check(TARGETS[name], bytes(damaged))


def test_what_breaks_the_rules_is_found() -> None:
    def hoard(data: bytes) -> None:
        bytearray(BYTES_PER_BYTE * len(data) + 2_000_000)

    def crash(data: bytes) -> None:
        raise KeyError(data)

    for run, error in ((hoard, AssertionError), (crash, KeyError)):
        with pytest.raises(error):
            check(Target(name="broken", run=run, seeds=list), b"x")


def test_new_inputs_are_kept_once_and_shortest_first(
    monkeypatch: pytest.MonkeyPatch, tmp_path: pytest.TempPathFactory
) -> None:
    monkeypatch.setattr("tools.fuzz.targets.CORPUS", tmp_path)
    keep_new("hello", [b"long" * 500, b"ccc", b"a", b""])
    keep_new("hello", [b"bb", b"a"])
    lines = (tmp_path / "hello.hex").read_text().splitlines()
    assert [bytes.fromhex(line) for line in lines] == [b"a", b"ccc", b"bb"]


def test_campaign_is_told_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    report("hello", "#2 NEW cov: 7 ft: 9\nstat::number_of_executed_units: 12\nDONE")
    assert capsys.readouterr().out == "hello: number of executed units 12, places covered 7\n"

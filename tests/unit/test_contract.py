"""The numerics contract: which codecs there are, and what a run promises about its bits."""

from __future__ import annotations

import dataclasses

import pytest

from p2ptrain.training.contract import CODECS_OF_RUNS, PARALLELISMS, Contract, RuntimeBuild
from p2ptrain.training.tensor_codec import CODECS
from p2ptrain.wire.codec import from_plain, to_plain
from tests.bundles import contract_for, tiny_bundle

CONTRACT = contract_for(tiny_bundle(blocks=1))
OTHER = RuntimeBuild(runtime="r", version="2", numpy="2", machine="aarch64", isa="neon")


def test_contract_takes_every_codec_and_no_other() -> None:
    assert CODECS_OF_RUNS == CODECS
    digests = {dataclasses.replace(CONTRACT, codec=codec).digest for codec in CODECS}
    assert len(digests) == len(CODECS)
    with pytest.raises(ValueError, match="unknown codec 'fp8'"):
        dataclasses.replace(CONTRACT, codec="fp8")


@pytest.mark.parametrize(
    ("changes", "promise"),
    [
        ({}, "exact: one runtime build"),
        ({"codec": "bf16"}, "exact for one placement: bf16 rounds"),
        ({"codec": "int8"}, "exact for one placement: int8 rounds"),
        ({"parallelism": "auto"}, "within tolerance: several peers may share a stage"),
        ({"builds": (*CONTRACT.builds, OTHER)}, "within tolerance: 2 different"),
        ({"builds": (*CONTRACT.builds, OTHER), "codec": "bf16"}, "within tolerance: 2 different"),
    ],
)
def test_contract_says_how_exact_its_run_is(changes: dict[str, object], promise: str) -> None:
    assert dataclasses.replace(CONTRACT, **changes).exactness.startswith(promise)


def test_parallelism_is_part_of_it_where_it_is_not_the_default() -> None:
    found = {dataclasses.replace(CONTRACT, parallelism=each).digest for each in PARALLELISMS}
    assert len(found) == len(PARALLELISMS)
    plain = {name: value for name, value in to_plain(CONTRACT).items() if name != "parallelism"}
    assert from_plain(Contract, plain).digest == CONTRACT.digest, "as before there was a choice"
    with pytest.raises(ValueError, match="unknown parallelism 'rows'"):
        dataclasses.replace(CONTRACT, parallelism="rows")

"""Patterns over parameter names: what they fit, and what is said when they fit nothing."""

from __future__ import annotations

import pytest

from p2ptrain.errors import ConfigError
from p2ptrain.graph.name_patterns import chosen, fits

NAMES = (
    "embedding.weight",
    "encoder.layer.1.query.weight",
    "encoder.layer.1.query.bias",
    "encoder.layer.11.query_norm.weight",
    "classifier.weight",
)


@pytest.mark.parametrize(
    ("pattern", "places"),
    [
        ("query", (1, 2)),
        ("query.weight", (1,)),
        ("layer.1", (1, 2)),
        ("layer.1*", (1, 2, 3)),
        ("layer", (1, 2, 3)),
        ("encoder.*.query.*", (1, 2)),
        ("*.bias", (2,)),
        ("*", (0, 1, 2, 3, 4)),
        ("classifier", (4,)),
        ("embedding.weight", (0,)),
        ("query*", (1, 2, 3)),
        ("Query", ()),
        ("layer.1.", ()),
    ],
)
def test_a_pattern_fits_the_whole_name_or_a_run_of_its_parts(
    pattern: str, places: tuple[int, ...]
) -> None:
    assert tuple(i for i, name in enumerate(NAMES) if fits(name, (pattern,))) == places


def test_chosen_names_keep_their_order_and_come_once() -> None:
    found = chosen(NAMES, ("classifier", "query", "*.weight"), option="--freeze")
    assert found == NAMES


def test_a_pattern_without_a_name_is_refused_with_likely_ones() -> None:
    with pytest.raises(ConfigError, match="--freeze: no parameter's name fits 'clasifier'") as info:
        chosen(NAMES, ("query", "clasifier"), option="--freeze")
    assert "classifier" in info.value.hint
    with pytest.raises(ConfigError) as info:
        chosen(NAMES, ("zzz",), option="--train")
    assert info.value.hint == f"names are like {', '.join(NAMES[:3])}"

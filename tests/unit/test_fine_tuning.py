"""What the options of fine-tuning mean, and which of them are refused."""

from __future__ import annotations

import pytest

from p2ptrain.errors import ConfigError
from p2ptrain.graph.fine_tuning import FineTuning, Lora, parse_lora

NAMES = ("table", "block.0.query.weight", "block.0.query.bias", "head.weight")
LORA = Lora(rank=4, alpha=8.0, targets=("query",))


@pytest.mark.parametrize(
    ("text", "lora"),
    [
        ("r=8,alpha=16,targets=query,value", Lora(rank=8, alpha=16.0, targets=("query", "value"))),
        ("targets=all,r=4", Lora(rank=4, alpha=4.0, targets=("all",))),
        ("targets=a.*, b ,alpha=0.5,r=1", Lora(rank=1, alpha=0.5, targets=("a.*", "b"))),
    ],
)
def test_lora_is_read_from_one_option(text: str, lora: Lora) -> None:
    assert parse_lora(text) == lora


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("r=8", "needs r and targets"),
        ("targets=query", "needs r and targets"),
        ("r=8,targets=", "needs r and targets"),
        ("r=8,targets=a,,b", "needs r and targets"),
        ("8,targets=query", "'8' is not NAME=VALUE"),
        ("r=8,query", "'query' is not NAME=VALUE"),
        ("r=8,rank=8,targets=all", "'rank' is unknown or repeated"),
        ("r=8,r=9,targets=all", "'r' is unknown or repeated"),
        ("r=0,targets=all", "at least 1"),
        ("r=2,alpha=nan,targets=all", "at least 1"),
        ("r=2,alpha=inf,targets=all", "at least 1"),
        ("r=2.5,targets=all", "invalid literal"),
    ],
)
def test_lora_with_a_mistake_is_refused(text: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said) as info:
        parse_lora(text)
    assert "--lora r=8" in info.value.hint


@pytest.mark.parametrize(
    ("tuning", "frozen"),
    [
        (FineTuning(), ()),
        (FineTuning(freeze=("table", "*.bias")), ("table", "block.0.query.bias")),
        (FineTuning(train=("head",)), NAMES[:3]),
        (FineTuning(train=("block",), freeze=("*.bias",)), ("table", NAMES[2], "head.weight")),
        (FineTuning(lora=LORA), NAMES),
        (FineTuning(lora=LORA, train=("head",)), NAMES[:3]),
    ],
)
def test_what_is_frozen_follows_from_the_patterns(
    tuning: FineTuning, frozen: tuple[str, ...]
) -> None:
    assert tuning.frozen(NAMES) == frozen


@pytest.mark.parametrize(
    "tuning", [FineTuning(freeze=("*",)), FineTuning(train=("head",), freeze=("head",))]
)
def test_a_model_without_anything_to_train_is_refused(tuning: FineTuning) -> None:
    with pytest.raises(ConfigError, match="nothing is left to train"):
        tuning.frozen(NAMES)

"""What a person asks to be trained of a model, and what stays as it is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from p2ptrain.errors import ConfigError
from p2ptrain.graph.name_patterns import chosen

ALL_TARGETS: Final = ("all",)
_LORA_HINT: Final = "for example --lora r=8,alpha=16,targets=query,value"


@dataclass(frozen=True, slots=True, kw_only=True)
class Lora:
    """Low-rank adapters: their rank, their scale times the rank, and which matrices get one."""

    rank: int
    alpha: float
    targets: tuple[str, ...]
    """Patterns over parameter names; ALL_TARGETS: every matrix of a linear."""

    @property
    def scale(self) -> float:
        return self.alpha / self.rank


@dataclass(frozen=True, slots=True, kw_only=True)
class FineTuning:
    """Patterns over parameter names; with none of them everything is trained."""

    lora: Lora | None = None
    freeze: tuple[str, ...] = ()
    train: tuple[str, ...] = ()
    """Where given, or with adapters, what these do not fit is frozen."""

    def frozen(self, parameters: Sequence[str]) -> tuple[str, ...]:
        """The parameters that stay as they are, in their order.

        Raises:
            ConfigError: a pattern fits nothing, or nothing is left to train.
        """
        held = set(chosen(parameters, self.freeze, option="--freeze"))
        trained = set(chosen(parameters, self.train, option="--train"))
        if self.train or self.lora is not None:
            held |= set(parameters) - trained
        if self.lora is None and held.issuperset(parameters):
            raise ConfigError(
                "nothing is left to train", hint="freeze less, or name something with --train"
            )
        return tuple(name for name in parameters if name in held)


def parse_lora(text: str) -> Lora:
    """`r=8,alpha=16,targets=query,value`; alpha is the rank where it is not given.

    Raises:
        ConfigError: an unknown or repeated word, no rank or targets, or a value out of range.
    """
    words: dict[str, list[str]] = {}
    latest = ""
    for part in text.split(","):
        name, separator, value = part.partition("=")
        if separator:
            latest = name.strip()
            if latest in words or latest not in ("r", "alpha", "targets"):
                raise ConfigError(f"--lora: {latest!r} is unknown or repeated", hint=_LORA_HINT)
            words[latest] = [value.strip()]
        elif latest == "targets":
            words[latest].append(part.strip())
        else:
            raise ConfigError(f"--lora: {part!r} is not NAME=VALUE", hint=_LORA_HINT)
    targets = tuple(words.get("targets", ()))
    if not targets or not all(targets) or "r" not in words:
        raise ConfigError("--lora needs r and targets", hint=f"{_LORA_HINT}, or targets=all")
    return _lora(words["r"][0], words.get("alpha", words["r"])[0], targets)


def _lora(rank: str, alpha: str, targets: tuple[str, ...]) -> Lora:
    try:
        made = Lora(rank=int(rank), alpha=float(alpha), targets=targets)
    except ValueError as error:
        raise ConfigError(f"--lora: {error}", hint=_LORA_HINT) from error
    if made.rank < 1 or not 0.0 < made.alpha < float("inf"):
        raise ConfigError("--lora: r is at least 1 and alpha above 0", hint=_LORA_HINT)
    return made

"""A torch module with what it eats, and how to call it."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch

from p2ptrain.bundle.manifest import Initialiser
from p2ptrain.errors import GraphError
from p2ptrain.graph.sources.inputs import Input


@dataclass(frozen=True, slots=True, kw_only=True)
class TorchModel:
    """A module and the arguments of its `forward`."""

    module: Any  # Any: a torch module; torch is untyped here
    inputs: dict[str, Input]
    """By the parameter of `forward` that takes it."""
    fixed: Mapping[str, Any] = field(default_factory=dict)  # Any: whatever `forward` takes
    """Further arguments: `use_cache=False`."""
    plain_operators: Callable[[], AbstractContextManager[None]] = contextlib.nullcontext
    """While it is entered the module computes the same with operators that can be exported."""

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(each.name for each in self.inputs.values())

    @property
    def has_sequence(self) -> bool:
        return any("sequence" in each.axes for each in self.inputs.values())

    @property
    def is_recurrent(self) -> bool:
        """Whether a part of it goes through the sequence step by step, as far as types tell."""
        return any(isinstance(part, torch.nn.RNNBase) for part in self.module.modules())

    def own_copy(self) -> Any:  # Any: a torch module
        """A copy that nobody else uses; nothing in it works in place, which would be traced into
        other operators than the same thing out of place."""
        copied = copy.deepcopy(self.module)
        for part in copied.modules():
            if isinstance(getattr(part, "inplace", None), bool):
                part.inplace = False
        return copied

    def arguments(self, tensors: Mapping[str, Any]) -> dict[str, Any]:  # Any: torch tensors
        """Keyword arguments of `forward`, from tensors by input name."""
        given = {parameter: tensors[each.name] for parameter, each in self.inputs.items()}
        return {**given, **self.fixed}

    def parameter_names(self) -> dict[str, str]:
        """Every name of every parameter -> its first name; tied ones have several."""
        first: dict[int, str] = {}
        return {
            name: first.setdefault(id(parameter), name)
            for name, parameter in self.module.named_parameters(remove_duplicate=False)
        }

    def initialisers(self) -> dict[str, Initialiser]:
        """How each parameter and running value is drawn: as the module says, else from the values
        that it has now."""
        said = self.module.initialisers() if hasattr(self.module, "initialisers") else {}
        chosen = {}
        for name, value in (*self.module.named_parameters(), *self.module.named_buffers()):
            if value.is_floating_point():
                kind, scale = said.get(name) or _measured(value.detach())
                chosen[name] = Initialiser(kind=kind, scale=round(scale, 9))
        return chosen


def logits_of(result: Any) -> Any:  # Any: what a module gives, and a torch tensor
    """The logits in what `forward` gave: a tensor, a tuple that begins with it, or a mapping.

    Raises:
        GraphError: none of these.
    """
    if isinstance(result, Mapping):
        result = result["logits"] if "logits" in result else next(iter(result.values()))
    if isinstance(result, tuple | list) and result:
        result = result[0]
    if not hasattr(result, "detach"):
        raise GraphError(
            f"the module gives a {type(result).__name__}, not a tensor of logits",
            hint="let forward return logits, or a tuple or mapping that begins with them",
        )
    return result


def _measured(value: Any) -> tuple[str, float]:  # Any: a torch tensor
    low, high = float(value.min()), float(value.max())
    if low == high and low in (0.0, 1.0):
        return ("ones" if low else "zeros"), 0.0
    return "normal", float((value**2).mean() ** 0.5)

"""Whether a torch module evaluates as it trains, but for dropout and BatchNorm.

Torch's exporter takes nearly all of the time of an export, and where this holds one trace gives
the graphs of both modes. It is told by what the module calls in each: every function of torch with
its arguments, where a tensor counts as the call that made it. What cannot be followed so (a
scripted function, a tensor that the module keeps beside its parameters and buffers) counts as a
difference.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from types import EllipsisType, NoneType
from typing import Any, Final

import torch
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from p2ptrain.graph.sources.simplify import quiet
from p2ptrain.graph.sources.torch_model import TorchModel, logits_of

Told = tuple[Any, ...]  # Any: comparable descriptions of calls

_PLAIN: Final = (
    bool, int, float, complex, str, NoneType, EllipsisType,
    torch.dtype, torch.device, torch.layout, torch.memory_format,
)  # fmt: skip
_RECURRENT: Final = (torch.lstm, torch.gru, torch.rnn_tanh, torch.rnn_relu)
_DROPOUT_AT, _TRAINING_AT = 5, 6
"""Places among the arguments of `_RECURRENT` for tensors that are not packed."""
_COUNT: Final = "num_batches_tracked"
_IN_PLACE: Final = re.compile(
    r".*[^_]_|__i(add|sub|mul|div|truediv|floordiv|mod|pow|and|or|xor|lshift|rshift)__"
    r"|__(setitem|set)__"
)
"""Names of functions that change their first argument."""


def evaluates_as_it_trains(model: TorchModel, tensors: tuple[Any, ...]) -> bool:
    """Whether both modes call the same but for dropout, which drops out in training only, and
    BatchNorm, which takes the batch's statistics in training only.

    The module is run twice on `tensors` (one per data input, in order), in copies of its own and
    without touching torch's generator. False also where it cannot be run.
    """
    try:
        with quiet(), torch.random.fork_rng(devices=[]), torch.no_grad(), model.plain_operators():
            training, evaluation = (_calls(model, tensors, mode) for mode in (True, False))
    except Exception:  # whatever a module raises; its trace will say it in words
        return False
    return training == evaluation


def _calls(model: TorchModel, tensors: tuple[Any, ...], training: bool) -> list[Told]:
    """Every call of torch in one mode, and where the logits come from. (Any: torch tensors.)"""
    module = model.own_copy().train(training)
    recorder = _Recorder(module, training=training)
    recorder.tell(tensors, is_new=True)
    with recorder:
        result = module(**model.arguments(dict(zip(model.names, tensors, strict=True))))
    return [*recorder.calls, recorder.tell([logits_of(result)])]


class _Recorder(TorchFunctionMode):  # type: ignore[misc]  # torch is untyped here
    """Writes down what is called while it is entered."""

    def __init__(self, module: Any, *, training: bool) -> None:  # Any: a torch module
        super().__init__()
        self.calls: list[Told] = []
        self._training = training
        self._has_dropped = False
        self._places: dict[int, int] = {}
        self._kept: list[Any] = []  # Any: torch tensors, whose ids must not be used again
        named = (
            *module.named_parameters(remove_duplicate=False),
            *module.named_buffers(remove_duplicate=False),
        )
        self.tell([value for _, value in named], is_new=True)
        self._counts = {id(value) for name, value in named if name.endswith(_COUNT)}

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:  # Any: whatever the functions of torch take and give
        given = dict(kwargs or {})
        if function is functional.dropout:
            return self._drop(args[0], given)
        if function is not torch.Tensor.add_ or id(args[0]) not in self._counts:
            self.calls.append((function, *self._told_call(function, args, dict(given))))
        result = function(*args, **given)
        self.tell(result, is_new=True)
        return result

    def _drop(self, value: Any, given: dict[str, Any]) -> Any:  # Any: a torch tensor
        """What is dropped out counts as what it is made of, which it is in evaluation mode."""
        result = functional.dropout(value, **given)
        self.calls.append((*self.tell(value), given["training"] == self._training))
        self._places[id(result)] = self._places.get(id(value), -1)
        self._kept.append(result)
        self._has_dropped = True
        return result

    def _told_call(self, function: Callable[..., Any], args: Told, kwargs: dict[str, Any]) -> Told:
        """A call's arguments, without what the two modes may differ in."""
        changes = _IN_PLACE.fullmatch(getattr(function, "__name__", "")) or kwargs.get("inplace")
        if self._has_dropped and (changes or kwargs.get("out") is not None):
            return (object(),)  # in evaluation it would change what went into the dropout
        if function is functional.batch_norm:
            told = kwargs.pop("training") == self._training
            del kwargs["momentum"]
            return (*self.tell(args), told, *self.tell(kwargs))
        if function in _RECURRENT and args[_DROPOUT_AT] == 0.0:
            args = (*args[:_TRAINING_AT], *args[_TRAINING_AT + 1 :])
        return (*self.tell(args), *self.tell(kwargs))

    def tell(self, value: Any, *, is_new: bool = False) -> Told:  # Any: see above
        """A description that equals the other mode's only if the value does.

        Args:
            is_new: Tensors that are not known become known; else they equal nothing.
        """
        if isinstance(value, torch.Tensor):
            if is_new and id(value) not in self._places:
                self._places[id(value)] = len(self._kept)
                self._kept.append(value)
            return ("tensor", self._places.get(id(value), object()))
        if isinstance(value, dict):
            return tuple((repr(k), self.tell(v, is_new=is_new)) for k, v in value.items())
        if isinstance(value, tuple | list):
            return tuple(self.tell(each, is_new=is_new) for each in value)
        if isinstance(value, slice):
            return ("slice", *self.tell([value.start, value.stop, value.step], is_new=is_new))
        return (repr(value),) if isinstance(value, _PLAIN) else (object(),)

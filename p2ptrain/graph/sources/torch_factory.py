"""A source from a function that makes a torch module: `package.module:callable`.

What the module eats is read from its `forward` and from what it says of itself:

- `vocabulary` and `context` (integers): one input of token ids, (batch, sequence) int64; beside
  `input_ids` or `ids` also `attention_mask` (0 where a text is filled up) and `token_type_ids`;
- `special_tokens` (ids by role: pad, cls, sep, mask, unknown): what goes around a text's bytes;
- `input_shape` (sizes of one sample): one input of features or pixels, float32;
- otherwise every input is named on the command line.
"""

from __future__ import annotations

import importlib
import inspect
import re
from typing import Any, Final

import torch

from p2ptrain.bundle.manifest import BATCH
from p2ptrain.errors import ConfigError
from p2ptrain.graph.source import Source
from p2ptrain.graph.sources.inputs import SEQUENCE, Input, parse_input, text_inputs
from p2ptrain.graph.sources.requests import Request
from p2ptrain.graph.sources.tasks import Images, Text, choose_task
from p2ptrain.graph.sources.torch_model import TorchModel
from p2ptrain.graph.sources.torch_source import About, torch_source

_SHAPE_SUFFIX: Final = re.compile(r"_[A-Z]+$")


def factory_source(place: str, request: Request) -> Source:
    """Make the module and trace it.

    Raises:
        ConfigError: no such factory, arguments that it does not take, or inputs, task and module
            that do not fit together.
        GraphError: torch cannot export the module.
    """
    module = make_module(place, request.arguments).float()
    return module_source(module, request, place=place)


def make_module(place: str, arguments: dict[str, Any]) -> Any:  # Any: a torch module
    """What the factory makes; ConfigError says what is wrong with the name or the arguments."""
    path, separator, name = place.partition(":")
    if not separator:
        raise ConfigError(f"--model {place!r} is not MODULE:FUNCTION, a folder or an ONNX file")
    try:
        factory = getattr(importlib.import_module(path), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(f"--model {place!r}: {error}") from error
    try:
        module = factory(**arguments)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ConfigError(
            f"--model {place!r}: {error}", hint="--arg NAME=VALUE gives the factory's arguments"
        ) from error
    if not isinstance(module, torch.nn.Module):
        raise ConfigError(f"--model {place!r} gives a {type(module).__name__}, not a torch module")
    return module


def module_source(module: Any, request: Request, *, place: str = "") -> Source:
    """The source of a module that is already there. (Any: a torch module.)"""
    vocabulary, context = (_integer(module, name) for name in ("vocabulary", "context"))
    inputs = _inputs(module, request, vocabulary)
    has_sequence = any(SEQUENCE in each.axes for each in inputs.values())
    if request.task is None and not (vocabulary and context and has_sequence):
        raise ConfigError(
            f"--model {place!r}: the module does not say its task", hint="give --task"
        )
    task = choose_task(
        request.task or "language-modelling",
        loss=request.loss,
        label_smoothing=request.label_smoothing,
    )
    about = About(
        text=_text(module, request, vocabulary, place) if has_sequence else None,
        images=Images() if _is_image(inputs) else None,
    )
    return torch_source(TorchModel(module=module, inputs=inputs), task, request, about)


def _integer(module: Any, name: str) -> int | None:  # Any: a torch module
    value = getattr(module, name, None)
    return value if isinstance(value, int) and value > 0 else None


def _inputs(module: Any, request: Request, vocabulary: int | None) -> dict[str, Input]:
    """Inputs by the parameter of forward. (Any: a torch module.)"""
    parameters = inspect.signature(module.forward).parameters.values()
    takes = [p.name for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    by_name = {_SHAPE_SUFFIX.sub("", name): name for name in takes}
    if request.inputs:
        said = [parse_input(text, high=vocabulary or 2) for text in request.inputs]
        unknown = [each.name for each in said if each.name not in by_name]
        if unknown:
            raise ConfigError(
                f"--input {unknown[0]!r}: forward takes no such argument",
                hint=f"it takes {', '.join(by_name) or 'nothing'}",
            )
        return {by_name[each.name]: each for each in said}
    needed = [p.name for p in parameters if p.default is p.empty and p.name in takes]
    names = [_SHAPE_SUFFIX.sub("", parameter) for parameter in needed]
    texts = text_inputs(names, vocabulary=vocabulary) if vocabulary is not None else None
    if texts is not None:
        return dict(zip(needed, texts, strict=True))
    if len(needed) == 1 and vocabulary is None:
        shape = getattr(module, "input_shape", None)
        if isinstance(shape, tuple | list) and all(isinstance(size, int) for size in shape):
            axes = (BATCH, *map(str, shape))
            return {needed[0]: Input(name=names[0], dtype="float32", axes=axes)}
    raise ConfigError(
        f"the module does not say what its inputs ({', '.join(needed)}) are",
        hint="give --input NAME=DTYPE:batch,SIZE,... for each, or vocabulary and context",
    )


def _text(module: Any, request: Request, vocabulary: int | None, place: str) -> Text:
    """How text is cut into samples. (Any: a torch module.)"""
    context = _integer(module, "context")
    length = request.context or context
    if length is None:
        raise ConfigError(
            f"--model {place!r}: the module has no integer 'context'", hint="give --context"
        )
    if context is not None and length > context:
        raise ConfigError(f"--context {length} is more than the module's {context}")
    special_tokens = getattr(module, "special_tokens", {})
    return Text(vocabulary=vocabulary or 0, context=length, special_tokens=special_tokens)


def _is_image(inputs: dict[str, Input]) -> bool:
    (first, *others) = inputs.values()
    return not others and first.dtype == "float32" and len(first.axes) == 4

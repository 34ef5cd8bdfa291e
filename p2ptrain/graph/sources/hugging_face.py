"""A source from a Hugging Face configuration or model folder, by transformers, never online.

The folder holds `config.json` and, as far as it has them, `model.safetensors` (one file or shards
with an index), `tokenizer.json` and `preprocessor_config.json`.
"""

from __future__ import annotations

import hashlib
import inspect
import json
from pathlib import Path
from typing import Any, Final

import torch
import transformers
from numpy.typing import NDArray

from p2ptrain.bundle.manifest import BATCH
from p2ptrain.errors import ConfigError
from p2ptrain.graph.source import Source
from p2ptrain.graph.sources.inputs import IDS, MASK, SEQUENCE, TYPES, Input
from p2ptrain.graph.sources.plain_masks import plain_masks
from p2ptrain.graph.sources.requests import Request
from p2ptrain.graph.sources.tasks import Images, Task, Text, choose_task
from p2ptrain.graph.sources.tokenizer_file import TOKENIZER, special_tokens
from p2ptrain.graph.sources.torch_model import TorchModel
from p2ptrain.graph.sources.torch_source import About, torch_source
from p2ptrain.ids import Digest

Array = NDArray[Any]  # Any: float32 values

CONFIG: Final = "config.json"
WEIGHTS: Final = ("model.safetensors", "model.safetensors.index.json")
PIXELS: Final = "pixel_values"
FIXED: Final = {"use_cache": False, "return_dict": True}
_CLASSES: Final = {
    "language-modelling": ("AutoModelForCausalLM",),
    "masked-language-modelling": ("AutoModelForMaskedLM",),
    "sequence-classification": ("AutoModelForSequenceClassification",),
    "token-classification": ("AutoModelForTokenClassification",),
    "image-classification": ("AutoModelForImageClassification",),
    "regression": ("AutoModelForSequenceClassification", "AutoModelForImageClassification"),
}


def folder_source(path: Path, request: Request) -> Source:
    """Read the configuration, make the model with its weights or without, and trace it.

    Args:
        path: The folder, or a configuration file.

    Raises:
        ConfigError: a file is missing or wrong, weights do not fit, or no task can be told.
        GraphError: torch cannot export the model.
    """
    folder = path if path.is_dir() else path.parent
    config = _configuration(path, request.arguments)
    task = choose_task(
        request.task or _task_of(config), loss=request.loss, label_smoothing=request.label_smoothing
    )
    has_weights = path.is_dir() and any((folder / name).is_file() for name in WEIGHTS)
    class_ = _class_for(config, task)
    if has_weights and request.use_weights:
        module, weights = _with_weights(class_, folder, config)
    else:
        module, weights = _drawn(class_, config), {}
    parameters = inspect.signature(module.forward).parameters
    inputs = _inputs(module, task, parameters)
    model = TorchModel(
        module=module,
        inputs=inputs,
        fixed={name: value for name, value in FIXED.items() if name in parameters},
        plain_operators=plain_masks,
    )
    files: dict[str, bytes] = {}
    text = _text(folder, config, request, files) if IDS in inputs else None
    about = About(
        text=text,
        images=_images(folder) if PIXELS in inputs else None,
        class_names=_class_names(config),
        weights=weights,
        files=files,
    )
    return torch_source(model, task, request, about)


def _configuration(path: Path, overrides: dict[str, Any]) -> Any:  # Any: a transformers config
    file = path / CONFIG if path.is_dir() else path
    try:
        document = json.loads(file.read_bytes())
    except OSError as error:
        raise ConfigError(f"cannot read {file}: {error.strerror}") from error
    except ValueError as error:
        raise ConfigError(f"{file} is not JSON: {error}") from error
    kind = document.get("model_type") if isinstance(document, dict) else None
    if not isinstance(kind, str) or kind not in transformers.CONFIG_MAPPING:
        raise ConfigError(
            f"{file}: transformers {transformers.__version__} knows no model type {kind!r}",
            hint="a configuration names its `model_type`, one that this transformers has",
        )
    try:
        config = transformers.CONFIG_MAPPING[kind].from_dict(document)
        for name, value in overrides.items():
            if not hasattr(config, name):
                raise ConfigError(f"--arg {name}: the configuration of {kind!r} has no such field")
            setattr(config, name, value)
    except ConfigError:
        raise
    except Exception as error:  # validators of transformers raise exceptions of several kinds
        raise ConfigError(f"{file}: {_first_line(error)}") from error
    config._attn_implementation = "eager"
    return config


def _task_of(config: Any) -> str:  # Any: a transformers config
    """The task whose head class the configuration names in `architectures`."""
    named = config.architectures or []
    for task, names in _CLASSES.items():
        for name in names:
            if any(each.__name__ in named for each in _heads(name, config)):
                return task
    said = ", ".join(named) or "no architecture"
    raise ConfigError(f"the configuration names {said}, which tells no task", hint="give --task")


def _heads(auto: str, config: Any) -> tuple[Any, ...]:  # Any: transformers' classes
    mapping = getattr(transformers, auto)._model_mapping
    if type(config) not in mapping:
        return ()
    found = mapping[type(config)]
    return tuple(found) if isinstance(found, tuple | list) else (found,)


def _class_for(config: Any, task: Task) -> Any:  # Any: transformers' classes
    """The class with the task's head; the one that the configuration names, if there are two."""
    heads = [head for auto in _CLASSES[task.name] for head in _heads(auto, config)]
    if not heads:
        raise ConfigError(
            f"transformers has no {task.name} head for model type {config.model_type!r}"
        )
    named = config.architectures or []
    return next((head for head in heads if head.__name__ in named), heads[0])


def _drawn(class_: Any, config: Any) -> Any:  # Any: transformers' classes
    torch.manual_seed(0)
    try:
        return class_._from_config(config, attn_implementation="eager").float()
    except Exception as error:  # a constructor's own, of any kind
        raise ConfigError(f"the configuration makes no model: {_first_line(error)}") from error


def _with_weights(
    class_: Any, folder: Path, config: Any
) -> tuple[Any, dict[str, Array]]:  # Any: transformers' classes
    """The model with its weights as float32, and those that the folder had.

    Raises:
        ConfigError: a tensor of the backbone is missing, or one has another shape; a head that
            is missing is drawn, as every fine-tuning begins, and so is what the architecture that
            the weights were saved from never had: BERT's pooler after masked language modelling.
    """
    try:
        module, found = class_.from_pretrained(
            folder,
            config=config,
            local_files_only=True,
            use_safetensors=True,
            attn_implementation="eager",
            dtype=torch.float32,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )
    except Exception as error:  # of safetensors and transformers, of several kinds
        raise ConfigError(f"{folder}: cannot read the weights: {_first_line(error)}") from error
    if found["mismatched_keys"]:
        name, have, want = sorted(found["mismatched_keys"])[0]
        raise ConfigError(
            f"{folder}: {name!r} has shape {tuple(have)}, the configuration says {tuple(want)}",
            hint="--no-weights draws the parameters; or correct the configuration",
        )
    missing = set(found["missing_keys"])
    backbone = f"{module.base_model_prefix}."
    absent = sorted(name for name in missing if name.startswith(backbone))
    lost = [name for name in absent if _was_saved(name, config)] if absent else []
    if lost:
        raise ConfigError(
            f"{folder}: the weights have no {lost[0]!r} ({len(lost)} tensors are missing)",
            hint="--no-weights draws the parameters",
        )
    return module, {
        name: value.detach().numpy()
        for name, value in (*module.named_parameters(), *module.named_buffers())
        if name not in missing and value.is_floating_point()
    }


def _was_saved(name: str, config: Any) -> bool:  # Any: a transformers config
    """Whether weights of the architecture that the configuration names hold this tensor.

    Without a name that transformers knows they should hold every one.
    """
    named = config.architectures or []
    heads = (head for autos in _CLASSES.values() for auto in autos for head in _heads(auto, config))
    saved_as = next((head for head in heads if head.__name__ in named), None)
    if saved_as is None:
        return True
    with torch.device("meta"):  # names alone, no memory
        return name in saved_as._from_config(config).state_dict()


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def _inputs(module: Any, task: Task, parameters: Any) -> dict[str, Input]:
    """Pixels, or token ids with padding mask and token types where samples have several lengths.

    (Any: a torch module, and the parameters of its forward.)
    """
    config = module.config
    if module.main_input_name == PIXELS and PIXELS in parameters:
        size = config.image_size
        height, width = size if isinstance(size, list | tuple) else (size, size)
        sample = (str(config.num_channels), str(height), str(width))
        return {PIXELS: Input(name=PIXELS, dtype="float32", axes=(BATCH, *sample))}
    if module.main_input_name != IDS or IDS not in parameters:
        raise ConfigError(f"models that eat {module.main_input_name!r} cannot be exported yet")
    axes = (BATCH, SEQUENCE)
    inputs = {IDS: Input(name=IDS, dtype="int64", axes=axes, high=config.vocab_size)}
    if task.name in ("language-modelling", "masked-language-modelling"):
        return inputs  # windows are full
    if MASK in parameters:
        inputs[MASK] = Input(name=MASK, dtype="int64", axes=axes, is_padding_mask=True)
    if TYPES in parameters:
        high = getattr(config, "type_vocab_size", None) or 1
        inputs[TYPES] = Input(name=TYPES, dtype="int64", axes=axes, high=high)
    return inputs


def _text(
    folder: Path, config: Any, request: Request, files: dict[str, bytes]
) -> Text:  # Any: a transformers config
    """The tokenizer, which joins the bundle's files, and the length of a sample."""
    longest = getattr(config, "max_position_embeddings", None)
    context = request.context or longest
    if not context:
        raise ConfigError("the configuration does not say how long a text may be", hint="--context")
    if longest and context > longest:
        raise ConfigError(f"--context {context} is more than the model's {longest} positions")
    pad = getattr(config, "pad_token_id", None)
    known = {"pad": pad} if isinstance(pad, int) and pad >= 0 else {}
    if not (folder / TOKENIZER).is_file():
        return Text(vocabulary=config.vocab_size, context=context, special_tokens=known)
    content = files[TOKENIZER] = (folder / TOKENIZER).read_bytes()
    return Text(
        vocabulary=config.vocab_size,
        context=context,
        tokenizer=TOKENIZER,
        tokenizer_digest=Digest(hashlib.sha256(content).hexdigest()),
        special_tokens={**known, **special_tokens(folder, content)},
    )


def _images(folder: Path) -> Images:
    """Mean and deviation of the folder's image processor, where it has one."""
    file = folder / "preprocessor_config.json"
    if not file.is_file():
        return Images()
    try:
        document = json.loads(file.read_bytes())
        mean, std = document.get("image_mean") or (), document.get("image_std") or ()
        if document.get("do_normalize") is False:
            return Images()
        return Images(mean=tuple(map(float, mean)), std=tuple(map(float, std)))
    except (ValueError, TypeError, AttributeError) as error:
        raise ConfigError(f"{file}: {error}") from error


def _class_names(config: Any) -> tuple[str, ...]:  # Any: a transformers config
    """By label; empty where the configuration has transformers' placeholders."""
    names = [config.id2label[index] for index in sorted(config.id2label)]
    if all(name == f"LABEL_{index}" for index, name in enumerate(names)):
        return ()
    return tuple(names)

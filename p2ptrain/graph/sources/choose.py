"""Tell what kind of model was named, and read it."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Final

from p2ptrain.errors import ConfigError
from p2ptrain.graph.sources.requests import Request

if TYPE_CHECKING:
    from p2ptrain.graph.source import Source

EXTRAS: Final = frozenset(
    {"torch", "onnx", "onnxscript", "transformers", "tokenizers", "safetensors"}
)


@contextlib.contextmanager
def with_extras() -> Iterator[None]:
    """Say how to install what an import inside does not find.

    Raises:
        ConfigError: one of the exporter's own dependencies is missing.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in EXTRAS:
            raise
        raise ConfigError(
            f"exporting needs {error.name}, which is not installed",
            hint="pip install 'p2ptrain[export]' on x86-64 Linux, Python 3.11 or 3.12",
        ) from error


def source_of(model: str, request: Request) -> Source:
    """The source behind `module:function`, a model folder or its config.json, or an ONNX file.

    Raises:
        ConfigError: nothing of the kind is there.
        GraphError: the model cannot be exported.
    """
    path = Path(model)
    # transformers must not look for anything online, whatever the folder lacks.
    os.environ["HF_HUB_OFFLINE"] = os.environ["TRANSFORMERS_OFFLINE"] = "1"
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    if path.suffix == ".onnx":
        from p2ptrain.graph.sources.onnx_file import file_source

        return file_source(path, request)
    if path.suffix == ".json" or path.is_dir():
        from p2ptrain.graph.sources.hugging_face import folder_source

        return folder_source(path, request)
    from p2ptrain.graph.sources.torch_factory import factory_source

    return factory_source(model, request)

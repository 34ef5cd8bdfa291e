"""A tiny decoder, exported once for all tests of this folder, and families traced once.

Without torch and onnxscript the folder is not collected: nothing in it can run.
"""

from __future__ import annotations

import functools
import gc
import importlib.util
import json
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from p2ptrain.graph.export import Bundle, export
from p2ptrain.graph.source import Source
from p2ptrain.graph.sources.requests import Request
from tests.export.configurations import Family, write

if TYPE_CHECKING:
    from onnx_models.gpt import Gpt

if not all(importlib.util.find_spec(name) for name in ("torch", "onnxscript")):
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """On a busy machine torch's threads wait for each other far longer than they compute."""
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def one_registry() -> Iterator[None]:
    """torch reads the source of each of its ONNX functions again for every trace, which is nearly
    half of the time that a small model takes. What it makes of them only depends on the opset."""
    from torch.onnx._internal.exporter._registration import ONNXRegistry

    made = staticmethod(functools.cache(ONNXRegistry.from_torchlib))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ONNXRegistry, "from_torchlib", made)
        yield


@pytest.fixture(scope="session", autouse=True)
def few_collections() -> Iterator[None]:
    """Torch and transformers are a million objects that stay, and a trace makes many more: going
    through all of them again and again took an eighth of the time."""
    import transformers  # noqa: F401

    usual = gc.get_threshold()
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 20)
    yield
    gc.set_threshold(*usual)
    gc.unfreeze()


@pytest.fixture(scope="session", autouse=True)
def one_trace() -> Iterator[None]:
    """A model of transformers is traced once, whatever its weights and whatever is tuned of it: a
    trace follows from the configuration, the inputs, and names, sizes and types of tensors."""
    from p2ptrain.graph.sources import torch_source
    from p2ptrain.graph.sources.torch_model import TorchModel
    from p2ptrain.graph.sources.torch_tracing import BothModes, trace_both

    traces: dict[object, BothModes] = {}

    def traced(model: TorchModel, *, context: int) -> BothModes:
        if not hasattr(model.module, "config"):
            return trace_both(model, context=context)
        tensors = tuple((n, v.shape, v.dtype) for n, v in model.module.state_dict().items())
        config = {**model.module.config.to_dict(), "_name_or_path": ""}
        said = (json.dumps(config, sort_keys=True), tuple(model.parameter_names().items()))
        key = (type(model.module), said, tuple(model.inputs.items()), context, tensors)
        if key not in traces:
            traces[key] = trace_both(model, context=context)
        return copied(traces[key])

    def copied(both: BothModes) -> BothModes:
        parts = (both.training, both.inference)
        training, inference = (replace(part, graph=part.graph.copy()) for part in parts)
        return BothModes(training=training, inference=inference)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch_source, "trace_both", traced)
        yield


@pytest.fixture(scope="session")
def module() -> Gpt:
    from onnx_models.gpt import gpt

    return gpt(layers=2, width=30, heads=5, vocabulary=40, context=16, dropout=0.25)


@pytest.fixture(scope="session")
def source(module: Gpt) -> Source:
    from p2ptrain.graph.sources.torch_factory import module_source

    return module_source(module, Request(name="tiny", description="for tests"))


@pytest.fixture(scope="session")
def bundle(source: Source) -> Bundle:
    return export(source)


@pytest.fixture(scope="session")
def family(tmp_path_factory: pytest.TempPathFactory) -> Family:
    from p2ptrain.graph.sources.hugging_face import folder_source

    @functools.cache
    def traced(kind: str, task: str) -> Source:
        folder = tmp_path_factory.mktemp(kind)
        if kind == "gpt2":  # says its task itself
            write(folder, kind, architectures=["GPT2LMHeadModel"])
            return folder_source(folder, Request(name=kind))
        write(folder, kind, num_labels=1 if task == "regression" else 5)
        return folder_source(folder, Request(name=kind, task=task))

    return traced

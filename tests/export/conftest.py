"""A tiny decoder, exported once for all tests of this folder, and families traced once.

Without torch and onnxscript the folder is not collected: nothing in it can run.
"""

from __future__ import annotations

import functools
import gc
import importlib.util
from collections.abc import Iterator
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

"""A tiny decoder, exported once for all tests of this folder.

Without torch and onnxscript the folder is not collected: nothing in it can run.
"""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING

import pytest

from p2ptrain.graph.export import Bundle, export
from p2ptrain.graph.source import Source
from p2ptrain.graph.sources.requests import Request

if TYPE_CHECKING:
    from onnx_models.gpt import Gpt

if not all(importlib.util.find_spec(name) for name in ("torch", "onnxscript")):
    collect_ignore_glob = ["test_*.py"]


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

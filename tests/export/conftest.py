"""A tiny decoder, exported once for all tests of this folder.

Without torch and onnxscript the folder is not collected: nothing in it can run.
"""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING

import pytest

from p2ptrain.graph.export import Bundle, export
from p2ptrain.graph.torch_export import Description, decoder_source

if TYPE_CHECKING:
    from onnx_models.gpt import Gpt

if not all(importlib.util.find_spec(name) for name in ("torch", "onnxscript")):
    collect_ignore_glob = ["test_*.py"]

ABOUT = Description(name="tiny", description="for tests", vocabulary=40, context=16)


@pytest.fixture(scope="session")
def module() -> Gpt:
    from onnx_models.gpt import gpt

    return gpt(layers=2, width=30, heads=5, vocabulary=40, context=16, dropout=0.25)


@pytest.fixture(scope="session")
def bundle(module: Gpt) -> Bundle:
    return export(decoder_source(module, ABOUT))

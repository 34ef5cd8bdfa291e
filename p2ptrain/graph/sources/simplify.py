"""Fold constants and drop what is redundant in a traced model, quietly."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Callable, Iterator
from typing import Final

import onnx
from onnxscript import optimizer

_LOGGERS: Final = ("torch.onnx", "torch.export", "torch.__trace", "onnxscript")


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """torch warns of training mode, of torchvision and of itself; none of it is news here."""
    loggers = [logging.getLogger(name) for name in _LOGGERS]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def simplify(model: onnx.ModelProto) -> onnx.ModelProto:
    """The optimised model; call it only when parameters are inputs, or equal ones are merged."""
    optimise: Callable[..., onnx.ModelProto] = optimizer.optimize
    with quiet():
        return optimise(model)

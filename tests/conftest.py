"""For every test: what is in memory once all tests are known is not looked through again."""

from __future__ import annotations

import gc

import pytest


@pytest.hookimpl(trylast=True)
def pytest_collection_finish() -> None:
    """Leave modules, pytest and the tests themselves out of every later collection.

    Each run's end collects (`release_memory`), once per peer, and all of that never goes.
    """
    gc.collect()
    gc.freeze()

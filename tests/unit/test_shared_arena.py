"""Engines that are opened at once register one arena."""

from __future__ import annotations

import threading

import pytest

from p2ptrain.engine import onnxruntime_engine
from p2ptrain.engine.onnxruntime_engine import open_engine

AT_ONCE = 4


def test_engines_that_are_opened_at_once_register_one_arena(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    inside, most, opened = 0, 0, []
    counting = threading.Lock()
    another = threading.Event()

    def share(runtime: object) -> None:
        nonlocal inside, most
        with counting:
            inside += 1
            most = max(most, inside)
            if inside > 1:
                another.set()
        another.wait(0.05)  # without a lock the others are here long before
        with counting:
            inside -= 1

    monkeypatch.setattr(onnxruntime_engine, "_share_arena", share)
    threads = [
        threading.Thread(target=lambda: opened.append(open_engine(threads=1)))
        for _ in range(AT_ONCE)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(opened), most) == (AT_ONCE, 1)

"""The parity table of the shipped bundles: how it is written, and that it is there."""

from __future__ import annotations

import pytest

from p2ptrain.store.bundles import shipped_bundles
from tools import parity_table
from tools.parity_table import BEGIN, END, Row

PAGE = f"before\n{BEGIN}\nold\n{END}\nafter\n"


def rows(bundle: str) -> list[Row]:
    return [
        parity_table.row(bundle, runtime, "portable", 2e-6, "w", 1.5, 1.0)
        for runtime in ("torch", "onnxruntime-training 1.19.2", "onnxruntime 1.32.0")
    ]


def test_table_replaces_what_is_between_its_markers() -> None:
    page = parity_table.with_table(PAGE, parity_table.table(rows("small")))
    assert page.startswith(f"before\n{BEGIN}\n| model ")
    assert page.endswith(f"| 1.500000 | 5.0e-01 |\n{END}\nafter\n")
    assert "old" not in page


def test_page_without_markers_is_left_alone() -> None:
    with pytest.raises(SystemExit, match="lacks the markers"):
        parity_table.with_table("before", "table")


def test_bundle_needs_a_row_of_torch_and_of_both_runtimes() -> None:
    page = parity_table.with_table(PAGE, parity_table.table([*rows("one"), *rows("two")[:2]]))
    assert parity_table.bundles_without_rows(page, ["one", "two", "three"]) == ["two", "three"]
    assert parity_table.bundles_without_rows("no table", ["one"]) == ["one"]


def test_committed_page_shows_every_shipped_bundle() -> None:
    shipped = shipped_bundles()
    page = parity_table.PAGE.read_text(encoding="utf-8")
    assert parity_table.bundles_without_rows(page, shipped) == []
    assert set(shipped) <= set(parity_table.SOURCES)

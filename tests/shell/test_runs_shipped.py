"""Shipped bundles train on real files of their kind, from the folder or file to the losses."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import trio
from PIL import Image

from p2ptrain.runtime.reports import TrainRequest
from p2ptrain.store.bundles import load_bundle, shipped_bundles
from p2ptrain.training.contract import OptimizerChoice
from tests.memory_group import MemoryGroup, float_bits, memory_group

SECONDS_MAX = 60
STEPS = 3
CLASSES, SIDE = 10, 28
WORDS = ("walk", "parse", "open", "sort", "hash", "send", "wait", "draw", "copy", "lock")
SGD = OptimizerChoice(name="sgd", peak_learning_rate=0.02, warmup_steps=0)


def digits(count: int) -> tuple[np.ndarray, np.ndarray]:
    """Grey pictures, uint8 (N, SIDE, SIDE), of one bright bar each: where it is, is the label."""
    rng = np.random.Generator(np.random.Philox(6))
    labels = np.arange(count) % CLASSES
    pictures = rng.integers(0, 40, (count, SIDE, SIDE), np.uint8)
    for picture, label in zip(pictures, labels, strict=True):
        picture[2 * label + 3 : 2 * label + 6] = 255
    return pictures, labels


def write_arrays(folder: Path) -> Path:
    pictures, labels = digits(44)
    features = (pictures[:, None] / 255).astype(np.float32)
    path = folder / "digits.npz"
    np.savez(path, features=features, labels=labels)
    return path


def write_images(folder: Path) -> Path:
    """Colour and twice as large, to be converted."""
    root = folder / "digits"
    for index, (picture, label) in enumerate(zip(*digits(44), strict=True)):
        place = root / f"bar-{label}"
        place.mkdir(parents=True, exist_ok=True)
        large = Image.fromarray(picture).resize((2 * SIDE, 2 * SIDE)).convert("RGB")
        large.save(place / f"{index}.png")
    return root


def write_texts(folder: Path) -> Path:
    path = folder / "texts.jsonl"
    rows = [
        {"text": f"{WORDS[i % 10]} the {WORDS[i // 10]} " * 3, "label": f"module{i % 20}"}
        for i in range(60)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


CASES: dict[str, tuple[str, Callable[[Path], Path], str]] = {
    "arrays": ("mlp", write_arrays, "44 records, 10 classes"),
    "images": ("mlp", write_images, "44 images, 10 classes"),
    "images for attention": ("vit-tiny", write_images, "44 images, 10 classes"),
    "labelled texts": ("bert-mini", write_texts, "60 texts, 20 classes"),
}


@pytest.mark.parametrize("case", CASES)
async def test_shipped_bundle_trains_on_files_of_its_kind(case: str, tmp_path: Path) -> None:
    name, write, summary = CASES[case]
    request = TrainRequest(
        bundle=str(shipped_bundles()[name]), data=str(write(tmp_path)), steps=STEPS,
        microbatches=2, microbatch_size=4, heldout_microbatches=1, threads=1,
        checkpoint_every=0, optimizer=SGD, dropout=0.0,
    )  # fmt: skip
    alone, together = [await losses(tmp_path, request, stages, summary) for stages in (1, 2)]
    assert float_bits(alone) == float_bits(together)
    classes = load_bundle(shipped_bundles()[name]).manifest.data.classes
    assert alone[0] == pytest.approx(math.log(classes), rel=0.2)
    assert alone[-1] < alone[0] or case == "labelled texts", "the bars are easily told apart"


async def losses(path: Path, request: TrainRequest, stages: int, summary: str) -> tuple[float, ...]:
    """Of a run on `stages` peers; what was said of the data is checked."""
    async with memory_group(path, stages) as group:
        with trio.fail_after(SECONDS_MAX):
            result = await group[0].train(dataclasses.replace(request, stages=stages))
        assert result.stages == stages
        assert said(group)[0].startswith(f"the data: {summary}; ")
    return result.losses


def said(group: MemoryGroup) -> list[str]:
    return [getattr(report, "text", "") for report in group.reports("note")]

"""Small configurations of Hugging Face families."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from p2ptrain.graph.source import Source

Family = Callable[[str, str], Source]
"""From a kind and a task to its source, traced once for all tests."""

SMALL = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
}
TEXT = {**SMALL, "vocab_size": 60, "max_position_embeddings": 12}
CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 60, "n_positions": 12},
    "llama": {**TEXT, "num_key_value_heads": 2},
    "bert": TEXT,
    "vit": {**SMALL, "image_size": 16, "patch_size": 4},
    "mobilenet_v2": {
        "image_size": 32,
        "depth_multiplier": 0.25,
        "finegrained_output": False,
        "output_stride": 8,
    },
    "resnet": {"hidden_sizes": [8, 16], "depths": [1, 1], "embedding_size": 8, "image_size": 32},
}


def write(folder: Path, kind: str, **fields: Any) -> Path:
    folder.mkdir(exist_ok=True)
    document = {"model_type": kind, **CONFIGURATIONS[kind], **fields}
    (folder / "config.json").write_text(json.dumps(document))
    return folder

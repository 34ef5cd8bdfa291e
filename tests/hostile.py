"""Bad bundles made from the tiny one: each is wrong in one way, and whole in every other."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
from onnx import TensorProto, helper

from p2ptrain.ids import Digest
from p2ptrain.store.bundles import Bundle
from tests.bundles import graph_files

Change = Callable[["Parts"], None]


@dataclass(slots=True, kw_only=True)
class Parts:
    """A bundle as a sender or a folder has it: JSON and files, not yet checked."""

    manifest: dict[str, Any]  # Any: JSON
    graphs: dict[Digest, bytes]

    @property
    def manifest_bytes(self) -> bytes:
        return json.dumps(self.manifest).encode()

    def digest(self, kind: str, which: str, form: str = "portable") -> Digest:
        """The digest of a kind's forward or backward graph."""
        return Digest(self.manifest["kinds"][kind]["forms"][form][which])

    def replace_graph(self, digest: Digest, content: bytes) -> None:
        """Put other bytes in place of a graph, with length and hash as they should be."""
        fresh = Digest(hashlib.sha256(content).hexdigest())
        del self.graphs[digest]
        self.graphs[fresh] = content
        text = json.dumps(self.manifest).replace(digest, fresh)
        self.manifest = json.loads(text)
        self.manifest["graphs"][fresh]["bytes"] = len(content)

    def edit_graph(self, digest: Digest, edit: Callable[[onnx.ModelProto], None]) -> None:
        model = onnx.load_model_from_string(self.graphs[digest])
        edit(model)
        self.replace_graph(digest, model.SerializeToString())

    def write(self, directory: Path) -> Path:
        (directory / "graphs").mkdir(parents=True)
        (directory / "manifest.json").write_bytes(self.manifest_bytes)
        for digest, content in self.graphs.items():
            (directory / "graphs" / f"{digest}.onnx").write_bytes(content)
        return directory


def parts_of(bundle: Bundle) -> Parts:
    return Parts(manifest=json.loads(bundle.manifest_bytes), graphs=dict(graph_files(bundle)))


def changed_by(bundle: Bundle, change: Change) -> Parts:
    parts = copy.deepcopy(parts_of(bundle))
    change(parts)
    return parts


def block(edit: Callable[[onnx.ModelProto], None], which: str = "forward") -> Change:
    """Change a graph of the block segments."""
    return lambda parts: parts.edit_graph(parts.digest("block", which), edit)


def _external(model: onnx.ModelProto) -> None:
    tensor = model.graph.initializer.add(name="c", data_type=TensorProto.FLOAT, dims=[4])
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="../../secret")


def _subgraph(model: onnx.ModelProto) -> None:
    inner = helper.make_graph([helper.make_node("Identity", ["x"], ["i"])], "inner", [], [])
    node = helper.make_node("If", ["mask"], ["branch"], then_branch=inner, else_branch=inner)
    model.graph.node.append(node)


def node(operator: str, *inputs: str, domain: str = "") -> Callable[[onnx.ModelProto], None]:
    def edit(model: onnx.ModelProto) -> None:
        model.graph.node.append(helper.make_node(operator, inputs, ["extra"], domain=domain))

    return edit


def _huge_claim(model: onnx.ModelProto) -> None:
    model.graph.initializer.add(
        name="c", data_type=TensorProto.FLOAT, dims=[1 << 20, 1 << 10], raw_data=b"\0" * 16
    )


def _huge_result(model: onnx.ModelProto) -> None:
    model.graph.initializer.append(
        helper.make_tensor("c", TensorProto.INT64, (3,), (1 << 20, 1 << 20, 4))
    )
    node("ConstantOfShape", "c")(model)


def _cycle(model: onnx.ModelProto) -> None:
    model.graph.node[0].input[0] = model.graph.node[-1].output[0]


def _two_definitions(model: onnx.ModelProto) -> None:
    model.graph.node.append(helper.make_node("Tanh", ["x"], ["y"]))


def _weights_inside(model: onnx.ModelProto) -> None:
    model.graph.initializer.append(helper.make_tensor("b", TensorProto.FLOAT, (16,), [0.0] * 16))


def _undefined_output(model: onnx.ModelProto) -> None:
    del model.graph.node[-1]


def _other_input(model: onnx.ModelProto) -> None:
    model.graph.input[0].name = model.graph.node[0].input[0] = "z"


def _other_dtype(model: onnx.ModelProto) -> None:
    model.graph.output[0].type.tensor_type.elem_type = TensorProto.INT64


def _other_shape(model: onnx.ModelProto) -> None:
    model.graph.input[0].type.tensor_type.shape.dim[2].dim_value = 17


def _other_rank(model: onnx.ModelProto) -> None:
    del model.graph.input[0].type.tensor_type.shape.dim[2]


def _missing_output(model: onnx.ModelProto) -> None:
    del model.graph.output[1]


def _other_opset(model: onnx.ModelProto) -> None:
    model.opset_import[0].version = 17


def _function(model: onnx.ModelProto) -> None:
    model.functions.add(name="f", domain="d")


GRAPHS: dict[str, tuple[Change, str]] = {
    "external data": (block(_external), "tensor 'c' lies in another file"),
    "a subgraph": (block(_subgraph), "node 'If' holds a graph of its own"),
    "a function": (block(_function), "model has a field 25"),
    "random numbers": (block(node("RandomNormalLike", "x")), "'RandomNormalLike' is not allowed"),
    "a gradient kernel in the portable form": (
        block(node("GatherGrad", "x", domain="com.microsoft")),
        "'com.microsoft.GatherGrad' is not allowed",
    ),
    "a domain of its own": (block(node("Tanh", "x", domain="evil")), "'evil.Tanh' is not allowed"),
    "weights that it does not hold": (block(_huge_claim), "does not hold the 1073741824 elements"),
    "a huge result": (block(_huge_result), "makes a tensor of shape"),
    "a cycle": (block(_cycle), "reads 'y' before anything defines it"),
    "a value defined twice": (block(_two_definitions), "'y' is defined twice"),
    "a parameter's weights": (block(_weights_inside), "'b' is defined twice"),
    "an undefined output": (block(_undefined_output), "nothing defines its output 'y'"),
    "an unknown input": (block(_other_input), "input 'z' is not in the manifest"),
    "another dtype": (block(_other_dtype), "output 'y' is int64 instead of float32"),
    "another shape": (block(_other_shape), "input 'x' has axes .* instead of"),
    "another rank": (block(_other_rank), "input 'x' has axes .* instead of"),
    "no stash": (block(_missing_output), "it has no output 'h'"),
    "no gradient": (block(_missing_output, "backward"), "it has no output 'gradient.w'"),
    "another opset": (block(_other_opset), "opset 17 instead of IR 8 and opset 18"),
    "no graph at all": (
        lambda parts: parts.replace_graph(parts.digest("block", "forward"), b"\x08\x08"),
        "model has no graph",
    ),
    "something else": (
        lambda parts: parts.replace_graph(parts.digest("block", "forward"), b"MZ" + b"\xff" * 90),
        "forward graph of kind 'block', portable form: the graph",
    ),
}  # fmt: skip
"""What a graph may have wrong, and what is said about it."""


def setting(*path: str | int, value: object) -> Change:
    """Put `value` at one place of the manifest."""

    def change(parts: Parts) -> None:
        place: Any = parts.manifest  # Any: JSON
        for step in path[:-1]:
            place = place[step]
        place[path[-1]] = value

    return change


def _twin_segment(parts: Parts) -> None:
    parts.manifest["segments"][2]["name"] = "block0"


def _shared_tensor(parts: Parts) -> None:
    parts.manifest["segments"][2]["parameters"] = parts.manifest["segments"][1]["parameters"]


def _swapped_segments(parts: Parts) -> None:
    parts.manifest["segments"].insert(0, parts.manifest["segments"].pop())


def _escaping_graph(parts: Parts) -> None:
    name = parts.digest("block", "forward")
    text = json.dumps(parts.manifest).replace(name, "../../../etc/passwd")
    parts.manifest = json.loads(text)


def _frozen_in_one_segment(parts: Parts) -> None:
    parts.manifest["tensors"][1]["binding"] = "frozen"


def _tie(owner: str, copy_of: int) -> Change:
    return setting("tensors", copy_of, "tied_to", value=owner)


def _adapter(**changes: object) -> Change:
    def change(parts: Parts) -> None:
        for index in (1, 3):
            parts.manifest["tensors"][index]["binding"] = "frozen"
        adapter = {"down": "block0.b", "up": "block0.b", "scale": 1.0, "transposed": False}
        parts.manifest["tensors"][1]["adapter"] = {**adapter, **changes}

    return change


MANIFESTS: dict[str, tuple[Change, str]] = {
    "a graph's name that leaves the directory": (_escaping_graph, "is not named by its sha256"),
    "a segment's name that leaves the directory": (
        setting("segments", 1, "name", value="../x"), r"'\.\./x' is not a name"),
    "a tensor's name that leaves the directory": (
        setting("tensors", 0, "name", value="../../x"), "is not a name"),
    "a control character in its name": (setting("name", value="a\x1b[2J"), "is not a name"),
    "no segments": (setting("segments", value=[]), "0 segments"),
    "two segments of one name": (_twin_segment, "two segments are called 'block0'"),
    "segments in another order": (_swapped_segments, "does not"),
    "a segment of no kind": (setting("segments", 1, "kind", value="none"), "unknown kind 'none'"),
    "a tensor in two segments": (_shared_tensor, "not exactly the listed tensors"),
    "a graph over the limit": (
        lambda parts: parts.manifest["graphs"][parts.digest("block", "forward")].update(
            bytes=1 << 40), "has 1099511627776 bytes"),
    "a tensor over the limit": (
        setting("tensors", 0, "shape", value=[1 << 40]), "has shape"),
    "a tensor of many axes": (setting("tensors", 0, "shape", value=[1] * 9), "has shape"),
    "a tensor with a negative axis": (
        setting("tensors", 0, "shape", value=[-256, -16]), "has shape"),
    "an activation over the limit": (
        setting("kinds", "block", "masks", 0, "value", "shape", value=["9999999999", "9999999999"]),
        "elements for one sample"),
    "an axis that is no number": (
        setting("kinds", "block", "masks", 0, "value", "shape", value=["\u00b2"]), "unknown axis"),
    "an axis of many factors": (
        setting("kinds", "block", "masks", 0, "value", "shape", value=["*".join(["batch"] * 99)]),
        "unknown axis"),
    "a symbol of no size": (setting("symbols", "sequence", "size", value=0), "has size 0"),
    "a symbol that is no word": (
        setting("symbols", "a*b", value={"size": 1, "kind": "x"}), "is not a plain word"),
    "negative FLOPs": (setting("kinds", "block", "forward_flops", value=-1), "negative FLOPs"),
    "a check that is not finite": (
        setting("checks", value={"loss": float("nan")}), "found an error of nan"),
    "NaN as an initialiser": (
        setting("tensors", 0, "initialiser", "scale", value=float("nan")), "drawn with scale nan"),
    "an unknown dtype": (setting("tensors", 0, "dtype", value="object"), "dtype 'object'"),
    "a trainable integer": (setting("tensors", 0, "dtype", value="int64"), "dtype 'int64'"),
    "an unknown binding": (setting("tensors", 0, "binding", value="loose"), "binding 'loose'"),
    "one frozen tensor among segments that share graphs": (
        _frozen_in_one_segment, "is trainable, elsewhere not"),
    "a running value bound as a parameter": (
        setting("tensors", 0, "binding", value="running"), "bound to a running tensor"),
    "a tie to nothing": (_tie("nobody", 3), "which owns nothing"),
    "a tie to itself": (_tie("block1.w", 3), "is tied to"),
    "a tie to a later tensor": (_tie("block1.w", 1), "comes before"),
    "a tie to another shape": (_tie("embed.table", 3), "is not what it is tied to"),
    "an adapter of other shapes": (_adapter(), "has shapes"),
    "an adapter of nothing": (_adapter(up="nobody"), "tensors that do not exist"),
    "an adapter in another segment": (_adapter(up="block1.b"), "lies in another segment"),
    "weights of a tensor, but none in the bundle": (
        setting("tensors", 0, "digest", value="0" * 64), "weights that do not exist"),
    "a shard along nothing": (
        setting("tensors", 0, "shard", value={"symbol": "none", "axis": 0, "block": 1}),
        "cannot be sharded"),
    "data in the middle": (
        setting("kinds", "block", "inputs", 0, "role", value="data"), "does not take data where"),
    "a loss in the middle": (
        setting("kinds", "block", "outputs", 0, "role", value="loss"), "does not hand on"),
    "no loss": (
        setting("kinds", "head", "outputs", 0, "role", value="boundary"), "not end in the loss"),
    "labels in the first segment": (
        setting("kinds", "embed", "inputs", 0, "role", value="labels"), "does not take"),
    "boundaries that do not fit": (
        setting("kinds", "block", "outputs", 0, "value", "shape", value=["batch", "16"]),
        "does not fit onto"),
    "a differentiable integer": (
        setting("kinds", "embed", "inputs", 0, "differentiable", value=True),
        "is differentiable, but int64"),
    "a special token outside the vocabulary": (
        setting("data", "special_tokens", value={"pad": 256}), "outside the vocabulary"),
    "class names without classes": (
        setting("data", "class_names", value=["a"]), "1 names for 0 classes"),
    "images for a language model": (
        setting("data", "kind", value="images"), "cannot be trained on images"),
    "a tokenizer without a hash": (
        setting("data", "tokenizer", value="tokenizer.json"), "do not come together"),
}  # fmt: skip
"""What a manifest may have wrong, and what is said about it."""

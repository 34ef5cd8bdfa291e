"""The lists of allowed operators hold pure tensor operators of the opset that we write."""

from __future__ import annotations

import onnx
import pytest

from p2ptrain.bundle.operators import MICROSOFT, OPSETS, SIZED_BY_INPUT, STANDARD, TRAINING


@pytest.mark.parametrize("name", sorted(name for _, name in STANDARD))
def test_standard_operator_exists_and_takes_and_gives_tensors_only(name: str) -> None:
    schema = onnx.defs.get_schema(name, OPSETS[-1], "")
    assert not schema.deprecated
    assert all(
        attribute.type
        not in (onnx.defs.OpSchema.AttrType.GRAPH, onnx.defs.OpSchema.AttrType.GRAPHS)
        for attribute in schema.attributes.values()
    )
    constrained = {each.type_param_str: each.allowed_type_strs for each in schema.type_constraints}
    for value in (*schema.inputs, *schema.outputs):
        types = constrained.get(value.type_str, [value.type_str])
        assert any(kind.startswith("tensor(") for kind in types)


@pytest.mark.parametrize(
    "name",
    ["If", "Loop", "Scan", "RandomNormal", "RandomUniformLike", "Bernoulli", "Multinomial",
     "Dropout", "SequenceAt", "SplitToSequence", "Optional", "StringNormalizer", "NonZero",
     "Unique", "Compress", "NonMaxSuppression"],
)  # fmt: skip
def test_control_flow_chance_and_sizes_that_follow_from_values_are_not_allowed(name: str) -> None:
    assert onnx.defs.has(name)
    assert ("", name) not in TRAINING


def test_the_portable_form_knows_no_vendor() -> None:
    assert {domain for domain, _ in STANDARD} == {""}
    assert {domain for domain, _ in TRAINING} == {"", MICROSOFT}
    assert STANDARD < TRAINING
    assert {("", name) for name in SIZED_BY_INPUT} <= STANDARD

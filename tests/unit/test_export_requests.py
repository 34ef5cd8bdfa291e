"""What a person asks of the exporter: inputs, tasks, losses, arguments."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("onnx")

from p2ptrain.errors import ConfigError
from p2ptrain.graph.sources.inputs import Input, parse_input, text_inputs
from p2ptrain.graph.sources.requests import parse_arguments
from p2ptrain.graph.sources.tasks import Images, Text, choose_task, data_section, example_of

TEXT = Text(vocabulary=50, context=12)


def test_an_input_is_read_from_text() -> None:
    found = parse_input("pixels=float32:batch,3,8,8", high=2)
    assert found == Input(name="pixels", dtype="float32", axes=("batch", "3", "8", "8"))
    assert found.shape(batch=4, sequence=9) == (4, 3, 8, 8)
    ids = parse_input("ids=int64:batch,sequence", high=30)
    assert (ids.shape(batch=4, sequence=9), ids.high) == ((4, 9), 30)


def test_the_usual_names_say_what_an_input_of_text_is() -> None:
    names = ("input_ids", "attention_mask", "token_type_ids")
    found = text_inputs(names, vocabulary=30)
    assert found is not None
    assert [each.name for each in found] == list(names)
    assert [each.high for each in found] == [30, 2, 2]
    assert [each.is_padding_mask for each in found] == [False, True, False]
    assert {(each.dtype, each.axes) for each in found} == {("int64", ("batch", "sequence"))}
    alone = text_inputs(("words",), vocabulary=30)
    assert alone is not None
    assert [each.high for each in alone] == [30]


@pytest.mark.parametrize(
    "names", [("attention_mask",), ("ids", "other"), ("words", "attention_mask"), ()]
)
def test_inputs_that_are_no_usual_text_are_left_to_the_user(names: tuple[str, ...]) -> None:
    assert text_inputs(names, vocabulary=30) is None


@pytest.mark.parametrize(
    "text",
    ["x", "x=float32", "x=float16:batch,3", "x=float32:3", "x=float32:batch,-1", "=int64:batch"],
)
def test_a_malformed_input_is_refused_with_the_form(text: str) -> None:
    with pytest.raises(ConfigError, match="NAME=DTYPE"):
        parse_input(text, high=2)


def test_arguments_are_json_where_they_can_be() -> None:
    given = ["a=3", "b=0.5", "c=true", "d=[8, 16]", "e=relu", "f=x=y"]
    assert parse_arguments(given) == {
        "a": 3,
        "b": 0.5,
        "c": True,
        "d": [8, 16],
        "e": "relu",
        "f": "x=y",
    }
    with pytest.raises(ConfigError, match="NAME=VALUE"):
        parse_arguments(["a"])


@pytest.mark.parametrize(
    ("task", "loss", "smoothing", "said"),
    [
        ("chess", None, 0.0, "unknown task"),
        ("regression", "hinge", 0.0, "unknown loss"),
        ("regression", "cross-entropy", 0.0, "does not go with"),
        ("language-modelling", "mse", 0.0, "does not go with"),
        ("regression", "mse", 0.1, "--label-smoothing"),
        ("language-modelling", None, 1.0, "--label-smoothing"),
    ],
)
def test_tasks_and_losses_that_do_not_fit_are_refused(
    task: str, loss: str | None, smoothing: float, said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        choose_task(task, loss=loss, label_smoothing=smoothing)


@pytest.mark.parametrize(
    ("task", "text", "images", "kind", "classes"),
    [
        ("language-modelling", TEXT, None, "windows", 0),
        ("masked-language-modelling", TEXT, None, "masked-windows", 0),
        ("sequence-classification", TEXT, None, "texts", 7),
        ("token-classification", TEXT, None, "words", 7),
        ("image-classification", None, Images(), "images", 7),
        ("regression", None, None, "arrays", 0),
        ("regression", None, Images(), "arrays", 0),
    ],
)
def test_the_data_section_follows_the_task(
    task: str, text: Text | None, images: Images | None, kind: str, classes: int
) -> None:
    chosen = choose_task(task, loss=None, label_smoothing=0.0)
    section = data_section(chosen, text=text, images=images, classes=7)
    assert (section.kind, section.classes) == (kind, classes)
    assert section.mask_probability == (0.15 if kind == "masked-windows" else 0.0)


def test_class_names_are_kept_when_there_is_one_per_logit() -> None:
    chosen = choose_task("image-classification", loss=None, label_smoothing=0.0)
    names = ("cat", "dog")
    two = data_section(chosen, text=None, images=Images(), classes=2, class_names=names)
    assert two.class_names == names
    three = data_section(chosen, text=None, images=Images(), classes=3, class_names=names)
    assert three.class_names == ()


def test_an_example_ignores_some_labels_and_weighs_the_others() -> None:
    chosen = choose_task("language-modelling", loss=None, label_smoothing=0.0)
    ids = Input(name="ids", dtype="int64", axes=("batch", "sequence"), high=50)
    padding = Input(name="mask", dtype="int64", axes=("batch", "sequence"), is_padding_mask=True)
    found = example_of(chosen, (ids, padding), (3, 12, 50), sequence=12)
    counted = int((found["labels"] != -100).sum())
    assert counted == 3 * 12 - 2
    assert found["loss_weight"] == np.float32(1 / counted)
    assert found["ids"].max() < 50
    lengths = found["mask"].sum(axis=1)
    assert (found["mask"] == (np.arange(12) < lengths[:, None])).all()

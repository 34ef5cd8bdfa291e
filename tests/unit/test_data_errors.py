"""Data that cannot be used: the sentence names the file and the record, the hint what to do."""

from __future__ import annotations

import builtins
import csv
import errno
import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from p2ptrain import limits
from p2ptrain.bundle.manifest import Manifest
from p2ptrain.errors import BundleError, DataError
from tests.data_cases import manifest_for, opened, text_model, write_lines

GOOD = {"text": "fine", "label": 1}
Case = tuple[str, str, str]


def refused(manifest: Manifest, path: Path, **options: Any) -> DataError:
    """The error that opening the path gives; it says what to do."""
    with pytest.raises(DataError) as caught:
        opened(manifest, path, **options)
    assert caught.value.hint
    assert "\n" not in caught.value.message
    return caught.value


# JSON lines and CSV.


@pytest.mark.parametrize(
    ("record", "said"),
    [
        ({"body": "x", "label": 0}, "there is no field 'text'; it has: body, label"),
        ({"text": "x", "class": 0}, "there is no field 'label'; it has: text, class"),
        ({"text": 5, "label": 0}, "field 'text' is of type int, not text"),
        ({"text": " \n", "label": 0}, "field 'text' holds no text"),
        ({"text": "x", "label": 3}, "label 3 is out of range; the model has the classes 0 to 2"),
        ({"text": "x", "label": -1}, "label -1 is out of range"),
        ({"text": "x", "label": "odd"}, "label 'odd' is not one of the classes 0 to 2"),
        ({"text": "x", "label": 1.5}, "label 1.5 is not"),
        ({"text": "x", "label": None}, "label None is not"),
        ({"text": "x", "label": [1, 0]}, "a label of 2 values where the model wants shape ()"),
        (["x", 1], "a JSON list where an object with fields is expected"),
    ],
)
def test_one_bad_record_among_many_is_named(tmp_path: Path, record: object, said: str) -> None:
    lines = write_lines(tmp_path / "a.jsonl", [*[GOOD] * 6, record, *[GOOD] * 6])
    message = refused(text_model(), lines).message
    assert message.startswith(f"{lines}, line 7 (record 7): ")
    assert said in message


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b'{"text": "a", "label": 0}\n\n{"text": ', "line 3 (record 2): not JSON: "),
        (b'{"text": "a", "label": 0}\n{"text": "\xff"}', "line 2 (record 2): byte 11 of it is not"),
        (b"\n \n", "has no records"),
        (b"", "is empty"),
        (b'{"text": "a", "label": 0}', "has 1 record; to train and to evaluate takes 2"),
        (b"[" * 100_000, "line 1 (record 1): not JSON: "),
    ],
)
def test_file_that_is_not_json_lines(tmp_path: Path, content: bytes, said: str) -> None:
    (tmp_path / "a.jsonl").write_bytes(content)
    assert said in refused(text_model(), tmp_path / "a.jsonl").message


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"text,label\na,0\nb,1,2\n", "line 3 (record 2): it has 3 columns; the header has 2"),
        (b'text,label\n"a\nb",0\nc\n', "line 4 (record 2): it has 1 columns"),
        (b'text,label\na,0\n"b,1\n', "line 3: a quote is never closed"),
        (b'text,label\na,0\n"b"c"d",1\n', "line 3 (record 2): not CSV: "),
        (b"text,text\na,0\nb,1\n", "empty or repeated names: text, text"),
        (b"text,\na,0\nb,1\n", "empty or repeated names"),
        (b"text,label\na,0\n\xe9,1\n", "line 3 (record 2): byte 1 of it is not UTF-8"),
        (b"t\xe9xt,label\na,0\nb,1\n", "the header is not CSV in UTF-8"),
        (b"text,label\n", "has no records"),
        (b"words,label\na,0\nb,1\n", "there is no field 'text'; it has: words, label"),
    ],
)
def test_file_that_is_not_csv(tmp_path: Path, content: bytes, said: str) -> None:
    (tmp_path / "a.csv").write_bytes(content)
    assert said in refused(text_model(), tmp_path / "a.csv").message


def test_endless_line_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "a", "label": 0}\n')
    os.truncate(path, limits.DATA_RECORD_BYTES_MAX + 100)
    assert "line 2: a record of over 16777216 bytes" in refused(text_model(), path).message


def test_hints_name_the_option(tmp_path: Path) -> None:
    lines = write_lines(tmp_path / "a.jsonl", [{"body": "x", "class": 0}] * 3)
    assert "--text-field" in refused(text_model(), lines, label_field="class").hint
    assert "--label-field" in refused(text_model(), lines, text_field="body").hint


@pytest.mark.parametrize(
    ("labels", "said"),
    [
        (["a", "b"], "2 different labels (a, b); the model has 3 classes"),
        (["a", "b", "c", "d"], "more than 3 different labels (a, b, c, d)"),
        (["1", "b"], "label 'b' is not one of the classes 0 to 2"),
        (["a", 1], "label 'a' is not"),
    ],
)
def test_labels_that_cannot_be_the_classes(tmp_path: Path, labels: list[Any], said: str) -> None:
    lines = write_lines(tmp_path / "a.jsonl", [{"text": "x", "label": each} for each in labels * 3])
    assert said in refused(text_model(), lines).message


def test_class_that_the_bundle_does_not_name(tmp_path: Path) -> None:
    lines = write_lines(tmp_path / "a.jsonl", [GOOD, {"text": "x", "label": "maybe"}])
    manifest = text_model(class_names=("no", "yes", "never"))
    assert (
        "label 'maybe' is not one of the classes no, yes, never" in refused(manifest, lines).message
    )


@pytest.mark.parametrize("value", ["NaN", "x", None, "1e39"])
def test_measured_value_that_is_no_number(tmp_path: Path, value: object) -> None:
    lines = write_lines(tmp_path / "a.jsonl", [{"text": "x", "label": value}] * 2)
    manifest = text_model(labels=((), "float32"), loss="mse", classes=0)
    assert "is not a finite float32 number" in refused(manifest, lines).message


@pytest.mark.parametrize(
    ("record", "said"),
    [
        ({"words": ["a", "b"], "tags": [0]}, "2 words have 1 tags"),
        ({"words": "a b", "tags": [0, 1]}, "field 'words' is not a list"),
        ({"words": [], "tags": []}, "field 'words' is not a list"),
        ({"words": ["a", ""], "tags": [0, 1]}, "field 'words' is not a list of words"),
        ({"words": ["a"], "tags": [9]}, "label 9 is out of range"),
    ],
)
def test_words_and_tags_that_do_not_fit(tmp_path: Path, record: object, said: str) -> None:
    lines = write_lines(tmp_path / "a.jsonl", [{"words": ["a"], "tags": [0]}, record])
    message = refused(text_model("words"), lines).message
    assert "line 2 (record 2): " in message
    assert said in message


@pytest.mark.parametrize(
    ("messages", "said"),
    [
        (None, "there is no list 'messages'"),
        ([], "there is no list 'messages'"),
        (["hi"], "message 1 is not an object"),
        ([{"role": "user"}], "message 1 lacks the text of a role or content"),
        ([{"role": "user", "content": [{"text": "x"}]}], "message 1 lacks the text"),
    ],
)
def test_conversation_that_is_none(tmp_path: Path, messages: object, said: str) -> None:
    good = {"messages": [{"role": "assistant", "content": "x"}]}
    lines = write_lines(tmp_path / "a.jsonl", [good, {"messages": messages}])
    error = refused(text_model("windows"), lines)
    assert f"line 2 (record 2): {said}" in error.message
    assert '{"role": "user", "content": "..."}' in error.hint


def test_conversations_without_an_answer(tmp_path: Path) -> None:
    silent = {"messages": [{"role": "user", "content": "x"}]}
    lines = write_lines(tmp_path / "a.jsonl", [silent] * 3)
    assert "no assistant says anything" in refused(text_model("windows"), lines).message


# Text.


@pytest.mark.parametrize(("content", "said"), [(b"", "is empty"), (b"x" * 17, "takes 18")])
def test_text_too_short(tmp_path: Path, content: bytes, said: str) -> None:
    (tmp_path / "a.txt").write_bytes(content)
    assert said in refused(text_model("windows"), tmp_path / "a.txt").message


def test_heldout_text_too_short_is_the_one_that_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"x" * 100)
    (tmp_path / "b.txt").write_bytes(b"x" * 8)
    error = refused(text_model("windows"), tmp_path / "a.txt", heldout=tmp_path / "b.txt")
    assert "b.txt: 8 bytes of held-out text; one sample needs 9" in error.message


def test_folder_without_text(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "a.bin").write_bytes(b"x")
    error = refused(text_model("windows"), tmp_path / "folder")
    assert error.message.endswith("folder holds no text files")
    assert ".txt" in error.hint


def test_missing_path(tmp_path: Path) -> None:
    assert "no such file" in refused(text_model("windows"), tmp_path / "absent").message


def test_unreadable_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"x" * 100)

    def forbidden(self: Path, *_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(self))

    monkeypatch.setattr(Path, "open", forbidden)
    assert refused(text_model("windows"), path).message == f"{path}: permission denied"


def test_full_disk_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = write_lines(tmp_path / "a.jsonl", [GOOD] * 3)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    error = refused(text_model(), lines)
    assert "No space left on device" in error.message
    assert list((tmp_path / "cache").iterdir()) == [], "nothing half-written stays"


# Tokenizers and libraries.


def without(monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    """Make a package as good as not installed."""
    real = builtins.__import__

    def guarded(name: str, *arguments: Any, **keywords: Any) -> Any:
        if name.split(".")[0] == package:
            raise ImportError(name)
        return real(name, *arguments, **keywords)

    monkeypatch.setattr(builtins, "__import__", guarded)


def file_model(path: Path, content: bytes, digest: str | None = None) -> Manifest:
    (path / "tokenizer.json").write_bytes(content)
    digest = digest or hashlib.sha256(content).hexdigest()
    return text_model("windows", tokenizer="tokenizer.json", tokenizer_digest=digest)


def test_missing_tokenizers_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = file_model(tmp_path, b"{}")
    (tmp_path / "a.txt").write_bytes(b"x" * 100)
    without(monkeypatch, "tokenizers")
    error = refused(manifest, tmp_path / "a.txt")
    assert "needs the tokenizers library, which is not installed" in error.message
    assert "pip install 'p2ptrain[text]'" in error.hint


def test_bytes_need_no_tokenizers_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.txt").write_bytes(b"x" * 100)
    without(monkeypatch, "tokenizers")
    assert opened(text_model("windows"), tmp_path / "a.txt").description


def test_tokenizer_file_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"x" * 100)
    error = refused(file_model(tmp_path, b'{"model": 5}'), tmp_path / "a.txt")
    assert "tokenizer.json cannot be used" in error.message


@pytest.mark.parametrize(("digest", "said"), [("0" * 64, "hash differs"), (None, "lacks")])
def test_tokenizer_that_was_exchanged_or_is_gone(
    tmp_path: Path, digest: str | None, said: str
) -> None:
    manifest = file_model(tmp_path, b"{}", digest)
    (tmp_path / "a.txt").write_bytes(b"x" * 100)
    if digest is None:
        (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(BundleError, match=said):
        opened(manifest, tmp_path / "a.txt")


def test_tokenizer_of_a_larger_model(tmp_path: Path) -> None:
    vocabulary = {f"w{i}": i for i in range(300)}
    model = {"type": "WordLevel", "vocab": vocabulary, "unk_token": "w0"}
    manifest = file_model(tmp_path, json.dumps({"version": "1.0", "model": model}).encode())
    (tmp_path / "a.txt").write_bytes(b"x" * 100)
    error = refused(manifest, tmp_path / "a.txt")
    assert "tokenizer has 300 tokens, the model knows 256" in error.message


def test_text_that_the_tokenizer_cannot_encode(tmp_path: Path) -> None:
    model = {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "missing"}
    manifest = file_model(tmp_path, json.dumps({"version": "1.0", "model": model}).encode())
    (tmp_path / "a.txt").write_bytes(b"zebra " * 100)
    message = refused(manifest, tmp_path / "a.txt").message
    assert "tokenizer cannot encode this text" in message


# Arrays.


def vector_model(**changes: object) -> Manifest:
    given = {"inputs": {"x": (("4",), "float32")}, "classes": 3, **changes}
    return manifest_for("arrays", **given)  # type: ignore[arg-type]  # by name


def good_arrays() -> dict[str, np.ndarray]:
    return {"x": np.zeros((10, 4), np.float32), "labels": np.arange(10) % 3}


def at(array: np.ndarray, place: object, value: object) -> np.ndarray:
    changed = array.copy()
    changed[place] = value
    return changed


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda a: {"x": a["x"]}, "there is no array labels; it has: x"),
        (lambda a: {"y": a["x"], "labels": a["labels"]}, "there is no array x; it has: y, labels"),
        (lambda a: {**a, "x": a["x"][:, :3]}, "array x: records of shape (3,); 'x' wants (4,)"),
        (lambda a: {**a, "x": a["x"].astype("U3")}, "dtype <U3; 'x' wants float32"),
        (lambda a: {**a, "x": a["x"][:9]}, "differ in their number of records: "),
        (lambda a: {**a, "x": at(a["x"], (6, 1), np.nan)}, "array x: record 7 has nan"),
        (
            lambda a: {**a, "x": at(a["x"].astype("f8"), (6, 1), 1e39)},
            "array x: record 7 has 1e+39",
        ),
        (lambda a: {**a, "labels": at(a["labels"], 4, 3)}, "labels: record 5 has 3, which is out"),
        (lambda a: {**a, "labels": a["labels"] / 2}, "labels: dtype float64; 'labels' wants int64"),
        (lambda a: {**a, "labels": a["x"]}, "labels: records of shape (4,); 'labels' wants ()"),
        (lambda a: {**a, "x": np.float32(1)}, "is a scalar, of objects or in Fortran order"),
        (lambda a: {**a, "x": a["x"].astype(object)}, "is not an .npz archive of plain arrays"),
    ],
)
@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_arrays_that_do_not_fit(
    tmp_path: Path,
    save: Callable[..., None],
    change: Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]],
    said: str,
) -> None:
    save(tmp_path / "a.npz", **change(good_arrays()))
    assert said in refused(vector_model(), tmp_path / "a.npz").message


def test_tokens_beyond_the_vocabulary(tmp_path: Path) -> None:
    ids = np.zeros((4, 8), np.int64)
    np.savez(tmp_path / "a.npz", input_ids=at(ids, (2, 5), 256), labels=ids)
    message = refused(text_model("windows"), tmp_path / "a.npz").message
    assert "array input_ids: record 3 has 256, which is out of range: 0 to 255" in message


def test_npy_without_labels(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", good_arrays()["x"])
    error = refused(vector_model(), tmp_path / "x.npy")
    assert "holds one array; this model wants x and labels" in error.message
    assert "--labels" in error.hint


@pytest.mark.parametrize("name", ["a.npy", "a.npz"])
def test_file_that_only_says_it_is_an_array(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"something else")
    np.save(tmp_path / "labels.npy", good_arrays()["labels"])
    error = refused(vector_model(), tmp_path / name, labels=str(tmp_path / "labels.npy"))
    assert f"{name} is not an .np" in error.message


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        (
            [["1", "2", "3", "4", "0"], ["1", "x", "3", "4", "0"]],
            "line 3 (record 2): column 'b': 'x'",
        ),
        (
            [["1", "2", "3", "4", "0"], ["1", "nan", "3", "4", "0"]],
            "column 'b': 'nan' is not a finite",
        ),
        ([["1", "2", "3", "4", "7"]] * 2, "line 2 (record 1): label 7 is out of range"),
    ],
)
def test_features_that_are_no_numbers(tmp_path: Path, rows: list[list[str]], said: str) -> None:
    with (tmp_path / "a.csv").open("w", newline="") as stream:
        csv.writer(stream).writerows([["a", "b", "c", "d", "label"], *rows])
    assert said in refused(vector_model(), tmp_path / "a.csv").message


@pytest.mark.parametrize(
    ("header", "said"),
    [
        ("a,b,c,d,e", "has no column label; it has: a, b, c, d, e"),
        ("a,b,c,label,e,f", "has 5 feature columns (a, b, c, e, f); the model wants 4"),
    ],
)
def test_columns_that_do_not_fit(tmp_path: Path, header: str, said: str) -> None:
    count = header.count(",") + 1
    (tmp_path / "a.csv").write_text(header + ("\n" + ",".join("1" * count)) * 3)
    error = refused(vector_model(), tmp_path / "a.csv")
    assert said in error.message
    assert "--label-field" in error.hint


# Images.


def image_model(**changes: object) -> Manifest:
    inputs = {"pixels": (("3", "4", "4"), "float32")}
    given = {"inputs": inputs, "classes": 2, **changes}
    return manifest_for("images", **given)  # type: ignore[arg-type]  # by name


@pytest.fixture
def images(tmp_path: Path) -> Path:
    for name in ("cat", "dog"):
        (tmp_path / "images" / name).mkdir(parents=True)
        for number in range(2):
            Image.new("RGB", (5, 5)).save(tmp_path / "images" / name / f"{number}.png")
    return tmp_path / "images"


def test_file_that_is_no_image_is_named_at_once(images: Path) -> None:
    (images / "cat" / "0.jpg").write_text("hello")
    assert "cat/0.jpg (image 1) cannot be decoded" in refused(image_model(), images).message


def test_deep_images_are_refused(images: Path) -> None:
    Image.fromarray(np.zeros((4, 4), np.uint16)).save(images / "dog" / "9.png")
    assert "9.png (image 5) has more than 8 bits" in refused(image_model(), images).message


def test_folder_of_an_unknown_class(images: Path) -> None:
    manifest = image_model(class_names=("cat", "cow"))
    message = refused(manifest, images).message
    assert "dog: unknown class: label 'dog' is not one of the classes cat, cow" in message


def test_folders_that_are_not_as_many_as_classes(images: Path) -> None:
    message = refused(image_model(classes=4), images).message
    assert "2 different labels (cat, dog); the model has 4 classes" in message


def test_missing_pillow(images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without(monkeypatch, "PIL")
    error = refused(image_model(), images)
    assert "images need the Pillow library" in error.message
    assert "pip install 'p2ptrain[images]'" in error.hint


# The wrong kind of data.


@pytest.mark.parametrize(
    ("kind", "name", "said"),
    [
        ("windows", "images", "is a folder of images; this model wants text"),
        ("windows", "images/cat/0.png", "is a single image; this model wants text"),
        ("texts", "a.txt", "is a text file; this model wants labelled texts"),
        ("words", "a.csv", "is CSV; this model wants tagged words"),
        ("images", "a.txt", "is a text file; this model wants a folder of images"),
        ("images", "texts", "is a folder; this model wants a folder of images"),
        ("arrays", "a.jsonl", "is JSON lines; this model wants numbers"),
        ("arrays", "images", "is a folder of images; this model wants numbers"),
    ],
)
def test_wrong_kind_says_what_the_model_wants(
    images: Path, kind: str, name: str, said: str
) -> None:
    root = images.parent
    for made in ("a.txt", "a.csv", "a.jsonl"):
        (root / made).write_text("x" * 100)
    (root / "texts").mkdir()
    (root / "texts" / "b.txt").write_text("x")
    models = {"images": image_model, "arrays": vector_model}
    manifest = models[kind]() if kind in models else text_model(kind)
    assert said in refused(manifest, root / name).message


def test_heldout_data_of_another_kind(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"x" * 100)
    chat = write_lines(
        tmp_path / "b.jsonl", [{"messages": [{"role": "assistant", "content": "x"}]}] * 2
    )
    for data, heldout in ((tmp_path / "a.txt", chat), (chat, tmp_path / "a.txt")):
        assert "of different kinds" in refused(text_model("windows"), data, heldout=heldout).message

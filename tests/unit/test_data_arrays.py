"""Readers of arrays, feature tables and images: what is drawn, mapped and never loaded."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from p2ptrain.bundle.manifest import Manifest
from p2ptrain.data.arrays import ArrayRecords, open_arrays
from p2ptrain.data.options import DataOptions
from p2ptrain.data.records import Wanted
from p2ptrain.errors import BundleError, DataError
from p2ptrain.training.feed import Feed, Samples
from tests.data_cases import manifest_for, opened, text_model

VECTOR = {"x": (("4",), "float32")}
PIXELS = {"pixel_values": (("3", "4", "6"), "float32")}


def vector_model(**changes: object) -> Manifest:
    given = {"inputs": VECTOR, "classes": 3, **changes}
    return manifest_for("arrays", **given)  # type: ignore[arg-type]  # by name


def drawn(samples: Samples, count: int = 4) -> Feed:
    return samples.training(seed=1, step=1, first_sample=0, count=count)


def vectors(count: int) -> tuple[np.ndarray, np.ndarray]:
    x = np.arange(count * 4, dtype=np.float64).reshape(count, 4)
    return x, np.arange(count) % 3


def check_pairs(feed: Feed) -> None:
    """Each row is one of `vectors`, with its own label."""
    (x,) = feed.inputs
    assert (x.dtype, x.shape[1:], feed.labels.dtype) == (np.float32, (4,), np.int64)
    assert x.flags.c_contiguous
    assert feed.labels.tolist() == [int(row[0]) // 4 % 3 for row in x]


@pytest.mark.parametrize("form", ["npz", "compressed", "folder", "npy"])
def test_arrays_of_every_form_give_the_same_samples(tmp_path: Path, form: str) -> None:
    x, labels = vectors(40)
    path, options = tmp_path / "data.npz", {}
    if form == "npz":
        np.savez(path, x=x, labels=labels)
    elif form == "compressed":
        np.savez_compressed(path, x=x, labels=labels)
    elif form == "folder":
        path = tmp_path / "folder"
        path.mkdir()
        np.save(path / "x.npy", x)
        np.save(path / "labels.npy", labels)
    else:
        path = tmp_path / "any.npy"
        np.save(path, np.asfortranarray(x))
        np.save(tmp_path / "y.npy", labels)
        options = {"labels": str(tmp_path / "y.npy")}
    data = opened(vector_model(), path, **options)
    assert data.description == "40 records, 3 classes; 2 held out"
    feed = drawn(data.samples, 38)
    check_pairs(feed)
    assert len(set(feed.inputs[0][:, 0].tolist())) == 38
    check_pairs(data.samples.heldout(sample_count=2, first_sample=0, count=2))


def test_heldout_array_has_labels_of_its_own(tmp_path: Path) -> None:
    x, labels = vectors(12)
    for name, rows in (("train", slice(0, 8)), ("held", slice(8, 12))):
        np.save(tmp_path / f"{name}.npy", x[rows])
        np.save(tmp_path / f"{name}_labels.npy", labels[rows])
    data = opened(
        vector_model(),
        tmp_path / "train.npy",
        heldout=tmp_path / "held.npy",
        labels=str(tmp_path / "train_labels.npy"),
        heldout_labels=str(tmp_path / "held_labels.npy"),
    )
    assert data.description == "8 records, 3 classes; held out: 4 records, 3 classes"
    check_pairs(data.samples.heldout(sample_count=4, first_sample=0, count=4))


def records(manifest: Manifest, path: Path, cache: Path, **options: str) -> ArrayRecords:
    wanted = Wanted(
        manifest=manifest, tokenizer=None, cache=cache, options=DataOptions(**options),
        class_names=(),
    )  # fmt: skip
    return open_arrays(path, wanted)


@pytest.mark.parametrize("form", ["npz", "compressed", "npy"])
def test_arrays_are_mapped_and_not_loaded(tmp_path: Path, form: str) -> None:
    """A sparse file of 64 MiB takes no room on the disk, and stays there."""
    count = 1 << 22
    if form == "npy":
        big = np.lib.format.open_memmap(
            tmp_path / "big.npy", mode="w+", dtype=np.float32, shape=(count, 4)
        )
        del big
        np.save(tmp_path / "labels.npy", np.zeros(count, np.uint8))
        found = records(
            vector_model(), tmp_path / "big.npy", tmp_path, labels=str(tmp_path / "labels.npy")
        )
    else:
        x, labels = vectors(100)
        save = np.savez if form == "npz" else np.savez_compressed
        save(tmp_path / "a.npz", x=x, labels=labels)
        found = records(vector_model(), tmp_path / "a.npz", tmp_path / "cache")
    assert all(isinstance(array, np.memmap) for array in found.arrays)
    feed = found.feed([found.count - 1, 0])
    assert not isinstance(feed.inputs[0], np.memmap)
    assert feed.inputs[0].shape == (2, 4)


def test_several_ports_take_arrays_by_name(tmp_path: Path) -> None:
    inputs = {"left": (("2",), "float32"), "right": ((), "int64")}
    manifest = manifest_for("arrays", inputs=inputs, labels=(("1",), "float32"), loss="mse")
    left = np.arange(20, dtype=np.float16).reshape(10, 2)
    np.savez(tmp_path / "a.npz", right=np.arange(10, dtype=np.uint8), left=left, labels=left[:, 0])
    feed = drawn(opened(manifest, tmp_path / "a.npz").samples)
    assert [array.dtype for array in (*feed.inputs, feed.labels)] == ["float32", "int64", "float32"]
    assert feed.labels.shape == (4, 1)
    np.testing.assert_array_equal(feed.inputs[0][:, 0], feed.inputs[1] * 2)
    np.testing.assert_array_equal(feed.labels[:, 0], feed.inputs[0][:, 0])


def test_class_numbers_become_one_value_per_class_where_the_port_wants_it(tmp_path: Path) -> None:
    x, labels = vectors(10)
    np.savez(tmp_path / "a.npz", x=x, labels=labels)
    manifest = vector_model(labels=(("3",), "float32"), loss="bce")
    feed = drawn(opened(manifest, tmp_path / "a.npz").samples)
    assert feed.labels.argmax(axis=1).tolist() == [int(row[0]) // 4 % 3 for row in feed.inputs[0]]
    assert (feed.labels.sum(axis=1) == 1).all()


def test_tokens_may_come_as_arrays(tmp_path: Path) -> None:
    ids = np.arange(80).reshape(10, 8)
    labels = np.where(ids % 2, ids, -100).astype(np.int32)
    np.savez(tmp_path / "a.npz", input_ids=ids.astype(np.uint16), labels=labels)
    feed = drawn(opened(text_model("windows"), tmp_path / "a.npz").samples)
    assert feed.labels.dtype == np.int64
    assert ((feed.labels == feed.inputs[0]) == (feed.inputs[0] % 2 == 1)).all()


@pytest.mark.parametrize("changed", ["shrunk", "gone"])
def test_array_that_changes_while_in_use_is_noticed(tmp_path: Path, changed: str) -> None:
    x, labels = vectors(40)
    np.savez(tmp_path / "a.npz", x=x, labels=labels)
    samples = opened(vector_model(), tmp_path / "a.npz").samples
    if changed == "shrunk":
        os.truncate(tmp_path / "a.npz", 100)
    else:
        (tmp_path / "a.npz").unlink()
    with pytest.raises(DataError, match=r"a\.npz"):
        drawn(samples)


# Features in CSV.


def test_features_are_all_columns_but_the_label(tmp_path: Path) -> None:
    x, labels = vectors(30)
    lines = [f"{a},{label},{b},{c},{d}" for (a, b, c, d), label in zip(x, labels, strict=True)]
    (tmp_path / "a.csv").write_text("\ufeffa,label,b,c,d\r\n" + "\r\n".join(lines))
    data = opened(vector_model(), tmp_path / "a.csv")
    assert data.description == "30 records, 3 classes; 1 held out"
    check_pairs(drawn(data.samples, 29))


def test_several_columns_may_be_labels(tmp_path: Path) -> None:
    (tmp_path / "a.tsv").write_text("a\tu\tb\tv\tc\td\n" + "1\t10\t2\t20\t3\t4\n" * 4)
    manifest = vector_model(labels=(("2",), "float32"), loss="mse", classes=0)
    feed = drawn(opened(manifest, tmp_path / "a.tsv", label_field="u,v").samples)
    assert feed.labels.tolist() == [[10.0, 20.0]] * 4
    assert feed.inputs[0].tolist() == [[1.0, 2.0, 3.0, 4.0]] * 4


def test_classes_of_features_may_be_words(tmp_path: Path) -> None:
    rows = "".join(f"{n},{n},{n},{n},{'cab'[n % 3]}\n" for n in range(9))
    (tmp_path / "a.csv").write_text("p,q,r,s,label\n" + rows)
    (tmp_path / "b.csv").write_text("p,q,r,s,label\n1,1,1,1,b\n")
    data = opened(vector_model(), tmp_path / "a.csv", heldout=tmp_path / "b.csv")
    assert data.notes == ("classes by name, in order: 0 a, 1 b, 2 c",)
    feed = drawn(data.samples, 9)
    assert feed.labels.tolist() == [[2, 0, 1][int(row[0]) % 3] for row in feed.inputs[0]]
    assert data.samples.heldout(sample_count=1, first_sample=0, count=1).labels.tolist() == [1]


# Images.


def image_folder(
    path: Path, *, names: tuple[str, ...] = ("blue", "red"), mode: str = "RGB"
) -> Path:
    """Two images of one colour per class; red ones are wide, blue ones a palette."""
    for index, name in enumerate(names):
        (path / name / "inner").mkdir(parents=True)
        colour = (255, 0, 51) if index else (0, 0, 255)
        image = Image.new("RGB", (20, 10), colour).convert(mode)
        image.save(path / name / "1.png")
        image.convert("P").save(path / name / "inner" / "2.gif")
        (path / name / "notes.txt").write_text("not an image")
    return path


def image_model(**changes: object) -> Manifest:
    given = {"inputs": PIXELS, "classes": 2, **changes}
    return manifest_for("images", **given)  # type: ignore[arg-type]  # by name


def test_images_are_scaled_and_normalised(tmp_path: Path) -> None:
    mean, std = (0.5, 0.0, 0.2), (0.5, 1.0, 2.0)
    manifest = image_model(image_mean=mean, image_std=std)
    data = opened(manifest, image_folder(tmp_path / "images"))
    assert data.description == "4 images, 2 classes; 1 held out"
    assert data.notes == ("classes by name, in order: 0 blue, 1 red",)
    feed = drawn(data.samples, 3)
    (pixels,) = feed.inputs
    assert (pixels.shape, pixels.dtype) == ((3, 3, 4, 6), np.float32)
    colours = np.array([[0, 0, 1], [1, 0, 0.2]], np.float32)
    expected = (colours - np.array(mean)) / np.array(std)
    np.testing.assert_allclose(pixels.mean(axis=(2, 3)), expected[feed.labels], atol=0.02)


def test_layout_and_channels_follow_the_port(tmp_path: Path) -> None:
    folder = image_folder(tmp_path / "images")
    grey = image_model(inputs={"x": (("1", "4", "6"), "float32")})
    assert drawn(opened(grey, folder).samples).inputs[0].shape == (4, 1, 4, 6)
    last = image_model(inputs={"x": (("4", "6", "3"), "uint8")})
    (pixels,) = drawn(opened(last, folder).samples).inputs
    assert (pixels.shape, pixels.dtype) == ((4, 4, 6, 3), np.uint8)
    assert pixels.flags.c_contiguous
    with pytest.raises(BundleError, match="takes no images"):
        opened(image_model(inputs={"x": (("9",), "float32")}), folder)


def test_camera_orientation_is_applied(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / "images" / name).mkdir(parents=True)
        image = Image.new("RGB", (6, 4))
        image.paste((255, 255, 255), (0, 0, 3, 4))
        orientation = image.getexif()
        orientation[0x0112] = 3
        image.save(tmp_path / "images" / name / "x.png", exif=orientation)
    (pixels,) = drawn(opened(image_model(), tmp_path / "images").samples, 1).inputs
    assert pixels[0, 0, :, 0].max() == 0.0
    assert pixels[0, 0, :, -1].min() == 1.0


def test_image_that_does_not_decode_is_named_when_it_is_drawn(tmp_path: Path) -> None:
    folder = image_folder(tmp_path / "images")
    broken = folder / "red" / "1.png"
    Image.effect_noise((64, 64), 50).save(broken)
    os.truncate(broken, broken.stat().st_size // 2)
    samples = opened(image_model(), folder).samples
    with pytest.raises(DataError, match=r"red/1\.png \(image 3\) cannot be decoded"):
        drawn(samples, 4)


def test_image_that_was_exchanged_is_noticed(tmp_path: Path) -> None:
    folder = image_folder(tmp_path / "images", names=("a", "b"))
    samples = opened(image_model(), folder).samples
    for path in folder.rglob("*.png"):
        Image.new("RGB", (5, 5)).save(path)
    with pytest.raises(DataError, match="has changed while it is in use"):
        drawn(samples, 4)

"""Images in folders, one folder per class; decoded by Pillow when they are drawn.

Shapes: B samples of a microbatch, C channels, H height, W width.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import types
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from p2ptrain.bundle.manifest import Manifest
from p2ptrain.data.cache import CacheEntry, CacheWriter, cached
from p2ptrain.data.files import digest_of, digest_of_files, inspect_file, reading, walk
from p2ptrain.data.labels import LabelRule, infer_class_names
from p2ptrain.data.records import Wanted
from p2ptrain.errors import BundleError, DataError
from p2ptrain.ids import Digest
from p2ptrain.training.feed import Feed

if TYPE_CHECKING:
    from PIL import Image

Array = NDArray[Any]  # Any: the port's dtype
IMAGE_SUFFIXES: Final = frozenset({
    ".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".ppm", ".pgm", ".tif", ".tiff",
})  # fmt: skip
_MODES: Final = {1: "L", 3: "RGB"}
_DEEP_MODES: Final = ("I", "F")


class ImageLayout(NamedTuple):
    """What the data port says about an image."""

    channels: int
    height: int
    width: int
    is_channels_last: bool
    dtype: str


class ImageRecords:
    """Files of a folder of classes, in the order of their names."""

    def __init__(
        self, root: Path, entry: CacheEntry, identity: Digest, rule: LabelRule, manifest: Manifest
    ) -> None:
        self._root, self._arrays, self._rule = root, entry.arrays, rule
        self._layout = image_layout(manifest)
        self._mean, self._std = _normalisation(manifest, self._layout)
        self.identity = identity
        self.class_names = rule.class_names
        self.summary = f"{self.count} images, {manifest.data.classes} classes"

    @property
    def count(self) -> int:
        return len(self._arrays["digests"])

    def feed(self, indices: Sequence[int]) -> Feed:
        """As `Records.feed`."""
        images = [self._image(index) for index in indices]
        labels = np.stack([self._rule.sample(self._path(index).parts[0]) for index in indices])
        return Feed(inputs=(np.stack(images),), labels=np.ascontiguousarray(labels))

    def _path(self, index: int) -> Path:
        ends = self._arrays["ends"]
        start = int(ends[index - 1]) if index else 0
        return Path(os.fsdecode(self._arrays["names"][start : int(ends[index])].tobytes()))

    def _image(self, index: int) -> Array:
        path, layout = self._root / self._path(index), self._layout
        with reading(path):
            content = path.read_bytes()
        if hashlib.sha256(content).digest() != self._arrays["digests"][index].tobytes():
            raise DataError(f"{path} has changed while it is in use", hint="restore the file")
        pixels_HWC = _decoded(path, layout, index)
        if layout.dtype == "uint8":
            image = pixels_HWC
        else:
            image = (pixels_HWC.astype(np.float32) / np.float32(255) - self._mean) / self._std
        ordered = image if layout.is_channels_last else image.transpose(2, 0, 1)
        return np.ascontiguousarray(ordered, layout.dtype)


def open_images(root: Path, wanted: Wanted) -> ImageRecords:
    """List a folder of classes and look into every file's header, once for each content.

    Raises:
        DataError: Pillow is missing, no class, an unknown one, a file that is no image.
    """
    _pillow()
    image_layout(wanted.manifest)
    folders = class_folders(root)
    names = wanted.class_names or infer_class_names(
        [folder.name for folder in folders], wanted.manifest, what=str(root)
    )
    rule = LabelRule(wanted.manifest, names)
    for folder in folders:
        _check_class(folder, rule)
    content = digest_of_files(
        (str(path.relative_to(root)), inspect_file(path).digest) for path in _files(folders)
    )
    identity = digest_of({"images": 1, "content": content, "class_names": names})
    entry = cached(wanted.cache, identity, lambda writer: _list(writer, root, folders))
    return ImageRecords(root, entry, identity, rule, wanted.manifest)


def class_folders(root: Path) -> list[Path]:
    """The folders of a folder that hold an image at any depth, by name."""
    with reading(root):
        folders = [path for path in sorted(root.iterdir()) if path.is_dir()]
    return [folder for folder in folders if any(_files([folder]))]


def image_paths(root: Path) -> Iterator[Path]:
    """The images of a folder of classes, in the order in which they are numbered."""
    return _files(class_folders(root))


def image_layout(manifest: Manifest) -> ImageLayout:
    """What the model's only data port wants; BundleError when it is no port for images."""
    ports = manifest.data_ports
    shape = manifest.shape(ports[0].value, batch=1)[1:]
    dtype = ports[0].value.dtype
    if len(ports) == 1 and len(shape) == 3 and dtype in ("float32", "uint8"):
        if shape[0] in _MODES:
            return ImageLayout(shape[0], shape[1], shape[2], False, dtype)
        if shape[2] in _MODES:
            return ImageLayout(shape[2], shape[0], shape[1], True, dtype)
    raise BundleError(f"input {ports[0].value.name!r} of shape {shape} takes no images")


def _list(writer: CacheWriter, root: Path, folders: list[Path]) -> None:
    """Write down every file's name and hash, once its header was found to be an image's."""
    end = 0
    for index, path in enumerate(_files(folders)):
        with _opened(path, index):
            name = np.frombuffer(os.fsencode(path.relative_to(root)), np.uint8)
        end += len(name)
        writer.append("names", name)
        writer.append("ends", np.array([end], np.int64))
        digest = bytes.fromhex(inspect_file(path).digest)
        writer.append("digests", np.frombuffer(digest, np.uint8)[None])


def _files(folders: list[Path]) -> Iterator[Path]:
    for folder in folders:
        yield from (path for path in walk(folder) if path.suffix.lower() in IMAGE_SUFFIXES)


def _check_class(folder: Path, rule: LabelRule) -> None:
    try:
        rule.sample(folder.name)
    except ValueError as error:
        raise DataError(
            f"{folder}: unknown class: {error}", hint="name each folder after a class of the model"
        ) from error


def _normalisation(manifest: Manifest, layout: ImageLayout) -> tuple[Array, Array]:
    mean = manifest.data.image_mean or (0.0,) * layout.channels
    std = manifest.data.image_std or (1.0,) * layout.channels
    if len(mean) != layout.channels or len(std) != layout.channels or 0.0 in std:
        raise BundleError(f"mean or deviation do not fit images of {layout.channels} channels")
    return np.array(mean, np.float32), np.array(std, np.float32)


def _decoded(path: Path, layout: ImageLayout, index: int) -> Array:
    """One image, upright, resized: uint8 (H, W, C)."""
    from PIL import Image, ImageOps

    with _opened(path, index) as image:
        upright = ImageOps.exif_transpose(image).convert(_MODES[layout.channels])
        size = (layout.width, layout.height)
        resized = upright.resize(size, Image.Resampling.BILINEAR)
    return np.asarray(resized, np.uint8).reshape(layout.height, layout.width, layout.channels)


@contextlib.contextmanager
def _opened(path: Path, index: int) -> Iterator[Image.Image]:
    """An image whose header was read; whatever is wrong with it becomes DataError."""
    pillow = _pillow()
    place = f"{path} (image {index + 1})"
    try:
        with pillow.open(path) as image:
            if image.mode.startswith(_DEEP_MODES):
                raise DataError(
                    f"{place} has more than 8 bits per channel", hint="convert it to 8 bits"
                )
            yield image
    except (OSError, ValueError, SyntaxError, pillow.DecompressionBombError) as error:
        raise DataError(
            f"{place} cannot be decoded: {error}", hint="replace or remove that image"
        ) from error


def _pillow() -> types.ModuleType:
    try:
        from PIL import Image
    except ImportError as error:
        raise DataError(
            "images need the Pillow library, which is not installed",
            hint="pip install 'p2ptrain[images]' on the device that holds the data",
        ) from error
    return Image

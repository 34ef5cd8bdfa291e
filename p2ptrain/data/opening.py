"""Open a run's data: the model says what it wants, the path what there is."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from p2ptrain.bundle.manifest import Manifest
from p2ptrain.data.arrays import ARRAY_SUFFIXES, open_arrays
from p2ptrain.data.chats import is_chat, open_chats
from p2ptrain.data.features import open_features
from p2ptrain.data.files import digest_of, reading
from p2ptrain.data.images import IMAGE_SUFFIXES, class_folders, image_paths, open_images
from p2ptrain.data.options import DataOptions
from p2ptrain.data.records import Records, Wanted
from p2ptrain.data.samples import (
    Digests,
    RecordSamples,
    WindowLayout,
    WindowSamples,
    split_records,
    whole_part,
)
from p2ptrain.data.streams import TokenStream, open_stream, text_paths
from p2ptrain.data.tables import CSV_SUFFIXES, JSON_SUFFIXES, open_table
from p2ptrain.data.texts import open_texts
from p2ptrain.data.tokenizing import open_tokenizer
from p2ptrain.data.words import open_words
from p2ptrain.errors import DataError
from p2ptrain.ids import Digest
from p2ptrain.training.feed import Samples
from p2ptrain.training.owners import OwnedData, Unit
from p2ptrain.training.sampling import Tokens
from p2ptrain.training.text import split_heldout

Opener = Callable[[Path, Wanted], Records]
_READERS: Final[Mapping[str, Mapping[str, Opener]]] = {
    "windows": {"arrays": open_arrays},
    "masked-windows": {"arrays": open_arrays},
    "texts": {"JSON lines": open_texts, "CSV": open_texts, "arrays": open_arrays},
    "words": {"JSON lines": open_words, "arrays": open_arrays},
    "images": {"a folder of images": open_images, "arrays": open_arrays},
    "arrays": {"CSV": open_features, "arrays": open_arrays},
}
"""Data kind of the bundle -> what a path holds -> who reads it as records."""
_STREAMED: Final = frozenset({"a text file", "a folder", "JSON lines", "CSV"})
_WANTED: Final = {
    "windows": "text: a file, a folder, JSON lines or CSV with a text field, or conversations",
    "masked-windows": "text: a file, a folder, JSON lines or CSV with a text field",
    "texts": "labelled texts: JSON lines or CSV with the fields text and label",
    "words": "tagged words: JSON lines with the lists words and tags",
    "images": "a folder of images with one folder per class",
    "arrays": "numbers: .npz, .npy, a folder of .npy arrays, or CSV",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenData:
    """A run's data, opened and checked."""

    samples: Samples
    training_digest: Digest
    heldout_digest: Digest
    description: str
    """For people: `4000 texts, 20 classes; 200 held out`."""
    notes: tuple[str, ...]
    """What was decided by looking at the data, one sentence each."""
    owned: OwnedData
    """What a device tells of it where it feeds data of its own."""


def open_samples(
    manifest: Manifest,
    bundle_directory: Path,
    data: str,
    heldout: str | None,
    options: DataOptions,
    cache: Path,
    *,
    minibatch_size: int,
) -> OpenData:
    """Open what `--data` and `--heldout` name; blocking, and every record is checked once.

    Args:
        manifest: The model; its data section and ports say what a sample is.
        bundle_directory: Where `tokenizer.json` lies, if the model has one.
        data: Path to train on.
        heldout: Path to evaluate on; None: a fixed part of the data is kept apart.
        options: Names of fields and of files of labels.
        cache: Folder for what is derived from the data once.
        minibatch_size: Samples of one step.

    Raises:
        DataError: names the file and the record, what was expected and the next move.
        BundleError: the bundle's data section contradicts its ports or its tokenizer.
    """
    wanted = wanted_by(manifest, bundle_directory, options, cache)
    path, other = Path(data), Path(heldout) if heldout is not None else None
    reader = _reader(path, wanted)
    if reader is None:
        return _open_windows(path, other, wanted)
    return _open_records(reader, path, other, wanted, minibatch_size)


def wanted_by(
    manifest: Manifest, bundle_directory: Path, options: DataOptions, cache: Path
) -> Wanted:
    """What a model wants of its data; arguments and errors as above."""
    needs_text = manifest.data.kind in ("windows", "masked-windows", "texts", "words")
    return Wanted(
        manifest=manifest,
        tokenizer=open_tokenizer(manifest, bundle_directory) if needs_text else None,
        cache=cache,
        options=options,
        class_names=manifest.data.class_names,
    )


def open_records(path: Path, wanted: Wanted) -> Records:
    """All records of one path, in order, for whoever evaluates a model on them.

    Raises:
        DataError: as `open_samples`; or the model wants windows of text, which has no records.
    """
    reader = _reader(path, wanted)
    if reader is None:
        raise DataError(f"{path} is a text without records", hint="give labelled records")
    return reader(path, wanted)


def _reader(path: Path, wanted: Wanted) -> Opener | None:
    """Who reads a path as records; None where the model wants windows of its text."""
    kind = wanted.manifest.data.kind
    found = content_of(path, kind)
    if found == "JSON lines" and kind == "windows" and is_chat(open_table(path, wanted.cache)):
        return open_chats
    if kind in ("windows", "masked-windows") and found in _STREAMED:
        return None
    reader = _READERS[kind].get(found)
    if reader is None:
        raise DataError(
            f"{path} is {found}; this model wants {_WANTED[kind]}",
            hint="give data of that kind, or another model",
        )
    return reader


def data_files(path: Path, kind: str) -> list[Path]:
    """Every file that opening a path reads; those of a folder in the order of their names.

    Raises:
        DataError: the path or a folder below it cannot be read.
    """
    if not path.is_dir():
        return [path]
    match content_of(path, kind):
        case "arrays":
            return sorted(path.glob("*.npy"))
        case "a folder of images":
            return list(image_paths(path))
        case _:
            return [file for file in text_paths(path) if file.stat().st_size]


def content_of(path: Path, kind: str) -> str:
    """What a path holds, by its name and, for a folder, by the names in it: a folder of both text
    and images is what the model wants."""
    with reading(path):
        path.stat()
    if path.is_dir():
        if any(path.glob("*.npy")):
            return "arrays"
        if kind != "images" and any(text_paths(path)):
            return "a folder"
        return "a folder of images" if class_folders(path) else "a folder"
    suffix = path.suffix.lower()
    for suffixes, name in (
        (JSON_SUFFIXES, "JSON lines"),
        (CSV_SUFFIXES, "CSV"),
        (ARRAY_SUFFIXES, "arrays"),
        (IMAGE_SUFFIXES, "a single image"),
    ):
        if suffix in suffixes:
            return name
    return "a text file"


def _open_records(
    reader: Opener, path: Path, other: Path | None, wanted: Wanted, minibatch_size: int
) -> OpenData:
    records = reader(path, wanted)
    if other is None:
        training, heldout = split_records(records, path)
        digests = _split_digests(records.identity)
        description = f"{records.summary}; {heldout.count} held out"
    else:
        changed = dataclasses.replace(wanted.options, labels=wanted.options.heldout_labels)
        same = dataclasses.replace(wanted, options=changed, class_names=records.class_names)
        found = _reader(other, same)
        if found is None:
            raise DataError(f"{other} and {path} are of different kinds")
        apart = found(other, same)
        training, heldout = whole_part(records), whole_part(apart)
        digests = Digests(
            training=digest_of({"data": records.identity}),
            heldout=digest_of({"data": apart.identity}),
        )
        description = f"{records.summary}; held out: {apart.summary}"
    samples = RecordSamples(
        training=training, heldout=heldout, minibatch_size=minibatch_size, digests=digests
    )
    notes = _class_notes(records.class_names, wanted.class_names)
    owned = _owned(digests, training.count, "records", records.class_names)
    return _opened(samples, owned, description, notes)


def _open_windows(path: Path, other: Path | None, wanted: Wanted) -> OpenData:
    stream = open_stream(path, wanted)
    files, unit = stream.files, _unit(wanted)
    if other is None:
        context = WindowLayout(wanted.manifest).span - 1
        training, heldout = split_heldout(stream.tokens, context=context)
        digests = _split_digests(stream.identity)
    else:
        training, apart = stream.tokens, _heldout_stream(other, path, wanted)
        heldout, files = apart.tokens, (*files, *apart.files)
        digests = Digests(
            training=digest_of({"data": stream.identity}),
            heldout=digest_of({"data": apart.identity}),
        )
    _check_length(training, "training", path, wanted)
    _check_length(heldout, "held-out", other or path, wanted)
    samples = WindowSamples(
        manifest=wanted.manifest, training=training, heldout=heldout, files=files, digests=digests
    )
    description = f"{len(training)} {unit} of text; {len(heldout)} held out"
    owned = _owned(digests, len(training), unit, ())
    return _opened(samples, owned, description, ())


def _heldout_stream(other: Path, path: Path, wanted: Wanted) -> TokenStream:
    if _reader(other, wanted) is not None:
        raise DataError(f"{other} and {path} are of different kinds")
    return open_stream(other, wanted)


def _check_length(tokens: Tokens, what: str, path: Path, wanted: Wanted) -> None:
    least = WindowLayout(wanted.manifest).span
    if len(tokens) < least:
        raise DataError(
            f"{path}: {len(tokens)} {_unit(wanted)} of {what} text; one sample needs {least}",
            hint="give a longer text with --data, or a held-out file with --heldout",
        )


def _unit(wanted: Wanted) -> Unit:
    return "bytes" if wanted.manifest.data.tokenizer == "bytes" else "tokens"


def _split_digests(identity: Digest) -> Digests:
    return Digests(
        training=digest_of({"data": identity, "split": 1, "part": "training"}),
        heldout=digest_of({"data": identity, "split": 1, "part": "heldout"}),
    )


def _class_notes(found: tuple[str, ...], known: tuple[str, ...]) -> tuple[str, ...]:
    if found == known:
        return ()
    numbered = ", ".join(f"{index} {name}" for index, name in enumerate(found))
    return (f"classes by name, in order: {numbered}",)


def _owned(digests: Digests, records: int, unit: Unit, class_names: tuple[str, ...]) -> OwnedData:
    return OwnedData(
        training=digests.training,
        heldout=digests.heldout,
        records=records,
        unit=unit,
        classes=digest_of({"classes": class_names}),
    )


def _opened(
    samples: Samples, owned: OwnedData, description: str, notes: tuple[str, ...]
) -> OpenData:
    return OpenData(
        samples=samples,
        training_digest=owned.training,
        heldout_digest=owned.heldout,
        description=description,
        notes=notes,
        owned=owned,
    )

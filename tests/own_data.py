"""Data of several owners, and the one peer that trains on the same microbatches in their order."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from p2ptrain.data.opening import OpenData, open_samples
from p2ptrain.data.options import GivenData
from p2ptrain.ids import Digest
from p2ptrain.runtime.planning import job
from p2ptrain.runtime.reports import TrainRequest
from p2ptrain.store.bundles import Bundle, bundle_from_parts, load_bundle
from p2ptrain.store.runs import RunDirectory
from p2ptrain.training.contract import Contract
from p2ptrain.training.feed import Feed, Samples
from p2ptrain.training.owners import DataOwner, own_microbatches, own_seed
from tests.bundles import write_bundle

SIDE, CLASSES = 28, 10


def letters(index: int, length: int) -> bytes:
    """Bytes with some structure, other ones for each owner: a random walk over a few letters."""
    rng = np.random.Generator(np.random.Philox(50 + index))
    return bytes((np.cumsum(rng.integers(-2, 3, length)) % 26 + 97).astype(np.uint8))


def write_text(folder: Path, index: int) -> Path:
    path = folder / f"text-{index}.txt"
    path.write_bytes(letters(index, 1200 + 400 * index))
    return path


def write_arrays(folder: Path, index: int) -> Path:
    """Pictures of noise with their classes: 30 and more records."""
    rng = np.random.Generator(np.random.Philox(60 + index))
    count = 30 + 8 * index
    features = rng.random((count, 1, SIDE, SIDE), np.float32)
    path = folder / f"arrays-{index}.npz"
    np.savez(path, features=features, labels=rng.integers(1, CLASSES, count))
    return path


def write_chats(folder: Path, index: int) -> Path:
    """Conversations, of whose tokens only some are learnt: owners have unlike numbers of labels."""
    path = folder / f"chats-{index}.jsonl"
    said = letters(index, 600).decode()
    rows = [
        {"messages": [
            {"role": "user", "content": said[at : at + 3]},
            {"role": "assistant", "content": said[at : at + 2 + 7 * (index + 1)]},
        ]}
        for at in range(0, 240, 12)
    ]  # fmt: skip
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_words(folder: Path, index: int) -> Path:
    """Letters one by one, for the tokenizer of `write_tokenized`."""
    path = folder / f"words-{index}.txt"
    path.write_text(" ".join(letters(index, 400).decode()), encoding="utf-8")
    return path


def write_tokenized(folder: Path, made: Bundle) -> tuple[Path, Digest]:
    """A bundle with a tokenizer of its own, a token for each letter, and that one's digest."""
    tokens = {letter: number for number, letter in enumerate("?abcdefghijklmnopqrstuvwxyz")}
    tokenizer = Tokenizer(models.WordLevel(tokens, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    content = tokenizer.to_str().encode()
    digest = Digest(hashlib.sha256(content).hexdigest())
    data = dataclasses.replace(
        made.manifest.data, tokenizer="tokenizer.json", tokenizer_digest=digest
    )
    manifest = dataclasses.replace(made.manifest, data=data)
    write_bundle(folder, bundle_from_parts(manifest.to_bytes(), made.graphs()))
    (folder / "tokenizer.json").write_bytes(content)
    return folder, digest


Write = Callable[[Path, int], Path]


def given(folder: Path, write: Write, count: int) -> list[GivenData]:
    """A data set of its own for each of so many owners."""
    folder.mkdir(parents=True, exist_ok=True)
    return [GivenData(path=str(write(folder, index))) for index in range(count)]


def turn_round(data: GivenData) -> None:
    """Change an owner's text; once more restores it."""
    path = Path(data.path)
    path.write_bytes(path.read_bytes()[::-1])


def contract_of(runs: Path) -> Contract:
    """Of the only run of a home peer."""
    (folder,) = [path for path in runs.iterdir() if (path / "run.json").is_file()]
    return RunDirectory(folder).read_record().contract


@dataclass(frozen=True)
class Together:
    """All owners' samples as those of one data set: each microbatch where its owner has it."""

    contract: Contract
    samples: Sequence[Samples]
    """By owner."""
    digest: Digest

    def training(self, *, seed: int, step: int, first_sample: int, count: int) -> Feed:
        assert seed == self.contract.seed
        owner, samples, first = self._place(first_sample, count, self.contract.microbatches)
        return samples.training(
            seed=own_seed(seed, owner), step=step, first_sample=first, count=count
        )

    def heldout(self, *, sample_count: int, first_sample: int, count: int) -> Feed:
        whole = sample_count // count
        owner, samples, first = self._place(first_sample, count, whole)
        own = own_microbatches(self.contract.owners, owner.device, whole)
        return samples.heldout(sample_count=len(own) * count, first_sample=first, count=count)

    def _place(
        self, first_sample: int, count: int, microbatches: int
    ) -> tuple[DataOwner, Samples, int]:
        """Whose microbatch begins there, and where it begins among its own."""
        microbatch, rest = divmod(first_sample, count)
        assert (rest, count) == (0, self.contract.microbatch_size)
        for owner, samples in zip(self.contract.owners, self.samples, strict=True):
            own = own_microbatches(self.contract.owners, owner.device, microbatches)
            if microbatch in own:
                return owner, samples, own.index(microbatch) * count
        raise AssertionError(f"nobody has microbatch {microbatch}")


@contextlib.contextmanager
def put_together(
    patch: pytest.MonkeyPatch, contract: Contract, sets: Sequence[GivenData]
) -> Iterator[None]:
    """Whoever opens data for a run meanwhile gets all owners' together; `sets`: by owner."""

    def opened(*args: Any, **kwargs: Any) -> OpenData:  # Any: as `open_samples` takes them
        manifest, bundle, _, heldout, options, cache = args
        each = [
            open_samples(
                manifest, bundle, own.path, heldout, options, cache,
                minibatch_size=owner.microbatches * contract.microbatch_size,
            )
            for own, owner in zip(sets, contract.owners, strict=True)
        ]  # fmt: skip
        samples = Together(contract, [one.samples for one in each], each[0].samples.digest)
        return dataclasses.replace(each[0], samples=samples)

    with patch.context() as within:
        within.setattr(job, "open_samples", opened)
        yield


def own_request(bundle: str | Path, **changes: object) -> TrainRequest:
    """A run on its peers' own data."""
    base = TrainRequest(
        bundle=str(bundle), data="", own_data=True, parallelism="data", steps=6, microbatches=4,
        microbatch_size=2, heldout_microbatches=4, threads=1, checkpoint_every=0,
    )  # fmt: skip
    return dataclasses.replace(base, **changes)  # type: ignore[arg-type]  # fields by name


def alone_request(asked: TrainRequest, contract: Contract, data: str) -> TrainRequest:
    """The same for one peer that has all of it."""
    return dataclasses.replace(
        asked, own_data=False, parallelism="pipeline", plan=None, data=data,
        heldout_microbatches=contract.heldout_microbatches,
    )  # fmt: skip


def segments_of(bundle: str | Path) -> int:
    return len(load_bundle(Path(bundle)).manifest.segments)

"""The two ways to draw samples: windows of a row of tokens, and records one after the other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from p2ptrain.bundle.manifest import Manifest
from p2ptrain.data.files import SourceFile, digest_of
from p2ptrain.data.ports import TokenPorts, token_labels
from p2ptrain.data.records import Records
from p2ptrain.errors import BundleError, DataError
from p2ptrain.ids import Digest
from p2ptrain.training.feed import Feed, Samples
from p2ptrain.training.hidden_tokens import HidingRule, hide_tokens
from p2ptrain.training.sampling import (
    Numbers,
    Tokens,
    heldout_records,
    heldout_spans,
    split_order,
    training_records,
    training_spans,
)
from p2ptrain.training.text import HELDOUT_FRACTION


@dataclass(frozen=True, slots=True, kw_only=True)
class Digests:
    """Of everything that decides a run's samples, by part."""

    training: Digest
    heldout: Digest

    @property
    def both(self) -> Digest:
        return digest_of({"training": self.training, "heldout": self.heldout})


class WindowSamples:
    """Windows of text for language modelling: labels shifted by one, or some tokens hidden."""

    def __init__(
        self,
        *,
        manifest: Manifest,
        training: Tokens,
        heldout: Tokens,
        files: Sequence[SourceFile],
        digests: Digests,
    ) -> None:
        self._manifest, self._files, self._digests = manifest, tuple(files), digests
        self.training_tokens, self.heldout_tokens = training, heldout
        self._ports = TokenPorts(manifest)
        self._layout = WindowLayout(manifest)

    @property
    def digest(self) -> Digest:
        """As `Samples.digest`."""
        return self._digests.both

    def training(self, *, seed: int, step: int, first_sample: int, count: int) -> Feed:
        """As `Samples.training`."""
        self._check()
        spans = training_spans(
            self.training_tokens,
            seed=seed,
            step=step,
            first_sample=first_sample,
            count=count,
            length=self._layout.span,
        )
        return self._feed(spans, seed=seed, step=step, first_sample=first_sample)

    def heldout(self, *, sample_count: int, first_sample: int, count: int) -> Feed:
        """As `Samples.heldout`; what is hidden is drawn as for seed 0 at step 0."""
        self._check()
        spans = heldout_spans(
            self.heldout_tokens,
            sample_count=sample_count,
            first_sample=first_sample,
            count=count,
            length=self._layout.span,
        )
        return self._feed(spans, seed=0, step=0, first_sample=first_sample)

    def _check(self) -> None:
        for file in self._files:
            file.check()

    def _feed(self, spans: Numbers, *, seed: int, step: int, first_sample: int) -> Feed:
        inputs, labels = self._layout.lay_out(
            spans, seed=seed, step=step, first_sample=first_sample
        )
        return Feed(inputs=self._ports.whole(inputs), labels=token_labels(self._manifest, labels))


class WindowLayout:
    """How a run of tokens becomes the inputs and labels of one sample."""

    def __init__(self, manifest: Manifest) -> None:
        data = manifest.data
        self._ignored = manifest.loss.ignore_index
        self._rule: HidingRule | None = None
        self._frame: tuple[int, int] | None = None
        self.span = data.context + 1
        """Tokens that one sample takes from the text."""
        if data.kind != "masked-windows":
            return
        special = data.special_tokens
        if "mask" not in special:
            raise BundleError("a model of masked text without a mask token")
        self._rule = HidingRule(
            probability=data.mask_probability,
            mask_token=special["mask"],
            vocabulary=data.vocabulary,
            ignore_index=self._ignored,
        )
        if "cls" in special and "sep" in special:
            self._frame = special["cls"], special["sep"]
        self.span = data.context - (2 if self._frame else 0)

    def lay_out(
        self, spans: Numbers, *, seed: int, step: int, first_sample: int
    ) -> tuple[Numbers, Numbers]:
        """Inputs and labels, both int64 (B, T)."""
        if self._rule is None:
            return spans[:, :-1], spans[:, 1:]
        inputs, labels = hide_tokens(
            spans, self._rule, seed=seed, step=step, first_sample=first_sample
        )
        if self._frame is None:
            return inputs, labels
        begin, end = self._frame
        return (
            np.pad(inputs, ((0, 0), (1, 1)), constant_values=((0, 0), (begin, end))),
            np.pad(labels, ((0, 0), (1, 1)), constant_values=self._ignored),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """Records that belong together: all of them, or some by the fixed order of the split."""

    records: Records
    first: int
    count: int
    is_split: bool

    def feed(self, numbers: Numbers) -> Feed:
        """The part's records of these numbers, 0 <= number < count."""
        if self.is_split:
            numbers = split_order(self.records.count).at(numbers + self.first)
        return self.records.feed(numbers.tolist())


def split_records(records: Records, path: Path) -> tuple[Part, Part]:
    """Training and held-out part: every record is in one of them; DataError for fewer than two."""
    if records.count < 2:
        raise DataError(
            f"{path} has {records.count} record; to train and to evaluate takes 2",
            hint="give more records, or a second file with --heldout",
        )
    kept = max(int(records.count * HELDOUT_FRACTION), 1)
    heldout = Part(records=records, first=0, count=kept, is_split=True)
    rest = records.count - kept
    return Part(records=records, first=kept, count=rest, is_split=True), heldout


def whole_part(records: Records) -> Part:
    """All records."""
    return Part(records=records, first=0, count=records.count, is_split=False)


class RecordSamples:
    """Records, each visited once per data epoch."""

    def __init__(
        self, *, training: Part, heldout: Part, minibatch_size: int, digests: Digests
    ) -> None:
        self._training, self._heldout = training, heldout
        self._minibatch_size, self._digests = minibatch_size, digests

    def by(self, minibatch_size: int) -> RecordSamples:
        """The same records for steps of so many."""
        return RecordSamples(
            training=self._training,
            heldout=self._heldout,
            minibatch_size=minibatch_size,
            digests=self._digests,
        )

    @property
    def digest(self) -> Digest:
        """As `Samples.digest`."""
        return self._digests.both

    def training(self, *, seed: int, step: int, first_sample: int, count: int) -> Feed:
        """As `Samples.training`."""
        numbers = training_records(
            self._training.count,
            seed=seed,
            step=step,
            minibatch_size=self._minibatch_size,
            first_sample=first_sample,
            count=count,
        )
        return self._training.feed(numbers)

    def heldout(self, *, sample_count: int, first_sample: int, count: int) -> Feed:
        """As `Samples.heldout`."""
        numbers = heldout_records(
            self._heldout.count, sample_count=sample_count, first_sample=first_sample, count=count
        )
        return self._heldout.feed(numbers)


def for_minibatch(samples: Samples, minibatch_size: int) -> Samples:
    """The same samples for steps of so many; windows of a text do not depend on it."""
    return samples.by(minibatch_size) if isinstance(samples, RecordSamples) else samples

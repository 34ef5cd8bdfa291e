"""The second copy of a run's data: offered by who has it, fetched in the background, opened.

Whoever holds a copy can feed the run, so that losing its home peer is an ordinary loss
(DESIGN section 7). Nothing is announced here; the caller sends `DataOffer` along and says when
the copy is whole.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import trio

from p2ptrain import limits
from p2ptrain.data.arriving import ArrivingData, ArrivingFile, storing
from p2ptrain.data.opening import OpenData, open_samples
from p2ptrain.data.portable import (
    DataManifest,
    DataSource,
    describe_data,
    parse_data_manifest,
)
from p2ptrain.errors import DataError, InvariantBroken, RemoteProtocolError
from p2ptrain.ids import DeviceId, Digest, Lineage, RunId, ViewNumber
from p2ptrain.runtime.exchange.blobs import BlobExchange
from p2ptrain.runtime.planning.job import CACHE_FOLDER, Job
from p2ptrain.store.bundles import Bundle, load_bundle
from p2ptrain.store.runs import RunDirectory
from p2ptrain.training.contract import Contract
from p2ptrain.wire.flows import Flow


@dataclass(frozen=True, slots=True, kw_only=True)
class DataOffer:
    """What a second holder is told: the blob that lists the files, and what they take."""

    listing: Digest
    listing_bytes: int
    total_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class CopyProgress:
    """How far a copy is."""

    files: int
    files_done: int
    bytes: int
    bytes_done: int


class OfferedData:
    """The owner's side: its data as blobs, read when they are asked for."""

    def __init__(self, blobs: BlobExchange) -> None:
        self._blobs = blobs
        self._source: DataSource | None = None
        self._listing: Digest | None = None

    async def open(self, job: Job) -> DataOffer:
        """Hash a run's data and offer it until `close`.

        Reads all of it once. A cancellation offers nothing.

        Raises:
            DataError: a file cannot be read, or the data cannot be copied to another device.
        """
        source = await trio.to_thread.run_sync(_describe, job)
        listing = source.manifest.to_bytes()
        if len(listing) > limits.DATA_MANIFEST_BYTES_MAX:
            raise DataError("the data has too many files for a second copy")
        self.close()
        flow = Flow(job.run, "data")
        self._source, self._listing = source, self._blobs.publish(listing, flow=flow)
        self._blobs.add_source(self._read, flow)
        return DataOffer(
            listing=self._listing,
            listing_bytes=len(listing),
            total_bytes=source.manifest.total_bytes,
        )

    def close(self) -> None:
        """Offer nothing any more."""
        if self._listing is not None:
            self._blobs.withdraw(self._listing)
            self._blobs.remove_source(self._read)
        self._source = self._listing = None

    async def _read(self, digest: Digest) -> bytes | None:
        if self._source is None:  # closed since it was asked for
            await trio.lowlevel.checkpoint()
            return None
        return await trio.to_thread.run_sync(self._source.read, digest)


@dataclass(frozen=True, slots=True, kw_only=True)
class CopiedRun:
    """What the holder of a copy knows of the run; enough to conduct it."""

    run: RunId
    lineage: Lineage
    view: ViewNumber
    bundle: Bundle
    """As it came over the wire."""
    contract: Contract
    checkpoint_every: int


class DataCopy:
    """The holder's side: one run's data on this device."""

    def __init__(
        self,
        run: CopiedRun,
        *,
        runs_path: Path,
        blobs: BlobExchange,
        on_progress: Callable[[CopyProgress], None] = lambda progress: None,
    ) -> None:
        self._run, self._runs_path, self._blobs = run, runs_path, blobs
        self._on_progress = on_progress
        self._directory = RunDirectory(runs_path / run.run)
        self._bytes_done = self._files_done = 0

    async def fetch(self, device: DeviceId, offer: DataOffer) -> Job:
        """Copy the data from another member and open it; what is here already is not fetched.

        A cancellation, and every error, leaves whole parts for the next attempt.

        Args:
            device: Who offers it.
            offer: What it said.

        Returns:
            A job with which this device can feed the run.

        Raises:
            PeerLost: it went away; try again when it is back.
            RemoteProtocolError: what it lists is no data; nothing was fetched.
            DataError: there is no room here, a file has changed meanwhile, or what came is not
                the run's data.
        """
        if not 0 < offer.listing_bytes <= limits.DATA_MANIFEST_BYTES_MAX:
            raise RemoteProtocolError(f"a list of the run's data of {offer.listing_bytes} bytes")
        size = offer.listing_bytes
        content = await self._blobs.fetch(device, offer.listing, size=size)
        manifest = await trio.to_thread.run_sync(parse_data_manifest, content)
        arriving = ArrivingData(self._directory.path, manifest)
        missing = await trio.to_thread.run_sync(arriving.missing)
        self._begin(manifest, missing)
        for file in missing:
            await self._fetch_file(device, manifest, file)
        return await trio.to_thread.run_sync(self._open, arriving)

    def _begin(self, manifest: DataManifest, missing: tuple[ArrivingFile, ...]) -> None:
        self._files_done = manifest.file_count - len(missing)
        self._bytes_done = manifest.total_bytes - sum(file.file.bytes for file in missing)
        self._tell(manifest)

    def _tell(self, manifest: DataManifest) -> None:
        self._on_progress(
            CopyProgress(
                files=manifest.file_count,
                files_done=self._files_done,
                bytes=manifest.total_bytes,
                bytes_done=self._bytes_done,
            )
        )

    async def _fetch_file(
        self, device: DeviceId, manifest: DataManifest, file: ArrivingFile
    ) -> None:
        try:
            sound = await trio.to_thread.run_sync(file.begin)
            self._bytes_done += sum(size for _, size in file.file.blobs[:sound])
            for digest, size in file.file.blobs[sound:]:
                await self._fetch_part(device, file, digest, size)
                self._bytes_done += size
                self._tell(manifest)
            await trio.to_thread.run_sync(file.finish)
        finally:
            file.close()
        self._files_done += 1
        self._tell(manifest)

    async def _fetch_part(
        self, device: DeviceId, file: ArrivingFile, digest: Digest, size: int
    ) -> None:
        with storing():
            try:
                await self._blobs.fetch_into(device, digest, size=size, write=file.write)
            except RemoteProtocolError as error:
                raise DataError(
                    f"{file.file.name} has changed while it was copied", hint="restore the file"
                ) from error

    def _open(self, arriving: ArrivingData) -> Job:
        run = self._run
        self._keep_bundle()
        bundle = load_bundle(self._directory.bundle_path)
        paths = arriving.paths()
        opened = open_samples(
            bundle.manifest,
            self._directory.bundle_path,
            paths.data,
            paths.heldout,
            paths.options,
            self._runs_path.parent / CACHE_FOLDER,
            minibatch_size=run.contract.minibatch_size,
        )
        _check_digests(opened, run.contract)
        return Job(
            run=run.run,
            lineage=run.lineage,
            view=run.view,
            bundle=bundle,
            contract=run.contract,
            samples=opened.samples,
            data=paths.data,
            heldout=paths.heldout,
            data_options=paths.options,
            data_notes=(f"the data: {opened.description}", *opened.notes),
            directory=self._directory,
            checkpoint=None,
            checkpoint_every=run.checkpoint_every,
        )

    def _keep_bundle(self) -> None:
        """Put the bundle's graphs beside its tokenizer and weights, which came as files."""
        bundle = self._run.bundle
        graphs = {Digest(digest): bundle.graph(Digest(digest)) for digest in bundle.manifest.graphs}
        self._directory.write_bundle(bundle.manifest_bytes, graphs)


def _describe(job: Job) -> DataSource:
    if job.bundle.directory is None:
        raise InvariantBroken("data is offered with a bundle that lies in a directory")
    return describe_data(
        job.bundle.manifest, job.data, job.heldout, job.data_options, job.bundle.directory
    )


def _check_digests(opened: OpenData, contract: Contract) -> None:
    found = (opened.training_digest, opened.heldout_digest)
    if found != (contract.training_data, contract.heldout_data):
        raise DataError(
            "the copy is not the data that the run was started with",
            hint="restore the data on the home peer; the copy is then made again",
        )

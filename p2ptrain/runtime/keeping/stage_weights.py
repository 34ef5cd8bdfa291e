"""A bundle's weights: offered by who has them; on other peers kept from before, else fetched."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

import trio

from p2ptrain import limits
from p2ptrain.bundle.manifest import DTYPES, Manifest, Tensor
from p2ptrain.engine.contract import Array
from p2ptrain.errors import BundleError, InvariantBroken
from p2ptrain.ids import DeviceId, Digest, RunId
from p2ptrain.runtime.exchange.blobs import BlobExchange
from p2ptrain.store.weights import (
    SegmentWeightsWriter,
    Weights,
    needed_weights,
    open_segment_weights,
)
from p2ptrain.training.safetensors import raw_bytes
from p2ptrain.wire.flows import Flow

FLOAT32_BYTES = DTYPES["float32"]


def prepare_timeout_s(manifest: Manifest, *, resumed: bool) -> float:
    """How long all stages together may take to fetch what they need, and to get ready.

    Every member derives the same from the manifest: who is ready first waits for the last.
    """
    segments = range(len(manifest.segments))
    needed = [t for index in segments for t in needed_weights(manifest, index, resumed=resumed)]
    fetched = sum(tensor_bytes(tensor) for tensor in needed)
    if resumed:
        vectors = 1 + max((len(rule.state) for rule in manifest.updates.values()), default=0)
        trained = [tensor for tensor in manifest.tensors if tensor.binding != "frozen"]
        fetched += vectors * FLOAT32_BYTES * sum(tensor.elements for tensor in trained)
    return limits.PREPARE_TIMEOUT_S + fetched / limits.PREPARE_BYTES_PER_S_MIN


def tensor_bytes(tensor: Tensor) -> int:
    """Bytes of a tensor in the weights file."""
    return tensor.elements * DTYPES[tensor.dtype]


class OfferedWeights:
    """Every tensor that a stage may fetch from this device, as long as it takes part in the run.

    Nothing is read before it is asked for. Members begin a view at different moments, so what
    one view's work offered would be missing for whoever is ahead of this device.
    """

    def __init__(self, blobs: BlobExchange, manifest: Manifest, run: RunId) -> None:
        self._blobs, self._manifest = blobs, manifest
        self._flow = Flow(run, "weights")
        self._published: list[Digest] = []

    def open(self, weights: Weights) -> None:
        """Offer them until `close`; again has no effect."""
        if self._published:
            return
        for segment in range(len(self._manifest.segments)):
            for tensor in needed_weights(self._manifest, segment, resumed=False):
                content = raw_bytes(weights.unchecked(tensor.name))
                self._published.append(
                    self._blobs.publish(content, digest=tensor.digest, flow=self._flow)
                )

    def close(self) -> None:
        """The run is over here: offer nothing more."""
        for digest in self._published:
            self._blobs.withdraw(digest)
        self._published.clear()


class StageWeights:
    """A stage's share of a bundle's weights on a peer that does not have the bundle.

    There is one file per segment, so that another cut after a pause finds them again.
    """

    def __init__(self, directory: Path, *, manifest: Manifest, segments: range) -> None:
        self._directory, self._manifest, self._segments = directory, manifest, segments

    async def fetch(
        self, blobs: BlobExchange, home: DeviceId, *, resumed: bool
    ) -> Mapping[str, Array]:
        """Every weight that the stage needs, mapped and checked.

        A cancellation leaves whole segments, which the next session finds.

        Raises:
            PeerLost: the home peer does not have a tensor, went away or stood still.
            BundleError: what came is not what the manifest names, or cannot be stored.
        """
        found: dict[str, Array] = {}
        for segment in self._segments:
            tensors = needed_weights(self._manifest, segment, resumed=resumed)
            if not tensors:
                continue
            path = self._directory / f"segment-{segment:04d}.safetensors"
            weights = await trio.to_thread.run_sync(open_segment_weights, path, tensors)
            if weights is None:
                await _fetch_segment(blobs, home, path, tensors)
                weights = await trio.to_thread.run_sync(open_segment_weights, path, tensors)
            if weights is None:
                raise BundleError(f"the weights of segment {segment} cannot be read back")
            found |= weights
        return found

    @property
    def kept(self) -> bool:
        """Whether anything was fetched for this run, now or in an earlier session."""
        return self._directory.is_dir()

    def forget(self) -> None:
        """The run is complete: nobody will resume it; blocking."""
        shutil.rmtree(self._directory, ignore_errors=True)


async def _fetch_segment(
    blobs: BlobExchange, home: DeviceId, path: Path, tensors: tuple[Tensor, ...]
) -> None:
    try:
        writer = await trio.to_thread.run_sync(SegmentWeightsWriter, path, tensors)
        try:
            for tensor in tensors:
                if tensor.digest is None:
                    raise InvariantBroken(f"{tensor.name!r} is drawn, not fetched")
                size = tensor_bytes(tensor)
                await blobs.fetch_into(home, tensor.digest, size=size, write=writer.write)
            await trio.to_thread.run_sync(writer.commit)
        finally:
            writer.discard()
    except OSError as error:
        raise BundleError(
            f"the weights cannot be stored: {error.strerror or error}",
            hint="make room on the disk, then go on with --resume",
        ) from error

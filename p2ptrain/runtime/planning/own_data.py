"""The data that this device gives to runs whose peers feed their own: open it, and know it again.

It is read where it lies and goes nowhere; what others hear of it is in `OwnedData`. A model's
tokenizer comes with the offer, and stays in the cache, where a restarted process finds it.
"""

from __future__ import annotations

import contextlib
from pathlib import Path

import trio

from p2ptrain import limits
from p2ptrain.bundle.manifest import Manifest
from p2ptrain.data.opening import OpenData, content_of, open_samples
from p2ptrain.data.options import GivenData
from p2ptrain.data.samples import for_minibatch
from p2ptrain.errors import BundleError, DataError
from p2ptrain.ids import DeviceId
from p2ptrain.runtime.services import Services
from p2ptrain.store.atomic import write_atomic
from p2ptrain.store.bundles import TOKENIZER_FILE, read_tokenizer
from p2ptrain.training.contract import Contract
from p2ptrain.training.feed import Samples
from p2ptrain.training.messages import Offer
from p2ptrain.training.owners import DataOwner

TOKENIZERS = "tokenizers"
"""Folder of the cache: a folder for each, by digest."""


async def offered_data(
    services: Services, home: DeviceId, offer: Offer, manifest: Manifest
) -> OpenData:
    """This device's data for an offered model; every record is checked once.

    Raises:
        DataError: it gives none, or none that the model can use; it takes no part in the run.
        PeerLost, RemoteProtocolError, BundleError: the model's tokenizer cannot be had.
    """
    if services.given_data is None:
        raise DataError("it gives no data: start it with p2ptrain join --data PATH")
    await _fetch_tokenizer(services, home, offer, manifest)
    try:
        return await trio.to_thread.run_sync(_open, services, manifest)
    except DataError as error:
        if home == services.device:
            raise
        found = await trio.to_thread.run_sync(_found, services.given_data, manifest)
        # What is wrong with a record may quote it: that is for who asks on this device.
        raise DataError(
            f"its data{found} does not fit this model: p2ptrain train --data there says why"
        ) from error


def _found(given: GivenData, manifest: Manifest) -> str:
    """What kind of data it is, as far as names show it."""
    with contextlib.suppress(DataError, OSError):
        return f", {content_of(Path(given.path), manifest.data.kind)},"
    return ""


def owner_samples(
    services: Services,
    manifest: Manifest,
    contract: Contract,
    owner: DataOwner,
    opened: OpenData | None,
) -> Samples:
    """The samples that this device feeds as an owner; blocking.

    Args:
        services: Of this device.
        manifest: Of the model.
        contract: Of the run.
        owner: This device in it.
        opened: As it was offered; None: by an earlier process, so it is looked through again.

    Raises:
        DataError: the data is not what the run was begun with, or cannot be read; what others hear
            of it quotes no record, its cause is for this device.
    """
    name = services.directory.name_of(owner.device)
    try:
        opened = opened or _open(services, manifest)
    except (DataError, BundleError) as error:
        raise DataError(
            f"the data of {name} cannot be read any more", hint=f"p2ptrain status on {name}"
        ) from error
    if not owner.has(opened.owned):
        raise DataError(
            f"the data of {name} has changed since the run began",
            hint=f"restore it on {name}, restart its peer and --resume, or start a new run",
        )
    return for_minibatch(opened.samples, owner.microbatches * contract.microbatch_size)


def _open(services: Services, manifest: Manifest) -> OpenData:
    """For steps of one sample: how many an owner has follows from the plan."""
    given = services.given_data
    if given is None:
        raise DataError("this device gives no data any more", hint="p2ptrain join --data PATH")
    return open_samples(
        manifest,
        _tokenizer_folder(services, manifest),
        given.path,
        given.heldout,
        given.options,
        services.cache_path,
        minibatch_size=1,
    )


def _tokenizer_folder(services: Services, manifest: Manifest) -> Path:
    return services.cache_path / TOKENIZERS / (manifest.data.tokenizer_digest or "none")


async def _fetch_tokenizer(
    services: Services, home: DeviceId, offer: Offer, manifest: Manifest
) -> None:
    digest = manifest.data.tokenizer_digest
    if manifest.data.tokenizer != TOKENIZER_FILE or digest is None:
        await trio.lowlevel.checkpoint()
        return
    folder = _tokenizer_folder(services, manifest)
    if (folder / TOKENIZER_FILE).is_file():
        await trio.to_thread.run_sync(read_tokenizer, folder, manifest)
        return
    if not 0 < offer.tokenizer_bytes <= limits.TOKENIZER_BYTES_MAX:
        raise BundleError(f"a tokenizer of {offer.tokenizer_bytes} bytes")
    content = await services.blobs.fetch(home, digest, size=offer.tokenizer_bytes)
    await trio.to_thread.run_sync(_keep, folder, content)


def _keep(folder: Path, content: bytes) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        write_atomic(folder / TOKENIZER_FILE, [content])
    except OSError as error:
        raise DataError(f"{folder}: {(error.strerror or str(error)).lower()}") from error

"""Read `manifest.json`, also of older versions, and refuse what contradicts itself."""

from __future__ import annotations

import json
from typing import Any, Final

from p2ptrain import limits
from p2ptrain.bundle.contradictions import contradictions
from p2ptrain.bundle.manifest import FORMAT, VERSION, WITH_UNITS_AS_NUMBERS, Manifest
from p2ptrain.errors import BundleError, RemoteProtocolError
from p2ptrain.wire.codec import from_plain

VERSIONS_READ: Final = (1, 2, 3, 4, 5)


def parse_manifest(content: bytes) -> Manifest:
    """Read and check `manifest.json`.

    Raises:
        BundleError: too large, not JSON, an unknown version, or inconsistent; the bundle is
            refused whole and nothing of it was used.
    """
    manifest = decode_manifest(content)
    check_manifest(manifest)
    return manifest


def decode_manifest(content: bytes) -> Manifest:
    """Read `manifest.json` without asking whether its parts agree; `check_manifest` does.

    Raises:
        BundleError: too large, not JSON, an unknown version, or fields of other types.
    """
    if len(content) > limits.MANIFEST_BYTES_MAX:
        raise BundleError(f"manifest.json has {len(content)} bytes, over the limit")
    try:
        document = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise BundleError(f"manifest.json is not JSON: {error}") from error
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise BundleError("manifest.json is not a p2ptrain bundle manifest")
    if document.get("version") not in VERSIONS_READ:
        raise BundleError(
            f"bundle version {document.get('version')!r} is unknown; this p2ptrain reads up to"
            f" {VERSION}",
            hint="update p2ptrain, or export the model again with this version",
        )
    if document["version"] == 1:
        _upgrade(document)
    if document["version"] == WITH_UNITS_AS_NUMBERS:
        _name_units(document)
    try:
        return from_plain(Manifest, document)
    except RemoteProtocolError as error:
        raise BundleError(f"manifest.json: {error.message}") from error


def check_manifest(manifest: Manifest) -> None:
    """Refuse a manifest whose parts contradict each other.

    Raises:
        BundleError: names the first contradiction found.
    """
    problem = next(contradictions(manifest), None)
    if problem is not None:
        raise BundleError(f"manifest.json: {problem}")


def _upgrade(document: dict[str, Any]) -> None:  # Any: JSON, not yet checked
    """Version 1 knew one input, byte-level language modelling and plain cross-entropy."""
    inference, data = document.get("inference"), document.get("data")
    if isinstance(inference, dict) and "input" in inference:
        inference["inputs"] = [inference.pop("input")]
    if isinstance(data, dict):
        data["kind"] = "windows"
        data.pop("dtype", None)
    document["task"] = "language-modelling"
    document["loss"] = {"kind": "cross-entropy"}


def _name_units(document: dict[str, Any]) -> None:  # Any: JSON, not yet checked
    """Version 4 knew numbers only, and nothing but numbers; the rest is refused by its type."""
    for mode in _entries(document.get("sharding")):
        for kind in _entries(mode.get("kinds")):
            axes = kind.get("axes")
            if isinstance(axes, dict):
                kind["axes"] = {
                    name: str(units) if type(units) is int else None for name, units in axes.items()
                }


def _entries(value: object) -> list[dict[str, Any]]:  # Any: JSON, not yet checked
    """The maps that a map holds."""
    entries = value.values() if isinstance(value, dict) else ()
    return [each for each in entries if isinstance(each, dict)]

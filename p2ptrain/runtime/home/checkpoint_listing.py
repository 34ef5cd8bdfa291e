"""The blob that tells members where each segment's state of a resumed checkpoint is."""

from __future__ import annotations

import json
from collections.abc import Iterable

from p2ptrain.errors import CheckpointError, RemoteProtocolError
from p2ptrain.store.runs import SavedSegment
from p2ptrain.wire.codec import from_plain, to_plain


def checkpoint_listing(segments: Iterable[SavedSegment]) -> bytes:
    """The listing as JSON."""
    return json.dumps([to_plain(saved) for saved in segments]).encode()


def parse_listing(content: bytes) -> dict[int, SavedSegment]:
    """By segment; CheckpointError for what is no listing."""
    try:
        document = json.loads(content)
        if not isinstance(document, list):
            raise CheckpointError("the checkpoint's listing is not a list")
        segments = [from_plain(SavedSegment, item) for item in document]
    except (ValueError, RemoteProtocolError) as error:
        raise CheckpointError(f"the checkpoint's listing is damaged: {error}") from error
    return {saved.segment: saved for saved in segments}

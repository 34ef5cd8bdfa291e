"""Every bound in one place: queues, sizes, waits. Units are in the names."""

from __future__ import annotations

from typing import Final

# Wire (PROTOCOL.md section 3).
FRAME_HEADER_BYTES_MAX: Final = 4096
CONTROL_BODY_BYTES_MAX: Final = 256 * 1024
BULK_CHUNK_BYTES_MAX: Final = 1024 * 1024
TENSOR_BODY_BYTES_MAX: Final = 1024 * 1024 * 1024
HANDSHAKE_TIMEOUT_S: Final = 5.0
HELLO_TIMEOUT_S: Final = 5.0
DIAL_TIMEOUT_S: Final = 5.0
CONTROL_QUEUE_MAX: Final = 1024
LINK_PEERS_MAX: Final = 64
REDIAL_BACKOFF_MAX_S: Final = 10.0
DISCOVERED_ADDRESSES_MAX: Final = 256

# Membership (DESIGN section 6).
PROBE_INTERVAL_S: Final = 1.0
PROBE_TIMEOUT_S: Final = 1.0
SUSPECT_TIMEOUT_S: Final = 5.0
PUSH_PULL_INTERVAL_S: Final = 10.0
RECORD_BYTES_MAX: Final = 2048

# Agreement.
PROPOSAL_TIMEOUT_S: Final = 30.0

# Bundle.
MANIFEST_BYTES_MAX: Final = 4 * 1024 * 1024
GRAPH_BYTES_MAX: Final = 64 * 1024 * 1024
SEGMENTS_MAX: Final = 4096
TENSOR_ELEMENTS_MAX: Final = 1 << 31

# Run.
STAGES_MAX: Final = 64
MICROBATCHES_MAX: Final = 4096
OFFER_TIMEOUT_S: Final = 60.0
PREPARE_TIMEOUT_S: Final = 120.0
BLOB_TIMEOUT_S: Final = 60.0

# Control socket.
CONTROL_LINE_BYTES_MAX: Final = 1024 * 1024
CONTROL_CLIENTS_MAX: Final = 16

# Local files.
CONFIG_BYTES_MAX: Final = 64 * 1024
INVITE_BYTES_MAX: Final = 16 * 1024

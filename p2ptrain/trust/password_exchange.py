"""SPAKE2: two sides that know the same short code get the same strong key, and nobody else any.

The one place that knows the `spake2` package (pure Python, the curve of Ed25519). It gives one
guess to whoever takes part in a run, and confirms nothing: the caller must. The package is loaded
by the first run: it computes its groups then, which is 7 % of a peer's start, and few peers ever
see a code.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Final, Protocol

from p2ptrain.errors import RemoteProtocolError

if TYPE_CHECKING:
    import spake2

EXCHANGE_MESSAGE_BYTES: Final = 33
"""A side byte and a point."""
Entropy = Callable[[int], bytes]


class PasswordExchange(Protocol):
    """One side of one run."""

    @property
    def message(self) -> bytes:
        """What the other side needs, EXCHANGE_MESSAGE_BYTES long."""

    def finish(self, theirs: bytes) -> bytes:
        """The shared key, 32 bytes; once only.

        Raises:
            RemoteProtocolError: what came is not a message of the other side.
        """


def begin_exchange(
    password: bytes,
    *,
    is_sponsor: bool,
    context: bytes,
    entropy: Entropy = os.urandom,
) -> PasswordExchange:
    """Begin one side of a run; blocks for some milliseconds, up to a tenth of a second on ARM.

    Args:
        context: Bound into the key, so that both sides must agree on it: who talks to whom in
            which group, with which nonces.
    """
    import spake2

    kind = spake2.SPAKE2_B if is_sponsor else spake2.SPAKE2_A
    joiner, sponsor = b"p2ptrain joiner " + context, b"p2ptrain sponsor " + context
    side = kind(password, idA=joiner, idB=sponsor, entropy_f=entropy)
    return _Exchange(side)


class _Exchange:
    def __init__(self, side: spake2.SPAKE2_A | spake2.SPAKE2_B) -> None:
        self._side = side
        self._message: bytes = side.start()

    @property
    def message(self) -> bytes:
        return self._message

    def finish(self, theirs: bytes) -> bytes:
        import spake2
        from spake2.ed25519_basic import NotOnCurve

        try:
            key: bytes = self._side.finish(theirs)
        except (spake2.SPAKEError, NotOnCurve, ValueError, AssertionError) as error:
            raise RemoteProtocolError("not a message of a code exchange") from error
        return key

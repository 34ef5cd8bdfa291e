"""The owners of a run's data, where every replica of the model feeds its own.

A run either has one body of data, which its home peer feeds to all, or owners: each runs the whole
model on records of its own, which never leave it. Which of a step's microbatches are whose follows
from the owners' shares as for replicas, so that all members know it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final, Literal

from p2ptrain import limits
from p2ptrain.ids import DeviceId, Digest, is_digest
from p2ptrain.schedule.replicated import owners_by_weight

Unit = Literal["records", "tokens", "bytes"]
"""What is counted of an owner's data: of running text its tokens or bytes."""
_SEED_BITS: Final = 63


@dataclass(frozen=True, slots=True, kw_only=True)
class OwnedData:
    """What a device tells of the data that it gives to a run: nothing that is in it."""

    training: Digest
    """Of everything that decides the samples to train on."""
    heldout: Digest
    """The same for those to evaluate on."""
    records: int
    """To train on."""
    unit: Unit
    classes: Digest
    """Of the names of its classes by number: owners must number them alike."""

    def __post_init__(self) -> None:
        if not all(map(is_digest, (self.training, self.heldout, self.classes))):
            raise ValueError("data is named by digests")
        if not 1 <= self.records <= limits.DATA_RECORDS_MAX:
            raise ValueError("data has records")


@dataclass(frozen=True, slots=True, kw_only=True)
class DataOwner:
    """One owner in the numerics contract of a run."""

    device: DeviceId
    training: Digest
    heldout: Digest
    records: int
    unit: Unit
    microbatches: int
    """Of a step's, how many are made of its records."""

    def __post_init__(self) -> None:
        if not is_digest(self.training) or not is_digest(self.heldout):
            raise ValueError("an owner's data is named by digests")
        if self.records < 1 or self.microbatches < 1:
            raise ValueError("an owner has records, and at least one microbatch of a step")

    def has(self, data: OwnedData) -> bool:
        """Whether this is the data that the run was begun with."""
        return (data.training, data.heldout) == (self.training, self.heldout)


def owner_of(owners: Iterable[DataOwner], device: DeviceId) -> DataOwner | None:
    """A device among the owners; None: it is none of them."""
    return next((owner for owner in owners if owner.device == device), None)


def own_microbatches(
    owners: Sequence[DataOwner], device: DeviceId, microbatches: int
) -> tuple[int, ...]:
    """Those of an item's microbatches that are made of a device's records, ascending."""
    shared = owners_by_weight([owner.microbatches for owner in owners], microbatches)
    return tuple(i for i, rank in enumerate(shared) if owners[rank].device == device)


def own_seed(seed: int, owner: DataOwner) -> int:
    """What an owner draws its samples by, 0 <= seed < 2^63: other records and another order on each
    device, also where two have the same data."""
    hashed = hashlib.sha256(f"{seed} {owner.device} {owner.training}".encode()).digest()
    return int.from_bytes(hashed[:8], "little") >> (64 - _SEED_BITS)


def joint_digest(digests: Iterable[Digest]) -> Digest:
    """One name for what all owners have, in their order."""
    return Digest(hashlib.sha256("".join(digests).encode()).hexdigest())


def microbatch_shares(times_ns: Sequence[int], microbatches: int) -> tuple[int, ...]:
    """How many microbatches each owner gets: one, and more by who would be done first.

    Args:
        times_ns: By owner, of one microbatch.
        microbatches: Of a step, at least one for each.
    """
    counts = [1] * len(times_ns)
    for _ in range(microbatches - len(times_ns)):
        first = min(range(len(counts)), key=lambda i: ((counts[i] + 1) * times_ns[i], i))
        counts[first] += 1
    return tuple(counts)

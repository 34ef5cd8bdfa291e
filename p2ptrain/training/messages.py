"""Control messages of a run. Every one carries the stamp (run, lineage, view, plan)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

from p2ptrain import limits
from p2ptrain.energy.combine import PeerBooking
from p2ptrain.ids import DeviceId, Digest, Lineage, RunId, ViewNumber, is_digest
from p2ptrain.planner.links import LinkFigure
from p2ptrain.planner.plan import Plan
from p2ptrain.planner.profile import PeerProfile
from p2ptrain.recovery.inventory import Inventory, check_microbatches
from p2ptrain.training.owners import OwnedData
from p2ptrain.training.segment_state import StateHeader
from p2ptrain.training.step_record import StepRecord
from p2ptrain.units import NS_PER_S
from p2ptrain.wire.codec import message
from p2ptrain.wire.flows import FLOW_KINDS, NO_RUN, Carried


@dataclass(frozen=True, slots=True, kw_only=True)
class Stamp:
    """What a training message belongs to; a message with another stamp is dropped."""

    run: RunId
    lineage: Lineage
    view: ViewNumber
    plan: Digest


WANTED: Final = ("state", "activation", "cotangent", "tied", "input", "labels")


def stamp_of(plan: Plan) -> Stamp:
    """The stamp of every message sent under this plan."""
    return Stamp(run=plan.run, lineage=plan.lineage, view=plan.view, plan=plan.digest)


def run_of(sent: object) -> str:
    """The run that a message belongs to, by its stamp or its own field; NO_RUN: to none."""
    stamp = getattr(sent, "stamp", None)
    run = stamp.run if isinstance(stamp, Stamp) else getattr(sent, "run", None)
    return run if isinstance(run, str) else NO_RUN


FedItem = Literal["train", "evaluate"]
"""Items for which samples are read."""


@message("offer")
@dataclass(frozen=True, slots=True, kw_only=True)
class Offer:
    """Home to every member: fetch this bundle from me, measure yourself on it, answer."""

    run: RunId
    view: ViewNumber
    bundle: Digest
    bundle_bytes: int
    microbatch_size: int
    form: str
    threads: int
    in_parts: bool = False
    """Measure backwards in their two parts as well."""
    other_sizes: tuple[int, ...] = ()
    """Microbatch sizes for which times should be told, too, as far as they follow from others."""
    optimizer: str = ""
    """Whose updates are to be timed; empty: the bundle's first."""
    own_data: bool = False
    """Every peer of the run is to feed data of its own: tell about yours, or decline."""
    tokenizer_bytes: int = 0
    """Of the bundle's tokenizer, by which it is read: the blob that the manifest names; 0: none."""


@message("profiled")
@dataclass(frozen=True, slots=True, kw_only=True)
class Profiled:
    """Answer to an offer: what I measured."""

    run: RunId
    view: ViewNumber
    profile: PeerProfile
    linked: tuple[DeviceId, ...] = ()
    """Devices with which I can exchange tensors."""
    links: tuple[LinkFigure, ...] = ()
    """What I have measured of my links."""
    data: OwnedData | None = None
    """About the data that I would feed; None: I was not asked."""

    def __post_init__(self) -> None:
        if len(self.links) > limits.LINK_PEERS_MAX:
            raise ValueError("figures of more links than there can be")


@message("declined")
@dataclass(frozen=True, slots=True, kw_only=True)
class Declined:
    """Answer to an offer: leave me out, because."""

    run: RunId
    view: ViewNumber
    reason: str


@message("begin")
@dataclass(frozen=True, slots=True, kw_only=True)
class Begin:
    """Home to members after the first plan of a lineage is decided: prepare your part."""

    stamp: Stamp
    first_step: int
    checkpoint_every: int
    profiles: tuple[PeerProfile, ...]
    """Of every member, so that any of them can plan the next view."""
    checkpoint: Digest | None
    """Blob that lists the digest of every segment's state; None: draw the parameters."""
    checkpoint_bytes: int


@message("ready")
@dataclass(frozen=True, slots=True, kw_only=True)
class Ready:
    """Any member to all: my buffers exist, my state is loaded. With everybody's, work begins."""

    stamp: Stamp
    asks: bool = False
    """Whether the sender still lacks the receiver's, which may have come too early for it."""


@message("done")
@dataclass(frozen=True, slots=True, kw_only=True)
class Done:
    """Stage peer to all members: my gradients of this step are complete, not yet applied."""

    stamp: Stamp
    step: int
    square_sums: bytes
    """Little-endian float64, one per tensor of the stage in manifest order."""
    loss: float | None
    """Mean loss of the minibatch, from the last stage only."""
    skip: bool
    """This peer saw a value that is not finite: nobody may apply the step."""
    compute_ns: int = 0
    """What the step's forwards and backwards took here; 0: not told."""

    def __post_init__(self) -> None:
        if not 0 <= self.compute_ns <= NS_PER_S * 10**9:
            raise ValueError("a step takes no such time")


@message("labels_counted")
@dataclass(frozen=True, slots=True, kw_only=True)
class LabelsCounted:
    """Owner of data, and the home peer, to all members: so many labels of my microbatches of this
    item count. With everybody's, each knows what a label weighs."""

    stamp: Stamp
    kind: FedItem
    step: int
    count: int

    def __post_init__(self) -> None:
        if not 0 <= self.step <= limits.STEPS_MAX or not 0 <= self.count <= limits.LABELS_MAX:
            raise ValueError("labels are of a step, and not that many")


@message("evaluated")
@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluated:
    """Last stage to home: the held-out loss after this step."""

    stamp: Stamp
    step: int
    loss: float


@message("stop_after")
@dataclass(frozen=True, slots=True, kw_only=True)
class StopAfter:
    """Home to stage peers: this is the last step of the session."""

    stamp: Stamp
    step: int


@message("segment_saved")
@dataclass(frozen=True, slots=True, kw_only=True)
class SegmentSaved:
    """Stage peer to its replica's keeper, and of a checkpoint to home: fetch this state."""

    stamp: Stamp
    step: int
    segment: int
    checkpoint: bool
    """Part of a checkpoint, which the home peer collects; else a replica only."""
    state: Digest
    """Digest of the state's values, equal wherever they were computed: the blob to fetch, whose
    size follows from the manifest."""

    def header(self, bundle: Digest) -> StateHeader:
        """The header of the file that the snapshot becomes where it is stored."""
        stamp = self.stamp
        return StateHeader(
            run=stamp.run,
            lineage=stamp.lineage,
            view=stamp.view,
            plan=stamp.plan,
            step=self.step,
            segment=self.segment,
            bundle=bundle,
        )


@message("replica_stored")
@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaStored:
    """Keeper to all members: this segment's state at this step is durable here, and checked.

    Said again after each decided view, for everything that is still kept.
    """

    stamp: Stamp
    step: int
    segment: int
    state: Digest
    """Digest of parameters and optimizer state alone, as the stage that made it said."""

    def __post_init__(self) -> None:
        if not 0 <= self.step <= limits.STEPS_MAX or not 0 <= self.segment < limits.SEGMENTS_MAX:
            raise ValueError("a replica is of a segment at a step")
        if not is_digest(self.state):
            raise ValueError("a state is named by its digest")


@message("checkpoint_stored")
@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointStored:
    """Home to stage peers: the checkpoint of this step is durable, its blobs may go."""

    stamp: Stamp
    step: int


@message("data_offered")
@dataclass(frozen=True, slots=True, kw_only=True)
class DataOffered:
    """Home to another data holder of the view: make your copy of the run's data."""

    stamp: Stamp
    listing: Digest
    """Blob that lists the files."""
    listing_bytes: int
    total_bytes: int


@message("data_held")
@dataclass(frozen=True, slots=True, kw_only=True)
class DataHeld:
    """A data holder to all members: I have the run's data whole and checked. Said in each view."""

    stamp: Stamp


@message("holdings_asked")
@dataclass(frozen=True, slots=True, kw_only=True)
class HoldingsAsked:
    """A member where somebody forces a view: what do you hold of the run?"""

    stamp: Stamp


@message("holdings_told")
@dataclass(frozen=True, slots=True, kw_only=True)
class HoldingsTold:
    """The answer: what a promise would tell, without promising anything."""

    stamp: Stamp
    inventory: Inventory
    records: tuple[StepRecord, ...]


@message("wanted")
@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """Restoring member to whom the view names: let me fetch this."""

    stamp: Stamp
    what: str
    """`state`: of a segment after `step`; `activation`, `cotangent`, `tied`: a log of one step,
    named as its tensors are; `input`, `labels`: what a data holder feeds in that step."""
    segment: int
    step: int
    microbatches: tuple[int, ...] = ()
    """Of a boundary's log: only these; empty: all."""

    def __post_init__(self) -> None:
        if self.what not in WANTED or self.segment < 0 or self.step < 0:
            raise ValueError("something is wanted that nobody can give")
        check_microbatches(self.microbatches)


@message("given")
@dataclass(frozen=True, slots=True, kw_only=True)
class Given:
    """The answer to `wanted`: it can be fetched as a blob, unless it is missing."""

    stamp: Stamp
    what: str
    segment: int
    step: int
    blob: Digest
    blob_bytes: int
    missing: bool = False
    """It is not here, and will not be: the view must change. There is no blob then."""


@message("usage")
@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """Stage peer to home, after each step: what the run has cost me so far."""

    stamp: Stamp
    step: int
    activity: str
    booking: PeerBooking
    sent: tuple[Carried, ...]
    """Encrypted bytes to each member for each kind of traffic, in this session of the run."""

    def __post_init__(self) -> None:
        if len(self.sent) > limits.LINK_PEERS_MAX * len(FLOW_KINDS):
            raise ValueError("more kinds of traffic than there are")


@message("abort")
@dataclass(frozen=True, slots=True, kw_only=True)
class Abort:
    """Any member to all: this run cannot go on here."""

    stamp: Stamp
    error: str
    """Name of the error class."""
    reason: str


@message("finish")
@dataclass(frozen=True, slots=True, kw_only=True)
class Finish:
    """Home to stage peers: everything is stored; forget the run."""

    stamp: Stamp


Outcome = Literal["complete", "stopped", "failed"]
"""How a lineage ended: after its contract's last step, earlier because somebody wanted it, or not
on purpose."""


@message("ended")
@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    """Any member to who still talks about a run: this lineage, or a later one, has ended."""

    run: RunId
    lineage: Lineage
    outcome: Outcome
    reason: str = ""
    """Why, where it failed."""

    def __post_init__(self) -> None:
        if len(self.reason) > limits.REASON_CHARACTERS_MAX:
            raise ValueError("the reason is too long")


@message("blob_request")
@dataclass(frozen=True, slots=True, kw_only=True)
class BlobRequest:
    """Send me this blob in bulk frames that carry `request`."""

    request: int
    digest: Digest


@message("blob_missing")
@dataclass(frozen=True, slots=True, kw_only=True)
class BlobMissing:
    """I do not have that blob."""

    request: int

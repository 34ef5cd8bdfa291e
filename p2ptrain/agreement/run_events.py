"""What the machine of a run tells its shell, and how it stands."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from p2ptrain.agreement.ballot import Ballot
from p2ptrain.agreement.view import View
from p2ptrain.ids import DeviceId, ViewNumber
from p2ptrain.recovery.inventory import Inventory
from p2ptrain.training.step_record import StepRecord


@dataclass(frozen=True, slots=True, kw_only=True)
class StepCommitted:
    """A quorum holds the record durably: apply the update now; once per step and process."""

    record: StepRecord


@dataclass(frozen=True, slots=True, kw_only=True)
class PromisedInventory:
    """What one member holds, as its promise says."""

    device: DeviceId
    inventory: Inventory


@dataclass(frozen=True, slots=True, kw_only=True)
class ProposalWanted:
    """A quorum promised and nothing was accepted: plan, then `propose` or `cannot_propose`."""

    ballot: Ballot
    """Hand it back with the answer, so that a late answer to another ballot is recognised."""
    number: ViewNumber
    """Of the view to propose."""
    base: View
    """The view before; its plan's digest is the new view's `previous`."""
    promises: tuple[PromisedInventory, ...]
    """By device."""
    records: tuple[StepRecord, ...]
    """All that the promises have, consecutive, up to `resume_step`; the new view carries them."""
    resume_step: int
    """Where the new view must resume."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ViewDecided:
    """This view counts now, whether or not this peer is in it; it may skip some."""

    view: View


@dataclass(frozen=True, slots=True, kw_only=True)
class Fenced:
    """This peer promised the next view: no update is applied under the present one any more."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Paused:
    """The run cannot go on here, and why."""

    reason: str
    missing: tuple[DeviceId, ...]
    """Members that cannot be reached, where that is the reason."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Unpaused:
    """What `Paused` said no longer holds."""


RunEvent = StepCommitted | ProposalWanted | ViewDecided | Fenced | Paused | Unpaused


class Stance(Enum):
    """How this peer stands to the run's newest view known here."""

    UNKNOWN = "knows no view"
    MEMBER = "member"
    OUTSIDER = "not a member"
    PAUSED = "paused"
    ABSTAINING = "member without memory"
    """A member by its name whose journal is lost or an old one: it has no vote in this view."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    """For `status`: the stance, and for a pause its reason and the members that are missing."""

    stance: Stance
    reason: str = ""
    missing: tuple[DeviceId, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class RunStatistics:
    """Counts of one run's machine since the process started."""

    view: int
    """0: none."""
    newest_step: int
    committed_step: int
    record_count: int
    """Retained now."""
    ballot_count: int
    """Ballots this peer opened."""
    decided_count: int
    """Views it came to know."""

"""What was looked at on a device, before anybody says what it means.

None means that it could not be found out, or was not looked at; nothing is concluded from it.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from p2ptrain.diagnosis.firewall import Firewall
from p2ptrain.ids import DeviceId, GroupId


@dataclass(frozen=True, slots=True, kw_only=True)
class Interface:
    """One network interface that is not loopback."""

    name: str
    networks: tuple[str, ...] = ()
    """IPv4 addresses with their prefix length: 192.168.1.5/24."""
    is_up: bool = True
    has_carrier: bool | None = None
    multicast_error: str | None = None
    """Why it does not take part in multicast; None: it does."""
    is_wireless: bool = False
    power_save: bool | None = None
    signal_dbm: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Announcement:
    """What one other device says of itself by multicast."""

    group: str
    """First 8 characters of its group's id."""
    device: DeviceId
    address: str
    """host:port."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Multicast:
    """What was heard while listening."""

    heard: tuple[Announcement, ...]
    seconds: float
    error: str | None = None
    """Why listening failed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PortUse:
    """Who has the port that a peer would listen at."""

    port: int
    is_free: bool
    owner: str | None = None
    """Another program's name and process id, where that can be told."""


class DialEnd(Enum):
    """How far a dial came."""

    NO_ANSWER = "no answer"
    NOTHING_LISTENS = "connection refused"
    NO_ROUTE = "no route"
    NOT_A_PEER = "not a peer"
    CERTIFICATES = "certificates do not fit"
    REFUSED = "refused"
    """By its HELLO, whose `refusal` says why."""
    IS_SELF = "this device"
    ANSWERED = "answered"


@dataclass(frozen=True, slots=True, kw_only=True)
class Dial:
    """One address of another peer, dialled."""

    address: str
    known_from: str
    """announced, remembered, given or a member's name."""
    end: DialEnd
    detail: str = ""
    """One phrase from the one who failed."""
    connect_s: float | None = None
    device: DeviceId | None = None
    protocol: tuple[int, int] | None = None
    """Lowest and highest version that it speaks."""
    clock_ahead_s: float | None = None
    """How far its wall clock is ahead of ours."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Certificate:
    """Dates of one certificate of ours."""

    what: str
    """`this device's certificate`, `its issuer's certificate`, `the group's root certificate`."""
    begins_s: float
    ends_s: float
    renews_itself: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Membership:
    """Our standing in the group that was asked about."""

    group_name: str
    group: GroupId | None = None
    device: DeviceId | None = None
    certificates: tuple[Certificate, ...] = ()
    error: str | None = None
    """Why the group's files cannot be used."""
    hint: str | None = None
    revoked_because: str | None = None
    """What the revocation of this device says; None: it is not revoked as far as is known here."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Distribution:
    """One installed distribution that owns the package directory onnxruntime."""

    name: str
    version: str
    changed_count: int = 0
    """Files that are missing or are not the ones that were installed."""
    example: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Runtime:
    """The onnxruntime of this environment."""

    distributions: tuple[Distribution, ...]
    error: str | None = None
    """Why it cannot be imported, or is not the one that was installed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """What slows a device down."""

    hottest_celsius: float | None = None
    governor: str | None = None
    """The frequency governor, where it holds the clock down."""
    throttled: str | None = None
    """What a Raspberry Pi's firmware says: under-voltage, throttled."""
    on_battery: bool = False
    battery_percent: int | None = None
    free_memory_bytes: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class RunningPeer:
    """What the peer of this device says of itself."""

    listen_host: str
    port: int
    discovery: str
    discovery_works: bool
    members_alive: tuple[str, ...]
    """Names of the other members that it is linked with."""
    addresses: dict[str, str]
    """host:port of members -> name."""
    refusals: dict[str, str]
    """host:port -> why it is not dialled any more."""
    failures: dict[str, str]
    """host:port -> why the last dial failed."""
    refused_count: int
    """Connections of others that were not let in."""
    last_refusal: str | None
    run_waits_for: str | None = None
    """Why the run that it takes part in stands still; None: it does not, or there is none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Observations:
    """Everything that was looked at."""

    now_s: float
    protocol: tuple[int, int]
    """Lowest and highest version that this p2ptrain speaks."""
    interfaces: tuple[Interface, ...] | None = None
    multicast: Multicast | None = None
    port: PortUse | None = None
    firewall: Firewall | None = None
    firewall_hidden: bool = False
    """There is a program for it, but only root may ask."""
    dials: tuple[Dial, ...] = ()
    membership: Membership | None = None
    runtime: Runtime | None = None
    machine: Machine | None = None
    peer: RunningPeer | None = None
    peer_error: str | None = None
    """Why a running peer could not be asked."""

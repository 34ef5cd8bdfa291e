"""Rules about the other peers: can they be reached, do they let this one in, do they fit?"""

from __future__ import annotations

import ipaddress
import statistics
from collections.abc import Callable, Iterator, Sequence

from p2ptrain import limits
from p2ptrain.diagnosis.findings import Finding, counted, duration, fine, hint, problem
from p2ptrain.diagnosis.observations import Dial, DialEnd, Observations
from p2ptrain.units import format_seconds

_OTHER_GROUP = ("another group", "unknown ca", "permitted subtree")
_DATES = ("expired", "not yet valid")


def reach_findings(observed: Observations) -> Iterator[Finding]:
    """Does anybody answer at the addresses that are known?"""
    is_linked = observed.peer is not None and bool(observed.peer.members_alive)
    for dial in observed.dials:
        match dial.end:
            case DialEnd.ANSWERED:
                yield _speed(dial)
            case DialEnd.NO_ANSWER | DialEnd.NOTHING_LISTENS | DialEnd.NO_ROUTE:
                yield _unreached(observed, dial, make=hint if is_linked else problem)
            case DialEnd.NOT_A_PEER:
                yield hint(
                    "reach",
                    f"what answers at {dial.address} ({dial.known_from}) is no peer: {dial.detail}",
                    why="another program has that port now",
                    next_step="give the peer's present address with --peer HOST:PORT",
                )
            case DialEnd.CERTIFICATES | DialEnd.REFUSED | DialEnd.IS_SELF:
                pass  # trust_findings, or nothing to say


def _speed(dial: Dial) -> Finding:
    if dial.connect_s is not None and dial.connect_s > limits.DOCTOR_CONNECT_S_MAX:
        return hint(
            "reach",
            f"{dial.address} answers after {format_seconds(dial.connect_s)}",
            why="every microbatch waits for that at each boundary",
            next_step="look at the signal and the power saving of both devices, or use a cable",
        )
    took = "" if dial.connect_s is None else f" after {format_seconds(dial.connect_s)}"
    return fine("reach", f"{dial.address} answers{took}")


def _unreached(observed: Observations, dial: Dial, *, make: Callable[..., Finding]) -> Finding:
    where = f"{dial.address} ({dial.known_from})"
    if dial.end is DialEnd.NOTHING_LISTENS:
        return make(
            "reach",
            f"nothing listens at {where}",
            why="the peer there is not running, or has another port now",
            next_step=f"start it there: p2ptrain join --group {_group(observed)}",
        )
    if dial.end is DialEnd.NO_ROUTE and not _is_near(observed, dial.address):
        return make(
            "reach",
            f"there is no way from here to {where}",
            why="the two devices are in different networks, or one of them is off",
            next_step="connect both to one network; a guest Wi-Fi is often kept apart",
        )
    return make(
        "reach",
        f"{where} does not answer",
        why="that device is off or asleep, its firewall drops what comes in, or the access point "
        "keeps its clients apart",
        next_step="run p2ptrain doctor there; look for client isolation in the access point",
    )


def _is_near(observed: Observations, address: str) -> bool:
    """Whether an address is in a network of ours: then it is silence that was found, no way."""
    try:
        host = ipaddress.ip_address(address.rpartition(":")[0].strip("[]"))
    except ValueError:
        return False
    return any(
        host in ipaddress.ip_interface(network).network
        for interface in observed.interfaces or ()
        for network in interface.networks
    )


def trust_findings(observed: Observations) -> Iterator[Finding]:
    """Do the others accept this device, and it them?"""
    for dial in observed.dials:
        detail = dial.detail.lower()
        if dial.end is DialEnd.REFUSED:
            yield _refused(observed, dial)
        elif dial.end is DialEnd.CERTIFICATES and any(word in detail for word in _OTHER_GROUP):
            yield problem(
                "group",
                f"the peer at {dial.address} belongs to another group",
                why="only devices with the same trust certificate link, whatever their groups are "
                "called",
                next_step=_one_group(observed),
            )
        elif dial.end is DialEnd.CERTIFICATES:
            dates = any(word in detail for word in _DATES)
            yield problem(
                "certificate",
                f"{dial.address} and this device do not accept each other: {dial.detail}",
                why="a certificate is out of date, or one of the clocks is wrong"
                if dates
                else "a certificate is not what it should be",
                next_step="compare the clocks of both devices, then run p2ptrain doctor there",
            )
    yield from _foreign_announcements(observed)


def _refused(observed: Observations, dial: Dial) -> Finding:
    match dial.detail:
        case "revoked":
            return problem(
                "revoked",
                f"{dial.address} refuses this device because it was revoked",
                why="no member of the group links with it any more",
                next_step="if that was a mistake: leave the group and join it again by a new "
                f"invite: p2ptrain group invite {_group(observed)}, on another member",
            )
        case "dates":
            return problem(
                "certificate",
                f"{dial.address} refuses this device because its certificate is out of date",
                why="no member of the group links with it any more",
                next_step="set this device's clock; otherwise ask a member for a new invite",
            )
        case "full":
            return hint(
                "reach",
                f"{dial.address} has as many links as it may",
                why="it does not link with this device now",
                next_step="try again later",
            )
    return hint(
        "reach",
        f"{dial.address} refuses this device: {dial.detail}",
        why="it does not link with this device now",
        next_step="run p2ptrain doctor there",
    )


def _foreign_announcements(observed: Observations) -> Iterator[Finding]:
    ours = observed.membership.group if observed.membership is not None else None
    if observed.multicast is None or ours is None or not observed.multicast.heard:
        return
    foreign = [each for each in observed.multicast.heard if each.group != ours[:8]]
    told = {dial.address for dial in observed.dials if dial.end is DialEnd.CERTIFICATES}
    for each in foreign:
        alone = len(foreign) == len(observed.multicast.heard)
        if each.address not in told:
            yield (problem if alone else hint)(
                "group",
                f"the peer at {each.address} announces another group ({each.group})",
                why="only devices with the same trust certificate link, whatever their groups are "
                "called",
                next_step=_one_group(observed),
            )


def version_findings(observed: Observations) -> Iterator[Finding]:
    """Do both sides speak a common protocol?"""
    lowest, highest = observed.protocol
    ours = _span(observed.protocol)
    fitting = 0
    for dial in observed.dials:
        if dial.protocol is None:
            continue
        theirs = dial.protocol
        if theirs[0] <= highest and theirs[1] >= lowest:
            fitting += 1
            continue
        older = "there" if theirs[1] < lowest else "here"
        yield problem(
            "version",
            f"{dial.address} speaks protocol {_span(theirs)}, this p2ptrain {ours}",
            why="the two devices cannot link",
            next_step=f"update p2ptrain {older}: pip install --upgrade p2ptrain, then start the "
            "peer again",
        )
    if fitting:
        yield fine("version", f"protocol {ours} is spoken at {counted(fitting, 'other place')}")


def clock_findings(observed: Observations) -> Iterator[Finding]:
    """Is it the same time everywhere?"""
    ahead = {d.address: d.clock_ahead_s for d in observed.dials if d.clock_ahead_s is not None}
    wrong = {at: by for at, by in ahead.items() if abs(by) > limits.DOCTOR_CLOCK_SKEW_S}
    why = "certificates count as expired or not yet valid where a clock is wrong"
    if wrong and _agree(list(ahead.values())) and len(ahead) > 1:
        by = statistics.median(ahead.values())
        yield problem(
            "clock",
            f"this device's clock is {_offset(-by)} that of {len(ahead)} others",
            why=why,
            next_step="set it: timedatectl set-ntp true, or date --set",
        )
        return
    for at, by in wrong.items():
        yield problem(
            "clock",
            f"this device's clock is {_offset(-by)} that of {at}",
            why=why,
            next_step="set the one that is wrong: timedatectl set-ntp true, or date --set",
        )
    if ahead and not wrong:
        yield fine("clock", f"this device's clock agrees with {counted(len(ahead), 'other')}")


def _agree(offsets: Sequence[float]) -> bool:
    return max(offsets) - min(offsets) <= limits.DOCTOR_CLOCK_SKEW_S


def _offset(seconds: float) -> str:
    return f"{duration(abs(seconds))} {'ahead of' if seconds > 0 else 'behind'}"


def _span(versions: tuple[int, int]) -> str:
    lowest, highest = versions
    return str(lowest) if lowest == highest else f"{lowest} to {highest}"


def _group(observed: Observations) -> str:
    return "NAME" if observed.membership is None else observed.membership.group_name


def _one_group(observed: Observations) -> str:
    return (
        f"bring both into one group: p2ptrain group invite {_group(observed)} on a member, "
        "then p2ptrain join --group NAME --code CODE on the other device"
    )

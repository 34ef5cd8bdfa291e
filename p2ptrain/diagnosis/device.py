"""Rules about this device itself: membership, certificates, onnxruntime, heat, power, its peer."""

from __future__ import annotations

from collections.abc import Iterator

from p2ptrain import limits
from p2ptrain.diagnosis.findings import Finding, counted, duration, fine, hint, problem
from p2ptrain.diagnosis.observations import Certificate, Distribution, Observations
from p2ptrain.units import format_bytes


def membership_findings(observed: Observations) -> Iterator[Finding]:
    """Is this device a member in good standing?"""
    ours = observed.membership
    if ours is None:
        yield problem(
            "group",
            "this device is in no group",
            why="peers only link with members of their own group",
            next_step="make one with p2ptrain group create NAME, or join one with a member's code: "
            "p2ptrain join --group NAME --code CODE",
        )
        return
    if ours.revoked_because is not None:
        yield problem(
            "revoked",
            f"this device was revoked in group {ours.group_name}: {ours.revoked_because}",
            why="no member of the group links with it any more",
            next_step="if that was a mistake: leave the group and join it again by a new invite: "
            f"p2ptrain group invite {ours.group_name}, on another member",
        )
    if ours.error is not None:
        yield problem(
            "certificate",
            ours.error,
            why="the peer of this device cannot start",
            next_step=ours.hint or "ask a member for a new invite",
        )
    for certificate in ours.certificates:
        yield from _dates(certificate, observed.now_s, ours.group_name)


def _dates(certificate: Certificate, now_s: float, group_name: str) -> Iterator[Finding]:
    what = certificate.what
    if now_s < certificate.begins_s:
        early = duration(certificate.begins_s - now_s)
        yield problem(
            "clock",
            f"by this device's clock {what} begins only in {early}",
            why="a certificate was made before it was valid: the clock is behind, and others "
            "refuse what it says",
            next_step="set the clock: timedatectl set-ntp true, or date --set",
        )
    elif now_s >= certificate.ends_s:
        yield problem(
            "certificate",
            f"{what} expired {duration(now_s - certificate.ends_s)} ago by this device's clock",
            why="no member of the group links with this device",
            next_step="look whether the clock is right; otherwise ask a member for a new invite: "
            f"p2ptrain group invite {group_name}",
        )
    elif certificate.ends_s - now_s < limits.DOCTOR_CERTIFICATE_ENDS_S and (
        not certificate.renews_itself
    ):
        yield hint(
            "certificate",
            f"{what} ends in {duration(certificate.ends_s - now_s)}",
            why="after that no member of the group links with this device",
            next_step="keep the peer running while another member's is: it renews by itself",
        )
    else:
        yield fine("certificate", f"{what} is good for {duration(certificate.ends_s - now_s)} more")


def runtime_findings(observed: Observations) -> Iterator[Finding]:
    """Is onnxruntime the one that was installed?"""
    if observed.runtime is None:
        return
    installed = observed.runtime.distributions
    names = " ".join(each.name for each in installed)
    again = f"pip uninstall --yes {names}; pip install --force-reinstall p2ptrain"
    changed = [each for each in installed if each.changed_count]
    why = "the mixture computes with whichever files came last, or not at all"
    if len(installed) > 1:
        both = " and ".join(f"{each.name} {each.version}" for each in installed)
        yield problem(
            "onnxruntime",
            f"{both} are both installed and own the same files" + _examples(changed),
            why=why,
            next_step=again,
        )
    elif changed:
        yield problem(
            "onnxruntime",
            f"{changed[0].name} {changed[0].version} is not as it was installed"
            + _examples(changed),
            why=why,
            next_step=again,
        )
    elif not installed:
        yield problem(
            "onnxruntime",
            observed.runtime.error or "onnxruntime is not installed",
            why="the peer of this device cannot start",
            next_step="pip install --force-reinstall p2ptrain",
        )
    elif observed.runtime.error is not None:
        yield problem(
            "onnxruntime",
            observed.runtime.error,
            why="the peer of this device cannot start",
            next_step=again,
        )
    else:
        yield fine("onnxruntime", f"{installed[0].name} {installed[0].version} is intact")


def _examples(changed: list[Distribution]) -> str:
    found = [
        f"{counted(each.changed_count, 'file')} of {each.name} changed, as {each.example}"
        for each in changed
    ]
    return f": {'; '.join(found)}" if found else ""


def machine_findings(observed: Observations) -> Iterator[Finding]:
    """Does anything hold this device back?"""
    machine = observed.machine
    if machine is None:
        return
    celsius = machine.hottest_celsius
    if celsius is not None and celsius >= limits.DOCTOR_CELSIUS_MAX:
        yield hint(
            "machine",
            f"this device is at {celsius:.0f} degrees Celsius",
            why="it slows itself down, and every step waits for the slowest stage",
            next_step="cool it, or allow fewer threads: p2ptrain join --threads 1",
        )
    if machine.throttled is not None:
        yield hint(
            "machine",
            f"the firmware reports {machine.throttled}",
            why="the processor is slowed down, and every step waits for the slowest stage",
            next_step="use the maker's power supply, and cool the board",
        )
    if machine.governor is not None:
        yield hint(
            "machine",
            f"the frequency governor is {machine.governor}",
            why="the processor stays at its lowest clock, and every step waits for it",
            next_step="cpupower frequency-set --governor schedutil",
        )
    low = limits.DOCTOR_BATTERY_PERCENT_MIN
    percent = machine.battery_percent
    if machine.on_battery and percent is not None and percent < low:
        yield hint(
            "machine",
            f"the battery is at {percent} %",
            why="the device may switch off in the middle of a run",
            next_step="plug it in",
        )
    free = machine.free_memory_bytes
    if free is not None and free < limits.DOCTOR_FREE_MEMORY_BYTES_MIN:
        yield hint(
            "machine",
            f"only {format_bytes(free)} of memory are free",
            why="the planner can give this device next to nothing, and what it has is swapped",
            next_step="end other programs, or set a limit: p2ptrain join --memory SIZE",
        )


def peer_findings(observed: Observations) -> Iterator[Finding]:
    """Does the peer run, and whom is it linked with?"""
    peer = observed.peer
    if observed.peer_error is not None:
        yield problem(
            "peer",
            f"the peer of this device cannot be asked: {observed.peer_error}",
            why="it may be of another version, or stuck",
            next_step="end it and start it again: p2ptrain join",
        )
        return
    if peer is None:
        if observed.membership is not None:
            name = observed.membership.group_name
            yield hint(
                "peer",
                f"no peer of group {name} runs on this device",
                why="others cannot find it, and it takes part in nothing",
                next_step=f"p2ptrain join --group {name}",
            )
        return
    if peer.members_alive:
        yield fine("peer", f"linked with {', '.join(peer.members_alive)}")
    else:
        yield problem(
            "peer",
            "the peer runs but is linked with no other member",
            why="it can train only what fits on this device",
            next_step="see the other findings; run p2ptrain doctor on the other device too",
        )
    if peer.run_waits_for is not None:
        yield (problem if peer.run_waits_for.startswith("paused") else hint)(
            "run",
            f"the run waits: {peer.run_waits_for}",
            why="no step is made until then; what was committed stays",
            next_step="bring back the devices that it names, or solve the problems above",
        )
    if peer.refused_count and peer.last_refusal is not None:
        yield hint(
            "peer",
            f"connections were refused here, {peer.refused_count} so far, the last one because: "
            f"{peer.last_refusal}",
            why="a device that wants to link with this one was not let in",
            next_step="if it is yours, run p2ptrain doctor there",
        )
    yield from _given_up(observed)


def _given_up(observed: Observations) -> Iterator[Finding]:
    """What the peer no longer dials, unless the doctor's own dial has something to say about it."""
    if observed.peer is None:
        return
    dialled = {dial.address for dial in observed.dials}
    for address, reason in observed.peer.refusals.items():
        if address not in dialled and reason != "this device itself":
            yield hint(
                "peer",
                f"the peer has given up dialling {address}: {reason}",
                why="it does not link with the device there until somebody names it again",
                next_step="run p2ptrain doctor there",
            )

"""A well device, and every trouble that the doctor names, with the exact sentence and next step."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from p2ptrain.diagnosis.findings import HINT, PROBLEM
from p2ptrain.diagnosis.firewall import Firewall, parse_iptables
from p2ptrain.diagnosis.observations import (
    Announcement,
    Certificate,
    Dial,
    DialEnd,
    Distribution,
    Interface,
    Machine,
    Membership,
    Multicast,
    Observations,
    PortUse,
    RunningPeer,
    Runtime,
)
from p2ptrain.ids import DeviceId, GroupId

NOW_S = 1_900_000_000.0
DAY_S = 86_400.0
GROUP = GroupId("g" * 16)
OURS, THEIRS = DeviceId("a" * 26), DeviceId("b" * 26)
THERE = "10.98.0.2:47615"
WLAN = Interface(name="wlan0", networks=("10.98.0.1/24",), has_carrier=True)
LEAF = Certificate(
    what="this device's certificate", begins_s=NOW_S - DAY_S, ends_s=NOW_S + 29 * DAY_S
)
HEARD = Multicast(heard=(Announcement(group=GROUP[:8], device=THEIRS, address=THERE),), seconds=3)
ANSWERED = Dial(
    address=THERE,
    known_from="announced",
    end=DialEnd.ANSWERED,
    connect_s=0.011,
    device=THEIRS,
    protocol=(2, 2),
    clock_ahead_s=0.5,
)
PEER = RunningPeer(
    listen_host="0.0.0.0",
    port=47615,
    discovery="announcing on 10.98.0.1",
    discovery_works=True,
    members_alive=("attic",),
    addresses={THERE: "attic"},
    refusals={},
    failures={},
    refused_count=0,
    last_refusal=None,
)
MEMBERSHIP = Membership(group_name="home", group=GROUP, device=OURS, certificates=(LEAF,))
RUNTIME = Runtime(distributions=(Distribution(name="onnxruntime", version="1.20.1"),))
WELL = Observations(
    now_s=NOW_S,
    protocol=(2, 2),
    interfaces=(WLAN,),
    multicast=HEARD,
    dials=(ANSWERED,),
    firewall=Firewall(program="nftables", chains=()),
    membership=MEMBERSHIP,
    runtime=RUNTIME,
    machine=Machine(hottest_celsius=50),
    peer=PEER,
)
ALONE = replace(PEER, members_alive=(), addresses={})
UNHEARD = Multicast(heard=(), seconds=3)
WITH_PEER = (
    "start the peer with the other device's address: p2ptrain join --group home --peer {}; "
    "or there with this one's: --peer 10.98.0.1:47615"
)
REINSTALL = "pip uninstall --yes {}; pip install --force-reinstall p2ptrain"


def dial(end: DialEnd, detail: str = "", **changes: Any) -> Dial:  # Any: fields of several types
    made = Dial(address=THERE, known_from="remembered", end=end, detail=detail)
    return replace(made, **changes)


CASES: list[tuple[str, dict[str, Any], str, str, str, str]] = [
    (
        "no network",
        {"interfaces": (Interface(name="eth0", has_carrier=False),)},
        PROBLEM,
        "interface",
        "this device has no network address but loopback: eth0 is not connected",
        "connect it to the network of the other devices and run p2ptrain doctor again",
    ),
    (
        "interface off",
        {"interfaces": (replace(WLAN, is_up=False),)},
        PROBLEM,
        "interface",
        "this device has no network address but loopback: wlan0 is switched off",
        "connect it to the network of the other devices and run p2ptrain doctor again",
    ),
    (
        "no address",
        {"interfaces": (Interface(name="eth0", has_carrier=True),)},
        PROBLEM,
        "interface",
        "this device has no network address but loopback: eth0 has no IPv4 address",
        "connect it to the network of the other devices and run p2ptrain doctor again",
    ),
    (
        "no multicast",
        {
            "interfaces": (replace(WLAN, multicast_error="No such device"),),
            "dials": (),
            "peer": ALONE,
        },
        PROBLEM,
        "multicast",
        "wlan0 does not take part in multicast: No such device",
        WITH_PEER.format("HOST:PORT"),
    ),
    (
        "filtered multicast, address known",
        {"multicast": UNHEARD, "peer": ALONE},
        PROBLEM,
        "multicast",
        "no other peer was heard by multicast on wlan0 within 3 s, but 10.98.0.2:47615 answers "
        "when it is dialled",
        WITH_PEER.format(THERE),
    ),
    (
        "filtered multicast, nobody known",
        {"multicast": UNHEARD, "peer": ALONE, "dials": ()},
        PROBLEM,
        "multicast",
        "no other peer was heard by multicast on wlan0 within 3 s",
        WITH_PEER.format("HOST:PORT"),
    ),
    (
        "filtered multicast, linked by --peer",
        {"multicast": UNHEARD},
        HINT,
        "multicast",
        "no other peer was heard by multicast on wlan0 within 3 s, but 10.98.0.2:47615 answers "
        "when it is dialled",
        WITH_PEER.format(THERE),
    ),
    (
        "listening fails",
        {"multicast": replace(UNHEARD, error="Address already in use")},
        PROBLEM,
        "multicast",
        "listening for other devices failed: Address already in use",
        WITH_PEER.format(THERE),
    ),
    (
        "the peer cannot announce",
        {
            "peer": replace(
                ALONE, discovery="multicast is not available: no", discovery_works=False
            ),
            "dials": (),
        },
        PROBLEM,
        "multicast",
        "the peer says: multicast is not available: no",
        WITH_PEER.format("HOST:PORT"),
    ),
    (
        "discovery off",
        {"peer": replace(PEER, discovery="switched off", discovery_works=False)},
        HINT,
        "multicast",
        "the peer was started with --no-discovery",
        "start it without --no-discovery, or give it --peer HOST:PORT",
    ),
    (
        "port taken",
        {
            "peer": None,
            "port": PortUse(port=47615, is_free=False, owner="nginx (process 12)"),
        },
        PROBLEM,
        "port",
        "port 47615 is taken by nginx (process 12)",
        "p2ptrain join --port 0 takes any free port; or end the other program",
    ),
    (
        "loopback only",
        {"peer": replace(PEER, listen_host="127.0.0.1")},
        PROBLEM,
        "port",
        "the peer listens at 127.0.0.1 only",
        "start it without --listen",
    ),
    (
        "firewall keeps everything out",
        {"firewall": parse_iptables("-P INPUT DROP\n-A INPUT -p udp --dport 5353 -j ACCEPT")},
        PROBLEM,
        "firewall",
        "the firewall of this device (iptables, INPUT) keeps TCP port 47615 out",
        "let it in: iptables -I INPUT -p tcp --dport 47615 -j ACCEPT",
    ),
    (
        "firewall keeps multicast out",
        {"firewall": parse_iptables("-P INPUT ACCEPT\n-A INPUT -p udp -j DROP")},
        PROBLEM,
        "firewall",
        "the firewall of this device (iptables, INPUT) keeps multicast DNS (UDP port 5353) out",
        "let it in: iptables -I INPUT -p udp --dport 5353 -j ACCEPT",
    ),
    (
        "firewall for root only",
        {"firewall": None, "firewall_hidden": True},
        HINT,
        "firewall",
        "the firewall of this device can only be read by root",
        "look at it: sudo nft list ruleset, or sudo iptables -S; TCP port 47615 and UDP port 5353 "
        "must pass",
    ),
    (
        "power saving",
        {"interfaces": (replace(WLAN, is_wireless=True, power_save=True),)},
        PROBLEM,
        "wifi",
        "power saving is on for wlan0",
        "switch it off: iw dev wlan0 set power_save off",
    ),
    (
        "weak signal",
        {"interfaces": (replace(WLAN, is_wireless=True, signal_dbm=-82),)},
        HINT,
        "wifi",
        "the signal at wlan0 is weak: -82 dBm",
        "move it closer to the access point, or use a cable",
    ),
    (
        "no answer",
        {"dials": (dial(DialEnd.NO_ANSWER),), "peer": ALONE},
        PROBLEM,
        "reach",
        "10.98.0.2:47615 (remembered) does not answer",
        "run p2ptrain doctor there; look for client isolation in the access point",
    ),
    (
        "no way within the own network is no answer",
        {"dials": (dial(DialEnd.NO_ROUTE),), "peer": ALONE},
        PROBLEM,
        "reach",
        "10.98.0.2:47615 (remembered) does not answer",
        "run p2ptrain doctor there; look for client isolation in the access point",
    ),
    (
        "another network",
        {"dials": (dial(DialEnd.NO_ROUTE, address="172.16.0.9:47615"),), "peer": ALONE},
        PROBLEM,
        "reach",
        "there is no way from here to 172.16.0.9:47615 (remembered)",
        "connect both to one network; a guest Wi-Fi is often kept apart",
    ),
    (
        "nothing listens",
        {"dials": (dial(DialEnd.NOTHING_LISTENS),), "peer": ALONE},
        PROBLEM,
        "reach",
        "nothing listens at 10.98.0.2:47615 (remembered)",
        "start it there: p2ptrain join --group home",
    ),
    (
        "nothing listens any more, but others are linked",
        {"dials": (dial(DialEnd.NOTHING_LISTENS),)},
        HINT,
        "reach",
        "nothing listens at 10.98.0.2:47615 (remembered)",
        "start it there: p2ptrain join --group home",
    ),
    (
        "another program",
        {"dials": (dial(DialEnd.NOT_A_PEER, "TLS failed: wrong version number"),)},
        HINT,
        "reach",
        "what answers at 10.98.0.2:47615 (remembered) is no peer: TLS failed: wrong version number",
        "give the peer's present address with --peer HOST:PORT",
    ),
    (
        "slow",
        {"dials": (replace(ANSWERED, connect_s=0.25),)},
        HINT,
        "reach",
        "10.98.0.2:47615 answers after 250.0 ms",
        "look at the signal and the power saving of both devices, or use a cable",
    ),
    (
        "another group",
        {"dials": (dial(DialEnd.CERTIFICATES, "the peer belongs to another group, or to none"),)},
        PROBLEM,
        "group",
        "the peer at 10.98.0.2:47615 belongs to another group",
        "bring both into one group: p2ptrain group invite home on a member, then p2ptrain join "
        "--group NAME --code CODE on the other device",
    ),
    (
        "another group announced",
        {
            "multicast": Multicast(
                heard=(Announcement(group="h" * 8, device=THEIRS, address=THERE),), seconds=3
            ),
            "dials": (),
        },
        PROBLEM,
        "group",
        "the peer at 10.98.0.2:47615 announces another group (hhhhhhhh)",
        "bring both into one group: p2ptrain group invite home on a member, then p2ptrain join "
        "--group NAME --code CODE on the other device",
    ),
    (
        "dates do not fit",
        {"dials": (dial(DialEnd.CERTIFICATES, "certificate has expired"),)},
        PROBLEM,
        "certificate",
        "10.98.0.2:47615 and this device do not accept each other: certificate has expired",
        "compare the clocks of both devices, then run p2ptrain doctor there",
    ),
    (
        "revoked over there",
        {"dials": (dial(DialEnd.REFUSED, "revoked"),)},
        PROBLEM,
        "revoked",
        "10.98.0.2:47615 refuses this device because it was revoked",
        "if that was a mistake: leave the group and join it again by a new invite: p2ptrain group "
        "invite home, on another member",
    ),
    (
        "revoked here",
        {"membership": replace(MEMBERSHIP, revoked_because="stolen")},
        PROBLEM,
        "revoked",
        "this device was revoked in group home: stolen",
        "if that was a mistake: leave the group and join it again by a new invite: p2ptrain group "
        "invite home, on another member",
    ),
    (
        "out of date over there",
        {"dials": (dial(DialEnd.REFUSED, "dates"),)},
        PROBLEM,
        "certificate",
        "10.98.0.2:47615 refuses this device because its certificate is out of date",
        "set this device's clock; otherwise ask a member for a new invite",
    ),
    (
        "full",
        {"dials": (dial(DialEnd.REFUSED, "full"),)},
        HINT,
        "reach",
        "10.98.0.2:47615 has as many links as it may",
        "try again later",
    ),
    (
        "newer over there",
        {"dials": (replace(ANSWERED, protocol=(3, 4)),)},
        PROBLEM,
        "version",
        "10.98.0.2:47615 speaks protocol 3 to 4, this p2ptrain 2",
        "update p2ptrain here: pip install --upgrade p2ptrain, then start the peer again",
    ),
    (
        "older over there",
        {"dials": (replace(ANSWERED, protocol=(1, 1)),)},
        PROBLEM,
        "version",
        "10.98.0.2:47615 speaks protocol 1, this p2ptrain 2",
        "update p2ptrain there: pip install --upgrade p2ptrain, then start the peer again",
    ),
    (
        "clocks differ",
        {"dials": (replace(ANSWERED, clock_ahead_s=7200.0),)},
        PROBLEM,
        "clock",
        "this device's clock is 2 hours behind that of 10.98.0.2:47615",
        "set the one that is wrong: timedatectl set-ntp true, or date --set",
    ),
    (
        "own clock wrong",
        {
            "dials": (
                replace(ANSWERED, clock_ahead_s=-3 * DAY_S),
                replace(ANSWERED, address="10.98.0.3:47615", clock_ahead_s=-3 * DAY_S + 1),
            )
        },
        PROBLEM,
        "clock",
        "this device's clock is 3 days ahead of that of 2 others",
        "set it: timedatectl set-ntp true, or date --set",
    ),
    (
        "clock before the certificate",
        {
            "membership": replace(
                MEMBERSHIP, certificates=(replace(LEAF, begins_s=NOW_S + 5 * DAY_S),)
            )
        },
        PROBLEM,
        "clock",
        "by this device's clock this device's certificate begins only in 5 days",
        "set the clock: timedatectl set-ntp true, or date --set",
    ),
    (
        "expired",
        {
            "membership": replace(
                MEMBERSHIP, certificates=(replace(LEAF, ends_s=NOW_S - 2 * DAY_S),)
            )
        },
        PROBLEM,
        "certificate",
        "this device's certificate expired 2 days ago by this device's clock",
        "look whether the clock is right; otherwise ask a member for a new invite: p2ptrain group "
        "invite home",
    ),
    (
        "ends soon",
        {
            "membership": replace(
                MEMBERSHIP, certificates=(replace(LEAF, ends_s=NOW_S + 2 * DAY_S),)
            )
        },
        HINT,
        "certificate",
        "this device's certificate ends in 2 days",
        "keep the peer running while another member's is: it renews by itself",
    ),
    (
        "loose file",
        {
            "membership": Membership(
                group_name="home", error="device.key has mode 0644, too open", hint="chmod 600 x"
            )
        },
        PROBLEM,
        "certificate",
        "device.key has mode 0644, too open",
        "chmod 600 x",
    ),
    (
        "two runtimes",
        {
            "runtime": Runtime(
                distributions=(
                    Distribution(name="onnxruntime-training-cpu", version="1.19.2",
                                 changed_count=3, example="onnxruntime/__init__.py"),
                    Distribution(name="onnxruntime", version="1.20.1"),
                )
            )
        },
        PROBLEM,
        "onnxruntime",
        "onnxruntime-training-cpu 1.19.2 and onnxruntime 1.20.1 are both installed and own the "
        "same files: 3 files of onnxruntime-training-cpu changed, as onnxruntime/__init__.py",
        REINSTALL.format("onnxruntime-training-cpu onnxruntime"),
    ),
    (
        "overwritten runtime",
        {
            "runtime": Runtime(
                distributions=(
                    Distribution(name="onnxruntime", version="1.20.1",
                                 changed_count=1, example="onnxruntime/capi/x.so"),
                )
            )
        },
        PROBLEM,
        "onnxruntime",
        "onnxruntime 1.20.1 is not as it was installed: 1 file of onnxruntime changed, as "
        "onnxruntime/capi/x.so",
        REINSTALL.format("onnxruntime"),
    ),
    (
        "no runtime",
        {"runtime": Runtime(distributions=())},
        PROBLEM,
        "onnxruntime",
        "onnxruntime is not installed",
        "pip install --force-reinstall p2ptrain",
    ),
    (
        "runtime does not start",
        {"runtime": replace(RUNTIME, error="importing onnxruntime ends the process with -11")},
        PROBLEM,
        "onnxruntime",
        "importing onnxruntime ends the process with -11",
        REINSTALL.format("onnxruntime"),
    ),
    (
        "hot",
        {"machine": Machine(hottest_celsius=91.2)},
        HINT,
        "machine",
        "this device is at 91 degrees Celsius",
        "cool it, or allow fewer threads: p2ptrain join --threads 1",
    ),
    (
        "weak supply",
        {"machine": Machine(throttled="under-voltage, throttling")},
        HINT,
        "machine",
        "the firmware reports under-voltage, throttling",
        "use the maker's power supply, and cool the board",
    ),
    (
        "low clock",
        {"machine": Machine(governor="powersave")},
        HINT,
        "machine",
        "the frequency governor is powersave",
        "cpupower frequency-set --governor schedutil",
    ),
    (
        "empty battery",
        {"machine": Machine(on_battery=True, battery_percent=12)},
        HINT,
        "machine",
        "the battery is at 12 %",
        "plug it in",
    ),
    (
        "no memory",
        {"machine": Machine(free_memory_bytes=100 * 1024**2)},
        HINT,
        "machine",
        "only 100.0 MiB of memory are free",
        "end other programs, or set a limit: p2ptrain join --memory SIZE",
    ),
    (
        "no peer",
        {"peer": None},
        HINT,
        "peer",
        "no peer of group home runs on this device",
        "p2ptrain join --group home",
    ),
    (
        "silent peer",
        {"peer": None, "peer_error": "it does not answer within 10 s"},
        PROBLEM,
        "peer",
        "the peer of this device cannot be asked: it does not answer within 10 s",
        "end it and start it again: p2ptrain join",
    ),
    (
        "alone",
        {"peer": ALONE},
        PROBLEM,
        "peer",
        "the peer runs but is linked with no other member",
        "see the other findings; run p2ptrain doctor on the other device too",
    ),
    (
        "others refused",
        {"peer": replace(PEER, refused_count=4, last_refusal="certificate has expired")},
        HINT,
        "peer",
        "connections were refused here, 4 so far, the last one because: certificate has expired",
        "if it is yours, run p2ptrain doctor there",
    ),
    (
        "paused run",
        {"peer": replace(PEER, run_waits_for="paused: no quorum (1 of 3: attic, b missing)")},
        PROBLEM,
        "run",
        "the run waits: paused: no quorum (1 of 3: attic, b missing)",
        "bring back the devices that it names, or solve the problems above",
    ),
    (
        "run getting ready",
        {"peer": replace(PEER, run_waits_for="getting ready: attic")},
        HINT,
        "run",
        "the run waits: getting ready: attic",
        "bring back the devices that it names, or solve the problems above",
    ),
    (
        "given up",
        {"peer": replace(PEER, refusals={"10.98.0.9:1": "it was revoked"})},
        HINT,
        "peer",
        "the peer has given up dialling 10.98.0.9:1: it was revoked",
        "run p2ptrain doctor there",
    ),
]  # fmt: skip

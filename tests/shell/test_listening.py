"""What is heard of other peers by multicast, and what is left out."""

from __future__ import annotations

import queue

import pytest
import zeroconf

from p2ptrain.diagnosis.observations import Announcement
from p2ptrain.ids import DeviceId
from p2ptrain.net import listening
from p2ptrain.net.discovery import SERVICE
from p2ptrain.net.listening import hear_peers, names_within

GROUP, DEVICE = "abcdefgh", "b" * 26
NAME = f"{DEVICE[:16]}-{GROUP}.{SERVICE}"


class Network:
    """Stands in for zeroconf: one announcement that is found at once."""

    def __init__(self, info: zeroconf.ServiceInfo | None) -> None:
        self.info = info
        self.closed = False

    def get_service_info(self, type_: str, name: str, timeout: int) -> zeroconf.ServiceInfo | None:
        return self.info

    def close(self) -> None:
        self.closed = True


def announced(*addresses: str, **properties: str) -> zeroconf.ServiceInfo:
    fields = {"v": "1", "g": GROUP, "id": DEVICE, "inv": "0"} | properties
    return zeroconf.ServiceInfo(
        SERVICE, NAME, port=47615, properties=fields, parsed_addresses=list(addresses)
    )


def heard(
    monkeypatch: pytest.MonkeyPatch, info: zeroconf.ServiceInfo | None, own: str | None = None
) -> tuple[Announcement, ...]:
    """What `hear_peers` makes of an announcement."""
    network = Network(info)

    def browse(running: Network, type_: str, handlers: list[object]) -> None:
        (changed,) = handlers
        assert callable(changed)
        for _ in range(2):  # the same name again is the same peer
            changed(
                zeroconf=running,
                service_type=type_,
                name=NAME,
                state_change=zeroconf.ServiceStateChange.Added,
            )

    monkeypatch.setattr(zeroconf, "Zeroconf", lambda **_: network)
    monkeypatch.setattr(zeroconf, "ServiceBrowser", browse)
    monkeypatch.setattr(listening, "multicast_error", lambda address: None)
    monkeypatch.setattr(listening.limits, "DOCTOR_SETTLED_S", 0.0)
    found = hear_peers(["10.0.0.1"], seconds=0.2, own=None if own is None else DeviceId(own))
    assert found.error is None
    assert network.closed
    return found.heard


def test_announcement_is_heard_once(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = Announcement(group=GROUP, device=DeviceId(DEVICE), address="10.0.0.2:47615")
    assert heard(monkeypatch, announced("10.0.0.2", "172.17.0.1")) == (expected,)
    assert heard(monkeypatch, announced("127.0.0.1", "10.0.0.2")) == (expected,)


@pytest.mark.parametrize(
    "info",
    [
        None,
        announced(),
        announced("127.0.0.1"),
        announced("10.0.0.2", v="2"),
        announced("10.0.0.2", g="../../etc"),
        announced("10.0.0.2", id="nobody"),
    ],
    ids=["unresolved", "no address", "loopback", "other version", "bad group", "bad device"],
)
def test_what_is_no_peer_elsewhere_is_left_out(
    monkeypatch: pytest.MonkeyPatch, info: zeroconf.ServiceInfo | None
) -> None:
    assert heard(monkeypatch, info) == ()


def test_own_announcement_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    assert heard(monkeypatch, announced("10.0.0.2"), own=DEVICE) == ()


def test_address_that_nobody_has_is_an_error() -> None:
    found = hear_peers(["203.0.113.77"], seconds=0.1, own=None)
    assert found.heard == ()
    assert found.error == "No such device on 203.0.113.77"


def test_own_peer_that_is_heard_first_does_not_end_the_listening(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(listening.limits, "DOCTOR_SETTLED_S", 0.0)
    names: queue.SimpleQueue[str] = queue.SimpleQueue()
    own = DeviceId("a" * 26)
    names.put(f"{own[:16]}-{GROUP}.{SERVICE}")
    names.put(NAME)
    assert list(names_within(names, 5.0, own=own)) == [NAME]

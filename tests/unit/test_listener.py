"""Addresses as text."""

from __future__ import annotations

from p2ptrain.net.listener import join_address, split_address


def test_addresses_split_and_join() -> None:
    for address, parts in (("a.b:1", ("a.b", 1)), ("[fe80::1]:65535", ("fe80::1", 65_535))):
        assert split_address(address) == parts
        assert join_address(*parts) == address

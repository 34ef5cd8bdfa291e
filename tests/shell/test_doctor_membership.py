"""The doctor looks at what a device holds of its group."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest

from p2ptrain.doctor.membership import standing
from p2ptrain.errors import NotFound
from p2ptrain.store.groups import Group, load_issuer
from p2ptrain.store.home import open_home
from p2ptrain.store.trust_log import append_statements
from p2ptrain.trust.chains import member_chain
from p2ptrain.trust.revocation import revoke

MintGroup = Callable[..., list[Group]]


def test_member_in_good_standing_has_three_certificates_in_date(mint_group: MintGroup) -> None:
    (group,) = mint_group(1)
    found = standing(open_home(group.folder.parents[1]), None).membership
    assert found is not None
    assert (found.group, found.device, found.revoked_because) == (group.id, group.device, None)
    whats = [certificate.what for certificate in found.certificates]
    assert whats == [
        "this device's certificate",
        "its issuer's certificate",
        "the group's root certificate",
    ]
    now = time.time()
    assert all(each.begins_s < now < each.ends_s for each in found.certificates)


def test_revoked_device_is_told_who_said_so_and_why(mint_group: MintGroup) -> None:
    ours, theirs = mint_group(2)
    statement = revoke(
        member_chain(ours.chain, gid=ours.id, roots=[ours.root]),
        by=load_issuer(theirs),
        gid=ours.id,
        reason="left in a train",
        keep=[],
        now=time.time(),
    )
    append_statements(ours.folder, [statement])
    found = standing(open_home(ours.folder.parents[1]), ours.name).membership
    assert found is not None
    assert found.revoked_because == f"left in a train (said by {theirs.device[:8]})"


def test_damaged_files_are_told_with_the_next_step(mint_group: MintGroup) -> None:
    (group,) = mint_group(1)
    home = open_home(group.folder.parents[1])
    (group.folder / "chain.pem").write_text("no certificate")
    looked = standing(home, group.name)
    assert looked.group is None
    assert looked.membership is not None
    assert looked.membership.error == "a certificate file is damaged"
    assert looked.membership.hint
    with pytest.raises(NotFound):
        standing(home, "nowhere")

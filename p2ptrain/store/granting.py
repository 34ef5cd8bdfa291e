"""Certify a new member's keys with this device's issuer."""

from __future__ import annotations

from cryptography import x509

from p2ptrain.errors import TrustError
from p2ptrain.ids import DeviceId
from p2ptrain.store.groups import Group, load_issuer
from p2ptrain.store.trust_log import read_revoked, read_roots
from p2ptrain.trust import certificates as certs
from p2ptrain.trust.chains import key_fingerprint
from p2ptrain.trust.enrolment import EnrolmentGrant, EnrolmentRequest, with_revocations


def live_issuer(group: Group) -> certs.Issuer:
    """Our right to admit, if nothing in its chain was revoked.

    Raises:
        TrustError: this member may not admit, or no longer.
    """
    issuer = load_issuer(group)
    roots = read_roots(group.folder, group.root, group.id)
    revoked = read_revoked(group.folder, roots, group.id)
    if revoked.against([key_fingerprint(certificate) for certificate in issuer.chain]) is not None:
        raise TrustError("this device was revoked and may not admit others")
    return issuer


def grant_membership(
    group: Group, request: EnrolmentRequest, *, admits: bool, now: float
) -> EnrolmentGrant:
    """What makes a member of a device that has proved that it was invited.

    Args:
        admits: Whether it may admit others: it then gets an issuer, otherwise a leaf.

    Raises:
        TrustError: this member may not admit, or the request does not prove its keys.
    """
    issuer = live_issuer(group)
    device_request = certs.request_from_der(request.device_csr)
    device = certs.device_id(certs.requested_key(device_request))
    chain, leaf = issuer.chain, b""
    if admits:
        chain = (_admitted(group, issuer, request, device, now), *issuer.chain)
    else:
        made = certs.issue_leaf(issuer, device_request, gid=group.id, name=request.name, now=now)
        leaf = certs.to_der(made)
    roots = read_roots(group.folder, group.root, group.id)
    grant = EnrolmentGrant(
        group_name=group.name,
        root=certs.to_der(group.root),
        issuers=tuple(certs.to_der(certificate) for certificate in chain),
        clock_s=now,
        leaf=leaf,
        rotations=roots.rotations,
    )
    return with_revocations(grant, read_revoked(group.folder, roots, group.id).statements)


def _admitted(
    group: Group, issuer: certs.Issuer, request: EnrolmentRequest, device: DeviceId, now: float
) -> x509.Certificate:
    return certs.issue_issuer(
        issuer,
        certs.request_from_der(request.issuer_csr),
        device=device,
        gid=group.id,
        name=request.name,
        now=now,
    )

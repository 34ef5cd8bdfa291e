"""Look at what this device holds of a group: certificates, and whether its files can be used."""

from __future__ import annotations

from dataclasses import dataclass

from cryptography import x509

from p2ptrain.diagnosis.observations import Certificate, Membership
from p2ptrain.errors import ConfigError, NotFound, TrustError
from p2ptrain.runtime.credentials.trust_reports import read_known
from p2ptrain.store.groups import Group, known_groups, load_group
from p2ptrain.store.home import Home


@dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    """A group as far as it could be loaded."""

    membership: Membership | None
    group: Group | None = None


def standing(home: Home, group_name: str | None) -> Standing:
    """Our standing in a group; in the only group there is when no name is given.

    Raises:
        ConfigError: several groups and no name, or no such group.
    """
    if group_name is None:
        known = known_groups(home)
        if len(known) > 1:
            raise ConfigError(
                f"this device is in several groups: {', '.join(known)}",
                hint="say which one: p2ptrain doctor --group NAME",
            )
        if not known:
            return Standing(membership=None)
        group_name = known[0]
    try:
        group = load_group(home, group_name)
    except NotFound:
        raise
    except (TrustError, ConfigError) as error:
        broken = Membership(group_name=group_name, error=error.message, hint=error.hint)
        return Standing(membership=broken)
    membership = Membership(
        group_name=group.name,
        group=group.id,
        device=group.device,
        certificates=_certificates(group),
        revoked_because=_revocation(group),
    )
    return Standing(membership=membership, group=group)


def _revocation(group: Group) -> str | None:
    """Why this device is out of the group, as far as it has heard; None: it is not."""
    known = read_known(group)
    statement = known.revoked.against(known.own.keys)
    if statement is None:
        return None
    return f"{statement.reason} (said by {known.name_of(statement.by)})"


def _certificates(group: Group) -> tuple[Certificate, ...]:
    leaf, *issuers = group.chain
    named = [("this device's certificate", leaf)]
    named += [("its issuer's certificate", issuer) for issuer in issuers[:1]]
    named += [("the group's root certificate", group.root)]
    return tuple(_dates(what, certificate) for what, certificate in named)


def _dates(what: str, certificate: x509.Certificate) -> Certificate:
    return Certificate(
        what=what,
        begins_s=certificate.not_valid_before_utc.timestamp(),
        ends_s=certificate.not_valid_after_utc.timestamp(),
    )

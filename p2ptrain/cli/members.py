"""`p2ptrain group members` and `group revoke`: who belongs to a group, and who no longer does."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import click

from p2ptrain.cli.options import report_options
from p2ptrain.cli.speech import print_json, say
from p2ptrain.errors import ConfigError, NotFound, PeerNotRunning

if TYPE_CHECKING:
    from rich.table import Table

    from p2ptrain.runtime.credentials.revoking import RevokeRequest
    from p2ptrain.runtime.credentials.trust_reports import (
        MemberTrust,
        RevocationReport,
        TrustReport,
    )
    from p2ptrain.store.groups import Group
    from p2ptrain.store.home import Home


@click.command()
@click.argument("name")
@report_options
def members(name: str, as_json: bool) -> None:
    """Show every device that was ever a member, as far as this one has heard of it.

    Works without a running peer, from what this device has on disk.
    """
    from p2ptrain.cli.display import print_report
    from p2ptrain.runtime.credentials.trust_reports import trust_report
    from p2ptrain.store.groups import load_group
    from p2ptrain.store.home import open_home
    from p2ptrain.wire.codec import to_plain

    report = trust_report(load_group(open_home(), name))
    if as_json:
        print_json(to_plain(report))
        return
    print_report(members_table(report), *members_lines(report))


@click.command()
@click.argument("device")
@click.option(
    "--group", "group_name", metavar="NAME", help="The group. [default: the only one there is]"
)
@click.option("--reason", required=True, help="Why, in a few words; every member sees it.")
@click.option(
    "--keep",
    multiple=True,
    metavar="DEVICE",
    help="A member that the revoked one had admitted, and that stays; repeatable.",
)
@click.option("--keep-all", is_flag=True, help="All members that it had admitted stay.")
@click.option("--keep-none", is_flag=True, help="No member that it had admitted stays.")
@report_options
def revoke(device: str, group_name: str | None, as_json: bool, **given: Any) -> None:  # Any: click
    """Put a stolen, lost or sold device out of the group, for ever.

    DEVICE is a name, or a device id or its beginning (see `group members`). Its links are closed
    at once, and all members refuse it as soon as they hear of it. What it had admitted is out as
    well, unless it is kept. To come back it must be invited again, with new keys.
    """
    from p2ptrain.runtime.credentials.revoking import RevokeRequest
    from p2ptrain.store.home import open_home
    from p2ptrain.wire.codec import to_plain

    if sum((bool(given["keep"]), given["keep_all"], given["keep_none"])) > 1:
        raise ConfigError("--keep, --keep-all and --keep-none exclude each other")
    home = open_home()
    group = load_only(home, group_name)
    request = RevokeRequest(
        device=device,
        reason=given["reason"],
        keep=tuple(given["keep"]),
        keep_all=given["keep_all"],
        keep_none=given["keep_none"],
    )
    report, is_running = _revoke(home, group, request)
    if as_json:
        print_json({**to_plain(report), "peer_running": is_running})
        return
    click.echo(f"revoked {report.name} ({report.device})")
    for line in _told(report, is_running):
        say(line)


def load_only(home: Home, name: str | None) -> Group:
    """The group of that name, or the only one of this home.

    Raises:
        NotFound: there is none.
        ConfigError: there are several and no name was given.
    """
    from p2ptrain.store.groups import known_groups, load_group

    if name is not None:
        return load_group(home, name)
    known = known_groups(home)
    if not known:
        raise NotFound("this device is in no group")
    if len(known) > 1:
        raise ConfigError(
            f"this device is in several groups: {', '.join(known)}", hint="choose with --group"
        )
    return load_group(home, known[0])


def _revoke(home: Home, group: Group, request: RevokeRequest) -> tuple[RevocationReport, bool]:
    """By the running peer, or on disk for the peer to spread when it runs."""
    from p2ptrain.cli.asking import ask
    from p2ptrain.runtime.credentials.revoking import sign_revocation
    from p2ptrain.runtime.credentials.trust_reports import RevocationReport, read_known
    from p2ptrain.store.home import control_socket_path, lock_group
    from p2ptrain.store.trust_log import append_statements
    from p2ptrain.wire.codec import from_plain, to_plain

    try:
        answer = ask(control_socket_path(home, group.id), "revoke", to_plain(request))
        return from_plain(RevocationReport, answer), True
    except PeerNotRunning:
        with lock_group(home, group.id):
            signed = sign_revocation(read_known(group), request)
            append_statements(group.folder, [signed.statement])
        return signed.report(told=0), False


def _told(report: RevocationReport, is_running: bool) -> list[str]:
    lines = []
    if report.kept:
        lines.append(f"kept: {', '.join(report.kept)}")
    if report.void:
        lines.append(f"out as well, because it had admitted them: {', '.join(report.void)}")
    if is_running:
        lines.append(f"told {report.told} members; those that are away hear of it when they return")
    else:
        lines.append("no peer runs here: nobody else knows yet")
        lines.append("hint: start it, so that it tells the others: p2ptrain join --group NAME")
    return lines


def members_table(report: TrustReport) -> Table:
    """One row per device."""
    from p2ptrain.cli.tables import add_row, new_table
    from p2ptrain.ids import short

    table = new_table(f"group {report.name} ({report.group})")
    for heading in ("device", "id", "state", "admits", "admitted by", "certificate until"):
        table.add_column(heading)
    for member in report.members:
        add_row(
            table,
            member.name + (" (this one)" if member.is_self else ""),
            short(member.device),
            member.state if member.reason is None else f"{member.state}: {member.reason}",
            "yes" if member.may_admit else "no",
            member.sponsor or "-",
            _date(member),
        )
    return table


def members_lines(report: TrustReport) -> list[str]:
    """What is said below the table."""
    lines = [f"the group's root certificate ends on {_day(report.root_expires_s)}"]
    if report.roots_trusted > 1:
        lines.append("a new root takes over: the old one is trusted until all members show it")
    return lines


def _date(member: MemberTrust) -> str:
    return "-" if member.state in ("revoked", "void") else _day(member.expires_s)


def _day(at_s: float) -> str:
    return time.strftime("%Y-%m-%d", time.localtime(at_s))

"""`p2ptrain status` and `p2ptrain energy`: ask the peer of this device what it knows."""

from __future__ import annotations

import click

from p2ptrain.cli.options import group_option, report_options


@click.command(short_help="Show who is there and what runs where.")
@group_option
@report_options
def status(group_name: str, as_json: bool) -> None:
    """Show who is there, what runs where and why, and what can be resumed."""
    from p2ptrain.cli.asking import ask
    from p2ptrain.cli.local import peer_socket
    from p2ptrain.cli.speech import print_json

    answer = ask(peer_socket(group_name), "status")
    if as_json:
        print_json(answer)
        return
    from p2ptrain.cli.display import print_report
    from p2ptrain.cli.tables import (
        plan_lines,
        plan_table,
        run_lines,
        status_lines,
        status_table,
    )
    from p2ptrain.runtime.reports import PeerStatus
    from p2ptrain.wire.codec import from_plain

    report = from_plain(PeerStatus, answer)
    print_report(status_table(report), *status_lines(report))
    if report.run_status is not None:
        print_report(*run_lines(report.run_status))
    if report.plan is not None:
        print_report(plan_table(report.plan), *plan_lines(report.plan))


@click.command(short_help="Show what the last run cost in joules.")
@group_option
@report_options
def energy(group_name: str, as_json: bool) -> None:
    """Show what the last run cost in joules, peer by peer and phase by phase."""
    from p2ptrain.cli.asking import ask
    from p2ptrain.cli.local import peer_socket
    from p2ptrain.cli.speech import print_json

    answer = ask(peer_socket(group_name), "energy")
    if as_json:
        print_json(answer)
        return
    from p2ptrain.cli.display import print_report
    from p2ptrain.cli.tables import energy_lines, energy_table
    from p2ptrain.runtime.reports import EnergyReport
    from p2ptrain.wire.codec import from_plain

    report = from_plain(EnergyReport, answer)
    print_report(energy_table(report), *energy_lines(report))

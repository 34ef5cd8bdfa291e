"""`p2ptrain doctor`: find out why a peer is alone or slow."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from p2ptrain import limits
from p2ptrain.cli.options import Address, report_options
from p2ptrain.errors import ProblemsFound

if TYPE_CHECKING:
    from p2ptrain.diagnosis.findings import Diagnosis, Finding


@click.command(short_help="Find out why a peer is alone or slow.")
@click.option(
    "--group",
    "group_name",
    metavar="NAME",
    help="The group to look at. [default: the only one of this device]",
)
@click.option(
    "--peer", "peers", type=Address(), multiple=True, help="Where another peer is; repeatable."
)
@click.option(
    "--port",
    type=click.IntRange(0, 65_535),
    default=limits.PEER_PORT_DEFAULT,
    show_default=True,
    help="Where the peer would listen, while none runs.",
)
@click.option(
    "--seconds",
    type=click.FloatRange(0.1, 60),
    default=limits.DOCTOR_LISTEN_S,
    show_default=True,
    help="How long to listen for other peers.",
)
@report_options
def doctor(
    group_name: str | None, peers: tuple[str, ...], port: int, seconds: float, as_json: bool
) -> None:
    """Find out why the peer of this device is alone or slow, whether it runs or not.

    Every finding says what was found, why it matters and what to do next. The exit code is 0 when
    there is no problem, else 11.
    """
    import trio

    from p2ptrain.cli.speech import print_json
    from p2ptrain.diagnosis.diagnose import diagnose
    from p2ptrain.doctor.examine import Question, examine
    from p2ptrain.store.home import open_home
    from p2ptrain.wire.codec import to_plain

    question = Question(group_name=group_name, port=port, listen_s=seconds, peers=peers)
    diagnosis = diagnose(trio.run(examine, open_home(), question))
    if as_json:
        print_json(to_plain(diagnosis))
    else:
        _print(diagnosis)
    count = len(diagnosis.problems)
    if count:
        raise ProblemsFound(
            "1 problem was found" if count == 1 else f"{count} problems were found",
            hint=diagnosis.problems[0].next_step,
        )


def _print(diagnosis: Diagnosis) -> None:
    from p2ptrain.cli.tables import printable

    width = max(len(each.severity) for each in diagnosis.findings)
    for finding in diagnosis.findings:
        for line in _lines(finding, width):
            click.echo(printable(line))


def _lines(finding: Finding, width: int) -> list[str]:
    indent = " " * (width + 2)
    lines = [f"{finding.severity:<{width}}  {finding.check}: {finding.found}"]
    lines += [f"{indent}why: {finding.why}"] if finding.why else []
    return [*lines, f"{indent}next: {finding.next_step}"] if finding.next_step else lines

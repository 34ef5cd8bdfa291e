"""`p2ptrain leave`: end the peer of this device without costing a run a step."""

from __future__ import annotations

import click

from p2ptrain.cli.options import group_option, report_options


@click.command(short_help="End this device's peer; a run goes on without it.")
@group_option
@report_options
def leave(group_name: str, as_json: bool) -> None:
    """End the peer of this device, after it has handed over its part of a run.

    The others go on from the same step. It joins again with: p2ptrain join.
    """
    from p2ptrain.cli.asking import ask
    from p2ptrain.cli.local import peer_socket
    from p2ptrain.cli.speech import print_json, say

    problem = ask(peer_socket(group_name), "leave")["not_handed_over"]
    if as_json:
        print_json({"version": 1, "left": True, "not_handed_over": problem})
    elif problem is not None:
        say(f"left without handing over: {problem}")
    else:
        click.echo("left; the other peers go on")

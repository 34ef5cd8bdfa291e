"""`p2ptrain demo`: the whole product on one machine, in about a minute."""

from __future__ import annotations

from pathlib import Path

import click

from p2ptrain.cli.options import report_options


@click.command(short_help="Train a small model with three peers on this machine.")
@click.option("--peers", type=click.IntRange(1, 8), default=3, show_default=True, help="Peers.")
@click.option("--steps", type=click.IntRange(min=1), help="Optimizer updates. [default: planned]")
@click.option("--long", is_flag=True, help="Train for minutes, until it beats the bigram.")
@click.option(
    "--directory",
    type=click.Path(file_okay=False, path_type=Path),
    help="Keep everything here. [default: a temporary folder]",
)
@report_options
def demo(peers: int, steps: int | None, long: bool, directory: Path | None, as_json: bool) -> None:
    """Start peers on this machine and let them train a small model from scratch.

    Keys, data and checkpoints live in a throwaway folder and nothing leaves the machine.
    """
    from p2ptrain.cli.display import DemoDisplay
    from p2ptrain.cli.speech import print_json
    from p2ptrain.demo.demo import DemoOptions, run_demo

    options = DemoOptions.chosen(peers=peers, steps=steps, long=long, directory=directory)
    with DemoDisplay(as_json=as_json) as display:
        summary = run_demo(options, display)
    if as_json:
        print_json(summary)

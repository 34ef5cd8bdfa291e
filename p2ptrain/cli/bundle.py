"""`p2ptrain bundle`: what is inside a model's bundle, and whether it is sound."""

from __future__ import annotations

import click

from p2ptrain.cli.options import report_options
from p2ptrain.errors import BundleError


@click.group(invoke_without_command=True, short_help="Look into a model's bundle, or check it.")
@click.pass_context
def bundle(context: click.Context) -> None:
    """Look into a model's bundle, or check it; a folder, or the name of one that comes along."""
    if context.invoked_subcommand is None:
        click.echo(context.get_help())


@bundle.command(short_help="Show what is inside.")
@click.argument("directory")
@report_options
def info(directory: str, as_json: bool) -> None:
    """Show a bundle's task, data, parameters, segments and costs, as its manifest states them."""
    from p2ptrain.bundle.report import bundle_report
    from p2ptrain.cli.speech import print_json
    from p2ptrain.store.bundles import find_bundle, load_bundle
    from p2ptrain.wire.codec import to_plain

    report = bundle_report(load_bundle(find_bundle(directory)).manifest)
    if as_json:
        print_json(to_plain(report))
        return
    from p2ptrain.cli.display import print_report
    from p2ptrain.cli.tables import bundle_lines, bundle_table

    print_report(bundle_table(report), *bundle_lines(report))


@bundle.command(short_help="Check everything in it.")
@click.argument("directory")
@report_options
def verify(directory: str, as_json: bool) -> None:
    """Check manifest, graphs, weights and tokenizer, and list all that is wrong.

    A peer makes the checks of manifest and graphs by itself before it compiles anything.
    """
    from p2ptrain.cli.speech import print_json
    from p2ptrain.store.bundles import find_bundle
    from p2ptrain.store.verify_bundle import verify_bundle
    from p2ptrain.wire.codec import to_plain

    report = verify_bundle(find_bundle(directory))
    if as_json:
        print_json(to_plain(report))
    else:
        from p2ptrain.cli.display import print_report
        from p2ptrain.cli.tables import verification_table

        print_report(verification_table(report))
    wrong = sum(finding.state == "wrong" for finding in report.findings)
    if wrong:
        problems = "one problem" if wrong == 1 else f"{wrong} problems"
        raise BundleError(
            f"the bundle is not sound: {problems}",
            hint="get it again from where it came, or export the model again",
        )

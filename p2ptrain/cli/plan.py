"""`p2ptrain plan`: who should take part, how, and what it would cost, without any peer."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from p2ptrain.cli.options import report_options
from p2ptrain.cli.planning_options import objective_options, way_options, work_options
from p2ptrain.cli.text_files import read_text
from p2ptrain.errors import ConfigError

if TYPE_CHECKING:
    from p2ptrain.planner.input import LinkEstimate
    from p2ptrain.planner.memory_shortfall import Variant
    from p2ptrain.planner.question import Question


@click.command(short_help="Ask who should train a model, how, and at what cost; needs no peer.")
@click.option("--model", metavar="DIR", required=True, help="A bundle's folder, or its name.")
@click.option(
    "--devices", metavar="FILE", required=True, help="Devices as [[device]] tables in TOML."
)
@click.option("--links", metavar="FILE", help="Links and media. [default: assumed 100 Mbit/s]")
@objective_options
@work_options(choosable=False)
@way_options(choosable=False)
@click.option("--optimizer", default="adamw", show_default=True, help="The update rule.")
@click.option("--plan", "plan_file", metavar="FILE", help="Price this plan instead of searching.")
@click.option("--home", metavar="NAME", help="Owns the data. [default: the first device]")
@click.option(
    "--private",
    is_flag=True,
    help="Neither inputs nor labels leave --home: it has the first and the last stage.",
)
@click.option("--svg", "svg_file", metavar="FILE", help="Draw the schedule into this file.")
@report_options
def plan(as_json: bool, **options: Any) -> None:  # Any: click's values
    """Compare one device, pipelines, data, tensor and sequence parallelism and hybrids.

    Nothing is measured: times follow from what the file of devices says. Plans that this version
    cannot run yet are marked.
    """
    from p2ptrain.cli.speech import print_json
    from p2ptrain.planner.answer import Answering
    from p2ptrain.planner.asked import asked_candidate
    from p2ptrain.planner.explore import Explorer
    from p2ptrain.planner.plan_file import read_plan
    from p2ptrain.planner.pricing import Pricing
    from p2ptrain.planner.shortfall import shortfall
    from p2ptrain.wire.codec import to_plain

    question, variant = _question(options)
    pricing = Pricing(question)
    explorer = Explorer(pricing)
    forced = options["plan_file"]
    winner = None
    if forced is not None:
        if question.private:
            raise ConfigError(
                "a private plan is searched, not asked for", hint="leave --plan or --private out"
            )
        asked = read_plan(read_text(forced, "--plan"), file=forced)
        winner = asked_candidate(asked, explorer=explorer, pricing=pricing)
    found = explorer.run()
    winner = winner or found.best
    if winner is None:
        raise shortfall(question, variant)
    answering = Answering(pricing, explorer, found)
    answer = answering.answer(winner, forced=forced is not None)
    rows = answering.rows(winner)
    if options["svg_file"] is not None:
        _draw(options["svg_file"], rows, answer.model)
    if as_json:
        print_json(to_plain(answer))
        return
    from p2ptrain.cli.display import print_report
    from p2ptrain.cli.plan_tables import answer_lines, candidates_table, parts_table, picture

    print_report(candidates_table(answer), *answer_lines(answer), "", parts_table(answer.winner))
    print_report(*picture(rows))


def _question(options: dict[str, Any]) -> tuple[Question, Variant]:  # Any: click's values
    from p2ptrain.planner.described import Work, described_question, owner_of
    from p2ptrain.planner.device_file import parse_devices, parse_links
    from p2ptrain.planner.objective import objective_of
    from p2ptrain.store.bundles import find_bundle, load_bundle
    from p2ptrain.store.device_types import device_types

    manifest = load_bundle(find_bundle(options["model"])).manifest
    file, links_file = options["devices"], options["links"]
    specs = parse_devices(read_text(file, "--devices"), file=file, types=device_types())
    names = [spec.name for spec in specs]
    links: tuple[LinkEstimate, ...] = ()
    if links_file is not None:
        links = parse_links(read_text(links_file, "--links"), file=links_file, devices=names)
    work = Work(
        steps=options["steps"],
        microbatches=options["microbatches"],
        microbatch_size=options["microbatch_size"],
        codec=options["codec"],
        optimizer=options["optimizer"],
        rematerialise=options["rematerialise"],
    )
    objective = objective_of(
        options["objective"], deadline_s=options["deadline"], joules=options["joules"]
    )
    owner = owner_of(options["home"], names, private=options["private"])

    def variant(size: int, rematerialise: bool) -> Question:
        other = question.contract.at_size(size, rematerialise=rematerialise)
        changed = replace(
            work,
            microbatch_size=size,
            microbatches=other.microbatches,
            rematerialise=rematerialise,
        )
        return ask(changed)

    def ask(about: Work) -> Question:
        question = described_question(manifest, specs, links, about, objective, options["schedule"])
        return replace(question, home=owner, private=options["private"])

    question = ask(work)
    return question, variant


def _draw(path: str, rows: list[tuple[str, Any]], model: str) -> None:  # Any: spans
    from p2ptrain.schedule.svg import svg

    if not rows:
        raise ConfigError(
            "tensor and sequence parallelism have no schedule to draw", hint="leave --svg out"
        )
    end_ns = max(span.end_ns for _, spans in rows for span in spans)
    try:
        Path(path).write_text(
            svg(rows, end_ns, f"the passes of one step of {model}"), encoding="utf-8"
        )
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error}", hint="choose another --svg") from (
            error
        )

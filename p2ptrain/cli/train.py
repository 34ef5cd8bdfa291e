"""`p2ptrain train`: hand one training job to the peer of this device and watch it."""

from __future__ import annotations

import os
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from p2ptrain.cli.options import group_option, report_options
from p2ptrain.cli.planning_options import (
    AUTO,
    COUNT,
    PARALLELISMS,
    objective_options,
    way_options,
    work_options,
)
from p2ptrain.errors import BundleError, ConfigError, DataError, Interrupted

if TYPE_CHECKING:
    from p2ptrain.runtime.reports import TrainRequest, TrainResult

_RATE = click.FloatRange(min=0.0)


@click.command()
@group_option
@click.option("--model", "bundle", metavar="DIR", help="An exported model (bundle), or its name.")
@click.option(
    "--data",
    metavar="PATH",
    help="Text, JSON lines, CSV, arrays or a folder; its samples reach first and last stage.",
)
@click.option(
    "--heldout", metavar="PATH", help="Data to evaluate on. [default: 5 % of --data, kept apart]"
)
@click.option(
    "--text-field", metavar="NAME", help="Field or column of the text. [default: text, or words]"
)
@click.option(
    "--label-field", metavar="NAME", help="Of the label; or NAME,NAME. [default: label, or tags]"
)
@click.option("--labels", metavar="FILE", help="Labels (.npy), where --data is one .npy array.")
@click.option("--heldout-labels", metavar="FILE", help="The same for --heldout.")
@work_options(choosable=True)
@objective_options
@click.option("--stages", type=COUNT, help="Exact number of stages. [default: planned]")
@click.option(
    "--plan", "plan_file", metavar="FILE", help="Begin with this plan instead of searching one."
)
@click.option(
    "--parallelism",
    type=click.Choice(PARALLELISMS),
    default="pipeline",
    show_default=True,
    help="Pipelines have the bits of one peer; under the others several peers may share a stage.",
)
@click.option(
    "--seed",
    type=click.IntRange(0, 2**63 - 1),
    default=0,
    show_default=True,
    help="Decides the initial parameters, the order of the data and dropout.",
)
@click.option("--threads", type=COUNT, help="Threads per peer. [default: half the cores]")
@click.option(
    "--form",
    type=click.Choice(["portable", "training"]),
    default="portable",
    show_default=True,
    help="Standard ONNX operators, or those of onnxruntime-training.",
)
@way_options(choosable=True)
@click.option(
    "--rematerialise-auto", is_flag=True, help="Rematerialise where a step is shorter for it."
)
@click.option(
    "--dropout",
    type=click.FloatRange(0.0, 1.0, max_open=True),
    help="Probability of dropout. [default: the model's own]",
)
@click.option(
    "--optimizer",
    type=click.Choice(["adamw", "sgd"]),
    default="adamw",
    show_default=True,
    help="The update rule.",
)
@click.option("--learning-rate", type=_RATE, help="Peak, after the warm-up. [default: 0.003]")
@click.option("--warmup-steps", type=click.IntRange(min=0), help="Linear warm-up. [default: 20]")
@click.option("--weight-decay", type=_RATE, help="For matrices only. [default: 0.01]")
@click.option("--clip-norm", type=_RATE, help="Largest gradient norm, 0 for any. [default: 1]")
@click.option(
    "--evaluate-every",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    help="Steps between held-out evaluations; 0 for the first and last only.",
)
@click.option(
    "--checkpoint-every", type=COUNT, default=100, show_default=True, help="Steps between saves."
)
@click.option(
    "--replicate-every", type=COUNT, help="Steps between replica sets. [default: planned]"
)
@click.option(
    "--keep-data-here",
    is_flag=True,
    help="Make no second copy of the data; the run pauses while this device is away.",
)
@click.option(
    "--private",
    is_flag=True,
    help="Neither inputs nor labels leave this device: it has the first and the last stage. "
    "Implies --keep-data-here.",
)
@click.option(
    "--own-data",
    is_flag=True,
    help="Every peer that joined with --data trains on its own, which never leaves it; takes "
    "--parallelism data.",
)
@click.option(
    "--force-view",
    is_flag=True,
    help="With --resume: go on although others may do so too, as a lineage of its own.",
)
@click.option("--resume", metavar="RUN", help="Go on with a run of this device, by its id.")
@click.option("--out", metavar="FILE", help="Where to write the trained model as one ONNX file.")
@click.option(
    "--safetensors",
    metavar="FILE",
    help="Write it for torch and transformers too, adapters merged.",
)
@report_options
def train(group_name: str, as_json: bool, **options: Any) -> None:  # Any: click's values
    """Train a model together with every peer that is there.

    Ctrl-C stops after the present step and keeps it; --resume goes on to the same curve.
    """
    request = _request(options)
    _check_paths(request)
    from p2ptrain.cli.asking import ask_stoppable
    from p2ptrain.cli.display import RunDisplay
    from p2ptrain.cli.local import peer_socket
    from p2ptrain.cli.speech import print_json
    from p2ptrain.runtime.reports import TrainResult
    from p2ptrain.wire.codec import from_plain, to_plain

    with RunDisplay(as_json=as_json) as display:
        answer = ask_stoppable(peer_socket(group_name), "train", to_plain(request), display.event)
        result = from_plain(TrainResult, answer)
        if as_json:
            print_json(answer)
        else:
            display.result(result)
    if result.stopped:
        raise _stopped(result, group_name)


def _request(options: dict[str, Any]) -> TrainRequest:  # Any: click's values
    """The request that the options describe; paths absolute, as the peer has its own folder."""
    from p2ptrain.runtime.reports import TrainRequest
    from p2ptrain.training.contract import OptimizerChoice

    chosen = {
        "name": options["optimizer"],
        "peak_learning_rate": options["learning_rate"],
        "final_learning_rate": _tenth(options["learning_rate"]),
        "warmup_steps": options["warmup_steps"],
        "weight_decay": options["weight_decay"],
        "clip_norm": options["clip_norm"],
    }
    names = {field.name for field in fields(TrainRequest)} - {"optimizer"}
    values = {name: value for name, value in options.items() if name in names}
    for name in ("data", "heldout", "labels", "heldout_labels", "out", "safetensors"):
        values[name] = _absolute(values[name])
    values["bundle"] = _bundle(values["bundle"])
    values["data"] = values["data"] or ""
    values["plan"] = _plan(options["plan_file"])
    values["deadline_s"] = options["deadline"]
    if options["microbatch_size"] == AUTO:
        values["microbatch_size"] = None
    if options["rematerialise_auto"]:
        values["rematerialise"] = None
    given = {name: value for name, value in chosen.items() if value is not None}
    return TrainRequest(**values, optimizer=OptimizerChoice(**given))


def _bundle(given: str | None) -> str:
    """The folder of a bundle: as given, or of one that comes with p2ptrain; empty for none."""
    from p2ptrain.errors import NotFound
    from p2ptrain.store.bundles import find_bundle

    if given is None:
        return ""
    try:
        return os.path.abspath(find_bundle(given))
    except NotFound as error:
        raise BundleError(error.message, hint=error.hint) from error


def _plan(path: str | None) -> str | None:
    """The text of a plan's file, once it agrees with itself; None for none."""
    from p2ptrain.cli.text_files import read_text
    from p2ptrain.planner.plan_file import read_plan

    if path is None:
        return None
    text = read_text(path, "--plan")
    read_plan(text, file=path)
    return text


def _tenth(rate: float | None) -> float | None:
    return None if rate is None else rate / 10


def _absolute(path: str | None) -> str | None:
    return None if path is None else os.path.abspath(path)


def _check_paths(request: TrainRequest) -> None:
    """Refuse at once what the peer would refuse later.

    Raises:
        ConfigError: neither a model and data nor a run to resume.
        BundleError, DataError: the folder or a file is not there or holds nothing.
    """
    if request.resume is None:
        if not request.bundle or not (request.data or request.own_data):
            raise ConfigError("a new run needs --model and --data; an old one needs --resume")
        if not Path(request.bundle, "manifest.json").is_file():
            raise BundleError(f"there is no bundle in {request.bundle}")
    for given in (request.data, request.heldout, request.labels, request.heldout_labels):
        _check_data(given or None)
    for option, out in (("--out", request.out), ("--safetensors", request.safetensors)):
        if out is not None and not Path(out).parent.is_dir():
            raise ConfigError(
                f"there is no folder {Path(out).parent}",
                hint=f"make it, or choose another {option}",
            )


def _check_data(given: str | None) -> None:
    if given is None:
        return
    path = Path(given)
    if not path.exists():
        raise DataError(f"there is no file or folder {path}")
    if path.is_file() and path.stat().st_size == 0:
        raise DataError(f"{path} is empty")


def _stopped(result: TrainResult, group_name: str) -> Interrupted:
    done = result.first_step + len(result.losses)
    return Interrupted(
        f"stopped after step {done}; nothing is lost",
        hint=f"go on with: p2ptrain train --group {group_name} --resume {result.run}",
    )

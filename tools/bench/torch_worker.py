"""One torch process of the benchmark: eager training, or one rank of a pipeline of two.

Started by `torch_contender` with the torch interpreter; it needs torch, numpy and
`onnx_models.gpt`, nothing of p2ptrain. It prints one JSON line when it is ready, then answers
each line `go` by training from the initial parameters and printing the seconds and losses of the
steps; a rank without the loss prints zeros. Between turns it waits for the next line and computes
nothing.

Shape suffixes: B samples of a microbatch, T context, D width, M microbatches, S steps.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import sys
import time
import types
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any, Final, cast

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import (
    PipelineStage,
    Schedule1F1B,
    ScheduleInterleavedZeroBubble,
    ScheduleZBVZeroBubble,
)
from torch.nn import functional
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from onnx_models.gpt import Attention, Block, Gpt, gpt

PIPELINE_RANKS: Final = 2
RENDEZVOUS_TIMEOUT_S: Final = 120.0

Workload = dict[str, Any]  # Any: workload.json, written by tools.bench.workload
Step = Callable[[Tensor, Tensor], float]
"""Inputs and labels (M, B, T) -> the mean loss; gradients are left in the parameters."""


def main() -> None:
    options = _options()
    torch.set_num_threads(options.threads)
    torch.set_num_interop_threads(1)
    workload = cast(Workload, json.loads((options.workload / "workload.json").read_text()))
    model = gpt(**workload["model"])
    if options.attention == "fused":
        use_fused_attention(model)
    if options.pipeline == "none":
        trainer = Trainer(workload, options.workload, model, model)
        step: Step = _eager_step(model)
    else:
        _join_ranks(options)
        parts = held_parts(chain_of(model), options.cut, options.pipeline, options.rank)
        trainer = Trainer(workload, options.workload, model, nn.ModuleList(parts.values()))
        example_MBT = trainer.inputs_SMBT[0]
        if len(options.cut) > 1:
            step = _torch_zero_bubble(options.pipeline, parts, example_MBT)
        else:
            make = _own_1f1b if options.pipeline == "own" else _torch_1f1b
            step = make(options.rank, parts[options.rank], example_MBT)
    del model
    _serve(trainer, step)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--workload", type=Path, required=True)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--attention", choices=["plain", "fused"], default="plain")
    pipelines = ["none", "own", "torch", "interleaved", "v"]
    parser.add_argument("--pipeline", choices=pipelines, default="none")
    parser.add_argument("--rank", type=int, default=0)
    parser.add_argument("--cut", type=int, action="append", default=[])
    parser.add_argument("--rendezvous", type=Path)
    return parser.parse_args()


def _join_ranks(options: argparse.Namespace) -> None:
    store = dist.FileStore(str(options.rendezvous), PIPELINE_RANKS)
    dist.init_process_group(
        "gloo",
        store=store,
        rank=options.rank,
        world_size=PIPELINE_RANKS,
        timeout=timedelta(seconds=RENDEZVOUS_TIMEOUT_S),
    )


def _serve(trainer: Trainer, step: Step) -> None:
    _say({"ready": True, "pid": os.getpid(), "torch": torch.__version__})
    for line in sys.stdin:
        if line.strip() == "go":
            _say(trainer.run(step))


def _say(document: dict[str, Any]) -> None:  # Any: JSON values
    print(json.dumps(document), flush=True)


class Trainer:
    """Parameters, optimizer and data of one process; every turn starts from the same state."""

    def __init__(self, workload: Workload, folder: Path, model: Gpt, part: nn.Module) -> None:
        self._initial = folder / "initial.npz"
        self._workload = workload
        own = {id(parameter) for parameter in part.parameters()}
        self._parameters = {
            name: parameter for name, parameter in model.named_parameters() if id(parameter) in own
        }
        with np.load(folder / "batches.npz") as batches:
            self.inputs_SMBT = torch.from_numpy(batches["inputs"])
            self.labels_SMBT = torch.from_numpy(batches["labels"])
        self._optimizer = self._make_optimizer()

    def run(self, step: Step) -> dict[str, list[float]]:
        """Train all steps of the workload from the start; seconds and mean loss of each."""
        self._reset()
        seconds, losses = [], []
        ended_s = time.perf_counter()
        for index, learning_rate in enumerate(self._workload["learning_rates"]):
            self._optimizer.zero_grad()
            losses.append(step(self.inputs_SMBT[index], self.labels_SMBT[index]))
            self._update(learning_rate)
            began_s, ended_s = ended_s, time.perf_counter()
            seconds.append(ended_s - began_s)
        return {"seconds": seconds, "losses": losses}

    def _make_optimizer(self) -> torch.optim.Optimizer:
        chosen, plain = self._workload["optimizer"], set(self._workload["undecayed"])
        groups: list[dict[str, Any]] = [  # Any: torch's parameter groups
            {"params": [p for n, p in self._parameters.items() if n not in plain]},
            {"params": [p for n, p in self._parameters.items() if n in plain], "weight_decay": 0.0},
        ]
        return torch.optim.AdamW(
            [group for group in groups if group["params"]],
            betas=(chosen["beta1"], chosen["beta2"]),
            eps=chosen["epsilon"],
            weight_decay=chosen["weight_decay"],
        )

    def _reset(self) -> None:
        self._optimizer.state.clear()
        with np.load(self._initial) as initial, torch.no_grad():
            for name, parameter in self._parameters.items():
                parameter.copy_(torch.from_numpy(initial[name]))

    def _update(self, learning_rate: float) -> None:
        gradients = [p.grad for p in self._parameters.values() if p.grad is not None]
        norm = get_total_norm(gradients)
        if dist.is_initialized():
            square = norm**2
            dist.all_reduce(square)
            norm = square.sqrt()
        clip_norm = self._workload["optimizer"]["clip_norm"]
        clip_grads_with_norm_(self._parameters.values(), clip_norm, norm)
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate
        self._optimizer.step()


def loss_of(logits_BTV: Tensor, labels_BT: Tensor) -> Tensor:
    """Mean cross entropy over all positions."""
    return functional.cross_entropy(logits_BTV.flatten(0, 1), labels_BT.flatten())


def _eager_step(model: nn.Module) -> Step:
    def step(inputs_MBT: Tensor, labels_MBT: Tensor) -> float:
        total = 0.0
        for inputs_BT, labels_BT in zip(inputs_MBT, labels_MBT, strict=True):
            loss = loss_of(model(inputs_BT), labels_BT) / len(inputs_MBT)
            loss.backward()
            total += loss.item()
        return total

    return step


def chain_of(model: Gpt) -> list[nn.Module]:
    """The model as a chain that may be cut anywhere: embedding, (attention, mlp)..., head."""
    blocks = cast(Iterator[Block], iter(model.blocks))
    halves = [half for block in blocks for half in (block.attention, block.mlp)]
    return [model.embedding, *halves, model.head]


def held_parts(
    chain: list[nn.Module], cuts: list[int], pipeline: str, rank: int
) -> dict[int, nn.Module]:
    """The parts of the chain that a rank holds, by their position in it."""
    edges = [0, *cuts, len(chain)]
    parts = [nn.Sequential(*chain[a:b]) for a, b in itertools.pairwise(edges)]
    if pipeline == "v":
        held = [rank, len(parts) - 1 - rank]
    else:
        held = list(range(rank, len(parts), PIPELINE_RANKS))
    return {position: parts[position] for position in held}


def _own_1f1b(rank: int, stage: nn.Module, example_MBT: Tensor) -> Step:
    """1F1B written by hand: receives are posted before the step, sends do not wait."""
    samples, context = example_MBT.shape[1:]
    shape = (len(example_MBT), samples, context, _width(stage))
    return _own_first(stage, shape) if rank == 0 else _own_last(stage, shape)


def _width(stage: nn.Module) -> int:
    norms = (module for module in stage.modules() if isinstance(module, nn.LayerNorm))
    return int(next(norms).normalized_shape[0])


def _own_first(stage: nn.Module, shape_MBTD: tuple[int, ...]) -> Step:
    def step(inputs_MBT: Tensor, labels_MBT: Tensor) -> float:
        cotangents_MBTD = torch.empty(shape_MBTD)
        receiving = [dist.irecv(c, src=1, tag=m) for m, c in enumerate(cotangents_MBTD)]
        outputs: dict[int, Tensor] = {}
        sending = []

        def forward(microbatch: int) -> None:
            outputs[microbatch] = stage(inputs_MBT[microbatch])
            sending.append(dist.isend(outputs[microbatch].detach(), dst=1, tag=microbatch))

        forward(0)
        for microbatch in range(len(inputs_MBT)):
            if microbatch + 1 < len(inputs_MBT):
                forward(microbatch + 1)
            _wait(receiving[microbatch])
            outputs.pop(microbatch).backward(cotangents_MBTD[microbatch])
        for request in sending:
            _wait(request)
        return 0.0

    return step


def _own_last(stage: nn.Module, shape_MBTD: tuple[int, ...]) -> Step:
    def step(inputs_MBT: Tensor, labels_MBT: Tensor) -> float:
        activations_MBTD = torch.empty(shape_MBTD)
        receiving = [dist.irecv(a, src=0, tag=m) for m, a in enumerate(activations_MBTD)]
        total, sending = 0.0, []
        for microbatch, labels_BT in enumerate(labels_MBT):
            _wait(receiving[microbatch])
            x_BTD = activations_MBTD[microbatch].requires_grad_()
            loss = loss_of(stage(x_BTD), labels_BT) / len(labels_MBT)
            loss.backward()
            if x_BTD.grad is None:
                raise RuntimeError("no cotangent for the first stage")
            sending.append(dist.isend(x_BTD.grad, dst=0, tag=microbatch))
            total += loss.item()
        for request in sending:
            _wait(request)
        return total

    return step


def _wait(request: dist.Work | None) -> None:
    if request is None:
        raise RuntimeError("this process is not a rank of the pipeline")
    request.wait()


def _torch_1f1b(rank: int, stage: nn.Module, example_MBT: Tensor) -> Step:
    """1F1B as torch.distributed.pipelining has it."""
    pipeline_stage = PipelineStage(stage, rank, PIPELINE_RANKS, torch.device("cpu"))
    schedule = Schedule1F1B(pipeline_stage, n_microbatches=len(example_MBT), loss_fn=loss_of)

    def step(inputs_MBT: Tensor, labels_MBT: Tensor) -> float:
        if rank == 0:
            schedule.step(inputs_MBT.flatten(0, 1))
            return 0.0
        losses: list[Tensor] = []
        schedule.step(target=labels_MBT.flatten(0, 1), losses=losses)
        return float(torch.stack(losses).mean().item())

    return step


def _torch_zero_bubble(pipeline: str, parts: dict[int, nn.Module], example_MBT: Tensor) -> Step:
    """The zero-bubble schedules of torch.distributed.pipelining, two parts on each rank."""
    count = PIPELINE_RANKS * len(parts)
    stages = [
        PipelineStage(part, position, count, torch.device("cpu"))
        for position, part in parts.items()
    ]
    make = ScheduleZBVZeroBubble if pipeline == "v" else ScheduleInterleavedZeroBubble
    schedule = make(stages, n_microbatches=len(example_MBT), loss_fn=loss_of)

    def step(inputs_MBT: Tensor, labels_MBT: Tensor) -> float:
        losses: list[Tensor] = []
        given = (inputs_MBT.flatten(0, 1),) if 0 in parts else ()
        if count - 1 not in parts:
            schedule.step(*given)
            return 0.0
        schedule.step(*given, target=labels_MBT.flatten(0, 1), losses=losses)
        return float(torch.stack(losses).mean().item())

    return step


def use_fused_attention(model: Gpt) -> None:
    """Let every attention use torch's fused kernel; parameters and results stay the same."""
    for module in model.modules():
        if isinstance(module, Attention):
            fused = types.MethodType(_fused_attention, module)
            module.forward = fused  # type: ignore[method-assign]  # to replace it is the point


def _fused_attention(self: Attention, x_BTD: Tensor) -> Tensor:
    n_BTD = self.norm(x_BTD)
    heads = (-1, (self.heads, self.head_dim))
    q_BHTK = self.query(n_BTD).unflatten(*heads).transpose(1, 2)
    k_BHTK = self.key(n_BTD).unflatten(*heads).transpose(1, 2)
    v_BHTK = self.value(n_BTD).unflatten(*heads).transpose(1, 2)
    mixed_BHTK = functional.scaled_dot_product_attention(q_BHTK, k_BHTK, v_BHTK, is_causal=True)
    return x_BTD + self.dropout(self.projection(mixed_BHTK.transpose(1, 2).flatten(2)))


if __name__ == "__main__":
    main()

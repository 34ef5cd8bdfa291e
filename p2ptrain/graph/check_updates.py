"""Compare a bundle's update graphs with torch's optimizers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from p2ptrain.graph.measured import GRADIENT_ERROR_MAX, Measured
from p2ptrain.graph.runner import Arrays, Runner

UPDATE_STEPS: Final = 3
HYPERPARAMETERS: Final = {
    "learning_rate": 1e-2,
    "weight_decay": 0.1,
    "beta1": 0.9,
    "beta2": 0.95,
    "epsilon": 1e-8,
    "momentum": 0.9,
    "clip_scale": 0.5,
}


def update_row(
    runner: Runner, parameters: Arrays, gradients: Sequence[Arrays], rule_name: str
) -> Measured:
    """Three steps of an update graph against torch's optimizer on the same gradients.

    The error is relative to how far torch moved the tensor, at least 10 % of its size.
    """
    ours = {name: value.copy() for name, value in parameters.items()}
    theirs = _torch_updates(parameters, gradients, rule_name)
    rule = runner.manifest.updates[rule_name]
    states = {
        name: {f"state.{s}": np.zeros(v.size, np.float32) for s in rule.state}
        for name, v in parameters.items()
    }
    for step in range(UPDATE_STEPS):
        for name, value in ours.items():
            feeds = {
                "parameter": value.reshape(-1),
                "gradient": gradients[step % len(gradients)][name].reshape(-1).astype(np.float32),
                **states[name],
                **_scalars(rule.scalars, step + 1),
            }
            out = runner.run(rule.graph, feeds, frozen={})
            ours[name] = out["new.parameter"].reshape(value.shape)
            states[name] = {f"state.{s}": out[f"new.state.{s}"] for s in rule.state}
    errors = {
        name: float(np.abs(ours[name] - t).max() / _movement(parameters[name], t))
        for name, t in theirs.items()
    }
    worst = max(errors, key=lambda name: errors[name])
    return Measured(
        name=f"{rule_name}, {UPDATE_STEPS} steps",
        error=errors[worst],
        limit=GRADIENT_ERROR_MAX,
        worst=worst,
    )


def _movement(before: NDArray[Any], after: NDArray[Any]) -> float:  # Any: float32
    return float(max(np.abs(after - before).max(), 0.1 * np.abs(after).max()))


def _scalars(names: tuple[str, ...], step: int) -> Arrays:
    beta1, beta2 = HYPERPARAMETERS["beta1"], HYPERPARAMETERS["beta2"]
    values = HYPERPARAMETERS | {
        "one_minus_beta1": 1.0 - beta1,
        "one_minus_beta2": 1.0 - beta2,
        "correction1": 1.0 - beta1**step,
        "correction2_sqrt": (1.0 - beta2**step) ** 0.5,
    }
    return {name: np.array(values[name], np.float32) for name in names}


def _torch_updates(parameters: Arrays, gradients: Sequence[Arrays], rule_name: str) -> Arrays:
    import torch

    h = HYPERPARAMETERS
    moving = {n: torch.nn.Parameter(torch.from_numpy(v.copy())) for n, v in parameters.items()}
    optimizer: torch.optim.Optimizer
    if rule_name == "adamw":
        optimizer = torch.optim.AdamW(
            moving.values(),
            lr=h["learning_rate"],
            betas=(h["beta1"], h["beta2"]),
            eps=h["epsilon"],
            weight_decay=h["weight_decay"],
        )
    else:
        optimizer = torch.optim.SGD(
            moving.values(),
            lr=h["learning_rate"],
            momentum=h["momentum"],
            weight_decay=h["weight_decay"],
        )
    for step in range(UPDATE_STEPS):
        for name, parameter in moving.items():
            gradient = gradients[step % len(gradients)][name].astype(np.float32)
            parameter.grad = torch.from_numpy(gradient * np.float32(h["clip_scale"]))
        optimizer.step()
    return {name: parameter.detach().numpy() for name, parameter in moving.items()}

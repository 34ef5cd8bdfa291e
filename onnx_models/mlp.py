"""A multilayer perceptron in plain torch operators, the source of the mlp bundle.

Shape suffixes: B batch, D features of one sample.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from torch import Tensor, nn


class Mlp(nn.Module):
    """features (B, D) or images (B, ...) float32 -> logits (B, classes), or (B, outputs)."""

    def __init__(self, *, input_shape: Sequence[int], widths: Sequence[int], outputs: int) -> None:
        super().__init__()
        self.input_shape = tuple(input_shape)
        sizes = [1, *widths]
        for size in self.input_shape:
            sizes[0] *= size
        self.hidden = nn.ModuleList(
            nn.Linear(inner, outer) for inner, outer in itertools.pairwise(sizes)
        )
        self.activation = nn.ReLU()
        self.head = nn.Linear(sizes[-1], outputs)

    def forward(self, features: Tensor) -> Tensor:
        h_BD = features.flatten(1)
        for layer in self.hidden:
            h_BD = self.activation(layer(h_BD))
        return self.head(h_BD)

    def initialisers(self) -> dict[str, tuple[str, float]]:
        """How each parameter is drawn: uniform within sqrt(6 / inputs), biases zero.

        Source: He et al. 2015, the bound of a layer before a rectifier.
        """
        return {
            name: ("zeros", 0.0) if p.ndim == 1 else ("uniform", (6.0 / p.shape[1]) ** 0.5)
            for name, p in self.named_parameters()
        }


def mlp(
    *,
    input_shape: Sequence[int] = (1, 28, 28),
    widths: Sequence[int] = (512, 256, 128),
    outputs: int = 10,
) -> Mlp:
    """The classifier of the mlp bundle; the defaults fit grey images of 28 by 28 pixels."""
    return Mlp(input_shape=input_shape, widths=widths, outputs=outputs)

"""A small vision transformer in plain torch operators, the source of the vit-tiny bundle.

Shape suffixes: B batch, T tokens (class token and patches), D width, H heads, K head_dim,
P side of a patch grid, C classes.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


class Patches(nn.Module):
    """Square patches as tokens, a class token before them, learned positions."""

    def __init__(self, *, channels: int, side: int, patch: int, width: int, dropout: float) -> None:
        super().__init__()
        self.projection = nn.Conv2d(channels, width, patch, stride=patch)
        self.class_token = nn.Parameter(torch.zeros(1, 1, width))
        self.position = nn.Parameter(torch.zeros((side // patch) ** 2 + 1, width))
        self.dropout = nn.Dropout(dropout)

    def forward(self, images: Tensor) -> Tensor:
        patches_BTD = self.projection(images).flatten(2).transpose(1, 2)
        class_B1D = self.class_token.expand(images.shape[0], -1, -1)
        return self.dropout(torch.cat([class_B1D, patches_BTD], dim=1) + self.position)


class Attention(nn.Module):
    """Self-attention with its LayerNorm and its residual connection."""

    def __init__(self, *, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.head_dim = heads, width // heads
        self.norm = nn.LayerNorm(width)
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.projection = nn.Linear(width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x_BTD: Tensor) -> Tensor:
        n_BTD = self.norm(x_BTD)
        q_BHTK = self._split(self.query(n_BTD) * (1.0 / math.sqrt(self.head_dim)))
        k_BHTK, v_BHTK = self._split(self.key(n_BTD)), self._split(self.value(n_BTD))
        weights_BHTT = torch.softmax(q_BHTK @ k_BHTK.transpose(-1, -2), dim=-1)
        mixed_BTD = (weights_BHTT @ v_BHTK).transpose(1, 2).flatten(2)
        return x_BTD + self.dropout(self.projection(mixed_BTD))

    def _split(self, x_BTD: Tensor) -> Tensor:
        return x_BTD.unflatten(-1, (self.heads, self.head_dim)).transpose(1, 2)


class Mlp(nn.Module):
    """Two linears with GELU between them, LayerNorm before and a residual connection."""

    def __init__(self, *, width: int, columns: int, dropout: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, columns)
        self.activation = nn.GELU()
        self.down = nn.Linear(columns, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x_BTD: Tensor) -> Tensor:
        return x_BTD + self.dropout(self.down(self.activation(self.up(self.norm(x_BTD)))))


class Block(nn.Module):
    """Attention, then the MLP."""

    def __init__(self, *, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.attention = Attention(width=width, heads=heads, dropout=dropout)
        self.mlp = Mlp(width=width, columns=4 * width, dropout=dropout)

    def forward(self, x_BTD: Tensor) -> Tensor:
        return self.mlp(self.attention(x_BTD))


class Head(nn.Module):
    """Final LayerNorm of the class token and the classifier."""

    def __init__(self, *, width: int, classes: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.classifier = nn.Linear(width, classes)

    def forward(self, x_BTD: Tensor) -> Tensor:
        return self.classifier(self.norm(x_BTD[:, 0]))


class Vit(nn.Module):
    """images (B, channels, side, side) float32 -> logits (B, C)."""

    def __init__(
        self,
        *,
        layers: int,
        width: int,
        heads: int,
        channels: int,
        side: int,
        patch: int,
        classes: int,
        dropout: float,
    ) -> None:
        super().__init__()
        self.input_shape = (channels, side, side)
        self.patches = Patches(
            channels=channels, side=side, patch=patch, width=width, dropout=dropout
        )
        self.blocks = nn.ModuleList(
            Block(width=width, heads=heads, dropout=dropout) for _ in range(layers)
        )
        self.head = Head(width=width, classes=classes)

    def forward(self, images: Tensor) -> Tensor:
        x_BTD = self.patches(images)
        for block in self.blocks:
            x_BTD = block(x_BTD)
        return self.head(x_BTD)

    def initialisers(self) -> dict[str, tuple[str, float]]:
        """How each parameter is drawn: std 0.02, norms one, biases zero.

        Source: Dosovitskiy et al. 2021, appendix B.
        """
        chosen: dict[str, tuple[str, float]] = {}
        for name, parameter in self.named_parameters():
            if name.endswith("norm.weight"):
                chosen[name] = ("ones", 0.0)
            else:
                chosen[name] = ("zeros", 0.0) if parameter.ndim == 1 else ("normal", 0.02)
        return chosen


def vit(
    *,
    layers: int = 6,
    width: int = 128,
    heads: int = 4,
    channels: int = 1,
    side: int = 28,
    patch: int = 4,
    classes: int = 10,
    dropout: float = 0.1,
) -> Vit:
    """The classifier of the vit-tiny bundle; the defaults fit grey images of 28 by 28 pixels."""
    return Vit(
        layers=layers,
        width=width,
        heads=heads,
        channels=channels,
        side=side,
        patch=patch,
        classes=classes,
        dropout=dropout,
    )

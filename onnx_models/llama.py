"""A Llama-style decoder in plain torch operators, the source of the llama-nano bundle.

Grouped queries, rotary positions, RMSNorm and a gated MLP (SwiGLU), without biases or dropout.

Shape suffixes: B batch, T sequence, D width, H heads, G groups of keys, K head_dim.

Source: Touvron et al. 2023, "Llama 2", section 2.2; Su et al. 2021 for rotary positions.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional


class RmsNorm(nn.Module):
    """Scale to a mean square of one, then a learned factor per column."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x_BTD: Tensor) -> Tensor:
        scale_BT1 = torch.rsqrt(x_BTD.pow(2).mean(-1, keepdim=True) + 1e-5)
        return self.weight * (x_BTD * scale_BT1)


class Attention(nn.Module):
    """Causal attention of several queries per key, with its norm and its residual connection."""

    frequencies: Tensor

    def __init__(self, *, width: int, heads: int, groups: int) -> None:
        super().__init__()
        self.heads, self.groups, self.head_dim = heads, groups, width // heads
        narrow = groups * self.head_dim
        self.norm = RmsNorm(width)
        self.query = nn.Linear(width, width, bias=False)
        self.key = nn.Linear(width, narrow, bias=False)
        self.value = nn.Linear(width, narrow, bias=False)
        self.projection = nn.Linear(width, width, bias=False)
        powers = torch.arange(0, self.head_dim, 2) / self.head_dim
        self.register_buffer("frequencies", 1.0 / (10000.0**powers), persistent=False)

    def forward(self, x_BTD: Tensor) -> Tensor:
        n_BTD = self.norm(x_BTD)
        position_T = torch.arange(x_BTD.shape[1])
        future_TT = (position_T[None, :] > position_T[:, None]).to(x_BTD.dtype) * -1e9
        half = position_T[:, None] * self.frequencies[None]
        angle_TK = torch.cat((half, half), -1)
        q_BHTK = turned(self._split(self.query(n_BTD), self.heads), angle_TK)
        k_BGTK = turned(self._split(self.key(n_BTD), self.groups), angle_TK)
        v_BGTK = self._split(self.value(n_BTD), self.groups)
        each = self.heads // self.groups
        k_BHTK, v_BHTK = k_BGTK.repeat_interleave(each, 1), v_BGTK.repeat_interleave(each, 1)
        scores_BHTT = (q_BHTK * (1.0 / math.sqrt(self.head_dim))) @ k_BHTK.transpose(-1, -2)
        weights_BHTT = torch.softmax(scores_BHTT + future_TT, dim=-1)
        mixed_BTD = (weights_BHTT @ v_BHTK).transpose(1, 2).flatten(2)
        return x_BTD + self.projection(mixed_BTD)

    def _split(self, x_BTD: Tensor, heads: int) -> Tensor:
        return x_BTD.unflatten(-1, (heads, self.head_dim)).transpose(1, 2)


def turned(x_BHTK: Tensor, angle_TK: Tensor) -> Tensor:
    """Each pair of columns turned by its position's angle."""
    left, right = x_BHTK.chunk(2, -1)
    return x_BHTK * angle_TK.cos() + torch.cat((-right, left), -1) * angle_TK.sin()


class Mlp(nn.Module):
    """A gated linear by SiLU and one back, RMSNorm before and a residual connection."""

    def __init__(self, *, width: int, columns: int) -> None:
        super().__init__()
        self.norm = RmsNorm(width)
        self.gate = nn.Linear(width, columns, bias=False)
        self.up = nn.Linear(width, columns, bias=False)
        self.down = nn.Linear(columns, width, bias=False)

    def forward(self, x_BTD: Tensor) -> Tensor:
        n_BTD = self.norm(x_BTD)
        return x_BTD + self.down(functional.silu(self.gate(n_BTD)) * self.up(n_BTD))


class Block(nn.Module):
    """Attention, then the MLP."""

    def __init__(self, *, width: int, heads: int, groups: int, columns: int) -> None:
        super().__init__()
        self.attention = Attention(width=width, heads=heads, groups=groups)
        self.mlp = Mlp(width=width, columns=columns)

    def forward(self, x_BTD: Tensor) -> Tensor:
        return self.mlp(self.attention(x_BTD))


class Head(nn.Module):
    """Final RMSNorm and the projection to the vocabulary, not tied to the embedding."""

    def __init__(self, *, width: int, vocabulary: int) -> None:
        super().__init__()
        self.norm = RmsNorm(width)
        self.projection = nn.Linear(width, vocabulary, bias=False)

    def forward(self, x_BTD: Tensor) -> Tensor:
        return self.projection(self.norm(x_BTD))


class Llama(nn.Module):
    """ids (B, T) int64 -> logits (B, T, vocabulary)."""

    def __init__(
        self,
        *,
        layers: int,
        width: int,
        heads: int,
        groups: int,
        columns: int,
        vocabulary: int,
        context: int,
    ) -> None:
        super().__init__()
        self.vocabulary, self.context = vocabulary, context
        self.embedding = nn.Embedding(vocabulary, width)
        self.blocks = nn.ModuleList(
            Block(width=width, heads=heads, groups=groups, columns=columns) for _ in range(layers)
        )
        self.head = Head(width=width, vocabulary=vocabulary)

    def forward(self, ids_BT: Tensor) -> Tensor:
        x_BTD = self.embedding(ids_BT)
        for block in self.blocks:
            x_BTD = block(x_BTD)
        return self.head(x_BTD)

    def initialisers(self) -> dict[str, tuple[str, float]]:
        """How each parameter is drawn: std 0.02, residual projections scaled down, norms one."""
        scaled = 0.02 / math.sqrt(2 * len(self.blocks))
        chosen: dict[str, tuple[str, float]] = {}
        for name, parameter in self.named_parameters():
            residual = name.endswith(("attention.projection.weight", "mlp.down.weight"))
            drawn = ("normal", scaled if residual else 0.02)
            chosen[name] = ("ones", 0.0) if parameter.ndim == 1 else drawn
        return chosen


def llama(
    *,
    layers: int = 4,
    width: int = 192,
    heads: int = 6,
    groups: int = 3,
    columns: int = 512,
    vocabulary: int = 256,
    context: int = 128,
) -> Llama:
    """The decoder of the llama-nano bundle; three groups of two queries split as 2 + 1."""
    return Llama(
        layers=layers,
        width=width,
        heads=heads,
        groups=groups,
        columns=columns,
        vocabulary=vocabulary,
        context=context,
    )

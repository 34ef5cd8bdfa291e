"""A pre-LayerNorm GPT in plain torch operators, the source of the gpt-nano bundle.

Shape suffixes: B batch, T sequence, D width, H heads, K head_dim, V vocabulary.
Query, key and value are three linears, so that each shards by heads on its own.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


class Embedding(nn.Module):
    """Token plus learned position."""

    def __init__(self, *, vocabulary: int, context: int, width: int, dropout: float) -> None:
        super().__init__()
        self.token = nn.Embedding(vocabulary, width)
        self.position = nn.Parameter(torch.zeros(context, width))
        self.dropout = nn.Dropout(dropout)

    def forward(self, ids_BT: Tensor) -> Tensor:
        return self.dropout(self.token(ids_BT) + self.position[: ids_BT.shape[1]])


class Attention(nn.Module):
    """Causal self-attention with its LayerNorm and its residual connection."""

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
        position_T = torch.arange(x_BTD.shape[1])
        future_TT = (position_T[None, :] > position_T[:, None]).to(x_BTD.dtype) * -1e9
        weights_BHTT = torch.softmax(q_BHTK @ k_BHTK.transpose(-1, -2) + future_TT, dim=-1)
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
    """Final LayerNorm and the projection to the vocabulary, not tied to the embedding."""

    def __init__(self, *, width: int, vocabulary: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.projection = nn.Linear(width, vocabulary, bias=False)

    def forward(self, x_BTD: Tensor) -> Tensor:
        return self.projection(self.norm(x_BTD))


class Gpt(nn.Module):
    """ids (B, T) int64 -> logits (B, T, V)."""

    def __init__(
        self,
        *,
        layers: int,
        width: int,
        heads: int,
        vocabulary: int,
        context: int,
        dropout: float,
    ) -> None:
        super().__init__()
        self.vocabulary, self.context = vocabulary, context
        self.embedding = Embedding(
            vocabulary=vocabulary, context=context, width=width, dropout=dropout
        )
        self.blocks = nn.ModuleList(
            Block(width=width, heads=heads, dropout=dropout) for _ in range(layers)
        )
        self.head = Head(width=width, vocabulary=vocabulary)

    def forward(self, ids_BT: Tensor) -> Tensor:
        x_BTD = self.embedding(ids_BT)
        for block in self.blocks:
            x_BTD = block(x_BTD)
        return self.head(x_BTD)

    def initialisers(self) -> dict[str, tuple[str, float]]:
        """How each parameter is drawn, as GPT-2: std 0.02, residual projections scaled down."""
        scaled = 0.02 / math.sqrt(2 * len(self.blocks))
        chosen: dict[str, tuple[str, float]] = {}
        for name, parameter in self.named_parameters():
            if name.endswith("norm.weight"):
                chosen[name] = ("ones", 0.0)
            elif parameter.ndim == 1:
                chosen[name] = ("zeros", 0.0)
            else:
                residual = name.endswith(("attention.projection.weight", "mlp.down.weight"))
                chosen[name] = ("normal", scaled if residual else 0.02)
        return chosen


def gpt(
    *,
    layers: int = 4,
    width: int = 192,
    heads: int = 6,
    vocabulary: int = 256,
    context: int = 128,
    dropout: float = 0.1,
) -> Gpt:
    """The decoder of the bundles in this folder; the defaults are gpt-nano (1.9 M parameters)."""
    return Gpt(
        layers=layers,
        width=width,
        heads=heads,
        vocabulary=vocabulary,
        context=context,
        dropout=dropout,
    )

"""A post-LayerNorm encoder with a classifier in plain torch operators: the bert-mini bundle.

Shape suffixes: B batch, T sequence, D width, H heads, K head_dim, V vocabulary, C classes.
"""

from __future__ import annotations

import math
from typing import Final

import torch
from torch import Tensor, nn

BYTES: Final = 256
SPECIAL_TOKENS: Final = {"pad": BYTES, "cls": BYTES + 1, "sep": BYTES + 2}
"""Ids behind those of the bytes, where the vocabulary has room for them."""


class Embedding(nn.Module):
    """Token, learned position and token type, then LayerNorm."""

    def __init__(self, *, vocabulary: int, context: int, width: int, dropout: float) -> None:
        super().__init__()
        self.token = nn.Embedding(vocabulary, width)
        self.position = nn.Parameter(torch.zeros(context, width))
        self.token_type = nn.Embedding(2, width)
        self.norm = nn.LayerNorm(width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, ids_BT: Tensor, types_BT: Tensor) -> Tensor:
        x_BTD = self.token(ids_BT) + self.token_type(types_BT)
        return self.dropout(self.norm(x_BTD + self.position[: ids_BT.shape[1]]))


class Attention(nn.Module):
    """Self-attention over the tokens that the mask leaves, residual, then LayerNorm."""

    def __init__(self, *, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.head_dim = heads, width // heads
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.projection = nn.Linear(width, width)
        self.dropout = nn.Dropout(dropout)
        self.norm = nn.LayerNorm(width)

    def forward(self, x_BTD: Tensor, hidden_B11T: Tensor) -> Tensor:
        q_BHTK = self._split(self.query(x_BTD) * (1.0 / math.sqrt(self.head_dim)))
        k_BHTK, v_BHTK = self._split(self.key(x_BTD)), self._split(self.value(x_BTD))
        weights_BHTT = torch.softmax(q_BHTK @ k_BHTK.transpose(-1, -2) + hidden_B11T, dim=-1)
        mixed_BTD = (weights_BHTT @ v_BHTK).transpose(1, 2).flatten(2)
        return self.norm(x_BTD + self.dropout(self.projection(mixed_BTD)))

    def _split(self, x_BTD: Tensor) -> Tensor:
        return x_BTD.unflatten(-1, (self.heads, self.head_dim)).transpose(1, 2)


class Mlp(nn.Module):
    """Two linears with GELU between them, residual, then LayerNorm."""

    def __init__(self, *, width: int, columns: int, dropout: float) -> None:
        super().__init__()
        self.up = nn.Linear(width, columns)
        self.activation = nn.GELU()
        self.down = nn.Linear(columns, width)
        self.dropout = nn.Dropout(dropout)
        self.norm = nn.LayerNorm(width)

    def forward(self, x_BTD: Tensor) -> Tensor:
        return self.norm(x_BTD + self.dropout(self.down(self.activation(self.up(x_BTD)))))


class Block(nn.Module):
    """Attention, then the MLP."""

    def __init__(self, *, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.attention = Attention(width=width, heads=heads, dropout=dropout)
        self.mlp = Mlp(width=width, columns=4 * width, dropout=dropout)

    def forward(self, x_BTD: Tensor, hidden_B11T: Tensor) -> Tensor:
        return self.mlp(self.attention(x_BTD, hidden_B11T))


class Head(nn.Module):
    """Pooler over the first token, then the classifier."""

    def __init__(self, *, width: int, classes: int, dropout: float) -> None:
        super().__init__()
        self.pooler = nn.Linear(width, width)
        self.activation = nn.Tanh()
        self.dropout = nn.Dropout(dropout)
        self.classifier = nn.Linear(width, classes)

    def forward(self, x_BTD: Tensor) -> Tensor:
        return self.classifier(self.dropout(self.activation(self.pooler(x_BTD[:, 0]))))


class Bert(nn.Module):
    """ids, attention_mask, token_types (B, T) int64 -> logits (B, C)."""

    def __init__(
        self,
        *,
        layers: int,
        width: int,
        heads: int,
        vocabulary: int,
        context: int,
        classes: int,
        dropout: float,
    ) -> None:
        super().__init__()
        self.vocabulary, self.context = vocabulary, context
        has_room = vocabulary >= BYTES + len(SPECIAL_TOKENS)
        self.special_tokens = dict(SPECIAL_TOKENS) if has_room else {}
        self.embedding = Embedding(
            vocabulary=vocabulary, context=context, width=width, dropout=dropout
        )
        self.blocks = nn.ModuleList(
            Block(width=width, heads=heads, dropout=dropout) for _ in range(layers)
        )
        self.head = Head(width=width, classes=classes, dropout=dropout)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor) -> Tensor:
        hidden_B11T = (1.0 - attention_mask[:, None, None, :].to(torch.float32)) * -1e9
        x_BTD = self.embedding(input_ids, token_type_ids)
        for block in self.blocks:
            x_BTD = block(x_BTD, hidden_B11T)
        return self.head(x_BTD)

    def initialisers(self) -> dict[str, tuple[str, float]]:
        """How each parameter is drawn: std 0.02, norms one, biases zero.

        Source: Devlin et al. 2019, the released configuration.
        """
        chosen: dict[str, tuple[str, float]] = {}
        for name, parameter in self.named_parameters():
            if name.endswith("norm.weight"):
                chosen[name] = ("ones", 0.0)
            else:
                chosen[name] = ("zeros", 0.0) if parameter.ndim == 1 else ("normal", 0.02)
        return chosen


def bert(
    *,
    layers: int = 4,
    width: int = 256,
    heads: int = 4,
    vocabulary: int = BYTES + len(SPECIAL_TOKENS),
    context: int = 128,
    classes: int = 20,
    dropout: float = 0.1,
) -> Bert:
    """The classifier of the bert-mini bundle; the defaults are four layers of width 256."""
    return Bert(
        layers=layers,
        width=width,
        heads=heads,
        vocabulary=vocabulary,
        context=context,
        classes=classes,
        dropout=dropout,
    )

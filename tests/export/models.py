"""Small torch modules whose graphs are cut in different ways.

Shape suffixes: B batch, T sequence, D width, H heads, K head_dim.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional


class Rms(nn.Module):
    """Root-mean-square norm in primitive operators."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x_BTD: Tensor) -> Tensor:
        scale = torch.rsqrt(x_BTD.pow(2).mean(-1, keepdim=True) + 1e-6)
        return self.weight * (x_BTD * scale)


class GroupedBlock(nn.Module):
    """Grouped-query attention with rotary positions, then a gated MLP."""

    def __init__(self, *, width: int, heads: int, groups: int) -> None:
        super().__init__()
        self.heads, self.groups, self.head_dim = heads, groups, width // heads
        self.norm1, self.norm2 = Rms(width), Rms(width)
        narrow = groups * self.head_dim
        self.query = nn.Linear(width, width, bias=False)
        self.key = nn.Linear(width, narrow, bias=False)
        self.value = nn.Linear(width, narrow, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.gate = nn.Linear(width, 3 * width, bias=False)
        self.up = nn.Linear(width, 3 * width, bias=False)
        self.down = nn.Linear(3 * width, width, bias=False)

    def forward(self, x_BTD: Tensor, cos_TK: Tensor, sin_TK: Tensor, future_TT: Tensor) -> Tensor:
        n_BTD = self.norm1(x_BTD)
        q = _turned(self._split(self.query(n_BTD), self.heads), cos_TK, sin_TK)
        k = _turned(self._split(self.key(n_BTD), self.groups), cos_TK, sin_TK)
        v = self._split(self.value(n_BTD), self.groups)
        k = k.repeat_interleave(self.heads // self.groups, 1)
        v = v.repeat_interleave(self.heads // self.groups, 1)
        scores = q @ k.transpose(-1, -2) / math.sqrt(self.head_dim) + future_TT
        x_BTD = x_BTD + self.out((torch.softmax(scores, -1) @ v).transpose(1, 2).flatten(2))
        n_BTD = self.norm2(x_BTD)
        return x_BTD + self.down(functional.silu(self.gate(n_BTD)) * self.up(n_BTD))

    def _split(self, x_BTD: Tensor, heads: int) -> Tensor:
        return x_BTD.unflatten(-1, (heads, self.head_dim)).transpose(1, 2)


def _turned(x: Tensor, cos_TK: Tensor, sin_TK: Tensor) -> Tensor:
    left, right = x.chunk(2, -1)
    return x * cos_TK + torch.cat((-right, left), -1) * sin_TK


class Rotary(nn.Module):
    """ids (B, T) -> logits, embedding and head tied, rotary tables from a buffer."""

    inverse: Tensor

    def __init__(self, *, layers: int, width: int, heads: int, groups: int) -> None:
        super().__init__()
        self.vocabulary, self.context = 40, 12
        self.embedding = nn.Embedding(self.vocabulary, width)
        self.blocks = nn.ModuleList(
            GroupedBlock(width=width, heads=heads, groups=groups) for _ in range(layers)
        )
        self.norm = Rms(width)
        self.head = nn.Linear(width, self.vocabulary, bias=False)
        self.head.weight = self.embedding.weight
        head_dim = width // heads
        powers = torch.arange(0, head_dim, 2) / head_dim
        self.register_buffer("inverse", 1.0 / (10000.0**powers))

    def forward(self, ids_BT: Tensor) -> Tensor:
        place_T = torch.arange(ids_BT.shape[1])
        angle = place_T[:, None] * self.inverse[None]
        angle_TK = torch.cat((angle, angle), -1)
        future_TT = (place_T[None, :] > place_T[:, None]).to(torch.float32) * -1e9
        x_BTD = self.embedding(ids_BT)
        for block in self.blocks:
            x_BTD = block(x_BTD, angle_TK.cos(), angle_TK.sin(), future_TT)
        return self.head(self.norm(x_BTD))


class Residual(nn.Module):
    """Two convolutions with BatchNorm, a shortcut, ReLU behind the sum."""

    def __init__(self, inner: int, outer: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inner, outer, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(outer)
        self.conv2 = nn.Conv2d(outer, outer, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(outer)
        self.shortcut = nn.Identity() if stride == 1 else nn.Conv2d(inner, outer, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        h = functional.relu(self.norm1(self.conv1(x)))
        return functional.relu(self.norm2(self.conv2(h)) + self.shortcut(x))


class ResNet(nn.Module):
    """Two stages of three residual blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.input_shape = (3, 8, 8)
        self.stem = nn.Sequential(
            nn.Conv2d(3, 8, 3, 1, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU()
        )
        first = [Residual(8, 8, 1) for _ in range(3)]
        second = [Residual(8 if i == 0 else 16, 16, 2 if i == 0 else 1) for i in range(3)]
        self.blocks = nn.Sequential(*first, *second)
        self.head = nn.Linear(16, 5)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(images)).mean((2, 3)))


class Recurrent(nn.Module):
    """Embedding, a stack of LSTM or GRU layers, head."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.vocabulary, self.context = 30, 6
        self.embedding = nn.Embedding(self.vocabulary, 12)
        layers: Any = getattr(nn, kind)  # Any: torch is untyped here
        self.layers = layers(12, 12, 2, batch_first=True)
        self.head = nn.Linear(12, self.vocabulary)

    def forward(self, ids_BT: Tensor) -> Tensor:
        return self.head(self.layers(self.embedding(ids_BT))[0])


class Reader(nn.Module):
    """A decoder block that attends to a memory which every block reads."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(3))
        self.own = nn.ModuleList(nn.Linear(width, width) for _ in range(4))
        self.other = nn.ModuleList(nn.Linear(width, width) for _ in range(4))
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)

    def forward(self, x_BTD: Tensor, memory_BTD: Tensor) -> Tensor:
        n_BTD = self.norms[0](x_BTD)
        x_BTD = x_BTD + _attended(n_BTD, n_BTD, self.own)
        x_BTD = x_BTD + _attended(self.norms[1](x_BTD), memory_BTD, self.other)
        return x_BTD + self.down(functional.gelu(self.up(self.norms[2](x_BTD))))


def _attended(x_BTD: Tensor, memory_BTD: Tensor, linears: nn.ModuleList) -> Tensor:
    query, key, value, out = linears
    scores = query(x_BTD) @ key(memory_BTD).transpose(-1, -2) / 4.0
    return out(torch.softmax(scores, -1) @ value(memory_BTD))


class EncoderDecoder(nn.Module):
    """A memory that crosses every cut of the decoder."""

    def __init__(self) -> None:
        super().__init__()
        self.vocabulary, self.context = 30, 8
        self.embedding = nn.Embedding(self.vocabulary, 16)
        self.encoder = nn.Linear(16, 16)
        self.start = nn.Linear(16, 16)
        self.readers = nn.ModuleList(Reader(16) for _ in range(3))
        self.head = nn.Linear(16, self.vocabulary)

    def forward(self, ids_BT: Tensor) -> Tensor:
        x_BTD = self.embedding(ids_BT)
        memory_BTD = torch.tanh(self.encoder(x_BTD))
        x_BTD = self.start(memory_BTD)
        for reader in self.readers:
            x_BTD = reader(x_BTD, memory_BTD)
        return self.head(x_BTD)

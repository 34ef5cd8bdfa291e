"""MobileNetV2 for small images in plain torch operators, the source of the mobilenet-v2 bundle.

Source: Sandler et al. 2018, table 2, with strides for images of 28 to 32 pixels: the stem and the
first wide stage keep the resolution.
"""

from __future__ import annotations

import math
from typing import Final

from torch import Tensor, nn

STAGES: Final = (
    (1, 16, 1, 1),
    (6, 24, 2, 1),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)
"""Expansion, channels, blocks, stride of the first block."""


class ConvNorm(nn.Sequential):
    """Convolution, BatchNorm and, where asked for, ReLU6."""

    def __init__(
        self, inner: int, outer: int, *, kernel: int, stride: int, groups: int, active: bool
    ) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(
            inner, outer, kernel, stride=stride, padding=kernel // 2, groups=groups, bias=False
        )
        self.norm = nn.BatchNorm2d(outer)
        if active:
            self.activation = nn.ReLU6()


class Bottleneck(nn.Module):
    """Expand, filter each channel, project; residual where the shape stays."""

    def __init__(self, inner: int, outer: int, *, expansion: int, stride: int) -> None:
        super().__init__()
        wide = inner * expansion
        self.residual = stride == 1 and inner == outer
        self.expand = (
            ConvNorm(inner, wide, kernel=1, stride=1, groups=1, active=True)
            if expansion > 1
            else nn.Identity()
        )
        self.filter = ConvNorm(wide, wide, kernel=3, stride=stride, groups=wide, active=True)
        self.project = ConvNorm(wide, outer, kernel=1, stride=1, groups=1, active=False)

    def forward(self, x: Tensor) -> Tensor:
        projected = self.project(self.filter(self.expand(x)))
        return x + projected if self.residual else projected


class Head(nn.Module):
    """Wide convolution, mean over the pixels, dropout, classifier."""

    def __init__(self, *, inner: int, wide: int, classes: int, dropout: float) -> None:
        super().__init__()
        self.expand = ConvNorm(inner, wide, kernel=1, stride=1, groups=1, active=True)
        self.dropout = nn.Dropout(dropout)
        self.classifier = nn.Linear(wide, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.dropout(self.expand(x).mean((2, 3))))


class MobileNet(nn.Module):
    """images (B, channels, side, side) float32 -> logits (B, classes)."""

    def __init__(
        self, *, channels: int, side: int, classes: int, width: float, dropout: float
    ) -> None:
        super().__init__()
        self.input_shape = (channels, side, side)
        inner = _scaled(32, width)
        self.stem = ConvNorm(channels, inner, kernel=3, stride=1, groups=1, active=True)
        blocks = []
        for expansion, outer, count, stride in STAGES:
            for index in range(count):
                blocks.append(
                    Bottleneck(
                        inner,
                        _scaled(outer, width),
                        expansion=expansion,
                        stride=stride if index == 0 else 1,
                    )
                )
                inner = _scaled(outer, width)
        self.blocks = nn.ModuleList(blocks)
        wide = _scaled(1280, max(1.0, width))
        self.head = Head(inner=inner, wide=wide, classes=classes, dropout=dropout)

    def forward(self, images: Tensor) -> Tensor:
        x = self.stem(images)
        for block in self.blocks:
            x = block(x)
        return self.head(x)

    def initialisers(self) -> dict[str, tuple[str, float]]:
        """How each parameter is drawn: convolutions by He et al. 2015 over their outputs."""
        chosen: dict[str, tuple[str, float]] = {}
        for name, parameter in self.named_parameters():
            if parameter.ndim == 4:
                fan_out = parameter.shape[0] * parameter[0, 0].numel()
                if ".filter." in name:
                    fan_out //= parameter.shape[0]
                chosen[name] = ("normal", math.sqrt(2.0 / fan_out))
            elif parameter.ndim == 2:
                chosen[name] = ("normal", 0.01)
            else:
                chosen[name] = ("ones" if name.endswith("norm.weight") else "zeros", 0.0)
        return chosen


def _scaled(channels: int, width: float) -> int:
    """Channels times the width multiplier, a multiple of 8 and at least nine tenths of it."""
    scaled = max(8, int(channels * width + 4) // 8 * 8)
    return scaled if scaled >= 0.9 * channels * width else scaled + 8


def mobilenet(
    *,
    channels: int = 1,
    side: int = 28,
    classes: int = 10,
    width: float = 1.0,
    dropout: float = 0.2,
) -> MobileNet:
    """The classifier of the mobilenet-v2 bundle; the defaults fit grey images of 28 pixels."""
    return MobileNet(channels=channels, side=side, classes=classes, width=width, dropout=dropout)

"""Small torch modules of the families that no shipped bundle or configuration here is of."""

from __future__ import annotations

from torch import Tensor, nn


class TextClassifier(nn.Module):
    """Token ids (B, T) -> logits (B, classes) of a recurrent network's last state."""

    def __init__(self, kind: type[nn.LSTM] | type[nn.GRU], *, layers: int, both_ways: bool) -> None:
        super().__init__()
        self.vocabulary, self.context = 30, 6
        self.token = nn.Embedding(self.vocabulary, 12)
        self.network = kind(
            12, 10, num_layers=layers, bidirectional=both_ways, dropout=0.0, batch_first=True
        )
        self.classifier = nn.Linear(20 if both_ways else 10, 4)

    def forward(self, ids: Tensor) -> Tensor:
        states, _ = self.network(self.token(ids))
        return self.classifier(states[:, -1])


class RegressionMlp(nn.Module):
    """Features (B, 5) -> targets (B, 3)."""

    input_shape = (5,)

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(5, 24), nn.SiLU(), nn.Linear(24, 24), nn.Tanh(), nn.Linear(24, 3)
        )

    def forward(self, features: Tensor) -> Tensor:
        return self.layers(features)

"""The position-wise feed-forward layer and the activations that WeNet names."""

from __future__ import annotations

from torch import Tensor, nn


def activation(kind: str) -> nn.Module:
    """The module that WeNet's `activation_type` stands for."""
    classes: dict[str, type[nn.Module]] = {
        "hardtanh": nn.Hardtanh,
        "tanh": nn.Tanh,
        "relu": nn.ReLU,
        "selu": nn.SELU,
        "swish": nn.SiLU,
        "gelu": nn.GELU,
    }
    return classes[kind]()


class PositionwiseFeedForward(nn.Module):
    """w_2(dropout(activation(w_1(x))))."""

    def __init__(self, size: int, hidden: int, dropout_rate: float, activation_type: str) -> None:
        super().__init__()
        self.w_1 = nn.Linear(size, hidden)
        self.activation = activation(activation_type)
        self.dropout = nn.Dropout(dropout_rate)
        self.w_2 = nn.Linear(hidden, size)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, size) -> (B, T, size)."""
        out: Tensor = self.w_2(self.dropout(self.activation(self.w_1(x))))
        return out

"""The Conformer's convolution module (Gulati et al. 2020, 2.2), symmetrical or causal."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from thawline.models.wenet.config import EncoderConfig
from thawline.models.wenet.feed_forward import activation


class ConvolutionModule(nn.Module):
    """pointwise, GLU, depthwise, norm, activation, pointwise; padding is zeroed before and after."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        size, kernel, bias = config.output_size, config.cnn_module_kernel, config.conv_bias
        inner = config.conv_inner_factor * size // 2
        self.left = kernel - 1 if config.causal else 0  # frames of history that a causal kernel needs
        self.pointwise_conv1 = nn.Conv1d(size, 2 * inner, 1, bias=bias)
        self.depthwise_conv = nn.Conv1d(
            inner,
            inner,
            kernel,
            padding=0 if config.causal else (kernel - 1) // 2,
            groups=inner,
            bias=bias,
        )
        self.channels_last = config.cnn_module_norm == "layer_norm"
        self.norm: nn.Module = (
            nn.LayerNorm(inner, eps=config.conv_norm_eps)
            if self.channels_last
            else nn.BatchNorm1d(inner, eps=config.conv_norm_eps)
        )
        self.pointwise_conv2 = nn.Conv1d(inner, size, 1, bias=bias)
        self.activation = activation(config.activation_type)

    def forward(self, x: Tensor, valid: Tensor | None, past: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """x (B, T, size), valid (B, 1, T) -> (the same shape, the next `past` (B, size, left)).

        past: the last `left` frames of this module's own input so far (streaming); None: silence.
        """
        x = x.transpose(1, 2)
        if valid is not None:
            x = x.masked_fill(~valid, 0.0)
        if self.left > 0:
            x = F.pad(x, (self.left, 0)) if past is None else torch.cat([past, x], dim=2)
            past = x[:, :, -self.left :]
        else:
            past = x[:, :, :0]
        x = self.depthwise_conv(F.glu(self.pointwise_conv1(x), dim=1))
        x = self.norm(x.transpose(1, 2)).transpose(1, 2) if self.channels_last else self.norm(x)
        x = self.pointwise_conv2(self.activation(x))
        if valid is not None:
            x = x.masked_fill(~valid, 0.0)
        return x.transpose(1, 2), past

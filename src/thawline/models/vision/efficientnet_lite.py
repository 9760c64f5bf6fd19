"""EfficientNet-lite 0 to 4 with the parameter names of the package `efficientnet_lite_pytorch`.

Tan and Le 2019 (EfficientNet); the lite variants (tensorflow/tpu, models/official/efficientnet/lite) leave out squeeze
and excitation, take ReLU6, and do not scale the stem and the head. Padding is TensorFlow's SAME, computed from the
input that comes, so any image size gives what the original gives for that size.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from thawline.core.config import near_names
from thawline.errors import RecipeError
from thawline.models.recompute import recomputed

_BN_MOMENTUM = 0.01  # 1 - 0.99, TensorFlow's way round
_BN_EPS = 1e-3
_STEM, _HEAD = 32, 1280
_DIVISOR = 8


@dataclass(frozen=True, slots=True)
class Variant:
    """Scaling of one variant: channel and layer multipliers, image side in pixels, dropout before the classifier."""

    width: float
    depth: float
    image_size: int
    dropout: float


VARIANTS = {
    "efficientnet-lite0": Variant(1.0, 1.0, 224, 0.2),
    "efficientnet-lite1": Variant(1.0, 1.1, 240, 0.2),
    "efficientnet-lite2": Variant(1.1, 1.2, 260, 0.3),
    "efficientnet-lite3": Variant(1.2, 1.4, 280, 0.3),
    "efficientnet-lite4": Variant(1.4, 1.8, 300, 0.3),
}

_STAGES = (  # repeats, kernel, stride, expansion, channels in, channels out
    (1, 3, 1, 1, 32, 16),
    (2, 3, 2, 6, 16, 24),
    (2, 5, 2, 6, 24, 40),
    (3, 3, 2, 6, 40, 80),
    (3, 5, 1, 6, 80, 112),
    (4, 5, 2, 6, 112, 192),
    (1, 3, 1, 6, 192, 320),
)


class SameConv2d(nn.Conv2d):
    """A convolution with TensorFlow's SAME padding: ceil(side / stride) outputs, the odd pixel at the far side."""

    def forward(self, input: Tensor) -> Tensor:
        down = _same(input.shape[-2], self.kernel_size[0], self.stride[0])
        right = _same(input.shape[-1], self.kernel_size[1], self.stride[1])
        if down or right:
            input = F.pad(input, (right // 2, right - right // 2, down // 2, down - down // 2))
        return F.conv2d(input, self.weight, self.bias, self.stride, 0, self.dilation, self.groups)


class MBConvBlock(nn.Module):
    """Inverted residual bottleneck (Sandler et al. 2018): expand, depthwise, project, and the way round it."""

    _expand_conv: SameConv2d
    _bn0: nn.BatchNorm2d

    def __init__(self, *, kernel: int, stride: int, expansion: int, channels_in: int, channels_out: int) -> None:
        super().__init__()
        hidden = channels_in * expansion
        self.expands = expansion != 1
        if self.expands:
            self._expand_conv = SameConv2d(channels_in, hidden, 1, bias=False)
            self._bn0 = _batch_norm(hidden)
        self._depthwise_conv = SameConv2d(hidden, hidden, kernel, stride=stride, groups=hidden, bias=False)
        self._bn1 = _batch_norm(hidden)
        self._project_conv = SameConv2d(hidden, channels_out, 1, bias=False)
        self._bn2 = _batch_norm(channels_out)
        self.skips = stride == 1 and channels_in == channels_out

    def forward(self, inputs: Tensor, drop_connect: float = 0.0) -> Tensor:
        """(batch, channels in, h, w) -> (batch, channels out, h / stride, w / stride).

        drop_connect: share of the samples whose block is left out in training (stochastic depth, Huang et al. 2016);
        drawn from torch's global generator, which the training step seeds. A frozen block is in eval mode: none.
        """
        x = inputs
        if self.expands:
            x = F.relu6(self._bn0(self._expand_conv(x)))
        x = F.relu6(self._bn1(self._depthwise_conv(x)))
        x = self._bn2(self._project_conv(x))
        if self.skips:
            if self.training and drop_connect > 0:
                keep = 1 - drop_connect
                mask = torch.floor(keep + torch.rand([x.shape[0], 1, 1, 1], dtype=x.dtype, device=x.device))
                x = x / keep * mask
            x = x + inputs
        return cast(Tensor, x)


class EfficientNetLite(nn.Module):
    """The network: images (batch, 3, h, w), normalised, to logits (batch, classes)."""

    def __init__(self, variant: Variant, *, classes: int = 1000, drop_connect: float = 0.2) -> None:
        super().__init__()
        self.drop_connect = drop_connect
        self.gradient_checkpointing = False
        self._conv_stem = SameConv2d(3, _STEM, 3, stride=2, bias=False)
        self._bn0 = _batch_norm(_STEM)
        blocks: list[MBConvBlock] = []
        for number, (repeats, kernel, stride, expansion, narrow, wide) in enumerate(_STAGES):
            ends = number in (0, len(_STAGES) - 1)  # the first and the last stage keep their number of layers
            count = repeats if ends else math.ceil(repeats * variant.depth)
            channels = _STEM if number == 0 else _channels(narrow, variant.width)
            out = _channels(wide, variant.width)
            for k in range(count):
                blocks.append(
                    MBConvBlock(
                        kernel=kernel,
                        stride=stride if k == 0 else 1,
                        expansion=expansion,
                        channels_in=channels if k == 0 else out,
                        channels_out=out,
                    )
                )
        self._blocks = nn.ModuleList(blocks)
        self._conv_head = SameConv2d(_channels(_STAGES[-1][-1], variant.width), _HEAD, 1, bias=False)
        self._bn1 = _batch_norm(_HEAD)
        self._dropout = nn.Dropout(variant.dropout)
        self._fc = nn.Linear(_HEAD, classes)

    def recompute_(self) -> None:
        """Recompute the activations of every block in the backward pass."""
        self.gradient_checkpointing = True

    def features(self, images: Tensor) -> Tensor:
        """(batch, 3, h, w) -> (batch, 1280, h / 32, w / 32)."""
        x = F.relu6(self._bn0(self._conv_stem(images)))
        recompute = self.gradient_checkpointing and torch.is_grad_enabled()
        for number, block in enumerate(self._blocks):
            x = (recomputed(block) if recompute else block)(x, self.drop_connect * number / len(self._blocks))
        return F.relu6(self._bn1(self._conv_head(x)))

    def forward(self, images: Tensor) -> Tensor:
        pooled = self.features(images).mean((-2, -1))
        logits: Tensor = self._fc(self._dropout(pooled))
        return logits


def build(name: str, *, classes: int = 1000, drop_connect: float = 0.2) -> EfficientNetLite:
    """The variant called `name`, with fresh weights from torch's global generator. Raises RecipeError if unknown.

    Convolutions are drawn as in the original (normal, variance 2 / fan out), BatchNorm is the identity.
    """
    if name not in VARIANTS:
        near = near_names(name, list(VARIANTS))
        raise RecipeError(
            f"there is no {name!r}",
            fix=(f"did you mean {near[0]!r}? " if near else "") + f"known: {', '.join(VARIANTS)}",
        )
    model = EfficientNetLite(VARIANTS[name], classes=classes, drop_connect=drop_connect)
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return model


def _batch_norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=_BN_EPS, momentum=_BN_MOMENTUM)


def _same(side: int, kernel: int, stride: int) -> int:
    return max((math.ceil(side / stride) - 1) * stride + kernel - side, 0)


def _channels(count: int, width: float) -> int:
    """`count` scaled by `width`, rounded to a multiple of 8, never more than 10 % down."""
    scaled = count * width
    rounded = max(_DIVISOR, int(scaled + _DIVISOR / 2) // _DIVISOR * _DIVISOR)
    return rounded + _DIVISOR if rounded < 0.9 * scaled else rounded

"""The encoder's front: fewer frames, model width, positions."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn

from thawline.errors import DataError


class Subsampling(nn.Module):
    """Base of the five kinds.

    rate:          input frames per output frame
    right_context: input frames after the first one that the first output frame needs
    """

    rate: ClassVar[int]
    right_context: ClassVar[int]
    pos_enc: nn.Module

    @property
    def min_frames(self) -> int:
        """The shortest input that gives an output frame."""
        return self.right_context + 1

    def transform(self, feats: Tensor) -> Tensor:
        """(B, T, bins) -> (B, T', size)."""
        raise NotImplementedError

    def subsample_mask(self, valid: Tensor) -> Tensor:
        """(B, 1, T) -> (B, 1, T'): an output frame is valid where the last input frame under its kernel is."""
        raise NotImplementedError

    def forward(self, feats: Tensor, valid: Tensor, offset: int = 0) -> tuple[Tensor, Tensor, Tensor]:
        """feats (B, T, bins), valid (B, 1, T) -> (x (B, T', size), positions (1, T', size), valid (B, 1, T')).

        offset: encoder frames that came before (streaming). Raises DataError for input too short for one output frame.
        """
        if feats.size(1) < self.min_frames:
            raise DataError(
                f"{feats.size(1)} frames are too few: one encoder frame needs {self.min_frames}",
                fix="leave out so short utterances (filter_conf.min_length)",
            )
        x, pos = self.pos_enc(self.transform(feats), offset)
        return x, pos, self.subsample_mask(valid)


class LinearNoSubsampling(Subsampling):
    """One linear layer per frame (WeNet's `linear`)."""

    rate = 1
    right_context = 0

    def __init__(self, bins: int, size: int, dropout_rate: float, pos_enc: nn.Module) -> None:
        super().__init__()
        self.out = nn.Sequential(nn.Linear(bins, size), nn.LayerNorm(size, eps=1e-5), nn.Dropout(dropout_rate))
        self.pos_enc = pos_enc

    def transform(self, feats: Tensor) -> Tensor:
        x: Tensor = self.out(feats)
        return x

    def subsample_mask(self, valid: Tensor) -> Tensor:
        return valid


class Conv1dSubsampling2(Subsampling):
    """Whisper's two padded convolutions, half as many frames (WeNet's `conv1d2`)."""

    rate = 2
    right_context = 4

    @property
    def min_frames(self) -> int:
        return 1  # its convolutions are padded

    def __init__(self, bins: int, size: int, dropout_rate: float, pos_enc: nn.Module) -> None:
        super().__init__()
        self.conv = nn.Sequential(
            nn.Conv1d(bins, size, kernel_size=3, padding=1),
            nn.GELU(),
            nn.Conv1d(size, size, kernel_size=3, stride=2, padding=1),
            nn.GELU(),
        )
        self.pos_enc = pos_enc

    def transform(self, feats: Tensor) -> Tensor:
        x: Tensor = self.conv(feats.transpose(1, 2))
        return x.transpose(1, 2)

    def subsample_mask(self, valid: Tensor) -> Tensor:
        # WeNet's choice: an odd utterance keeps its last half frame only where the batch's length is odd, too.
        return valid[:, :, (valid.size(2) + 1) % 2 :: 2]


class _Conv2d(Subsampling):
    """Unpadded two-dimensional convolutions over (time, bins) with ReLU, then one linear layer."""

    layers: ClassVar[tuple[tuple[int, int], ...]]  # (kernel, stride), square in time and bins

    def __init__(self, bins: int, size: int, dropout_rate: float, pos_enc: nn.Module) -> None:
        super().__init__()
        convolutions: list[nn.Module] = []
        width, channels = bins, 1
        for kernel, stride in self.layers:
            convolutions += [nn.Conv2d(channels, size, kernel, stride), nn.ReLU()]
            width, channels = (width - kernel) // stride + 1, size
        self.conv = nn.Sequential(*convolutions)
        self.project(size * width, size)
        self.pos_enc = pos_enc

    def project(self, wide: int, size: int) -> None:
        self.linear = nn.Linear(wide, size)

    def projection(self) -> nn.Module:
        return self.linear

    def transform(self, feats: Tensor) -> Tensor:
        x: Tensor = self.conv(feats.unsqueeze(1))  # (B, size, T', bins')
        projected: Tensor = self.projection()(x.transpose(1, 2).flatten(2))
        return projected

    def subsample_mask(self, valid: Tensor) -> Tensor:
        for kernel, stride in self.layers:
            valid = valid[:, :, kernel - 1 :: stride]
        return valid


class Conv2dSubsampling4(_Conv2d):
    """A quarter of the frames (WeNet's `conv2d`); its linear layer is called `out.0`."""

    rate = 4
    right_context = 6
    layers = ((3, 2), (3, 2))

    def project(self, wide: int, size: int) -> None:
        self.out = nn.Sequential(nn.Linear(wide, size))

    def projection(self) -> nn.Module:
        return self.out


class Conv2dSubsampling6(_Conv2d):
    """A sixth of the frames (WeNet's `conv2d6`)."""

    rate = 6
    right_context = 10
    layers = ((3, 2), (5, 3))


class Conv2dSubsampling8(_Conv2d):
    """An eighth of the frames (WeNet's `conv2d8`)."""

    rate = 8
    right_context = 14
    layers = ((3, 2), (3, 2), (3, 2))


def subsampling(kind: str, bins: int, size: int, dropout_rate: float, pos_enc: nn.Module) -> Subsampling:
    """The module that WeNet's name `kind` stands for."""
    classes: dict[str, type[Subsampling]] = {
        "linear": LinearNoSubsampling,
        "conv1d2": Conv1dSubsampling2,
        "conv2d": Conv2dSubsampling4,
        "conv2d6": Conv2dSubsampling6,
        "conv2d8": Conv2dSubsampling8,
    }
    made: Subsampling = classes[kind](bins, size, dropout_rate, pos_enc)
    return made

"""What a normalisation policy does to layers: `groupnorm` replaces BatchNorm, and says what that costs.

`pinned` and `tracking` need nothing here: they are modes, set by `apply.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from thawline.errors import RecipeError
from thawline.freeze.inspect import original_class

_MOST_GROUPS = 32  # Wu and He 2018, table 3: 32 groups, or 16 channels a group, did best
_LEAST_CHANNELS = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class NormChange:
    """One layer that was replaced.

    dropped: elements of running statistics that the base had and the model no longer has
    """

    path: str
    was: str
    channels: int
    groups: int
    dropped: int

    @property
    def cost(self) -> str:
        """What the replacement costs, for people."""
        return (
            f"{self.path}: {self.was}({self.channels}) -> GroupNorm({self.groups} groups): {self.dropped} learned "
            "statistics are dropped and every sample is normalised by its own, so the outputs of the base change "
            "until training has made up for it; it no longer folds into the convolution before it"
        )


def convert_to_groupnorm_(model: nn.Module, paths: Sequence[str]) -> tuple[NormChange, ...]:
    """Replace the BatchNorm, SyncBatchNorm, FrozenBatchNorm or InstanceNorm layers at `paths` by GroupNorm.

    Scale and shift are taken over; an InstanceNorm becomes a GroupNorm of one channel a group, which is the same
    function without statistics. Parameter names stay. Raises RecipeError for a layer that does more than normalise.
    """
    plans = [(path, model.get_submodule(path)) for path in paths]
    made = [(path, old, _groupnorm(path, old)) for path, old in plans]
    changes = []
    for path, old, new in made:
        parent, _, key = path.rpartition(".")
        owner = model.get_submodule(parent)
        owner._modules[key] = new
        dropped = sum(
            b.numel() for k, b in old._buffers.items() if b is not None and k in ("running_mean", "running_var")
        )
        changes.append(
            NormChange(
                path=path,
                was=original_class(old).__name__,
                channels=new.num_channels,
                groups=new.num_groups,
                dropped=dropped,
            )
        )
    return tuple(changes)


def groups_for(channels: int) -> int:
    """Number of groups for so many channels: the largest divisor up to 32 that leaves two channels a group."""
    fitting = [g for g in range(1, min(_MOST_GROUPS, channels) + 1) if channels % g == 0]
    wide = [g for g in fitting if channels // g >= _LEAST_CHANNELS]
    return max(wide or fitting)


def _groupnorm(path: str, old: nn.Module) -> nn.GroupNorm:
    name = original_class(old).__name__
    if any(old.children()):
        raise RecipeError(
            f"{path} is a {name}, which does more than normalise",
            where=path,
            fix="keep it pinned or tracking, or replace it by hand",
        )
    mean = old._buffers.get("running_mean")
    weight = _affine(old, "weight")
    sample = mean if mean is not None else weight
    if sample is None:
        raise RecipeError(f"{path} ({name}) has neither statistics nor scale", where=path, fix="leave it as it is")
    channels = sample.numel()
    instance = isinstance(old, nn.modules.instancenorm._InstanceNorm)
    new = nn.GroupNorm(
        channels if instance else groups_for(channels),
        channels,
        eps=float(getattr(old, "eps", 1e-5)),
        affine=weight is not None,
        device=sample.device,
        dtype=sample.dtype,
    )
    with torch.no_grad():
        for key, param in new.named_parameters():
            value = _affine(old, key)
            if value is not None:
                param.copy_(value)
    new.train(old.training)
    return new


def _affine(module: nn.Module, key: str) -> Tensor | None:
    # torchvision's and timm's FrozenBatchNorm keep scale and shift as buffers.
    value = module._parameters.get(key)
    return value if value is not None else module._buffers.get(key)

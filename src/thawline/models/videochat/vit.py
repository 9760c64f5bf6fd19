"""UMT's vision transformer as VideoChat2 uses it: joint attention over all patches of all frames.

Names of modules and tensors are those of `video_chat2/models/blip2/vit.py` (itself after VideoMAE), so that its
checkpoints load as they are. Differences: position tables for any frame count and grid are computed where they are
needed, attention runs through `scaled_dot_product_attention`, and recomputation of activations is never reentrant.
Reentrant recomputation gives no gradient to a block whose input needs none, which is the case of every checkpointed
block once the patch embedding is frozen ("None of the inputs have requires_grad=True").
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from thawline.models.videochat.config import VisionConfig
from thawline.models.videochat.positions import image_table, video_table

NORM_EPS = 1e-6


class DropPath(nn.Module):
    """Leaves the residual branch of a whole sample away with probability `drop_prob`, in training only.

    Stochastic depth (Huang et al. 2016), scaled so that the expectation stays, as in timm's `drop_path`.
    """

    def __init__(self, drop_prob: float) -> None:
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.drop_prob == 0.0:
            return x
        keep = 1.0 - self.drop_prob
        kept = x.new_empty((x.shape[0],) + (1,) * (x.dim() - 1)).bernoulli_(keep)
        return x * kept.div_(keep)


class Mlp(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden, width)
        self.drop = nn.Dropout(0.0)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.fc2(self.drop(self.act(self.fc1(x)))))  # type: ignore[no-any-return]


class Attention(nn.Module):
    """Self attention whose fused projection has a bias for queries and values, and none for keys."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.num_heads = heads
        self.qkv = nn.Linear(width, width * 3, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(width))
        self.v_bias = nn.Parameter(torch.zeros(width))
        self.attn_drop = nn.Dropout(0.0)
        self.proj = nn.Linear(width, width)
        self.proj_drop = nn.Dropout(0.0)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        bias = torch.cat((self.q_bias, torch.zeros_like(self.v_bias, requires_grad=False), self.v_bias))
        qkv = functional.linear(x, self.qkv.weight, bias).reshape(batch, tokens, 3, self.num_heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (batch, heads, tokens, width // heads)
        out = functional.scaled_dot_product_attention(q, k, v)
        return self.proj_drop(self.proj(out.transpose(1, 2).reshape(batch, tokens, width)))  # type: ignore[no-any-return]


class Block(nn.Module):
    def __init__(self, width: int, heads: int, drop_path: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=NORM_EPS)
        self.attn = Attention(width, heads)
        self.drop_path = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()
        self.norm2 = nn.LayerNorm(width, eps=NORM_EPS)
        self.mlp = Mlp(width, 4 * width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self.attn(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))  # type: ignore[no-any-return]


class PatchEmbed(nn.Module):
    """Cubes of `tubelet` frames times a patch -> vectors: (B, 3, T, H, W) -> (B, T/tubelet * H/p * W/p, width)."""

    def __init__(self, patch_size: int, width: int, tubelet_size: int) -> None:
        super().__init__()
        size = (tubelet_size, patch_size, patch_size)
        self.proj = nn.Conv3d(3, width, kernel_size=size, stride=size)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).flatten(2).transpose(1, 2)  # type: ignore[no-any-return]


class Encoder(nn.Module):
    """Patches, positions and blocks. There is no final norm unless `with_ln`."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.config = config
        self.patch_embed = PatchEmbed(config.patch_size, config.width, config.tubelet_size)
        # The rate grows over the depth of the pretrained network, of which the last block may not be built.
        rates = torch.linspace(0, config.drop_path_rate, config.depth, device="cpu").tolist()
        self.blocks = nn.ModuleList(Block(config.width, config.heads, rates[i]) for i in range(config.blocks_run))
        self.norm = nn.LayerNorm(config.width, eps=NORM_EPS) if config.with_ln else nn.Identity()

    def recompute_(self) -> None:
        """Recompute the activations of every block in the backward pass."""
        self.config = replace(self.config, checkpoint_blocks=len(self.blocks))

    def positions(self, frames: int, rows: int, columns: int, *, is_image: bool) -> Tensor:
        """(1, frames * rows * columns, width) for clips, (1, rows * columns, width) for still images."""
        if is_image:
            return image_table(rows, columns, self.config.width)
        return video_table(frames, rows, columns, self.config.width)

    def forward(self, x: Tensor, is_image: bool = False) -> Tensor:
        c = self.config
        frames, rows, columns = x.shape[2] // c.tubelet_size, x.shape[3] // c.patch_size, x.shape[4] // c.patch_size
        x = self.patch_embed(x)
        x = x + self.positions(frames, rows, columns, is_image=is_image).to(device=x.device, dtype=x.dtype)
        for number, block in enumerate(self.blocks):
            if number < c.checkpoint_blocks and torch.is_grad_enabled():
                x = checkpoint(block, x, use_reentrant=False)
            else:
                x = block(x)
        return self.norm(x)  # type: ignore[no-any-return]


class VisionTransformer(nn.Module):
    """`vision_encoder`: frames (B, 3, T, H, W) -> (B, T, patches of one frame, width)."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.encoder = Encoder(config)
        self.apply(_initialise)

    def forward(self, frames: Tensor, is_image: bool = False) -> Tensor:
        x = self.encoder(frames, is_image)  # (B, T * patches, width)
        steps = frames.shape[2] // self.encoder.config.tubelet_size
        return x.view(x.shape[0], steps, -1, x.shape[-1])  # type: ignore[no-any-return]


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)

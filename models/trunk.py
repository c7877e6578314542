"""The network inside the image decoder: a U-Net whose every level hears what is wanted.

MONAI's `BasicUNet` blocks (convolution, instance norm, leaky ReLU), with three additions: a scale and shift of every
level by time and prompt (FiLM, arXiv 1709.07871), cross-attention to the prompt at the coarsest level, and the
Swin pyramid added level by level.
"""

# B slices, H W in-plane voxels, K prompt states, P their width, E feature channels

from __future__ import annotations

from itertools import pairwise

import torch
from monai.networks.blocks.crossattention import CrossAttentionBlock
from monai.networks.nets.basic_unet import Down, TwoConv, UpCat
from monai.networks.nets.diffusion_model_unet import get_timestep_embedding
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

_ACTIVATION = ("leakyrelu", {"negative_slope": 0.1, "inplace": True})
_NORM = ("instance", {"affine": True})
_TIME_WIDTH = 64
_EMBEDDING = 128


class ConditionalUNet(nn.Module):
    """U-Net over slices, conditioned on a time and a prompt."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        channels: tuple[int, ...],
        *,
        condition_dim: int,
        pyramid_channels: tuple[int, ...],
        num_heads: int,
    ) -> None:
        """Build it.

        Args:
            in_channels: Of the input.
            out_channels: Of the output.
            channels: Width of each level; the first works at full resolution, each next at half the one before.
            condition_dim: Width of one prompt state.
            pyramid_channels: Of the Swin maps at strides 2, 4, 8...; as many are used as there are levels for them.
            num_heads: Of the cross-attention.
        """
        super().__init__()
        self.use_checkpoint = False
        blocks = {"act": _ACTIVATION, "norm": _NORM, "bias": True}
        self.first = TwoConv(2, in_channels, channels[0], **blocks)
        self.downs = nn.ModuleList(Down(2, finer, coarser, **blocks) for finer, coarser in pairwise(channels))
        self.ups = nn.ModuleList(
            UpCat(2, coarser, finer, finer, **blocks, halves=False) for finer, coarser in pairwise(channels)
        )
        self.inject = nn.ModuleList(
            _zeroed(nn.Conv2d(found, wanted, 1)) for found, wanted in zip(pyramid_channels, channels[1:], strict=False)
        )
        self.embed = nn.Sequential(
            nn.Linear(_TIME_WIDTH + condition_dim, _EMBEDDING), nn.SiLU(), nn.Linear(_EMBEDDING, _EMBEDDING), nn.SiLU()
        )
        self.down_films = nn.ModuleList(_zeroed(nn.Linear(_EMBEDDING, 2 * width)) for width in channels)
        self.up_films = nn.ModuleList(_zeroed(nn.Linear(_EMBEDDING, 2 * width)) for width in channels[:-1])
        self.norm = nn.LayerNorm(channels[-1])
        self.attention = CrossAttentionBlock(
            channels[-1], num_heads, context_input_size=condition_dim, use_flash_attention=True
        )
        self.last = nn.Conv2d(channels[0], out_channels, 1)

    def forward(self, x: Tensor, time: Tensor, condition: Tensor, pyramid: list[Tensor]) -> Tensor:
        """`(B, out_channels, H, W)` of `x` `(B, in_channels, H, W)`; any H and W, padded to whole coarsest voxels.

        Args:
            x: The bridge's state and what else there is to see.
            time: `(B,)` in (0, 1]; 1 is where the bridge starts.
            condition: Prompt states `(B, K, P)`.
            pyramid: Feature maps `(B, E, H / 2, W / 2)` and coarser; a map that is smaller than its level is padded.
        """
        height, width = x.shape[-2:]
        multiple = 2 ** len(self.downs)
        embedded = get_timestep_embedding(time * 1000.0, _TIME_WIDTH)
        wanted = self.embed(torch.cat([embedded, condition.mean(1)], dim=1))
        x = nn.functional.pad(x, (0, -width % multiple, 0, -height % multiple))
        features = _film(self._run(self.first, x), self.down_films[0](wanted))
        skips = []
        for level, down in enumerate(self.downs):
            skips.append(features)
            features = self._run(down, features)
            if level < len(self.inject):
                features = features + self.inject[level](_fitted(pyramid[level], features.shape[-2:]))
            features = _film(features, self.down_films[level + 1](wanted))
        features = features + self._attend(features, condition)
        for level in reversed(range(len(self.ups))):
            features = _film(self._run(self.ups[level], features, skips[level]), self.up_films[level](wanted))
        return self.last(features)[..., :height, :width]

    def _run(self, block: nn.Module, *inputs: Tensor) -> Tensor:
        """A level, whose activations are computed again in the backward pass if that is wanted."""
        if self.use_checkpoint and torch.is_grad_enabled():
            return checkpoint(block, *inputs, use_reentrant=False)
        return block(*inputs)

    def _attend(self, features: Tensor, condition: Tensor) -> Tensor:
        """What each place of the coarsest level reads from the prompt."""
        places = self.norm(features.flatten(2).transpose(1, 2))
        return self.attention(places, condition).transpose(1, 2).unflatten(2, features.shape[-2:])


def _film(features: Tensor, scale_shift: Tensor) -> Tensor:
    scale, shift = scale_shift[..., None, None].chunk(2, dim=1)
    return features * (1 + scale) + shift


def _fitted(maps: Tensor, size: torch.Size) -> Tensor:
    """Zeros at the far edges, where the trunk's grid was padded further than the encoder's."""
    return nn.functional.pad(maps, (0, size[1] - maps.shape[-1], 0, size[0] - maps.shape[-2]))


def _zeroed(layer: nn.Linear | nn.Conv2d) -> nn.Linear | nn.Conv2d:
    """A layer that adds nothing until it has learned to."""
    nn.init.zeros_(layer.weight)
    assert layer.bias is not None
    nn.init.zeros_(layer.bias)
    return layer

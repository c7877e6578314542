"""The network inside the image decoder: a U-Net over slices or volumes whose every level hears what is wanted.

The shape of MONAI's `BasicUNet` (convolution, instance norm, leaky ReLU), with three additions: a scale and shift of
every level by time and prompt (FiLM, arXiv 1709.07871), cross-attention to the prompt at the coarsest level, and the
Swin pyramid added level by level. In three dimensions the finest levels stay in plane, because slices are thicker than
pixels are wide (nnU-Net, Nature Methods 18, 203-211, 2021).
"""

# B slices or patches, D slices of a patch, H W in-plane voxels, K prompt states, P their width, E feature channels

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence
from itertools import pairwise

import torch
from monai.networks.blocks.convolutions import Convolution
from monai.networks.blocks.crossattention import CrossAttentionBlock
from monai.networks.blocks.upsample import UpSample
from monai.networks.layers.factories import Conv, Pool
from monai.networks.nets.diffusion_model_unet import get_timestep_embedding
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

_ACTIVATION = ("leakyrelu", {"negative_slope": 0.1, "inplace": True})
_NORM = ("instance", {"affine": True})
_TIME_WIDTH = 64
_EMBEDDING = 128


class ConditionalUNet(nn.Module):
    """U-Net over slices or volumes, conditioned on a time and a prompt."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        channels: tuple[int, ...],
        *,
        condition_dim: int,
        pyramid_channels: tuple[int, ...],
        num_heads: int,
        spatial_dims: int = 2,
        flat_levels: int = 0,
        pyramid_depths: tuple[int, ...] = (),
    ) -> None:
        """Build it.

        Args:
            in_channels: Of the input.
            out_channels: Of the output.
            channels: Width of each level; the first works at full resolution, each next at half the one before.
            condition_dim: Width of one prompt state.
            pyramid_channels: Of the Swin maps at strides 2, 4, 8... in plane; as many are used as there are levels.
            num_heads: Of the cross-attention.
            spatial_dims: 2 for slices, 3 for volumes.
            flat_levels: Finest levels of volumes that stay in plane, at least one.
            pyramid_depths: Slices that a voxel of each Swin map covers; for volumes.
        """
        super().__init__()
        self.spatial_dims = spatial_dims
        self.use_checkpoint = False
        depths = [2 ** max(0, level - flat_levels) for level in range(len(channels))]
        kernels = [_kernel(spatial_dims, is_flat=level < flat_levels) for level in range(len(channels))]
        strides = [_stride(spatial_dims, is_flat=before == after) for before, after in pairwise(depths)]
        self.strides = tuple(strides)
        self.spread = tuple(theirs // own for theirs, own in zip(pyramid_depths, depths[1:], strict=False))
        """Of each level, the voxels along z in one of its Swin map."""
        self.first = _two_conv(in_channels, channels[0], kernels[0])
        self.downs = nn.ModuleList(
            _Down(finer, coarser, kernel, stride)
            for (finer, coarser), kernel, stride in zip(pairwise(channels), kernels[1:], strides, strict=True)
        )
        self.ups = nn.ModuleList(
            _Up(coarser, finer, kernel, stride)
            for (finer, coarser), kernel, stride in zip(pairwise(channels), kernels[:-1], strides, strict=True)
        )
        self.inject = nn.ModuleList(
            _zeroed(Conv["conv", spatial_dims](found, wanted, 1))
            for found, wanted in zip(pyramid_channels, channels[1:], strict=False)
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
        self.last = Conv["conv", spatial_dims](channels[0], out_channels, 1)

    def forward(self, x: Tensor, time: Tensor, condition: Tensor, pyramid: list[Tensor]) -> Tensor:
        """`(B, out_channels, [D,] H, W)` of `x` `(B, in_channels, [D,] H, W)`; any size, padded to coarsest voxels.

        Args:
            x: The bridge's state and what else there is to see.
            time: `(B,)` in (0, 1]; 1 is where the bridge starts.
            condition: Prompt states `(B, K, P)`.
            pyramid: Feature maps `(B, E, [D,] H / 2, W / 2)` and coarser; one that is smaller than its level is padded.
        """
        size = x.shape[2:]
        embedded = get_timestep_embedding(time * 1000.0, _TIME_WIDTH)
        wanted = self.embed(torch.cat([embedded, condition.mean(1)], dim=1))
        x = _fitted(x, [-(-length // whole) * whole for length, whole in zip(size, self.coarsest_voxel, strict=True)])
        features = _film(self._run(self.first, x), self.down_films[0](wanted))
        skips = []
        for level, down in enumerate(self.downs):
            skips.append(features)
            features = self._run(down, features)
            if level < len(self.inject):
                maps = pyramid[level].repeat_interleave(self.spread[level], 2) if self.spread else pyramid[level]
                features = features + self.inject[level](_fitted(maps, features.shape[2:]))
            features = _film(features, self.down_films[level + 1](wanted))
        features = features + self._attend(features, condition)
        for level in reversed(range(len(self.ups))):
            features = _film(self._run(self.ups[level], features, skips[level]), self.up_films[level](wanted))
        return _fitted(self.last(features), size)

    @property
    def coarsest_voxel(self) -> tuple[int, ...]:
        """Voxels of the input, along each axis, in one of the coarsest level."""
        return tuple(math.prod(stride[axis] for stride in self.strides) for axis in range(self.spatial_dims))

    def _run(self, block: nn.Module, *inputs: Tensor) -> Tensor:
        """A level, whose activations are computed again in the backward pass if that is wanted."""
        if self.use_checkpoint and torch.is_grad_enabled():
            return checkpoint(block, *inputs, use_reentrant=False)
        return block(*inputs)

    def _attend(self, features: Tensor, condition: Tensor) -> Tensor:
        """What each place of the coarsest level reads from the prompt."""
        places = self.norm(features.flatten(2).transpose(1, 2))
        return self.attention(places, condition).transpose(1, 2).unflatten(2, features.shape[2:])


class _Down(nn.Sequential):
    """Pooling and two convolutions."""

    def __init__(self, in_channels: int, out_channels: int, kernel: Sequence[int], stride: Sequence[int]) -> None:
        super().__init__()
        self.add_module("max_pooling", Pool["max", len(stride)](kernel_size=stride))
        self.add_module("convs", _two_conv(in_channels, out_channels, kernel))


class _Up(nn.Module):
    """Transposed convolution, the finer level's features beside it, and two convolutions."""

    def __init__(self, in_channels: int, out_channels: int, kernel: Sequence[int], stride: Sequence[int]) -> None:
        super().__init__()
        self.upsample = UpSample(len(stride), in_channels, in_channels, stride)
        self.convs = _two_conv(out_channels + in_channels, out_channels, kernel)

    def forward(self, coarse: Tensor, skip: Tensor) -> Tensor:
        return self.convs(torch.cat([skip, self.upsample(coarse)], dim=1))


def _two_conv(in_channels: int, out_channels: int, kernel: Sequence[int]) -> nn.Sequential:
    """MONAI's `TwoConv` with a kernel of one's own."""
    blocks = {"kernel_size": kernel, "act": _ACTIVATION, "norm": _NORM}
    first = Convolution(len(kernel), in_channels, out_channels, **blocks)
    second = Convolution(len(kernel), out_channels, out_channels, **blocks)
    return nn.Sequential(OrderedDict(conv_0=first, conv_1=second))


def _kernel(spatial_dims: int, *, is_flat: bool) -> tuple[int, ...]:
    return (3, 3) if spatial_dims == 2 else (1, 3, 3) if is_flat else (3, 3, 3)


def _stride(spatial_dims: int, *, is_flat: bool) -> tuple[int, ...]:
    return (2, 2) if spatial_dims == 2 else (1, 2, 2) if is_flat else (2, 2, 2)


def _film(features: Tensor, scale_shift: Tensor) -> Tensor:
    scale, shift = scale_shift.reshape(*scale_shift.shape, *(1,) * (features.ndim - 2)).chunk(2, dim=1)
    return features * (1 + scale) + shift


def _fitted(maps: Tensor, size: Sequence[int]) -> Tensor:
    """Zeros added, or places dropped, at the far edges."""
    padding = [amount for old, new in zip(maps.shape[:1:-1], reversed(size), strict=True) for amount in (0, new - old)]
    return nn.functional.pad(maps, padding)


def _zeroed(layer: nn.Module) -> nn.Module:
    """A layer that adds nothing until it has learned to."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer

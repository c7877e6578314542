"""Image decoder: a diffusion trunk that reconstructs and segments by bridges, with data consistency inside.

Reconstruction walks from the SENSE image to the image (I2SB, arXiv 2302.05872; InDI, arXiv 2303.11435);
segmentation from a neutral mask to the mask in [-1, 1]. The trunk predicts the clean image `x0`; a diffusers
scheduler takes the step. What to do comes from the backbone's query states by cross-attention; the image itself by
channels and by the Swin pyramid, since fine detail would not survive the backbone.
"""

# B slices, H W in-plane voxels, C coils, K query states, P condition width

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from diffusers import FlowMatchEulerDiscreteScheduler
from einops import rearrange
from monai.networks.nets import DiffusionModelUNet
from torch import Tensor, nn

from omnimri.models.config import ImageDecoderConfig
from omnimri.models.physics import SenseOperator, data_consistency

RECONSTRUCT, SEGMENT = 0, 1
_STATE_CHANNELS = 2
_IMAGE_CHANNELS = 2
_OUTPUT_CHANNELS = 3  # real, imaginary, mask logit
_SHUFFLE = 2  # pixels folded into channels per axis, so that the trunk starts at the pyramid's first stride
_MULTIPLE = 16


@dataclass(frozen=True)
class Measurement:
    """What reconstruction must stay true to, slice by slice, scaled so that the zero-filled maximum is one."""

    kspace: Tensor
    """Complex `(B, C, H, W)`, zero where not acquired."""
    operator: SenseOperator
    initial: Tensor
    """Complex `(B, H, W)`: where the bridge starts, the zero-filled image made consistent with the data."""

    @classmethod
    def start(cls, kspace: Tensor, operator: SenseOperator, config: ImageDecoderConfig) -> Measurement:
        """Begin with regularised SENSE: most of the aliasing is gone before the network looks."""
        zero_filled = operator.adjoint(kspace)
        initial = data_consistency(
            zero_filled, kspace, operator, weight=config.consistency_weight, num_steps=config.consistency_steps
        )
        return cls(kspace, operator, initial)


class ImageDecoder(nn.Module):
    """One trunk for both bridges."""

    def __init__(self, config: ImageDecoderConfig, condition_dim: int, pyramid_channels: tuple[int, ...]) -> None:
        super().__init__()
        self.config = config
        levels = len(config.channels)
        folded = _SHUFFLE**2
        self.trunk = DiffusionModelUNet(
            spatial_dims=2,
            in_channels=(_STATE_CHANNELS + _IMAGE_CHANNELS) * folded + config.condition_channels,
            out_channels=_OUTPUT_CHANNELS * folded,
            num_res_blocks=config.num_res_blocks,
            channels=config.channels,
            attention_levels=(*(False,) * (levels - 1), True),
            norm_num_groups=16,
            num_head_channels=config.num_head_channels,
            with_conditioning=True,
            cross_attention_dim=condition_dim,
            num_class_embeds=2,
        )
        self.pool = nn.Sequential(nn.LayerNorm(condition_dim), nn.Linear(condition_dim, config.condition_channels))
        self.pyramid_entries = _residual_levels(levels, config.num_res_blocks)
        self.inject = nn.ModuleList(
            nn.Conv2d(pyramid_channels[source], config.channels[width], 1) for source, width in self.pyramid_entries
        )
        for layer in self.inject:
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(
        self, state: Tensor, image: Tensor, time: Tensor, task: int, condition: Tensor, pyramid: list[Tensor]
    ) -> Tensor:
        """Trunk output `(B, 3, H, W)`: real and imaginary residual, mask logit.

        Args:
            state: `(B, 2, H, W)`, the bridge's `x_t` (real and imaginary part, or mask and zero).
            image: `(B, 2, H, W)`, what is being read (real and imaginary part of the start, or magnitude and zero).
            time: `(B,)` in (0, 1]; 1 is where the bridge starts.
            task: RECONSTRUCT or SEGMENT.
            condition: `(B, K, P)` from the query connector.
            pyramid: Swin feature maps `(B, E, H', W')` of the slice, finest first.
        """
        height, width = state.shape[-2:]
        x = torch.cat([state, image], dim=1)
        x = F.pad(x, (0, -width % _MULTIPLE, 0, -height % _MULTIPLE))
        x = F.pixel_unshuffle(x, _SHUFFLE)
        maps = self.pool(condition.mean(1))[..., None, None].expand(-1, -1, *x.shape[-2:])
        output = self.trunk(
            torch.cat([x, maps], dim=1),
            timesteps=time * 1000.0,
            context=condition,
            class_labels=torch.full((x.shape[0],), task, device=x.device),
            down_block_additional_residuals=self._residuals(pyramid, x.shape[-2:]),
        )
        return F.pixel_shuffle(output, _SHUFFLE)[..., :height, :width]

    def _residuals(self, pyramid: list[Tensor], finest: torch.Size) -> tuple[Tensor, ...]:
        """The pyramid, projected to each skip connection of the trunk."""
        residuals = []
        for layer, (source, _) in zip(self.inject, self.pyramid_entries, strict=True):
            size = (finest[0] // 2**source, finest[1] // 2**source)
            maps = pyramid[source]
            if maps.shape[-2:] != size:
                maps = F.pad(maps, (0, size[1] - maps.shape[-1], 0, size[0] - maps.shape[-2]))
            residuals.append(layer(maps))
        return tuple(residuals)

    def predict_image(
        self, state: Tensor, time: Tensor, measured: Measurement, condition: Tensor, pyramid: list[Tensor],
        *, consistent: bool = True,
    ) -> Tensor:  # fmt: skip
        """Clean complex image `x0` `(B, H, W)`: the start plus a residual, then data consistency in float32."""
        residual = self(as_channels(state), as_channels(measured.initial), time, RECONSTRUCT, condition, pyramid)
        estimate = measured.initial + torch.complex(residual[:, 0].float(), residual[:, 1].float())
        if not consistent:
            return estimate
        return data_consistency(
            estimate, measured.kspace, measured.operator,
            weight=self.config.consistency_weight, num_steps=self.config.consistency_steps,
        )  # fmt: skip

    def predict_mask(
        self, state: Tensor, image: Tensor, time: Tensor, condition: Tensor, pyramid: list[Tensor]
    ) -> Tensor:
        """Mask logit `(B, H, W)`; `state` and `image` are `(B, H, W)`."""
        zero = torch.zeros_like(state)
        output = self(torch.stack([state, zero], 1), torch.stack([image, zero], 1), time, SEGMENT, condition, pyramid)
        return output[:, 2]

    @torch.no_grad()
    def reconstruct(
        self, measured: Measurement, condition: Tensor, pyramid: list[Tensor],
        *, num_steps: int, noise: float = 0.0, generator: torch.Generator | None = None,
    ) -> Tensor:  # fmt: skip
        """Walk the bridge from its start; complex `(B, H, W)`. `noise` > 0 samples it stochastically."""
        state = measured.initial
        batch = state.shape[0]
        for scheduler, time, following in _steps(num_steps):
            clean = self.predict_image(state, state.real.new_full((batch,), time), measured, condition, pyramid)
            stepped = _scheduled_step(scheduler, as_channels(state), as_channels(clean), time)
            state = torch.complex(stepped[:, 0], stepped[:, 1])
            if noise and following:
                spread = noise * (following * (time - following) / time) ** 0.5
                state = state + spread * torch.randn(state.shape, dtype=state.dtype, generator=generator)
        return state

    @torch.no_grad()
    def segment(
        self, image: Tensor, condition: Tensor, pyramid: list[Tensor],
        *, num_steps: int, noise: float = 0.0, generator: torch.Generator | None = None,
    ) -> Tensor:  # fmt: skip
        """Walk the bridge from the neutral mask; probability `(B, H, W)`."""
        state = torch.zeros_like(image)
        for scheduler, time, following in _steps(num_steps):
            logit = self.predict_mask(state, image, image.new_full((image.shape[0],), time), condition, pyramid)
            clean = torch.tanh(logit / 2)
            state = _scheduled_step(scheduler, state, clean, time)
            if noise and following:
                spread = noise * (following * (time - following) / time) ** 0.5
                state = state + spread * torch.randn(state.shape, generator=generator)
        return (state + 1) / 2


def bridge_state(clean: Tensor, start: Tensor, time: Tensor, noise: float) -> Tensor:
    """`x_t = (1 - t) x0 + t x1 + s sqrt(t (1 - t)) eps` (I2SB eq. 6, constant s); real or complex `(B, ...)`."""
    t = time.reshape(-1, *(1,) * (clean.ndim - 1))
    spread = noise * (t * (1 - t)).clamp_min(0).sqrt()
    return (1 - t) * clean + t * start + spread * torch.randn_like(clean)


def as_channels(image: Tensor) -> Tensor:
    """Complex `(B, H, W)` as real `(B, 2, H, W)`."""
    return rearrange(torch.view_as_real(image), "b h w c -> b c h w")


def _residual_levels(levels: int, num_res_blocks: int) -> list[tuple[int, int]]:
    """Grid level and width level of every skip connection, in the order MONAI's trunk collects them.

    A downsampled entry has the coarser grid but still the finer level's width.
    """
    entries = [(0, 0)]
    for level in range(levels):
        entries += [(level, level)] * num_res_blocks
        if level < levels - 1:
            entries.append((level + 1, level))
    return entries


def _steps(num_steps: int) -> list[tuple[FlowMatchEulerDiscreteScheduler, float, float]]:
    """The scheduler with each step's time and the next one, from 1 to 0."""
    if not 1 <= num_steps <= 50:
        raise ValueError(f"num_steps={num_steps}: expected 1 to 50.")
    # shift stays 1 and the sigmas are given: the scheduler would otherwise shift them twice (diffusers #13243).
    scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0)
    scheduler.set_timesteps(sigmas=[1 - i / num_steps for i in range(num_steps)])
    scheduler.set_begin_index(0)
    times = [float(s) for s in scheduler.sigmas]
    return [(scheduler, time, following) for time, following in pairwise(times)]


def _scheduled_step(scheduler: FlowMatchEulerDiscreteScheduler, state: Tensor, clean: Tensor, time: float) -> Tensor:
    """One Euler step along the velocity `(x_t - x0) / t`."""
    velocity = (state - clean) / time
    return scheduler.step(velocity, torch.tensor(time * 1000.0), state).prev_sample

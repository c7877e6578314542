"""Image decoder: conditional U-Nets that reconstruct and segment by bridges, with data consistency inside.

Reconstruction walks from the SENSE image to the image (I2SB, arXiv 2302.05872; InDI, arXiv 2303.11435);
segmentation from neutral masks to masks in [-1, 1]. A trunk predicts the clean image `x0`; a diffusers scheduler
takes the step. What to do comes from the backbone's query states; the image itself by channels and by the Swin
pyramid, since fine detail would not survive the backbone.

Each bridge has its own trunk: what removes aliasing and what tells tissues apart share little, and one trunk for both
learned reconstruction more slowly.

Reconstruction goes slice by slice: that is how most data are acquired, and a volume that was encoded in two phase
directions comes apart into slices by a Fourier transform along its readout. Segmentation goes slice by slice or, with
`segment_dims=3`, by volume: its trunk then takes patches of some slices, and `segment_volume` slides it over a volume.

Several prompts about one image share one pass: each writes its mask into, and reads its logit from, the trunk's
feature maps through a vector of its own (as MaskFormer, arXiv 2107.06278, reads its masks).
"""

# B slices or patches, D slices of a patch, H W in-plane voxels, C coils, M mask channels, N prompts, K query states,
# P condition width, S voxels of a slice or patch

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from einops import rearrange
from monai.inferers import sliding_window_inference
from torch import Tensor, nn

from omnimri.models.config import ImageDecoderConfig
from omnimri.models.physics import SenseOperator, data_consistency
from omnimri.models.trunk import ConditionalUNet

_COMPLEX = 2  # channels of a complex image: real and imaginary part
_INPUT_SCALE = 3.0
"""Slices are scaled to a maximum of one; tissue lies near a third of it."""
_RESIDUAL_SCALE = 0.1
"""What SENSE leaves to mend is a few hundredths: an output of order one is scaled down to it."""


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
    """Two bridges, each with its trunk, behind one condition."""

    def __init__(
        self,
        config: ImageDecoderConfig,
        condition_dim: int,
        pyramid_channels: tuple[int, ...],
        pyramid_depths: tuple[int, ...] = (1, 2, 4, 8, 8),
    ) -> None:
        """Build both trunks.

        Args:
            config: Of this part.
            condition_dim: Width of a query state.
            pyramid_channels: Of the Swin maps.
            pyramid_depths: Slices that a voxel of each of them covers.
        """
        super().__init__()
        self.config = config
        trunk = partial(
            ConditionalUNet,
            channels=config.channels,
            condition_dim=condition_dim,
            pyramid_channels=pyramid_channels,
            num_heads=config.num_heads,
        )
        self.reconstruct_trunk = trunk(2 * _COMPLEX, _COMPLEX)
        nn.init.zeros_(self.reconstruct_trunk.last.weight)  # starts where the data are
        nn.init.zeros_(self.reconstruct_trunk.last.bias)
        if config.segment_dims == 3:
            # The last two maps have one stride, and the trunk's levels have none in common.
            trunk = partial(
                trunk, spatial_dims=3, flat_levels=config.flat_levels,
                pyramid_channels=pyramid_channels[:-1], pyramid_depths=pyramid_depths[:-1],
            )  # fmt: skip
        self.segment_trunk = trunk(config.mask_channels + 1, config.mask_channels)
        # A module, since ZeRO-3 gathers parameters where one is called.
        self.mask_tokens = nn.Embedding(config.mask_channels, condition_dim)
        self.prompt = nn.Sequential(nn.LayerNorm(condition_dim), nn.Linear(condition_dim, 2 * config.mask_channels + 1))

    def predict_image(
        self, state: Tensor, time: Tensor, measured: Measurement, condition: Tensor, pyramid: list[Tensor],
        *, consistent: bool = True,
    ) -> Tensor:  # fmt: skip
        """Clean complex image `x0` `(B, H, W)`: the start plus a residual, then data consistency in float32."""
        shown = _INPUT_SCALE * torch.cat([as_channels(state), as_channels(measured.initial)], dim=1)
        residual = _RESIDUAL_SCALE * self.reconstruct_trunk(shown, time, condition, pyramid)
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
        """Mask logits `(B, N, [D,] H, W)` of N prompts.

        The trunk sees the image and reads tokens of its own; a prompt chooses from its features (as MaskFormer's
        queries do, arXiv 2107.06278). So a mask does not depend on what else is asked for, but for what the states of
        all prompts write into the trunk from the second step on.

        Args:
            state: `(B, N, [D,] H, W)`.
            image: `(B, [D,] H, W)`: slices, or patches for a decoder of three dimensions.
            time: `(B,)`.
            condition: `(B, N, K, P)`.
            pyramid: As in `forward`.
        """
        write, read, offset = self.prompt(condition.mean(2)).split([self.config.mask_channels] * 2 + [1], dim=-1)
        written = torch.einsum("bns,bnm->bms", state.flatten(2), write).unflatten(2, image.shape[1:])
        shown = torch.cat([written, image[:, None]], dim=1)
        tokens = self.mask_tokens(torch.arange(self.config.mask_channels, device=shown.device))
        features = self.segment_trunk(shown, time, tokens.expand(len(shown), -1, -1), pyramid)
        logit = torch.einsum("bms,bnm->bns", features.flatten(2).float(), read.float()) + offset.float()
        return logit.unflatten(2, image.shape[1:])

    @torch.no_grad()
    def reconstruct(
        self, measured: Measurement, condition: Tensor, pyramid: list[Tensor],
        *, num_steps: int,
    ) -> Tensor:  # fmt: skip
        """Walk the bridge from its start; complex `(B, H, W)`."""
        state = measured.initial
        batch = state.shape[0]
        for scheduler, time in _steps(num_steps):
            clean = self.predict_image(state, state.real.new_full((batch,), time), measured, condition, pyramid)
            stepped = _scheduled_step(scheduler, as_channels(state), as_channels(clean), time)
            state = torch.complex(stepped[:, 0], stepped[:, 1])
        return state

    @torch.no_grad()
    def segment(
        self, image: Tensor, condition: Tensor, pyramid: list[Tensor],
        *, num_steps: int,
    ) -> Tensor:  # fmt: skip
        """Walk the bridge from neutral masks; probabilities `(B, N, [D,] H, W)` for `condition` `(B, N, K, P)`."""
        state = image.new_zeros(image.shape[0], condition.shape[1], *image.shape[1:])
        for scheduler, time in _steps(num_steps):
            logit = self.predict_mask(state, image, image.new_full((image.shape[0],), time), condition, pyramid)
            clean = torch.tanh(logit / 2)
            state = _scheduled_step(scheduler, state, clean, time)
        return (state + 1) / 2

    @torch.no_grad()
    def segment_volume(
        self, volume: Tensor, condition: Tensor, pyramid_of: Callable[[Tensor], list[Tensor]],
        *, patch_shape: tuple[int, int, int], num_steps: int,
    ) -> Tensor:  # fmt: skip
        """Slide a window over a volume, walk the whole bridge in each, and blend what they find by Gaussian weights.

        What is smaller than the window is centred in its darkest value, as in training.

        Args:
            volume: `(D, H, W)`, of any size.
            condition: `(N, K, P)`.
            pyramid_of: Swin maps of patches `(B, D, H, W)`.
            patch_shape: Of the window.
            num_steps: Of the bridge.

        Returns:
            Probabilities `(N, D, H, W)`.
        """

        def predict(patches: Tensor) -> Tensor:
            seen = patches[:, 0]
            return self.segment(seen, condition.expand(len(seen), -1, -1, -1), pyramid_of(seen), num_steps=num_steps)

        return sliding_window_inference(
            volume[None, None], patch_shape, 1, predict,
            overlap=self.config.patch_overlap, mode="gaussian", cval=float(volume.min()),
        )[0]  # fmt: skip


def bridge_state(clean: Tensor, start: Tensor, time: Tensor, noise: float) -> Tensor:
    """`x_t = (1 - t) x0 + t x1 + s sqrt(t (1 - t)) eps` (I2SB eq. 6, constant s); real or complex `(B, ...)`."""
    t = time.reshape(-1, *(1,) * (clean.ndim - 1))
    spread = noise * (t * (1 - t)).clamp_min(0).sqrt()
    return (1 - t) * clean + t * start + spread * torch.randn_like(clean)


def as_channels(image: Tensor) -> Tensor:
    """Complex `(B, H, W)` as real `(B, 2, H, W)`."""
    return rearrange(torch.view_as_real(image), "b h w c -> b c h w")


def _steps(num_steps: int) -> list[tuple[FlowMatchEulerDiscreteScheduler, float]]:
    """The scheduler with the time of each step, from 1 down to above 0."""
    if not 1 <= num_steps <= 50:
        raise ValueError(f"num_steps={num_steps}: expected 1 to 50.")
    # shift stays 1 and the sigmas are given: the scheduler would otherwise shift them twice (diffusers #13243).
    scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0)
    scheduler.set_timesteps(sigmas=[1 - i / num_steps for i in range(num_steps)])
    scheduler.set_begin_index(0)
    times = [float(s) for s in scheduler.sigmas]
    return [(scheduler, time) for time in times[:-1]]


def _scheduled_step(scheduler: FlowMatchEulerDiscreteScheduler, state: Tensor, clean: Tensor, time: float) -> Tensor:
    """One Euler step along the velocity `(x_t - x0) / t`."""
    velocity = (state - clean) / time
    return scheduler.step(velocity, torch.tensor(time * 1000.0), state).prev_sample

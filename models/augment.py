"""Random changes of a volume that an MR scanner could have made, each with its share and its size.

Contrast curve, receive field, noise, gain, resolution and motion between phase-encoding lines; the anatomy stays where
it is.
"""

# B batch, D H W voxels

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from omnimri.models.physics import fft2c, ifft2c


@dataclass(frozen=True, kw_only=True)
class AugmentConfig:
    """Sizes of the changes; zero leaves one out."""

    gamma: float = 0.25
    """Standard deviation of the logarithm of the contrast curve's exponent."""
    field: float = 0.15
    """Standard deviation of the logarithm of the smooth receive field."""
    gain: float = 0.1
    """Standard deviation of a factor about one."""
    noise: float = 0.03
    """Largest standard deviation of the noise, in shares of the volume's range."""
    resolution_share: float = 0.2
    """Share of views that lose resolution."""
    coarsest: float = 2.0
    """Largest factor of their coarser voxels, drawn per in-plane axis."""
    motion_share: float = 0.1
    """Share of views in which the patient moves."""
    motion_voxels: float = 1.5
    """Standard deviation of a movement, per in-plane axis, in voxels."""
    movements: int = 3
    """Times that the patient moves while the lines of a slice are acquired."""

    def __post_init__(self) -> None:
        for name in ("resolution_share", "motion_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"AugmentConfig.{name} must be between 0 and 1, found {getattr(self, name)}.")
        if self.coarsest < 1:
            raise ValueError(f"AugmentConfig.coarsest must be at least 1, found {self.coarsest}.")


def augment(volume: Tensor, config: AugmentConfig | None = None) -> Tensor:
    """One random view of each standardised volume `(B, 1, D, H, W)`."""
    config = config or AugmentConfig()
    batch = volume.shape[0]
    shape = (batch, 1, 1, 1, 1)
    low = volume.amin(dim=(1, 2, 3, 4), keepdim=True)
    span = (volume.amax(dim=(1, 2, 3, 4), keepdim=True) - low).clamp_min(1e-6)
    unit = (volume - low) / span
    gamma = torch.exp(config.gamma * torch.randn(shape, device=volume.device))
    field = F.interpolate(torch.randn(batch, 1, 2, 3, 3, device=volume.device), size=volume.shape[2:],
                          mode="trilinear", align_corners=True)  # fmt: skip
    gain = 1 + config.gain * torch.randn(shape, device=volume.device)
    view = unit.clamp_min(1e-6) ** gamma * torch.exp(config.field * field) * gain
    view = _some(view, config.motion_share, lambda v: with_motion(v, config.motion_voxels, config.movements))
    view = _some(view, config.resolution_share, lambda v: at_lower_resolution(v, config.coarsest))
    noise = config.noise * torch.rand(shape, device=volume.device) * torch.randn_like(view)
    return (view + noise) * span + low


def _some(view: Tensor, share: float, change: Callable[[Tensor], Tensor]) -> Tensor:
    """A change of randomly drawn views `(B, ...)`; the others are not computed."""
    drawn = torch.rand(len(view), device=view.device) < share if share else torch.zeros(len(view), dtype=torch.bool)
    if not drawn.any():
        return view
    changed = view.clone()
    changed[drawn] = change(view[drawn])
    return changed


def at_lower_resolution(volume: Tensor, coarsest: float) -> Tensor:
    """In-plane k-space cut to the part that voxels 1 to `coarsest` times as large would have needed.

    That is what a scanner does: no aliasing, and ringing at sharp edges. Volumes `(B, 1, D, H, W)`, one draw for each.
    """
    kspace = fft2c(volume.to(torch.complex64))
    for axis in (-2, -1):
        factor = 1 + (coarsest - 1) * torch.rand(len(volume), device=volume.device)
        size = volume.shape[axis]
        distance = (torch.arange(size, device=volume.device) - size // 2).abs()
        kept = distance[None] <= size / 2 / factor[:, None]
        kspace = kspace * kept.reshape(len(volume), 1, 1, *((size, 1) if axis == -2 else (1, size)))
    return ifft2c(kspace).real


def with_motion(volume: Tensor, voxels: float, movements: int) -> Tensor:
    """Ghosts and blur of a patient who moves while the phase-encoding lines are acquired one after the other.

    A shift of the object is a phase ramp of its k-space. Lines run along the last axis, in their order; the middle
    third, which holds the contrast, is acquired at rest. Magnitudes `(B, 1, D, H, W)`; all slices of one volume move
    alike.
    """
    batch, _, _, height, width = volume.shape
    device = volume.device
    lines = torch.arange(width, device=device)
    starts = torch.randint(width, (batch, movements), device=device)
    position = (lines[None, None] >= starts[..., None]).sum(1)  # (B, W), counts the movements so far
    places = torch.randn(batch, movements + 1, 2, device=device) * voxels
    shift = places.gather(1, position[..., None].expand(-1, -1, 2))  # (B, W, 2)
    rest = (lines - width // 2).abs() < width / 6
    shift = torch.where(rest[None, :, None], 0.0, shift)
    ky = (torch.arange(height, device=device) - height // 2) / height
    kx = (lines - width // 2) / width
    turns = ky[None, :, None] * shift[:, None, :, 0] + kx[None, None] * shift[:, None, :, 1]
    ramp = torch.polar(torch.ones_like(turns), -2 * math.pi * turns)
    return ifft2c(fft2c(volume.to(torch.complex64)) * ramp[:, None, None]).abs()


def local_crop(volume: Tensor) -> Tensor:
    """A part of half the height and width of volumes `(B, 1, D, H, W)`, at a random place that the batch shares."""
    height, width = volume.shape[-2] // 2, volume.shape[-1] // 2
    top, left = (int(torch.randint(size + 1, ())) for size in (height, width))
    return volume[..., top : top + height, left : left + width]

"""Random changes of a volume that an MR scanner could have made: contrast curve, receive field, noise, gain."""

# B batch, D H W voxels

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def augment(volume: Tensor) -> Tensor:
    """One random view of each standardised volume `(B, 1, D, H, W)`; the anatomy stays where it is."""
    batch = volume.shape[0]
    shape = (batch, 1, 1, 1, 1)
    low = volume.amin(dim=(1, 2, 3, 4), keepdim=True)
    span = (volume.amax(dim=(1, 2, 3, 4), keepdim=True) - low).clamp_min(1e-6)
    unit = (volume - low) / span
    gamma = torch.exp(0.25 * torch.randn(shape, device=volume.device))
    field = F.interpolate(torch.randn(batch, 1, 2, 3, 3, device=volume.device), size=volume.shape[2:],
                          mode="trilinear", align_corners=True)  # fmt: skip
    gain = 1 + 0.1 * torch.randn(shape, device=volume.device)
    view = unit.clamp_min(1e-6) ** gamma * torch.exp(0.15 * field) * gain
    noise = 0.03 * torch.rand(shape, device=volume.device) * torch.randn_like(view)
    return (view + noise) * span + low

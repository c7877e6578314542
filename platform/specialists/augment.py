"""Random changes of slices that keep their labels: turned, scaled, shifted, mirrored; and what a scanner may change."""

# B slices, C neighbouring slices, N masks, H W voxels

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from omnimri.models.augment import augment as change_contrast

MAX_TURN = math.radians(15)
MAX_SHIFT = 0.08
"""Of half the slice."""
SCALES = (0.85, 1.2)


def augment_slices(slices: Tensor, masks: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """One random view of each stack of neighbouring slices, and its masks moved alike.

    Args:
        slices: Standardised, `(B, C, H, W)`.
        masks: Float `(B, N, H, W)`.
    """
    grid = F.affine_grid(_transforms(len(slices)), [len(slices), 1, *slices.shape[-2:]], align_corners=False)
    # Zero outside is the background, so the slices are lifted by their minimum while they are moved.
    low = slices.amin(dim=(1, 2, 3), keepdim=True)
    moved = F.grid_sample(slices - low, grid, mode="bilinear", align_corners=False) + low
    changed = change_contrast(moved[:, None])[:, 0]
    return changed, None if masks is None else F.grid_sample(masks, grid, mode="nearest", align_corners=False)


def _transforms(count: int) -> Tensor:
    """Random affine matrices `(B, 2, 3)`."""
    turn = (2 * torch.rand(count) - 1) * MAX_TURN
    scale = torch.empty(count).uniform_(*SCALES)
    mirror = torch.where(torch.rand(count) < 0.5, -1.0, 1.0)
    shift = (2 * torch.rand(count, 2) - 1) * MAX_SHIFT
    cosine, sine = torch.cos(turn) / scale, torch.sin(turn) / scale
    rows = [torch.stack([cosine * mirror, -sine, shift[:, 0]], 1), torch.stack([sine * mirror, cosine, shift[:, 1]], 1)]
    return torch.stack(rows, dim=1)

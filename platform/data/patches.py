"""Patches of a volume for networks of three dimensions: where they lie, and how they are cut."""

# D slices of a volume, H W pixels of the slice grid

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from omnimri.models.resample import pad_or_crop

Shape = tuple[int, int, int]


def draw_corners(foreground: np.ndarray, patch_shape: Shape, count: int, rng: np.random.Generator) -> list[Shape]:
    """First voxels `z y x` of patches: half of them about a voxel of the foreground, the others anywhere.

    nnU-Net's oversampling of the foreground, which takes a third. Of an odd number the larger half is centred. A patch
    stays inside the volume; along axes where the volume is smaller it begins at the first voxel.

    Args:
        foreground: Bool `(D, H, W)`; where there is none, all patches lie anywhere.
        patch_shape: Of a patch.
        count: Of patches.
        rng: Draws them.
    """
    last = np.maximum(np.array(foreground.shape) - patch_shape, 0)
    corners = rng.integers(0, last + 1, size=(count, 3))
    voxels = np.argwhere(foreground)
    if len(voxels):
        centred = (count + 1) // 2
        corners[:centred] = voxels[rng.integers(len(voxels), size=centred)] - np.array(patch_shape) // 2
    return [tuple(corner) for corner in np.clip(corners, 0, last).tolist()]


def cut_patches(volume: torch.Tensor, corners: Sequence[Shape], patch_shape: Shape, background: float) -> torch.Tensor:
    """Patches `(S, *patch_shape)` of a volume `(D, H, W)`; what is smaller is centred in the background."""
    patches = []
    for corner in corners:
        inside = tuple(slice(start, start + size) for start, size in zip(corner, patch_shape, strict=True))
        patches.append(pad_or_crop(volume[inside], patch_shape, background))
    return torch.stack(patches)

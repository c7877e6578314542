"""Undersampling in retrospect: the same for training, for specialists and for callers of the server who ask for it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from omnimri.models.physics import (
    SenseOperator,
    estimate_sens_maps,
    ifft2c,
    root_sum_of_squares,
    undersampling_mask,
)
from omnimri.models.preprocess import scale_kspace
from omnimri.models.scan import Scan


def center_fraction_for(acceleration: int) -> float:
    """Share of fully sampled centre lines, as fastMRI pairs them: 8 % up to fourfold, 4 % beyond."""
    return 0.08 if acceleration <= 4 else 0.04


def undersample(scan: Scan, *, acceleration: int, kind: str, seed: int) -> Scan:
    """A fully sampled scan as if only some phase-encoding lines had been acquired; its image becomes zero-filled.

    Args:
        scan: With k-space.
        acceleration: Lines over lines kept; the centre is as `center_fraction_for` says.
        kind: `equispaced` or `random`, of `physics.undersampling_mask`.
        seed: Of the mask.

    Raises:
        ValueError: If there is no k-space, or its lines are too few for the acceleration.
    """
    if scan.kspace is None:
        raise ValueError("undersample: the scan holds no k-space.")
    mask = undersampling_mask(
        scan.kspace.shape[-1],
        acceleration=acceleration,
        center_fraction=center_fraction_for(acceleration),
        kind=kind,
        seed=seed,
    )
    kspace = scan.kspace * mask
    image = root_sum_of_squares(ifft2c(torch.from_numpy(kspace))).numpy()
    return replace(scan, image=image, kspace=kspace, mask=mask)


def reconstruction_arrays(scan: Scan, slices: np.ndarray, sens_maps: str = "acs") -> dict[str, np.ndarray]:
    """Measured k-space, mask and coil maps of some slices, with the scale they were divided by."""
    assert scan.kspace is not None
    assert scan.mask is not None
    kspace = torch.from_numpy(scan.kspace[slices])
    mask = torch.from_numpy(scan.mask)
    maps = estimate_sens_maps(kspace, mask, method=sens_maps)
    scaled, scale = scale_kspace(kspace, SenseOperator(maps, mask))
    return {
        "kspace": scaled.numpy(),
        "mask": np.repeat(scan.mask[None], len(slices), axis=0),
        "sens_maps": maps.numpy(),
        "scale": scale.numpy(),
    }

"""Views of stage 1: what each change does to a volume, and what it leaves."""

import math

import pytest
import torch

from omnimri.models.augment import AugmentConfig, at_lower_resolution, augment, local_crop, with_motion
from omnimri.models.physics import fft2c

NONE = AugmentConfig(gamma=0, field=0, gain=0, noise=0, resolution_share=0, motion_share=0)


@pytest.fixture
def volume() -> torch.Tensor:
    """Two magnitudes `(2, 1, 3, 24, 20)` with air about them."""
    torch.manual_seed(0)
    y, x = torch.meshgrid(torch.linspace(-1, 1, 24), torch.linspace(-1, 1, 20), indexing="ij")
    inside = (y**2 + x**2 < 0.6).float()
    return inside * (1 + torch.rand(2, 1, 3, 24, 20))


def test_without_any_change_a_view_is_the_volume(volume: torch.Tensor) -> None:
    torch.testing.assert_close(augment(volume, NONE), volume, rtol=1e-4, atol=1e-4)


def test_lower_resolution_empties_the_rim_of_kspace_and_keeps_the_mean(volume: torch.Tensor) -> None:
    torch.manual_seed(1)
    coarse = at_lower_resolution(volume, 3.0)
    torch.testing.assert_close(coarse.mean((-2, -1)), volume.mean((-2, -1)), rtol=1e-4, atol=1e-4)
    before, after = (fft2c(v.to(torch.complex64)).abs().square() for v in (volume, coarse))
    assert (after[..., 0, :].sum() + after[..., :, 0].sum()) < 1e-6 * after.sum()
    assert (after.sum((1, 2, 3, 4)) < before.sum((1, 2, 3, 4))).all()
    torch.testing.assert_close(at_lower_resolution(volume, 1.0), volume, rtol=1e-4, atol=1e-4)


def test_motion_makes_ghosts_and_keeps_contrast_and_energy(volume: torch.Tensor) -> None:
    """Phase ramps change no sample's size, so that what leaves the object stands beside it."""
    torch.manual_seed(2)
    moved = with_motion(volume, 1.5, 3)
    energy = [v.square().sum((1, 2, 3, 4)) for v in (moved, volume)]
    torch.testing.assert_close(energy[0], energy[1], rtol=1e-4, atol=1e-4)
    air = volume == 0
    assert moved[air].mean() > 0.02
    inside = ~air
    assert torch.corrcoef(torch.stack([moved[inside], volume[inside]]))[0, 1] > 0.3
    torch.testing.assert_close(with_motion(volume, 0.0, 3), volume, rtol=1e-3, atol=1e-4)


def test_shares_are_those_of_the_views() -> None:
    torch.manual_seed(3)
    volume = torch.rand(200, 1, 1, 16, 16)
    config = AugmentConfig(gamma=0, field=0, gain=0, noise=0, resolution_share=0.0, motion_share=0.25)
    changed = (augment(volume, config) - volume).abs().amax((1, 2, 3, 4)) > 1e-3
    assert math.isclose(changed.float().mean(), 0.25, abs_tol=0.1)
    with pytest.raises(ValueError, match="motion_share must be between 0 and 1, found 2"):
        AugmentConfig(motion_share=2)


def test_local_crops_are_parts_of_the_volume(volume: torch.Tensor) -> None:
    torch.manual_seed(4)
    crop = local_crop(volume)
    assert crop.shape == (2, 1, 3, 12, 10)
    parts = volume.unfold(-2, 12, 1).unfold(-2, 10, 1)
    assert (parts == crop[:, :, :, None, None]).flatten(5).all(-1).all(0).all(0).all(0).any()

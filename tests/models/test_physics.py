"""Identities that the physics must keep, whatever the data."""

import numpy as np
import pytest
import torch

from omnimri.models.physics import (
    SenseOperator,
    center_lines,
    cg_sense,
    compress_coils,
    data_consistency,
    estimate_sens_maps,
    fft2c,
    ifft2c,
    relative_residual,
    root_sum_of_squares,
    undersampling_mask,
)


def complex_normal(rng: torch.Generator, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.complex64, generator=rng)


def unit_maps(rng: torch.Generator, coils: int, height: int, width: int) -> torch.Tensor:
    """Smooth coil maps with root sum of squares one."""
    y, x = torch.meshgrid(torch.linspace(-1, 1, height), torch.linspace(-1, 1, width), indexing="ij")
    centres = 1.2 * torch.randn(coils, 2, generator=rng)
    magnitude = torch.stack([torch.exp(-((y - cy) ** 2 + (x - cx) ** 2) / 2) for cy, cx in centres])
    phase = torch.stack([cy * y + cx * x for cy, cx in centres])
    maps = torch.polar(magnitude, phase)
    return maps / root_sum_of_squares(maps)


@pytest.mark.parametrize("shape", [(8, 10), (9, 7)])
def test_fft_preserves_energy_and_inverts(rng: torch.Generator, shape: tuple[int, int]) -> None:
    image = complex_normal(rng, 2, *shape)
    torch.testing.assert_close(fft2c(image).abs().square().sum(), image.abs().square().sum())
    torch.testing.assert_close(ifft2c(fft2c(image)), image)


def test_fft_is_centred() -> None:
    """A constant image is a single peak at the middle index."""
    kspace = fft2c(torch.ones(8, 8, dtype=torch.complex64))
    assert int(kspace.abs().argmax()) == 4 * 8 + 4
    torch.testing.assert_close(kspace.abs().sum(), torch.tensor(8.0))


def test_sense_operator_is_adjoint(rng: torch.Generator) -> None:
    operator = SenseOperator(complex_normal(rng, 3, 4, 12, 10), torch.rand(10, generator=rng) < 0.5)
    image, kspace = complex_normal(rng, 3, 12, 10), complex_normal(rng, 3, 4, 12, 10)
    left = torch.vdot(kspace.flatten(), operator.forward(image).flatten())
    right = torch.vdot(operator.adjoint(kspace).flatten(), image.flatten())
    torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-4)


def test_fully_sampled_unit_maps_give_identity(rng: torch.Generator) -> None:
    operator = SenseOperator(unit_maps(rng, 4, 16, 16), torch.tensor(True))
    image = complex_normal(rng, 1, 16, 16)
    torch.testing.assert_close(operator.normal(image), image, rtol=1e-4, atol=1e-5)


def test_cg_sense_recovers_the_image_from_twofold_noiseless_data(rng: torch.Generator) -> None:
    maps = unit_maps(rng, 6, 32, 32)[None]
    y, x = torch.meshgrid(torch.linspace(-1, 1, 32), torch.linspace(-1, 1, 32), indexing="ij")
    image = ((y**2 + x**2) < 0.6).to(torch.complex64)[None]
    operator = SenseOperator(maps, torch.arange(32) % 2 == 0)
    recovered = cg_sense(operator.forward(image), operator, weight=1e-6, num_steps=60)
    assert (recovered - image).abs().max() < 0.02


def test_data_consistency_moves_towards_the_measurement_and_keeps_a_solution(rng: torch.Generator) -> None:
    operator = SenseOperator(unit_maps(rng, 4, 16, 16)[None], torch.arange(16) % 2 == 0)
    truth, guess = complex_normal(rng, 1, 16, 16), complex_normal(rng, 1, 16, 16)
    kspace = operator.forward(truth)
    before = relative_residual(guess, kspace, operator)
    after = relative_residual(data_consistency(guess, kspace, operator), kspace, operator)
    assert float(after) < 0.2 * float(before)
    torch.testing.assert_close(data_consistency(truth, kspace, operator), truth, rtol=1e-3, atol=1e-4)


def test_data_consistency_is_differentiable(rng: torch.Generator) -> None:
    operator = SenseOperator(unit_maps(rng, 4, 8, 8)[None], torch.arange(8) % 2 == 0)
    guess = complex_normal(rng, 1, 8, 8).requires_grad_()
    data_consistency(guess, operator.forward(complex_normal(rng, 1, 8, 8)), operator).abs().sum().backward()
    assert torch.isfinite(torch.view_as_real(guess.grad)).all()


@pytest.mark.parametrize("kind", ["equispaced", "random"])
@pytest.mark.parametrize(("acceleration", "center_fraction"), [(4, 0.08), (8, 0.04)])
def test_masks_keep_the_centre_and_the_mean_rate(kind: str, acceleration: int, center_fraction: float) -> None:
    options = {"acceleration": acceleration, "center_fraction": center_fraction, "kind": kind}
    masks = np.stack([undersampling_mask(96, seed=seed, **options) for seed in range(300)])
    center = round(96 * center_fraction)
    start = (96 - center + 1) // 2
    assert masks[:, start : start + center].all()
    assert masks.sum(1).mean() == pytest.approx(96 / acceleration, rel=0.1)
    assert np.array_equal(masks[7], undersampling_mask(96, seed=7, **options))


def test_unknown_mask_kind_names_the_known_ones() -> None:
    with pytest.raises(ValueError, match="known: equispaced, random"):
        undersampling_mask(96, acceleration=4, center_fraction=0.08, kind="spiral")


def test_center_lines_stop_at_the_first_gap() -> None:
    mask = torch.zeros(16, dtype=torch.bool)
    mask[[1, 6, 7, 8, 9, 12]] = True
    assert center_lines(mask).nonzero().flatten().tolist() == [6, 7, 8, 9]


def test_sens_maps_from_the_centre_match_the_true_coils(rng: torch.Generator) -> None:
    """Up to the phase that all coils share, in the middle of a smooth object."""
    maps = unit_maps(rng, 4, 48, 48)
    y, x = torch.meshgrid(torch.linspace(-1, 1, 48), torch.linspace(-1, 1, 48), indexing="ij")
    image = ((y**2 + x**2) < 0.7).to(torch.complex64)
    kspace = fft2c(maps * image)[None]
    mask = torch.zeros(48, dtype=torch.bool)
    mask[18:30] = True
    estimated = estimate_sens_maps(kspace * mask, mask)[0]
    inside = (y**2 + x**2) < 0.3
    agreement = (estimated.conj() * maps).sum(0).abs()[inside]
    assert float(agreement.min()) > 0.98
    torch.testing.assert_close(root_sum_of_squares(estimated)[inside], torch.ones(int(inside.sum())))


def test_sens_maps_without_a_centre_say_what_to_do() -> None:
    with pytest.raises(ValueError, match="raise center_fraction"):
        estimate_sens_maps(torch.zeros(1, 2, 8, 8, dtype=torch.complex64), torch.zeros(8, dtype=torch.bool))


def test_compression_of_coils_that_repeat_each_other_loses_nothing(rng: torch.Generator) -> None:
    """Twelve coils that are mixtures of three are three, and the root sum of squares stays the same."""
    independent = complex_normal(rng, 4, 3, 16, 12)
    mixing, _ = torch.linalg.qr(complex_normal(rng, 12, 3))
    kspace = torch.einsum("ck,zkyx->zcyx", mixing, independent)
    compressed = compress_coils(kspace, 3)
    assert compressed.shape == (4, 3, 16, 12)
    torch.testing.assert_close(
        root_sum_of_squares(ifft2c(compressed)), root_sum_of_squares(ifft2c(kspace)), rtol=1e-4, atol=1e-5
    )
    energy = compressed.abs().square().sum((0, 2, 3))
    assert (energy[:-1] >= energy[1:]).all()


def test_compression_keeps_the_strongest_combinations(rng: torch.Generator) -> None:
    """No other orthonormal combination of as many coils holds more energy; with all of them nothing changes."""
    kspace = complex_normal(rng, 3, 6, 10, 8) * torch.logspace(0, -2, 6)[:, None, None]
    kept = compress_coils(kspace, 2).abs().square().sum()
    for _ in range(20):
        other, _ = torch.linalg.qr(complex_normal(rng, 6, 2))
        assert torch.einsum("ck,zcyx->zkyx", other.conj(), kspace).abs().square().sum() <= kept * 1.0001
    assert compress_coils(kspace, 6) is kspace

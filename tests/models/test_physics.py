"""Identities that the physics must keep, whatever the data."""

import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from sigpy.mri import birdcage_maps
from sigpy.mri.linop import Sense
from sigpy.sim import shepp_logan

from omnimri.models.physics import (
    SenseOperator,
    center_lines,
    cg_sense,
    compress_coils,
    data_consistency,
    decouple_readout,
    estimate_sens_maps,
    fft2c,
    fftc,
    hard_data_consistency,
    ifft2c,
    ifftc,
    partial_fourier,
    relative_residual,
    root_sum_of_squares,
    shifted_lines,
    simulated_acquisition,
    symmetric_lines,
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


def fastmri_random(num_cols: int, acceleration: int, num_low: int, draws: np.ndarray) -> np.ndarray:
    """FastMRI's `RandomMaskFunc`, written out, for given uniform draws."""
    prob = (num_cols / acceleration - num_low) / (num_cols - num_low)
    return np.maximum(fastmri_center(num_cols, num_low), draws < prob)


def fastmri_equispaced(num_cols: int, acceleration: int, num_low: int, offset: int) -> np.ndarray:
    """FastMRI's `EquispacedMaskFractionFunc`, written out, for a given offset."""
    adjusted = (acceleration * (num_low - num_cols)) / (num_low * acceleration - num_cols)
    mask = fastmri_center(num_cols, num_low)
    mask[np.around(np.arange(offset, num_cols - 1, adjusted)).astype(np.uint)] = True
    return mask


def fastmri_center(num_cols: int, num_low: int) -> np.ndarray:
    pad = (num_cols - num_low + 1) // 2
    return (np.arange(num_cols) >= pad) & (np.arange(num_cols) < pad + num_low)


CONDITIONS = [(a, c) for c in (0.08, 0.04) for a in (2, 4, 6, 8, 12)]


@pytest.mark.parametrize("num_lines", [320, 368, 217])
@pytest.mark.parametrize(("acceleration", "center_fraction"), CONDITIONS)
def test_masks_are_those_of_fastmri(num_lines: int, acceleration: int, center_fraction: float) -> None:
    """Equispaced masks are the ones of fastMRI's offsets, all of them; random ones follow fastMRI from the draws on."""
    num_low = round(num_lines * center_fraction)
    options = {"acceleration": acceleration, "center_fraction": center_fraction}
    adjusted = (acceleration * (num_low - num_lines)) / (num_low * acceleration - num_lines)
    expected = {
        fastmri_equispaced(num_lines, acceleration, num_low, offset).tobytes() for offset in range(round(adjusted))
    }
    num_seeds = 30 * min(round(adjusted), 20)
    found = {undersampling_mask(num_lines, seed=seed, **options).tobytes() for seed in range(num_seeds)}
    assert found <= expected
    assert found == expected or round(adjusted) > 20
    for seed in range(5):
        draws = np.random.default_rng(seed).random(num_lines)
        mask = undersampling_mask(num_lines, seed=seed, kind="random", **options)
        np.testing.assert_array_equal(mask, fastmri_random(num_lines, acceleration, num_low, draws))


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


def birdcage_phantom(size: int = 128, num_coils: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    """SigPy's birdcage maps `(C, Y, X)` and a Shepp-Logan phantom `(Y, X)` with a phase of its own."""
    y, x = np.mgrid[-1 : 1 : size * 1j, -1 : 1 : size * 1j]
    image = shepp_logan((size, size)) * np.exp(1j * (0.8 * x + 0.5 * y))
    maps = birdcage_maps((num_coils, size, size), dtype=np.complex64)
    return torch.from_numpy(maps), torch.from_numpy(image.astype(np.complex64))


def phantom_acquisition(center_fraction: float, rng: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Noisy k-space `(1, C, Y, X)` of the birdcage phantom, fourfold undersampled, and its mask."""
    maps, image = birdcage_phantom()
    kspace = fft2c(maps * image)
    kspace = kspace + 3e-4 * kspace.abs().max() * complex_normal(rng, *kspace.shape)
    mask = torch.from_numpy(undersampling_mask(128, acceleration=4, center_fraction=center_fraction, seed=1))
    return (kspace * mask)[None], mask


@pytest.mark.parametrize(("method", "median", "fifth"), [("acs", 0.999, 0.997), ("espirit", 0.9995, 0.998)])
def test_maps_of_the_birdcage_phantom(rng: torch.Generator, method: str, median: float, fifth: float) -> None:
    """From ten centre lines: cosine to the true maps (no common phase changes it), at median and 5th percentile."""
    maps, image = birdcage_phantom()
    kspace, mask = phantom_acquisition(0.08, rng)
    estimated = estimate_sens_maps(kspace, mask, method=method)[0]
    inside = image.abs() > 0.05
    agreement = (estimated.conj() * maps).sum(0).abs()[inside]
    assert agreement.median() > median
    assert agreement.quantile(0.05) > fifth
    torch.testing.assert_close(
        root_sum_of_squares(estimated)[inside], torch.ones(int(inside.sum())), rtol=1e-3, atol=1e-3
    )


@pytest.mark.parametrize("center_fraction", [0.08, 0.125])
def test_cg_sense_with_espirit_maps_is_no_worse(rng: torch.Generator, center_fraction: float) -> None:
    """Fourfold, at most 0.1 dB below the low-pass maps; mostly it is above them by a decibel or more."""
    _, image = birdcage_phantom()
    kspace, mask = phantom_acquisition(center_fraction, rng)
    errors = {}
    for method in ("acs", "espirit"):
        operator = SenseOperator(estimate_sens_maps(kspace, mask, method=method), mask)
        recovered = cg_sense(kspace, operator, weight=0.002, num_steps=20)[0].abs()
        errors[method] = float((recovered - image.abs()).square().mean())
    assert 10 * np.log10(errors["acs"] / errors["espirit"]) > -0.1


def test_espirit_maps_have_the_shape_of_the_others(rng: torch.Generator) -> None:
    """A batch with a mask each gives what each slice gives alone; a slice without signal has no maps."""
    kspace, mask = phantom_acquisition(0.125, rng)
    other = torch.from_numpy(undersampling_mask(128, acceleration=2, center_fraction=0.2, seed=3))
    batch = torch.cat([kspace * other, kspace, torch.zeros_like(kspace)])
    maps = estimate_sens_maps(batch, torch.stack([mask & other, mask, mask]), method="espirit")
    assert maps.shape == batch.shape
    assert maps.dtype == torch.complex64
    torch.testing.assert_close(maps[1], estimate_sens_maps(kspace, mask, method="espirit")[0])
    assert not maps[2].any()


def test_espirit_without_a_centre_says_what_to_do(rng: torch.Generator) -> None:
    mask = torch.zeros(32, dtype=torch.bool)
    mask[15:18] = True
    with pytest.raises(ValueError, match=r"needs 4 acquired lines .* found 3; raise center_fraction or set sens_maps"):
        estimate_sens_maps(complex_normal(rng, 1, 4, 32, 32) * mask, mask, method="espirit")
    with pytest.raises(ValueError, match="known: acs, espirit"):
        estimate_sens_maps(complex_normal(rng, 1, 4, 32, 32), mask, method="walsh")


@pytest.mark.parametrize("shape", [(24, 20), (15, 21)])
def test_sense_operator_is_that_of_sigpy(rng: torch.Generator, shape: tuple[int, int]) -> None:
    maps, mask = complex_normal(rng, 5, *shape), torch.rand(shape[1], generator=rng) < 0.5
    image, kspace = complex_normal(rng, *shape), complex_normal(rng, 5, *shape)
    ours = SenseOperator(maps[None], mask)
    theirs = Sense(maps.numpy(), weights=mask.expand(shape).numpy().astype(np.float32))
    np.testing.assert_allclose(ours.forward(image[None])[0], theirs(image.numpy()), atol=1e-5)
    np.testing.assert_allclose(ours.adjoint(kspace[None])[0], theirs.H(kspace.numpy()), atol=1e-5)


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


def test_shifted_lines_keep_the_centre_and_the_number() -> None:
    mask = torch.from_numpy(undersampling_mask(96, acceleration=4, center_fraction=0.08, seed=2))
    center = center_lines(mask)
    shifted = [shifted_lines(mask, shift) for shift in range(5)]
    assert all(other[center].all() and other.sum() == mask.sum() for other in shifted)
    torch.testing.assert_close(shifted[0], mask)
    assert len({tuple(other.tolist()) for other in shifted}) > 3


def test_a_simulated_acquisition_measures_the_image_with_the_noise_of_the_first(rng: torch.Generator) -> None:
    """Whatever the residual was, the new measurement differs from the noiseless one by as much per sample."""
    mask = torch.from_numpy(undersampling_mask(64, acceleration=2, center_fraction=0.2, seed=2))
    operator = SenseOperator(unit_maps(rng, 4, 64, 64).expand(2, -1, -1, -1), mask)
    image = complex_normal(rng, 2, 64, 64)
    size = torch.tensor([0.3, 0.02])[:, None, None, None]
    kspace = operator.forward(image) + size * complex_normal(rng, 2, 4, 64, 64) * mask
    measured, other = simulated_acquisition(image, kspace, operator, rng)
    assert not measured[..., ~other.mask].any()
    noise = (measured - other.forward(image))[..., other.mask]
    torch.testing.assert_close(noise.abs().square().mean((1, 2, 3)).sqrt(), size.flatten(), rtol=0.05, atol=0)
    exact, other = simulated_acquisition(image, operator.forward(image), operator, rng)
    torch.testing.assert_close(exact, other.forward(image), rtol=1e-4, atol=1e-4)


def volume_problem(rng: torch.Generator) -> tuple[torch.Tensor, torch.Tensor, SenseOperator]:
    """Two images `(2, Z, Y, X)`, their undersampled 3D k-space, and the forward model; Y is the readout."""
    maps = complex_normal(rng, 2, 4, 6, 10, 8)
    maps = maps / maps.abs().square().sum(1, keepdim=True).sqrt()
    mask = torch.rand(6, 1, 8, generator=rng) < 0.6
    operator = SenseOperator(maps, mask, spatial_dims=3)
    image = complex_normal(rng, 2, 6, 10, 8)
    return image, operator.forward(image), operator


def test_operator_in_three_dimensions_is_adjoint_and_that_of_sigpy(rng: torch.Generator) -> None:
    image, kspace, operator = volume_problem(rng)
    other = complex_normal(rng, *kspace.shape)
    left = torch.vdot(other.flatten(), operator.forward(image).flatten())
    right = torch.vdot(operator.adjoint(other).flatten(), image.flatten())
    torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-4)
    weights = operator.mask.expand(6, 10, 8).numpy().astype(np.float32)
    theirs = Sense(operator.sens_maps[0].numpy(), weights=weights)
    np.testing.assert_allclose(kspace[0], theirs(image[0].numpy()), atol=1e-5)
    assert relative_residual(image, kspace, operator).tolist() == [0.0, 0.0]


def test_volumes_are_solved_whole_and_along_the_readout_alike(rng: torch.Generator) -> None:
    """The readout is sampled whole, so that its Fourier transform takes the 3D problem apart into 2D ones."""
    image, kspace, operator = volume_problem(rng)
    apart = SenseOperator(operator.sens_maps.movedim(-2, -4), operator.mask[:, 0])
    hybrid = decouple_readout(kspace, -2)
    assert hybrid.shape == (2, 10, 4, 6, 8)
    torch.testing.assert_close(apart.forward(image.movedim(-2, -3)), hybrid, rtol=1e-4, atol=1e-5)
    whole = cg_sense(kspace, operator, weight=0.1, num_steps=60)
    torch.testing.assert_close(
        cg_sense(hybrid, apart, weight=0.1, num_steps=60).movedim(-3, -2), whole, rtol=1e-3, atol=1e-4
    )
    guess = complex_normal(rng, *image.shape)
    soft = data_consistency(guess, kspace, operator, weight=0.1, num_steps=60)
    torch.testing.assert_close(
        data_consistency(guess.movedim(-2, -3), hybrid, apart, weight=0.1, num_steps=60).movedim(-3, -2),
        soft, rtol=1e-3, atol=1e-4,
    )  # fmt: skip
    hard = hard_data_consistency(guess, kspace, operator)
    torch.testing.assert_close(
        hard_data_consistency(guess.movedim(-2, -3), hybrid, apart).movedim(-3, -2), hard, rtol=1e-3, atol=1e-4
    )


def test_hard_consistency_of_one_coil_meets_the_measurement_and_leaves_the_rest(rng: torch.Generator) -> None:
    operator = SenseOperator(torch.ones(2, 1, 12, 10, dtype=torch.complex64), torch.arange(10) % 3 == 0)
    kspace, guess = complex_normal(rng, 2, 1, 12, 10) * operator.mask, complex_normal(rng, 2, 12, 10)
    found = fft2c(hard_data_consistency(guess, kspace, operator))
    torch.testing.assert_close(found[..., operator.mask], kspace[:, 0][..., operator.mask])
    torch.testing.assert_close(found[..., ~operator.mask], fft2c(guess)[..., ~operator.mask])


def test_hard_consistency_of_many_coils_keeps_the_truth_and_comes_closer(rng: torch.Generator) -> None:
    operator = SenseOperator(unit_maps(rng, 4, 16, 16)[None], torch.arange(16) % 2 == 0)
    truth, guess = complex_normal(rng, 1, 16, 16), complex_normal(rng, 1, 16, 16)
    kspace = operator.forward(truth)
    torch.testing.assert_close(hard_data_consistency(truth, kspace, operator), truth, rtol=1e-4, atol=1e-5)
    after = relative_residual(hard_data_consistency(guess, kspace, operator), kspace, operator)
    assert float(after) < 0.8 * float(relative_residual(guess, kspace, operator))


@pytest.mark.parametrize("spatial_dims", [2, 3])
def test_gradients_in_double_precision(rng: torch.Generator, spatial_dims: int) -> None:
    """Of operators, both data consistencies, CG-SENSE, coil maps and partial Fourier, by finite differences."""
    shape = {2: (2, 4), 3: (2, 1, 4)}[spatial_dims]

    def draw(*leading: int) -> torch.Tensor:
        return torch.randn(*leading, *shape, dtype=torch.complex128, generator=rng).requires_grad_()

    mask = torch.tensor([True, False, True, True])
    image, kspace, maps = draw(2), draw(2, 2), draw(2, 2)

    def operator(maps: torch.Tensor) -> SenseOperator:
        return SenseOperator(maps, mask, spatial_dims)

    functions = {
        "forward": (lambda x, s: operator(s).forward(x), (image, maps)),
        "adjoint": (lambda y, s: operator(s).adjoint(y), (kspace, maps)),
        "soft": (lambda x, y, s: data_consistency(x, y, operator(s), num_steps=3), (image, kspace, maps)),
        "hard": (lambda x, y, s: hard_data_consistency(x, y, operator(s)), (image, kspace, maps)),
        "cg_sense": (lambda y, s: cg_sense(y, operator(s), num_steps=3), (kspace, maps)),
    }
    if spatial_dims == 2:
        whole = torch.ones(4, dtype=torch.bool)
        functions["maps"] = (lambda y: estimate_sens_maps(y, whole), (kspace,))
        functions["partial"] = (lambda y: partial_fourier(y, torch.arange(4) > 0, num_steps=2), (kspace,))
    for name, (function, arguments) in functions.items():
        assert torch.autograd.gradcheck(function, arguments), name


def asymmetric_echo(rng: torch.Generator) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """An image `(2, Y, X)` of smooth phase, its k-space with 60 % of the lines, and their mask."""
    y, x = torch.meshgrid(torch.linspace(-1, 1, 64), torch.linspace(-1, 1, 48), indexing="ij")
    objects = torch.stack(
        [((y - 0.1) ** 2 + x**2 < 0.5).float() + ((y + x).abs() < 0.2), (y.abs() + x.abs() < 0.6).float()]
    )
    image = torch.polar(objects, (0.8 * x + 0.6 * y * y).expand(2, -1, -1))
    mask = torch.arange(48) >= 19
    noise = 1e-3 * complex_normal(rng, 2, 64, 48)
    return image, (fft2c(image) + noise) * mask, mask


def test_partial_fourier_restores_what_the_missing_side_held(rng: torch.Generator) -> None:
    image, kspace, mask = asymmetric_echo(rng)
    found = partial_fourier(kspace, mask)
    errors = [float((other.abs() - image.abs()).square().mean()) for other in (found, ifft2c(kspace))]
    assert errors[0] < 0.5 * errors[1]
    torch.testing.assert_close((fft2c(found) * mask), kspace, rtol=1e-4, atol=1e-4)
    whole = torch.ones(48, dtype=torch.bool)
    torch.testing.assert_close(partial_fourier(fft2c(image), whole), image, rtol=1e-4, atol=1e-5)


def test_symmetric_lines_have_their_mirror_images() -> None:
    assert symmetric_lines(torch.arange(8) >= 2).nonzero().flatten().tolist() == [2, 3, 4, 5, 6]
    assert symmetric_lines(torch.arange(7) >= 2).nonzero().flatten().tolist() == [2, 3, 4]
    with pytest.raises(ValueError, match="at least 3 lines symmetrically about the centre of k-space, found 1"):
        partial_fourier(torch.zeros(1, 8, 8, dtype=torch.complex64), torch.arange(8) >= 4)


class Bart:
    """BART's programs (Debian package `bart`) on arrays, which it keeps with the first axis running fastest."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __call__(self, *arguments: str | torch.Tensor) -> torch.Tensor:
        """Run a program; arrays among its arguments come last, and the result has the axes of BART, turned round."""
        paths = [str(self._write(i, a)) if isinstance(a, torch.Tensor) else a for i, a in enumerate(arguments)]
        subprocess.run(["bart", *paths, str(self.folder / "out")], check=True, capture_output=True, timeout=60)
        header = (self.folder / "out.hdr").read_text().splitlines()
        shape = [int(size) for size in header[1].split()][::-1]
        return torch.from_numpy(np.fromfile(self.folder / "out.cfl", np.complex64).reshape(shape))

    def _write(self, index: int, array: torch.Tensor) -> Path:
        path = self.folder / f"in{index}"
        path.with_suffix(".hdr").write_text(f"# Dimensions\n{' '.join(map(str, array.shape[::-1]))}\n")
        array.numpy().astype(np.complex64).tofile(path.with_suffix(".cfl"))
        return path


@pytest.fixture
def bart(tmp_path: Path) -> Bart:
    if shutil.which("bart") is None:
        pytest.skip("BART is not installed (apt-get install bart)")
    return Bart(tmp_path)


@pytest.mark.parametrize("shape", [(24, 20), (15, 21)])
def test_fourier_transform_is_that_of_bart(rng: torch.Generator, bart: Bart, shape: tuple[int, int]) -> None:
    image = complex_normal(rng, *shape)
    torch.testing.assert_close(bart("fft", "-u", "3", image).squeeze(), fft2c(image), rtol=1e-4, atol=1e-5)


def test_cg_sense_is_that_of_bart(rng: torch.Generator, bart: Bart) -> None:
    """Same weight, no scaling, both run to convergence."""
    maps = unit_maps(rng, 4, 32, 24)
    operator = SenseOperator(maps[None], torch.arange(24) % 2 == 0)
    kspace = operator.forward(complex_normal(rng, 1, 32, 24))
    theirs = bart("pics", "-l2", "-r", "0.1", "-i", "200", "-w", "1", kspace[0, :, None], maps[:, None])
    ours = cg_sense(kspace, operator, weight=0.1, num_steps=200)[0]
    torch.testing.assert_close(theirs.squeeze(), ours, rtol=1e-2, atol=2e-3)


def test_partial_fourier_is_no_worse_than_barts_homodyne(rng: torch.Generator, bart: Bart) -> None:
    image, kspace, mask = asymmetric_echo(rng)
    fraction = str(float(mask.float().mean()))
    mirrored = kspace[0].roll(0)
    theirs = bart("homodyne", "0", fraction, mirrored).squeeze()
    ours = partial_fourier(kspace, mask)[0]
    errors = [float((found.abs() - image[0].abs()).square().mean()) for found in (ours, theirs)]
    assert errors[0] < 1.1 * errors[1]


def test_operator_is_that_of_mrpro(rng: torch.Generator) -> None:
    """Where MRPro is installed; it is no dependency, because it brings torchvision and a CUDA library."""
    operators = pytest.importorskip("mrpro.operators", exc_type=ImportError)
    image, kspace, operator = volume_problem(rng)
    fourier = operators.FastFourierOp(dim=(-3, -2, -1))
    coils = operators.SensitivityOp(operator.sens_maps)
    (theirs,) = fourier(*coils(image[:, None]))
    torch.testing.assert_close(theirs * operator.mask, kspace, rtol=1e-4, atol=1e-5)
    (adjoint,) = coils.H(*fourier.H(kspace))
    torch.testing.assert_close(adjoint[:, 0], operator.adjoint(kspace), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ifftc(fftc(image, (-3, -1)), (-3, -1)), image, rtol=1e-4, atol=1e-5)

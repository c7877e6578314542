"""Baselines: what each sees, and that they do what their names say."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from omnimri.models import metrics, physics
from omnimri.models.scan import Scan
from omnimri.platform.evaluation import baselines
from omnimri.platform.evaluation.baselines import SenseSetting
from omnimri.platform.evaluation.config import EvaluateConfig
from tests.platform.evaluation_fakes import phantom_affine, phantom_row


@pytest.fixture
def scan() -> Scan:
    row = phantom_row(1, split="test", patient=1)
    return Scan(image=row["image"], affine=phantom_affine(), kspace=row["kspace"])


def _mask(scan: Scan, row_id: str = "a", seed: int = 0) -> np.ndarray:
    return baselines.case_mask(
        scan, row_id, acceleration=3, center_fraction=0.15, kind="equispaced", seed=seed
    )  # fmt: skip


def test_the_target_is_made_of_all_lines(scan: Scan) -> None:
    """A root sum of squares, or a combination by maps of unit length, which cannot be more (Cauchy-Schwarz)."""
    squares, combined = (baselines.reference_magnitude(scan, reference) for reference in ("rss", "combined"))
    np.testing.assert_allclose(squares, scan.image, rtol=1e-5, atol=1e-6)
    assert (combined <= squares + 1e-5).all()
    assert metrics.psnr(squares, combined) > 30


def test_the_combined_target_has_the_noise_of_one_image_in_air() -> None:
    """With eight coils of pure noise the root sum of squares lies near `4 sigma`, one image near `1.25 sigma`."""
    rng = np.random.default_rng(0)
    axis = np.linspace(-1, 1, 64)
    ball = (axis[:, None] ** 2 + axis**2 < 0.25).astype(np.float32)
    coils = ball * np.exp(2j * np.pi * np.arange(8) / 8)[:, None, None] * 40
    noise = rng.normal(size=(8, 64, 64)) + 1j * rng.normal(size=(8, 64, 64))
    kspace = physics.fft2c(torch.from_numpy((coils + noise)[None]).to(torch.complex64)).numpy()
    scan = Scan(image=np.zeros((1, 64, 64), np.float32), affine=np.eye(4), kspace=kspace)
    air = (axis[:, None] ** 2 + axis**2 > 0.5)[None]
    squares, combined = (baselines.reference_magnitude(scan, reference) for reference in ("rss", "combined"))
    assert np.median(squares[air]) == pytest.approx(np.sqrt(2 * 8), rel=0.05)
    assert np.median(combined[air]) < 1.5
    assert combined[0, 32, 32] == pytest.approx(40 * np.sqrt(8), rel=0.05)


def test_a_mask_belongs_to_its_row_and_seed(scan: Scan) -> None:
    masks = [_mask(scan, f"row-{index}") for index in range(8)]
    np.testing.assert_array_equal(masks[3], _mask(scan, "row-3"))
    assert len({mask.tobytes() for mask in masks}) > 1


def test_an_acquisition_knows_nothing_of_the_other_lines(scan: Scan) -> None:
    mask = _mask(scan)
    altered = scan.kspace.copy()
    altered[..., ~mask] += 100
    other = Scan(image=scan.image, affine=scan.affine, kspace=altered)
    first, second = baselines.acquire(scan, mask), baselines.acquire(other, mask)
    torch.testing.assert_close(first.operator.sens_maps, second.operator.sens_maps)
    np.testing.assert_array_equal(first.scan.image, second.scan.image)
    assert not first.scan.kspace[..., ~mask].any()


def test_cg_sense_beats_zero_filled_and_agrees_with_the_data(scan: Scan) -> None:
    target, acquisition = baselines.reference_magnitude(scan), baselines.acquire(scan, _mask(scan))
    zero_filled, sense = baselines.zero_filled(acquisition), baselines.cg_sense(acquisition, SenseSetting(0.005, 10))
    assert metrics.psnr(target, sense.abs().numpy()) > metrics.psnr(target, zero_filled.abs().numpy()) + 1
    residuals = [
        physics.relative_residual(image, acquisition.kspace, acquisition.operator).mean()
        for image in (sense, zero_filled)
    ]
    assert residuals[0] < residuals[1]


def test_espirit_maps_are_a_setting_of_the_baselines(scan: Scan) -> None:
    """They too know nothing of lines that were not acquired, and CG-SENSE with them beats zero-filled."""
    mask, part = _mask(scan), baselines.central_slices(scan, 2)
    altered = part.kspace.copy()
    altered[..., ~mask] += 100
    target, acquisition = baselines.reference_magnitude(part), baselines.acquire(part, mask, "espirit")
    other = baselines.acquire(replace(part, kspace=altered), mask, "espirit")
    torch.testing.assert_close(acquisition.operator.sens_maps, other.operator.sens_maps)
    sense = baselines.cg_sense(acquisition, SenseSetting(0.005, 10)).abs().numpy()
    zero_filled = baselines.zero_filled(acquisition).abs().numpy()
    assert metrics.psnr(target, sense) > metrics.psnr(target, zero_filled) + 1
    assert not torch.equal(acquisition.operator.sens_maps, baselines.acquire(part, mask).operator.sens_maps)


def test_the_ceiling_is_above_every_method_and_below_the_target_by_noise_in_air_only(scan: Scan) -> None:
    target, acquisition = baselines.reference_magnitude(scan, "rss"), baselines.acquire(scan, _mask(scan))
    ceiling = baselines.fully_sampled(scan, acquisition).abs().numpy()
    sense = baselines.cg_sense(acquisition, SenseSetting(0.005, 10)).abs().numpy()
    assert metrics.psnr(target, ceiling) > metrics.psnr(target, sense) + 3
    assert (ceiling <= target + 1e-5).all()  # Cauchy-Schwarz: maps of unit length cannot add signal


def test_the_grid_is_scored_whole_and_the_best_mean_wins(scan: Scan) -> None:
    grid = baselines.grid_psnr(scan, _mask(scan), (0.001, 10.0), (2, 8))
    assert set(grid) == {SenseSetting(w, n) for w in (0.001, 10.0) for n in (2, 8)}
    assert baselines.best_setting([grid]).weight == 0.001
    first, second = SenseSetting(0.1, 1), SenseSetting(0.2, 1)
    assert baselines.best_setting([{first: 30.0, second: 29.0}, {first: 20.0, second: 25.0}]) == second
    assert baselines.best_setting([]) == SenseSetting()


def test_central_slices_stay_where_they_are_in_space(scan: Scan) -> None:
    part = baselines.central_slices(scan, 3)
    assert part.image.shape[0] == part.kspace.shape[0] == 3
    np.testing.assert_array_equal(part.image, scan.image[2:5])
    np.testing.assert_allclose(part.affine @ [1, 2, 0, 1], scan.affine @ [1, 2, 2, 1])
    assert baselines.central_slices(scan, None) is scan


def test_a_blank_scan_keeps_header_and_geometry_only(scan: Scan) -> None:
    blank = baselines.blank_scan(scan)
    assert np.ptp(blank.image) == 0
    assert blank.kspace is None
    np.testing.assert_array_equal(blank.affine, scan.affine)


def test_class_frequencies_count_patients() -> None:
    frequencies = baselines.class_frequencies({"a": ["normal"], "b": ["normal"], "c": ["haemorrhage"]})
    np.testing.assert_allclose(frequencies, [2 / 3, 0, 0, 0, 1 / 3])
    np.testing.assert_allclose(baselines.class_frequencies({}), np.full(5, 0.2))


def test_the_baseline_may_not_be_tuned_on_the_scored_split() -> None:
    with pytest.raises(ValueError, match="nothing may be tuned on the scored split"):
        EvaluateConfig(split="val")
    with pytest.raises(ValueError, match="accelerations"):
        EvaluateConfig(accelerations=(4,))
    with pytest.raises(ValueError, match="known: reconstruct"):
        EvaluateConfig(tasks=("classify",))


@pytest.mark.parametrize("method", baselines.COMPRESSED_SENSING)
def test_compressed_sensing_beats_zero_filled_and_knows_nothing_of_other_lines(scan: Scan, method: str) -> None:
    mask, reconstruct = _mask(scan), baselines.ITERATIVE[method]
    altered = scan.kspace.copy()
    altered[..., ~mask] += 100
    target, acquisition = baselines.reference_magnitude(scan), baselines.acquire(scan, mask)
    image = reconstruct(acquisition, SenseSetting(0.003, 40))
    other = reconstruct(baselines.acquire(replace(scan, kspace=altered), mask), SenseSetting(0.003, 40))
    torch.testing.assert_close(image, other, rtol=0, atol=0)
    zero_filled = baselines.zero_filled(acquisition).abs().numpy()
    assert metrics.psnr(target, image.abs().numpy()) > metrics.psnr(target, zero_filled) + 1


@pytest.mark.parametrize("method", baselines.COMPRESSED_SENSING)
def test_the_weight_of_compressed_sensing_does_not_depend_on_the_scanners_units(scan: Scan, method: str) -> None:
    """A slice that is a thousand times louder is the same slice."""
    mask, reconstruct = _mask(scan), baselines.ITERATIVE[method]
    part = baselines.central_slices(scan, 2)
    louder = replace(part, kspace=part.kspace * np.array([1.0, 1e3], np.float32)[:, None, None, None])
    image, other = (
        reconstruct(baselines.acquire(each, mask), SenseSetting(0.01, 20)).numpy() for each in (part, louder)
    )
    np.testing.assert_allclose(other[1] / 1e3, image[1], atol=1e-4 * np.abs(image).max())


def test_the_long_steps_of_total_variation_lead_where_sigpys_own_do(scan: Scan) -> None:
    """Both approach the one minimum of the convex problem; ours has nearly reached it in 300 iterations."""
    from sigpy.mri.app import TotalVariationRecon

    part, mask = baselines.central_slices(scan, 1), _mask(scan)
    acquisition = baselines.acquire(part, mask)
    ours = baselines.total_variation(acquisition, SenseSetting(0.01, 300))[0]
    scale = float(baselines.zero_filled(acquisition).abs().max())
    weights = np.broadcast_to(mask, part.kspace.shape[-2:]).astype(np.float32)
    theirs = TotalVariationRecon(
        acquisition.kspace[0].numpy() / scale, acquisition.operator.sens_maps[0].numpy(), 0.01, weights=weights,
        max_iter=2500, show_pbar=False,
    ).run()  # fmt: skip
    assert np.linalg.norm(ours.numpy() / scale - theirs) < 0.02 * np.linalg.norm(theirs)


def test_unknown_compressed_sensing_names_the_known_ones() -> None:
    with pytest.raises(ValueError, match="known: l1_wavelet, total_variation"):
        EvaluateConfig(compressed_sensing=("curvelets",))

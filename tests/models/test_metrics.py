"""Metrics: known answers, and agreement with scikit-image, scikit-learn and MONAI."""

import math

import numpy as np
import pytest
import torch
from monai.metrics import DiceMetric, compute_froc_curve_data
from skimage.metrics import structural_similarity
from sklearn.metrics import balanced_accuracy_score, roc_auc_score

from omnimri.models import metrics


@pytest.fixture
def volumes() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    target = rng.random((3, 16, 18), dtype=np.float32) * np.array([1, 5, 2], dtype=np.float32)[:, None, None]
    return target, target + 0.1 * rng.standard_normal(target.shape, dtype=np.float32)


def test_reconstruction_metrics_follow_the_formulas_of_fastmri(volumes: tuple[np.ndarray, np.ndarray]) -> None:
    target, prediction = volumes
    assert metrics.nmse(target, prediction) == pytest.approx(
        np.linalg.norm(target - prediction) ** 2 / np.linalg.norm(target) ** 2, rel=1e-5
    )
    mean_square = np.mean((target - prediction) ** 2)
    assert metrics.psnr(target, prediction) == pytest.approx(10 * np.log10(target.max() ** 2 / mean_square), rel=1e-5)
    slices = [structural_similarity(target[z], prediction[z], data_range=target.max()) for z in range(3)]
    assert metrics.ssim(target, prediction) == pytest.approx(np.mean(slices), rel=1e-6)


def test_psnr_of_a_constant_error_is_known() -> None:
    target = np.zeros((2, 8, 8), dtype=np.float32)
    target[0, 0, 0] = 10.0
    assert metrics.psnr(target, target + 0.1) == pytest.approx(40.0, abs=1e-4)


def test_data_range_is_the_volume_maximum_not_the_slice_maximum(volumes: tuple[np.ndarray, np.ndarray]) -> None:
    target, prediction = volumes
    per_slice = np.mean(
        [structural_similarity(t, p, data_range=t.max()) for t, p in zip(target, prediction, strict=True)]
    )
    assert metrics.ssim(target, prediction) > per_slice


def test_nmse_of_nothing_is_one_and_of_a_zero_target_is_refused() -> None:
    target = np.ones((1, 8, 8))
    assert metrics.nmse(target, np.zeros_like(target)) == 1.0
    with pytest.raises(ValueError, match="zero everywhere"):
        metrics.nmse(np.zeros_like(target), target)


def test_shapes_must_agree() -> None:
    with pytest.raises(ValueError, match=r"\(1, 8, 8\) and \(1, 8, 9\)"):
        metrics.psnr(np.ones((1, 8, 8)), np.ones((1, 8, 9)))
    with pytest.raises(ValueError, match="7x7"):
        metrics.ssim(np.ones((1, 6, 8)), np.ones((1, 6, 8)))


def test_dice_agrees_with_monai_where_both_have_a_value() -> None:
    rng = np.random.default_rng(1)
    reference, prediction = rng.random((2, 4, 9, 9)) > 0.6
    theirs = DiceMetric(include_background=True)(
        torch.from_numpy(prediction[None, None].astype(np.float32)),
        torch.from_numpy(reference[None, None].astype(np.float32)),
    )
    assert metrics.dice(reference, prediction) == pytest.approx(float(theirs), rel=1e-6)


def test_dice_of_empty_masks() -> None:
    empty, full = np.zeros((2, 2, 2), bool), np.ones((2, 2, 2), bool)
    assert math.isnan(metrics.dice(empty, empty))
    assert metrics.dice(empty, full) == 0.0
    assert metrics.dice(full, empty) == 0.0
    assert metrics.dice(full, full) == 1.0


def test_box_iou_counts_voxels_of_half_open_boxes() -> None:
    rng = np.random.default_rng(2)
    corners = rng.integers(0, 8, size=(2, 5, 3))
    boxes = np.concatenate([corners, corners + rng.integers(1, 6, size=corners.shape)], axis=-1)

    def voxels(box: np.ndarray) -> np.ndarray:
        grid = np.zeros((16, 16, 16), bool)
        grid[box[0] : box[3], box[1] : box[4], box[2] : box[5]] = True
        return grid

    counted = [[(voxels(a) & voxels(b)).sum() / (voxels(a) | voxels(b)).sum() for b in boxes[1]] for a in boxes[0]]
    np.testing.assert_allclose(metrics.box_iou(boxes[0], boxes[1]), counted, atol=1e-7)
    assert metrics.box_iou(np.zeros((0, 6)), boxes[1]).shape == (0, 5)


def test_touching_boxes_do_not_overlap() -> None:
    assert metrics.box_iou(np.array([[0, 0, 0, 2, 2, 2]]), np.array([[2, 0, 0, 4, 2, 2]])).item() == 0.0


def test_each_box_is_matched_once_and_the_surest_prediction_goes_first() -> None:
    reference = np.array([[0, 0, 0, 4, 4, 4], [8, 8, 8, 12, 12, 12]])
    prediction = np.array([[0, 0, 0, 4, 4, 2], [0, 0, 0, 4, 4, 4], [20, 20, 20, 22, 22, 22]])
    first = metrics.match_boxes(reference, prediction, iou_threshold=0.1)
    assert first.pairs == ((0, 0),)
    assert (first.true_positives, first.false_positives, first.false_negatives) == (1, 2, 1)
    by_score = metrics.match_boxes(reference, prediction, iou_threshold=0.1, scores=[0.2, 0.9, 0.5])
    assert by_score.pairs == ((0, 1),)


def test_overlap_below_the_threshold_is_a_miss() -> None:
    reference = np.array([[0, 0, 0, 10, 10, 10]])
    prediction = np.array([[0, 0, 0, 10, 10, 1]])
    assert metrics.match_boxes(reference, prediction, iou_threshold=0.1).true_positives == 1
    assert metrics.match_boxes(reference, prediction, iou_threshold=0.11).true_positives == 0
    with pytest.raises(ValueError, match="iou_threshold"):
        metrics.match_boxes(reference, prediction, iou_threshold=0.0)


def test_auroc_agrees_with_scikit_learn_with_ties() -> None:
    rng = np.random.default_rng(3)
    truth = rng.integers(0, 3, size=60)
    probabilities = rng.dirichlet(np.ones(3), size=60).round(1)
    ours = metrics.macro_auroc(truth, probabilities)
    theirs = np.mean([roc_auc_score(truth == k, probabilities[:, k]) for k in range(3)])
    assert ours == pytest.approx(theirs, rel=1e-9)


def test_auroc_of_one_class_is_not_scored_and_of_a_constant_is_chance() -> None:
    assert math.isnan(metrics.auroc(np.array([0.1, 0.2]), np.array([True, True])))
    assert metrics.auroc(np.full(6, 0.3), np.array([1, 0, 1, 0, 0, 0])) == 0.5


def test_balanced_accuracy_agrees_with_scikit_learn() -> None:
    truth = np.array([0, 0, 0, 0, 1, 1, 2])
    prediction = np.array([0, 0, 0, 1, 1, 0, 2])
    assert metrics.balanced_accuracy(truth, prediction) == pytest.approx(balanced_accuracy_score(truth, prediction))
    assert metrics.balanced_accuracy(truth, np.zeros(7)) == pytest.approx(1 / 3)
    assert metrics.accuracy(truth, prediction) == pytest.approx(5 / 7)


def test_bootstrap_draws_patients_not_volumes() -> None:
    """Copies of a patient's volume add no information, so they must not narrow the interval."""
    values = np.random.default_rng(4).normal(10.0, 1.0, size=20)
    patients = [f"p{index}" for index in range(20)]
    once = metrics.patient_bootstrap(lambda index: values[index].mean(), patients)
    repeated = np.repeat(values, 10)
    tenfold = metrics.patient_bootstrap(lambda index: repeated[index].mean(), list(np.repeat(patients, 10)))
    assert once == pytest.approx(tenfold)
    standard_error = values.std(ddof=1) / np.sqrt(20)
    assert once[1] - once[0] == pytest.approx(2 * 1.96 * standard_error, rel=0.15)


def test_bootstrap_is_seeded_and_silent_where_it_cannot_say() -> None:
    values = np.arange(6.0)
    patients = list("aabbcc")
    statistic = lambda index: values[index].mean()  # noqa: E731
    assert metrics.patient_bootstrap(statistic, patients, seed=7) == metrics.patient_bootstrap(
        statistic, patients, seed=7
    )
    assert metrics.patient_bootstrap(statistic, ["a"] * 6) is None
    assert metrics.patient_bootstrap(lambda _: float("nan"), patients) is None


def test_uncertainty_that_is_the_standard_deviation_of_the_error_is_calibrated() -> None:
    rng = np.random.default_rng(0)
    scale = 0.01 + 0.1 * np.kron(rng.random((4, 8, 8)), np.ones((1, 8, 8)))
    target = np.ones_like(scale)
    prediction = target + scale * rng.standard_normal(scale.shape)
    scores = metrics.uncertainty_scores(target, prediction, scale)
    assert scores["uncertainty_ratio"] == pytest.approx(1.0, abs=0.03)
    assert scores["uncertainty_coverage"] == pytest.approx(0.954, abs=0.01)
    assert scores["uncertainty_correlation"] > 0.9
    timid = metrics.uncertainty_scores(target, prediction, 2 * scale)
    assert timid["uncertainty_ratio"] == pytest.approx(2 * scores["uncertainty_ratio"])
    assert timid["uncertainty_correlation"] == scores["uncertainty_correlation"]


def test_uncertainty_is_scored_in_the_foreground_alone() -> None:
    rng = np.random.default_rng(1)
    target, spread = np.zeros((2, 32, 32)), 0.1 * rng.random((2, 32, 32))
    target[:, :, 8:] = 1.0
    prediction = target + spread * rng.standard_normal(target.shape)
    scores = metrics.uncertainty_scores(target, prediction, spread)
    prediction[:, :, :8] += 5.0
    assert metrics.uncertainty_scores(target, prediction, spread) == scores
    assert np.isnan(metrics.uncertainty_scores(target, target, spread)["uncertainty_ratio"])


def test_froc_is_that_of_monai_at_the_points_it_can_be_operated_at() -> None:
    rng = np.random.default_rng(1)
    scores, right = rng.random(60).round(2), rng.random(60) < 0.4
    thresholds = {"num_targets": 50, "num_images": 9}
    # MONAI leaves out the lowest score, so one more false box below all others stands in for it.
    curve = compute_froc_curve_data(np.append(scores[~right], -1.0), scores[right], **thresholds)
    for limit in (0.25, 0.5, 1.0, 2.0, 8.0):
        expected = max(found for false, found in zip(*curve, strict=True) if false <= limit)
        ours = metrics.froc_sensitivity(scores, right, num_reference=50, num_volumes=9, false_positives=limit)
        assert ours == pytest.approx(expected)


def test_froc_of_known_candidates() -> None:
    scores, right = np.array([0.9, 0.8, 0.7, 0.7, 0.1]), np.array([1, 0, 1, 0, 1])
    at = [
        metrics.froc_sensitivity(scores, right, num_reference=4, num_volumes=2, false_positives=limit)
        for limit in (0.0, 0.5, 1.0)
    ]
    assert at == [0.25, 0.25, 0.75]  # the equal scores come in together, and bring the second false box
    assert math.isnan(metrics.froc_sensitivity(scores, right, num_reference=0, num_volumes=2, false_positives=1))
    assert metrics.froc_sensitivity(scores[:0], right[:0], num_reference=4, num_volumes=2, false_positives=1) == 0


def test_calibration_error_of_known_probabilities() -> None:
    rng = np.random.default_rng(0)
    probabilities = rng.random(40_000)
    honest = rng.random(40_000) < probabilities
    assert metrics.expected_calibration_error(probabilities, honest) < 0.01
    assert metrics.expected_calibration_error(probabilities**3, honest) == pytest.approx(0.25, abs=0.01)
    assert metrics.expected_calibration_error(np.ones(4), np.zeros(4)) == 1.0
    assert math.isnan(metrics.expected_calibration_error(np.zeros(0), np.zeros(0)))

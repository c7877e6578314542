"""Metrics by the definitions of the field, on plain NumPy arrays, and patient bootstrap intervals.

Reconstruction follows fastMRI's evaluate.py: everything on magnitude, one number per volume, the volume's maximum as
the data range. A metric that has no value for a case is NaN ("not scored"), never a silent zero or one.
"""

# Z Y X voxels, N cases, K classes, R reference boxes, P predicted boxes

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from einops import reduce
from monai.data.box_utils import box_iou as monai_box_iou
from scipy.stats import rankdata, spearmanr
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

SSIM_WINDOW = 7
"""Edge of the uniform window, as in fastMRI's evaluate.py."""


def nmse(target: np.ndarray, prediction: np.ndarray) -> float:
    """Normalised mean squared error `|target - prediction|^2 / |target|^2` over the volume `(Z, Y, X)`."""
    _check_same_shape(target, prediction)
    energy = np.square(target, dtype=np.float64).sum()
    if energy == 0:
        raise ValueError("nmse: the target volume is zero everywhere, so the error cannot be normalised.")
    return float(np.square(target - prediction, dtype=np.float64).sum() / energy)


def psnr(target: np.ndarray, prediction: np.ndarray) -> float:
    """Peak signal-to-noise ratio in dB over the volume `(Z, Y, X)`; the peak is the volume maximum of `target`."""
    _check_same_shape(target, prediction)
    return float(peak_signal_noise_ratio(target, prediction, data_range=float(target.max())))


def ssim(target: np.ndarray, prediction: np.ndarray) -> float:
    """Structural similarity per slice, mean over the slices of `(Z, Y, X)`.

    Uniform 7x7 window; the data range is the maximum of the target *volume* (fastmri/evaluate.py).

    Raises:
        ValueError: If a slice is smaller than the window.
    """
    _check_same_shape(target, prediction)
    if min(target.shape[-2:]) < SSIM_WINDOW:
        raise ValueError(f"ssim: expected slices of at least {SSIM_WINDOW}x{SSIM_WINDOW}, found {target.shape[-2:]}.")
    data_range = float(target.max())
    return float(
        np.mean(
            [
                structural_similarity(wanted, got, win_size=SSIM_WINDOW, data_range=data_range)
                for wanted, got in zip(target, prediction, strict=True)
            ]
        )
    )


def uncertainty_scores(
    target: np.ndarray, prediction: np.ndarray, uncertainty: np.ndarray, *, block: int = 8
) -> dict[str, float]:
    """Whether an uncertainty map says where and how much a reconstruction errs; all magnitudes `(Z, Y, X)`.

    Over the foreground, which is what exceeds a tenth of the target's 99th percentile.

    Args:
        target: Truth.
        prediction: Reconstruction.
        uncertainty: Expected error, in the same units.
        block: In-plane voxels of the squares that the correlation averages over, of which at least half are foreground.

    Returns:
        `uncertainty_correlation`: Spearman's, between mean error and mean uncertainty of the squares;
        `uncertainty_ratio`: root mean square of the uncertainty over that of the error, one if it is calibrated;
        `uncertainty_coverage`: share of voxels whose error is below two uncertainties. NaN where undefined.
    """
    _check_same_shape(target, prediction)
    _check_same_shape(target, uncertainty)
    error = np.abs(prediction - target)
    foreground = target > 0.1 * np.percentile(target, 99)
    kept = _block_means(foreground, block) >= 0.5
    squares = [_block_means(values, block)[kept] for values in (error, uncertainty)]
    varied = kept.sum() > 2 and all(np.ptp(values) > 0 for values in squares)
    error, uncertainty = error[foreground], uncertainty[foreground]
    size = np.sqrt(np.mean(np.square(error))) if error.size else 0.0
    return {
        "uncertainty_correlation": float(spearmanr(*squares).statistic) if varied else math.nan,
        "uncertainty_ratio": float(np.sqrt(np.mean(np.square(uncertainty))) / size) if size else math.nan,
        "uncertainty_coverage": float(np.mean(error <= 2 * uncertainty)) if error.size else math.nan,
    }


def _block_means(values: np.ndarray, block: int) -> np.ndarray:
    """Means over in-plane squares of `(Z, Y, X)`; what does not fill one at the far edges is left out."""
    height, width = (size - size % block for size in values.shape[1:])
    return reduce(values[:, :height, :width].astype(np.float64), "z (y a) (x b) -> z y x", "mean", a=block, b=block)


def _check_same_shape(target: np.ndarray, prediction: np.ndarray) -> None:
    if target.ndim != 3 or target.shape != prediction.shape:
        raise ValueError(f"Expected two volumes (Z, Y, X) of one shape, found {target.shape} and {prediction.shape}.")


def dice(reference: np.ndarray, prediction: np.ndarray) -> float:
    """Dice overlap of two masks of any shape.

    Empty-class rule: both empty is NaN (not scored, to be counted by the caller); only one empty is 0.
    """
    if reference.shape != prediction.shape:
        raise ValueError(f"dice: expected masks of one shape, found {reference.shape} and {prediction.shape}.")
    reference, prediction = reference.astype(bool), prediction.astype(bool)
    total = int(reference.sum()) + int(prediction.sum())
    return float("nan") if total == 0 else 2.0 * int((reference & prediction).sum()) / total


def box_iou(reference: np.ndarray, prediction: np.ndarray) -> np.ndarray:
    """Intersection over union of half-open voxel boxes, pair by pair.

    Args:
        reference: `(R, 6)` as `[z1, y1, x1, z2, y2, x2]`; voxel z2 is outside.
        prediction: `(P, 6)`.

    Returns:
        `(R, P)` float64 in [0, 1].
    """
    reference, prediction = (np.asarray(boxes, dtype=np.float64).reshape(-1, 6) for boxes in (reference, prediction))
    if not len(reference) or not len(prediction):
        return np.zeros((len(reference), len(prediction)))
    return np.asarray(monai_box_iou(reference, prediction), dtype=np.float64)


@dataclass(frozen=True)
class DetectionMatch:
    """Which predicted box found which reference box; `pairs` holds `(reference, prediction)` indices."""

    pairs: tuple[tuple[int, int], ...]
    num_reference: int
    num_predicted: int

    @property
    def true_positives(self) -> int:
        """Reference boxes that were found."""
        return len(self.pairs)

    @property
    def false_positives(self) -> int:
        """Predicted boxes that found nothing."""
        return self.num_predicted - len(self.pairs)

    @property
    def false_negatives(self) -> int:
        """Reference boxes that were missed."""
        return self.num_reference - len(self.pairs)


def match_boxes(
    reference: np.ndarray, prediction: np.ndarray, *, iou_threshold: float, scores: Sequence[float] | None = None
) -> DetectionMatch:
    """Match predicted to reference boxes of one volume, each at most once.

    Greedy: predictions in falling order of score (in the given order where there are no scores) take the free
    reference box of largest overlap, if that overlap reaches the threshold.

    Args:
        reference: `(R, 6)` half-open voxel boxes.
        prediction: `(P, 6)`.
        iou_threshold: Smallest intersection over union that counts as found, in (0, 1].
        scores: `(P,)`, larger is surer.
    """
    if not 0 < iou_threshold <= 1:
        raise ValueError(f"iou_threshold: expected a number in (0, 1], found {iou_threshold}.")
    overlap = box_iou(reference, prediction)
    num_reference, num_predicted = overlap.shape
    order = range(num_predicted) if scores is None else np.argsort(-np.asarray(scores), kind="stable")
    pairs: list[tuple[int, int]] = []
    for index in order:
        free = np.setdiff1d(np.arange(num_reference), [pair[0] for pair in pairs])
        if not len(free):
            break
        best = free[np.argmax(overlap[free, index])]
        if overlap[best, index] >= iou_threshold:
            pairs.append((int(best), int(index)))
    return DetectionMatch(tuple(pairs), num_reference, num_predicted)


def froc_sensitivity(
    scores: np.ndarray, right: np.ndarray, *, num_reference: int, num_volumes: int, false_positives: float
) -> float:
    """Share of reference boxes found at the lowest score that keeps to a number of false boxes per volume.

    The free-response operating characteristic without interpolation: the best point that can be operated at.

    Args:
        scores: `(N,)` of the candidates of all volumes.
        right: `(N,)` whether each found a reference box that no surer one had found.
        num_reference: Reference boxes of all volumes.
        num_volumes: Volumes, those without candidates included.
        false_positives: Allowed per volume.
    """
    if not num_reference:
        return float("nan")
    order = np.argsort(-np.asarray(scores), kind="stable")
    falling, hits = np.asarray(scores)[order], np.asarray(right, dtype=bool)[order]
    found, false = np.cumsum(hits), np.cumsum(~hits)
    is_threshold = np.append(falling[1:] != falling[:-1], True)[: len(falling)]  # equal scores come together
    allowed = is_threshold & (false <= false_positives * num_volumes)
    return float(found[allowed].max(initial=0) / num_reference)


def expected_calibration_error(probabilities: np.ndarray, right: np.ndarray, *, num_bins: int = 10) -> float:
    """Mean gap between probability and share of right ones, over bins of equal width weighted by their size.

    Guo et al., On calibration of modern neural networks, ICML 2017. NaN without cases.
    """
    probabilities, right = np.asarray(probabilities, dtype=float), np.asarray(right, dtype=float)
    if not len(probabilities):
        return float("nan")
    bins = np.minimum((probabilities * num_bins).astype(int), num_bins - 1)
    gaps = np.bincount(bins, weights=probabilities - right, minlength=num_bins)
    return float(np.abs(gaps).sum() / len(probabilities))


def auroc(scores: np.ndarray, positives: np.ndarray) -> float:
    """Area under the ROC curve of `(N,)` scores; ties count half; NaN unless both classes occur.

    The rank form (Mann-Whitney U), because a bootstrap asks for it thousands of times.
    """
    positives = np.asarray(positives, dtype=bool)
    num_positive, num_negative = int(positives.sum()), int((~positives).sum())
    if not num_positive or not num_negative:
        return float("nan")
    rank_sum = rankdata(scores)[positives].sum()
    return float((rank_sum - num_positive * (num_positive + 1) / 2) / (num_positive * num_negative))


def macro_auroc(truth: np.ndarray, probabilities: np.ndarray) -> float:
    """Mean one-versus-rest AUROC over the classes that have both positive and negative cases; NaN if there is none.

    Args:
        truth: `(N,)` class indices.
        probabilities: `(N, K)`.
    """
    areas = [auroc(probabilities[:, k], truth == k) for k in range(probabilities.shape[1])]
    scored = [area for area in areas if not np.isnan(area)]
    return float(np.mean(scored)) if scored else float("nan")


def accuracy(truth: np.ndarray, prediction: np.ndarray) -> float:
    """Share of `(N,)` class indices that agree."""
    return float(np.mean(np.asarray(truth) == np.asarray(prediction)))


def balanced_accuracy(truth: np.ndarray, prediction: np.ndarray) -> float:
    """Mean recall over the classes that occur in `truth`."""
    truth, prediction = np.asarray(truth), np.asarray(prediction)
    return float(np.mean([np.mean(prediction[truth == k] == k) for k in np.unique(truth)]))


def patient_bootstrap(
    statistic: Callable[[np.ndarray], float],
    patients: Sequence[str],
    *,
    num_samples: int = 1000,
    seed: int = 0,
    level: float = 0.95,
) -> tuple[float, float] | None:
    """Percentile interval of a statistic when whole patients are drawn with replacement.

    Volumes of one patient are not independent, so drawing volumes would make the interval too narrow.

    Args:
        statistic: Takes case indices `(M,)` into `patients`, gives a number; NaN samples are left out.
        patients: `(N,)` patient of every case.
        num_samples: Bootstrap samples.
        seed: Of the draws.
        level: Coverage.

    Returns:
        `(low, high)`, or None with fewer than two patients or when fewer than half of the samples have a value.
    """
    names, inverse = np.unique(np.asarray(patients), return_inverse=True)
    if len(names) < 2 or num_samples < 1:
        return None
    members = [np.flatnonzero(inverse == index) for index in range(len(names))]
    rng = np.random.default_rng(seed)
    draws = rng.integers(0, len(names), size=(num_samples, len(names)))
    values = np.array([statistic(np.concatenate([members[index] for index in draw])) for draw in draws])
    values = values[np.isfinite(values)]
    if 2 * len(values) < num_samples:
        return None
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)

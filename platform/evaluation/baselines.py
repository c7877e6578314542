"""What a model must beat: classical reconstructions, the commonest class, and the model without an image."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import numpy as np
import torch
from torch import Tensor

from omnimri.models import metrics, physics
from omnimri.models.preprocess import scale_kspace
from omnimri.models.scan import Scan
from omnimri.models.vocabulary import DIAGNOSES
from omnimri.platform.data.undersampling import center_fraction_for


@dataclass(frozen=True)
class SenseSetting:
    """The two knobs of an iterative reconstruction."""

    weight: float = 0.005
    """Of the regularisation: Tikhonov for CG-SENSE, L1 norm for compressed sensing."""
    num_steps: int = 20
    """Iterations."""


@dataclass(frozen=True)
class Acquisition:
    """An undersampled acquisition made from a fully sampled one, with all that a reconstruction may use."""

    kspace: Tensor
    """Complex `(Z, C, Y, X)`, zero where not acquired."""
    mask: np.ndarray
    """Bool `(X,)`."""
    operator: physics.SenseOperator
    """Its sensitivity maps come from the centre lines of this acquisition alone."""
    scan: Scan
    """The same as a scan, as it enters the model."""


def case_mask(
    scan: Scan, row_id: str, *, acceleration: int, center_fraction: float, kind: str, seed: int
) -> np.ndarray:
    """Phase-encoding lines `(X,)` for one volume; fixed by the row and the seed, as fastMRI fixes it by the file."""
    case_seed = zlib.crc32(f"{seed}/{row_id}/{acceleration}".encode())
    assert scan.kspace is not None
    return physics.undersampling_mask(
        scan.kspace.shape[-1], acceleration=acceleration, center_fraction=center_fraction, kind=kind, seed=case_seed
    )


def acquire(scan: Scan, mask: np.ndarray, sens_maps: str = "acs") -> Acquisition:
    """Keep only the lines of `mask`; the image of the new scan is its zero-filled root sum of squares.

    Args:
        scan: Fully sampled.
        mask: Bool `(X,)`.
        sens_maps: How coil maps are made of what is left, of `physics.SENS_MAPS`.
    """
    lines = torch.from_numpy(mask)
    kspace = torch.tensor(scan.kspace) * lines
    operator = physics.SenseOperator(physics.estimate_sens_maps(kspace, lines, method=sens_maps), lines)
    image = physics.root_sum_of_squares(physics.ifft2c(kspace)).numpy()
    undersampled = replace(scan, image=image, kspace=kspace.numpy(), mask=mask)
    return Acquisition(kspace, mask, operator, undersampled)


REFERENCES = ("combined", "rss")


def reference_magnitude(scan: Scan, reference: str = "combined") -> np.ndarray:
    """Target of every reconstruction, magnitude `(Z, Y, X)` of all lines.

    Args:
        scan: Fully sampled.
        reference: `combined` joins the coil images by low-pass coil maps, of the centre lines that a fourfold
            acquisition has, whatever maps the methods use. `rss` is their root sum of squares, fastMRI's target: in
            air, and where there is little signal, it keeps the noise of all coils at once, and who paints that scores
            best.
    """
    kspace = torch.tensor(scan.kspace)
    if reference == "rss":
        return physics.root_sum_of_squares(physics.ifft2c(kspace)).numpy()
    centre = torch.from_numpy(physics.center_mask(kspace.shape[-1], center_fraction_for(4)))
    maps = physics.estimate_sens_maps(kspace, centre)
    return physics.SenseOperator(maps, torch.ones_like(centre)).adjoint(kspace).abs().numpy()


def zero_filled(acquisition: Acquisition) -> Tensor:
    """Adjoint reconstruction, complex `(Z, Y, X)`: missing lines stay zero, coils combined by their maps."""
    return acquisition.operator.adjoint(acquisition.kspace)


def fully_sampled(scan: Scan, acquisition: Acquisition) -> Tensor:
    """All lines, combined with the coil maps of the acquisition; complex `(Z, Y, X)`.

    What a perfect reconstruction in these maps would be. From a root sum of squares it differs by the noise that this
    keeps in the air and the maps leave out: there it is the ceiling of every method that uses maps.
    """
    assert scan.kspace is not None
    everything = torch.ones(scan.kspace.shape[-1], dtype=torch.bool)
    operator = physics.SenseOperator(acquisition.operator.sens_maps, everything)
    return operator.adjoint(torch.tensor(scan.kspace))


def cg_sense(acquisition: Acquisition, setting: SenseSetting) -> Tensor:
    """Iterative SENSE, complex `(Z, Y, X)`."""
    return physics.cg_sense(
        acquisition.kspace, acquisition.operator, weight=setting.weight, num_steps=setting.num_steps
    )


def l1_wavelet(acquisition: Acquisition, setting: SenseSetting) -> Tensor:
    """Compressed sensing with sparse Daubechies-4 wavelets (Lustig et al., Sparse MRI, MRM 2007), `(Z, Y, X)`."""
    from sigpy.mri.app import L1WaveletRecon  # compiles with numba for seconds when it is imported

    return _by_sigpy(L1WaveletRecon, acquisition, setting, alpha=1.0)


def total_variation(acquisition: Acquisition, setting: SenseSetting) -> Tensor:
    """Compressed sensing with sparse gradients (Block et al., MRM 2007), complex `(Z, Y, X)`."""
    from sigpy.mri.app import TotalVariationRecon

    return _by_sigpy(TotalVariationRecon, acquisition, setting, tau=_PRIMAL_STEP, sigma=1 / (9 * _PRIMAL_STEP))


_PRIMAL_STEP = 3.0
"""Of the primal-dual iteration, with the largest stable dual one: squared norms are 1 of `A` and 8 of the gradient.
SigPy's own steps are 27 times shorter: after 60 iterations 2.5 dB behind on fourfold 112 x 96."""


def _by_sigpy(app: Callable[..., Any], acquisition: Acquisition, setting: SenseSetting, **steps: float) -> Tensor:
    """Slice by slice, each scaled by its zero-filled maximum as for the model; `(Z, Y, X)`.

    The lengths of the steps are given: coil maps of unit length and a mask make an operator of norm one, and SigPy's
    estimate of it starts from noise without a seed.
    """
    kspace, scale = scale_kspace(acquisition.kspace, acquisition.operator)
    weights = np.broadcast_to(acquisition.mask, kspace.shape[-2:]).astype(np.float32)
    slices = [
        app(
            coils, maps, setting.weight, weights=weights, max_iter=setting.num_steps, show_pbar=False, **steps
        ).run()
        for coils, maps in zip(kspace.numpy(), acquisition.operator.sens_maps.numpy(), strict=True)
    ]  # fmt: skip
    return torch.from_numpy(np.stack(slices)).to(torch.complex64) * scale[:, None, None]


ITERATIVE: dict[str, Callable[[Acquisition, SenseSetting], Tensor]] = {
    "cg_sense": cg_sense,
    "l1_wavelet": l1_wavelet,
    "total_variation": total_variation,
}
"""Baselines that are tuned on the validation split."""
COMPRESSED_SENSING = ("l1_wavelet", "total_variation")


def central_slices(scan: Scan, max_slices: int | None) -> Scan:
    """The middle `max_slices` of a scan with its geometry kept; all of it for None."""
    num_slices = scan.image.shape[0]
    if max_slices is None or num_slices <= max_slices:
        return scan
    start = (num_slices - max_slices) // 2
    affine = scan.affine.copy()
    affine[:3, 3] += start * affine[:3, 2]
    inside = slice(start, start + max_slices)
    return replace(
        scan,
        image=scan.image[inside],
        affine=affine,
        kspace=None if scan.kspace is None else scan.kspace[inside],
    )


def grid_psnr(
    scan: Scan, mask: np.ndarray, weights: Iterable[float], num_steps: Iterable[int], sens_maps: str = "acs",
    method: str = "cg_sense", reference: str = "combined",
) -> dict[SenseSetting, float]:  # fmt: skip
    """PSNR of an iterative baseline on one volume for every setting of a grid."""
    target, acquisition = reference_magnitude(scan, reference), acquire(scan, mask, sens_maps)
    reconstruct = ITERATIVE[method]
    return {
        setting: metrics.psnr(target, reconstruct(acquisition, setting).abs().numpy())
        for setting in (SenseSetting(weight, steps) for weight, steps in product(weights, num_steps))
    }


def best_setting(scores: list[dict[SenseSetting, float]]) -> SenseSetting:
    """The setting with the highest mean PSNR over volumes; the defaults where there is no volume."""
    if not scores:
        return SenseSetting()
    return max(scores[0], key=lambda setting: np.mean([score[setting] for score in scores]))


def blank_scan(scan: Scan) -> Scan:
    """The scan with its image replaced by its mean: same geometry and header facts, nothing to see."""
    return replace(scan, image=np.full_like(scan.image, scan.image.mean()), kspace=None, mask=None)


def class_frequencies(classes_by_patient: dict[str, list[str]]) -> np.ndarray:
    """Share of training patients per diagnosis, `(K,)` in the order of DIAGNOSES; uniform where there are none."""
    counts = np.array(
        [sum(name in classes for classes in classes_by_patient.values()) for name in DIAGNOSES], dtype=float
    )
    return counts / counts.sum() if counts.any() else np.full(len(DIAGNOSES), 1 / len(DIAGNOSES))

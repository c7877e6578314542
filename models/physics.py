"""Physics of Cartesian multi-coil MRI: Fourier transform, coils, undersampling, data consistency.

Everything is batched and differentiable but ESPIRiT. Images and k-space are complex64; the Fourier transform is centred
and orthonormal over the last two axes, or three of a volume that was encoded in 3D; phase encoding runs along the last
axis. K-space comes here with white noise (`platform.data.formats.kspace.prewhitening`).
"""

# B batch (any number of leading axes), C coils, Z Y X voxels or k-space samples

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

_ESPIRIT_WIDTH, _ESPIRIT_KERNEL = 24, 6
"""Of calibration region and kernel: SigPy's defaults."""
_ESPIRIT_LEAST = 4
"""Centre lines from which maps can be calibrated at all."""


def fftc(image: Tensor, axes: tuple[int, ...]) -> Tensor:
    """Centred orthonormal Fourier transform over some axes."""
    shifted = torch.fft.ifftshift(image, dim=axes)
    return torch.fft.fftshift(torch.fft.fftn(shifted, dim=axes, norm="ortho"), dim=axes)


def ifftc(kspace: Tensor, axes: tuple[int, ...]) -> Tensor:
    """Inverse of `fftc`."""
    shifted = torch.fft.ifftshift(kspace, dim=axes)
    return torch.fft.fftshift(torch.fft.ifftn(shifted, dim=axes, norm="ortho"), dim=axes)


def fft2c(image: Tensor) -> Tensor:
    """`fftc` over the last two axes."""
    return fftc(image, (-2, -1))


def ifft2c(kspace: Tensor) -> Tensor:
    """Inverse of `fft2c`."""
    return ifftc(kspace, (-2, -1))


def root_sum_of_squares(coil_images: Tensor) -> Tensor:
    """Magnitude `(B, Y, X)` of coil images `(B, C, Y, X)` (Roemer et al., The NMR phased array, MRM 1990)."""
    return coil_images.abs().square().sum(-3).sqrt()


def center_mask(num_lines: int, center_fraction: float) -> np.ndarray:
    """Bool `(num_lines,)`: the fully sampled lines in the centre of k-space, as fastMRI counts and places them."""
    center = round(num_lines * center_fraction)
    start = (num_lines - center + 1) // 2
    mask = np.zeros(num_lines, dtype=bool)
    mask[start : start + center] = True
    return mask


def undersampling_mask(
    num_lines: int, *, acceleration: int, center_fraction: float, kind: str = "equispaced", seed: int = 0
) -> np.ndarray:
    """Phase-encoding lines to keep, by fastMRI's definitions (fastmri/data/subsample.py).

    The mean number of lines is `num_lines / acceleration`, centre included. `random` (`RandomMaskFunc`) draws the outer
    lines independently; `equispaced` (`EquispacedMaskFractionFunc`) takes every k-th line from a random offset, with k
    widened for the centre. A seed gives the same mask everywhere, but another one than the same seed in fastMRI.

    Returns:
        Bool `(num_lines,)`, True where the line is acquired.

    Raises:
        ValueError: If `kind` is unknown or the acceleration leaves no line outside the centre.
    """
    if kind not in ("equispaced", "random"):
        raise ValueError(f"Undersampling kind {kind!r} is unknown; known: equispaced, random.")
    mask = center_mask(num_lines, center_fraction)
    center = int(mask.sum())
    outer = num_lines / acceleration - center
    if acceleration < 1 or outer < 0:
        raise ValueError(
            f"acceleration={acceleration} with center_fraction={center_fraction} asks for fewer than the "
            f"{center} centre lines of {num_lines}. Lower either."
        )
    rng = np.random.default_rng(seed)
    if kind == "random":
        mask |= rng.random(num_lines) < outer / max(num_lines - center, 1)
    elif outer:
        step = (num_lines - center) / outer
        offset = rng.integers(0, round(step)) if round(step) > 0 else 0
        mask[np.around(np.arange(offset, num_lines - 1, step)).astype(int)] = True
    return mask


def center_lines(mask: Tensor) -> Tensor:
    """The contiguous run of acquired lines around the centre of a mask `(..., X)`, as a mask of the same shape."""
    num_lines = mask.shape[-1]
    middle = num_lines // 2
    right = mask[..., middle:].long().cumprod(-1)
    left = mask[..., :middle].flip(-1).long().cumprod(-1).flip(-1)
    return torch.cat([left, right], dim=-1).bool()


def estimate_sens_maps(kspace: Tensor, mask: Tensor, *, method: str = "acs") -> Tensor:
    """Coil sensitivities from the autocalibration lines alone.

    Args:
        kspace: Complex `(B, C, Y, X)`, zero where not acquired.
        mask: Bool `(X,)` or `(B, X)`.
        method: Of SENS_MAPS: `acs` is fast and knows smooth coils (`low_pass_maps`); `espirit` is slower and more exact
            (`espirit_maps`).

    Returns:
        Complex `(B, C, Y, X)`, root sum of squares one inside the support, zero outside; the phase that all coils share
        is free.

    Raises:
        ValueError: If the method is unknown or the mask has too few lines at its centre.
    """
    if method not in SENS_MAPS:
        raise ValueError(f"sens_maps={method!r} is unknown; known: {', '.join(SENS_MAPS)}.")
    return SENS_MAPS[method](kspace, mask)


def low_pass_maps(kspace: Tensor, mask: Tensor, *, support_threshold: float = 0.03) -> Tensor:
    """Low-pass coil images over their root sum of squares; arguments and result of `estimate_sens_maps`.

    Args:
        kspace: Complex `(B, C, Y, X)`.
        mask: Bool `(X,)` or `(B, X)`.
        support_threshold: Share of the largest low-pass magnitude below which a voxel is air and its maps zero.
    """
    calibration = center_lines(mask)
    num_acs = int(calibration.sum(-1).max())
    if num_acs == 0:
        raise ValueError("estimate_sens_maps: no acquired line at the centre of k-space; raise center_fraction.")
    window = _calibration_window(kspace.shape[-2], num_acs, kspace.device)[:, None]
    lines = calibration.to(kspace.real.dtype)
    taper = torch.hann_window(num_acs + 2, periodic=False, device=kspace.device)[1:-1]
    start = (kspace.shape[-1] // 2) - num_acs // 2
    profile = torch.zeros(kspace.shape[-1], device=kspace.device)
    profile[start : start + num_acs] = taper
    lines = lines * torch.maximum(profile, torch.full_like(profile, 1e-3))
    lines = lines.reshape(*lines.shape[:-1], *(1,) * 2, lines.shape[-1]) if lines.ndim > 1 else lines
    low_pass = ifft2c(kspace * window * lines)
    magnitude = root_sum_of_squares(low_pass).unsqueeze(-3)
    support = magnitude > support_threshold * magnitude.amax(dim=(-2, -1), keepdim=True)
    return torch.where(support, low_pass / magnitude.clamp_min(1e-12), 0)


def _calibration_window(size: int, num_acs: int, device: torch.device) -> Tensor:
    """Hann window over a centred band of the readout, at least as wide as 16 samples."""
    width = min(size, max(num_acs, 16))
    window = torch.zeros(size, device=device)
    start = (size - width) // 2
    window[start : start + width] = torch.hann_window(width + 2, periodic=False, device=device)[1:-1]
    return window


def espirit_maps(kspace: Tensor, mask: Tensor) -> Tensor:
    """First set of ESPIRiT maps (Uecker et al., MRM 2014) by SigPy, one slice at a time on the CPU.

    SigPy calibrates on a square: as wide as the lines around the centre, and no wider than 24 samples. Where the
    largest eigenvalue is below 0.95 (its default) there is no object and the maps are zero. Arguments and result of
    `estimate_sens_maps`; not differentiable. On two cores 0.3 s for 128 x 128 of 8 coils, 9 s for 256 x 256 of 8 and
    half a minute for 320 x 320 of 16.
    """
    lines = center_lines(mask).expand(kspace.shape[0], -1)
    maps = [_espirit_slice(coils, kept) for coils, kept in zip(kspace.detach().cpu(), lines.cpu(), strict=True)]
    return torch.stack(maps).to(kspace.device)


def _espirit_slice(kspace: Tensor, lines: Tensor) -> Tensor:
    """ESPIRiT maps `(C, Y, X)` of one slice from its centre lines `(X,)`."""
    from sigpy.mri.app import EspiritCalib  # compiles with numba for seconds when it is imported

    middle = lines.shape[-1] // 2
    before, after = int(lines[:middle].sum()), int(lines[middle:].sum())
    width = min(2 * before + 1, 2 * after, kspace.shape[-2], _ESPIRIT_WIDTH)
    if width < _ESPIRIT_LEAST:
        raise ValueError(
            f"ESPIRiT needs {_ESPIRIT_LEAST} acquired lines around the centre of k-space, found {before + after}; "
            'raise center_fraction or set sens_maps="acs".'
        )
    kernel = min(_ESPIRIT_KERNEL, width // 2)
    with np.errstate(divide="ignore", invalid="ignore"):  # coils without signal have no phase
        maps = EspiritCalib(kspace.numpy(), calib_width=width, kernel_width=kernel, show_pbar=False).run()
    return torch.from_numpy(np.nan_to_num(maps).astype(np.complex64, copy=False))


SENS_MAPS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"acs": low_pass_maps, "espirit": espirit_maps}
"""Ways to coil maps by name."""


def compress_coils(kspace: Tensor, num_coils: int) -> Tensor:
    """The virtual coils that hold most of the signal (Buehrer et al., Array compression for MRI, MRM 2007).

    Principal components over all samples: orthonormal combinations, so noise stays white and energy can only fall.

    Args:
        kspace: Complex `(Z, C, Y, X)`.
        num_coils: Virtual coils to keep; with C or more the data stay as they are.

    Returns:
        Complex `(Z, min(C, num_coils), Y, X)`, the strongest coil first.
    """
    if kspace.shape[1] <= num_coils:
        return kspace
    covariance = torch.einsum("zcyx,zdyx->cd", kspace, kspace.conj())
    _, components = torch.linalg.eigh(covariance)  # ascending
    strongest = components[:, -num_coils:].flip(-1)
    return torch.einsum("ck,zcyx->zkyx", strongest.conj(), kspace)


@dataclass(frozen=True)
class SenseOperator:
    """`A = M F S`: image to undersampled multi-coil k-space (Pruessmann et al., SENSE, MRM 1999).

    `sens_maps` is complex `(B, C, Y, X)`; `mask` is bool and broadcasts against `(B, C, Y, X)`.
    """

    sens_maps: Tensor
    mask: Tensor
    spatial_dims: int = 2
    """3 for a volume that was encoded in 3D: `(B, C, Z, Y, X)` instead of `(B, C, Y, X)`, here and below."""

    @property
    def axes(self) -> tuple[int, ...]:
        """Those of the image."""
        return tuple(range(-self.spatial_dims, 0))

    @property
    def coil_axis(self) -> int:
        return -self.spatial_dims - 1

    def coils(self, image: Tensor) -> Tensor:
        """K-space of all coils, every sample: `F S`, `(B, Y, X)` to `(B, C, Y, X)`."""
        return fftc(self.sens_maps * image.unsqueeze(self.coil_axis), self.axes)

    def combine(self, kspace: Tensor) -> Tensor:
        """`S' F'`, `(B, C, Y, X)` to `(B, Y, X)`."""
        return (self.sens_maps.conj() * ifftc(kspace, self.axes)).sum(self.coil_axis)

    def forward(self, image: Tensor) -> Tensor:
        """`(B, Y, X)` to `(B, C, Y, X)`."""
        return self.coils(image) * self.mask

    def adjoint(self, kspace: Tensor) -> Tensor:
        """`(B, C, Y, X)` to `(B, Y, X)`."""
        return self.combine(kspace * self.mask)

    def normal(self, image: Tensor) -> Tensor:
        """`A' A`."""
        return self.adjoint(self.forward(image))


def decouple_readout(array: Tensor, axis: int) -> Tensor:
    """A volume acquired in 3D, with the readout sampled whole, as one 2D problem for each place along the readout.

    Args:
        array: K-space, complex `(B, C, Z, Y, X)`.
        axis: The readout's, -3, -2 or -1.

    Returns:
        `(B, R, C, P, Q)`, R places along the readout in image space and the two phase-encoding axes in k-space. Coil
        maps, which are images, are brought there by `movedim(axis, -4)` alone.
    """
    return ifftc(array, (axis,)).movedim(axis, -4)


def conjugate_gradient(
    normal: Callable[[Tensor], Tensor], right: Tensor, start: Tensor, num_steps: int,
    axes: tuple[int, ...] = (-2, -1),
) -> Tensor:  # fmt: skip
    """Solve `normal(x) = right` per item of the batch for a Hermitian positive operator; complex `(B, Y, X)`.

    `axes` are those of one item, the others the batch.
    """
    x = start
    residual = right - normal(x)
    direction = residual
    energy = _inner(residual, residual, axes)
    for _ in range(num_steps):
        applied = normal(direction)
        alpha = energy / _inner(direction, applied, axes).clamp_min(1e-20)
        x = x + alpha * direction
        residual = residual - alpha * applied
        new_energy = _inner(residual, residual, axes)
        direction = residual + new_energy / energy.clamp_min(1e-20) * direction
        energy = new_energy
    return x


def _inner(a: Tensor, b: Tensor, axes: tuple[int, ...]) -> Tensor:
    """Real part of the inner product over the image axes, kept for broadcasting."""
    return (a.conj() * b).real.sum(dim=axes, keepdim=True)


def data_consistency(
    image: Tensor, kspace: Tensor, operator: SenseOperator, *, weight: float = 0.02, num_steps: int = 5
) -> Tensor:
    """`argmin_x |A x - y|^2 + weight |x - image|^2` by conjugate gradients (Aggarwal et al., MoDL, TMI 2019, eq. 9).

    Args:
        image: Complex `(B, Y, X)`, the estimate to stay close to.
        kspace: Complex `(B, C, Y, X)`, measured, zero where not acquired.
        operator: The forward model.
        weight: Regularisation; larger trusts `image` more.
        num_steps: Conjugate-gradient iterations.
    """
    return conjugate_gradient(
        lambda x: operator.normal(x) + weight * x, operator.adjoint(kspace) + weight * image, image, num_steps,
        operator.axes,
    )  # fmt: skip


def hard_data_consistency(image: Tensor, kspace: Tensor, operator: SenseOperator) -> Tensor:
    """Measured samples put in place of those of the image, coil by coil (Schlemper et al., TMI 2018, eq. 7, no noise).

    With one coil the measured samples are then met exactly; with several, as far as one image can meet them in one
    step. Arguments as of `data_consistency`.
    """
    return operator.combine(torch.where(operator.mask, kspace, operator.coils(image)))


def cg_sense(kspace: Tensor, operator: SenseOperator, *, weight: float = 0.005, num_steps: int = 20) -> Tensor:
    """Iterative SENSE from zero with Tikhonov weight (Pruessmann et al., MRM 2001); complex `(B, Y, X)`."""
    zero_filled = operator.adjoint(kspace)
    return conjugate_gradient(
        lambda x: operator.normal(x) + weight * x, zero_filled, torch.zeros_like(zero_filled), num_steps, operator.axes
    )


def relative_residual(image: Tensor, kspace: Tensor, operator: SenseOperator) -> Tensor:
    """`|A x - y| / |y|` per item `(B,)`: how far an image is from what was measured."""
    difference = operator.forward(image) - kspace * operator.mask
    axes = (operator.coil_axis, *operator.axes)
    return difference.abs().square().sum(axes).sqrt() / kspace.abs().square().sum(axes).sqrt().clamp_min(1e-12)


def partial_fourier(kspace: Tensor, mask: Tensor, *, num_steps: int = 10) -> Tensor:
    """Images of k-space whose lines stop short on one side, by projections (POCS; Haacke et al., JMR 1991).

    The phase is taken from the lines that lie symmetrically about the centre; an image of that phase and the measured
    lines are enforced in turn.

    Args:
        kspace: Complex `(B, Y, X)`, zero where not acquired; coils are part of the batch.
        mask: Bool `(X,)`, lines that were acquired.
        num_steps: Times that both are enforced.

    Raises:
        ValueError: If fewer than three lines lie symmetrically about the centre.
    """
    symmetric = symmetric_lines(mask)
    count = int(symmetric.sum())
    if count < 3:
        raise ValueError(
            f"partial_fourier: expected at least 3 lines symmetrically about the centre of k-space, found {count}."
        )
    taper = torch.zeros(mask.shape, dtype=kspace.real.dtype, device=kspace.device)
    taper[symmetric] = torch.hann_window(count + 2, periodic=False, dtype=taper.dtype, device=kspace.device)[1:-1]
    low_pass = ifft2c(kspace * taper)
    phase = low_pass / low_pass.abs().clamp_min(1e-12)
    filled = kspace
    for _ in range(num_steps):
        image = (ifft2c(filled) * phase.conj()).real * phase
        filled = torch.where(mask, kspace, fft2c(image))
    return ifft2c(filled)


def symmetric_lines(mask: Tensor) -> Tensor:
    """The lines of `center_lines` whose mirror images about the centre are acquired too, bool `(X,)`."""
    middle, places = mask.shape[-1] // 2, torch.arange(mask.shape[-1], device=mask.device)
    center = center_lines(mask)
    return center & center[(2 * middle - places) % mask.shape[-1]]


def simulated_acquisition(
    image: Tensor, kspace: Tensor, operator: SenseOperator, generator: torch.Generator
) -> tuple[Tensor, SenseOperator]:
    """The measurement of an image as if it were the truth: other lines of the same pattern, noise of the same size.

    Args:
        image: Complex `(B, Y, X)`, reconstructed from `kspace`.
        kspace: Complex `(B, C, Y, X)`, zero where not acquired.
        operator: The forward model, its mask `(X,)`.
        generator: Draws the lines and the noise.

    Returns:
        K-space like `kspace`, and its forward model with the same coil maps.
    """
    mask = shifted_lines(operator.mask, int(torch.randint(operator.mask.numel(), (), generator=generator)))
    axes = (-3, -2, -1)
    misfit = (operator.forward(image) - kspace * operator.mask).abs().square().sum(axes, keepdim=True)
    num_samples = operator.mask.sum() * kspace[0, :, :, 0].numel()
    noise = torch.randn(kspace.shape, dtype=kspace.dtype, generator=generator).to(kspace.device)
    other = SenseOperator(operator.sens_maps, mask)
    return (other.forward(image) + (misfit / num_samples).sqrt() * noise) * mask, other


def shifted_lines(mask: Tensor, shift: int) -> Tensor:
    """A mask `(X,)` whose lines outside the centre are moved round by `shift` places; the centre stays."""
    center = center_lines(mask)
    shifted = mask.clone()
    shifted[~center] = mask[~center].roll(shift)
    return shifted

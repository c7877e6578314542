"""The preprocessing contract: how a scan becomes what the model sees. One object for training, evaluation, serving.

It is saved inside every checkpoint, and its version stands in every answer. What is done to an image is decided by the
facts of its scan alone, so that a request and a row of the same file give the same input. Grids are the model's; the
native grid and affine stay with the scan, and outputs are mapped back to them.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from omnimri.models.config import InputConfig
from omnimri.models.geometry import Canonical, from_canonical, to_canonical
from omnimri.models.physics import SenseOperator
from omnimri.models.quantities import QUANTITIES, quantity_of, scaled_map
from omnimri.models.resample import pad_or_crop, resize
from omnimri.models.scan import Scan

CONTRACT_VERSION = 2
"""1 standardised every image. Since 2, maps of physical quantities keep their values."""
CONTRACT_FILE = "preprocessing.json"


@dataclass(frozen=True)
class VolumeInput:
    """A scan on the grid of the vision encoder."""

    volume: Tensor
    """Float32 `(1, Z, Y, X)`, its intensities scaled by `Preprocess.scale`."""
    spacing_mm: Tensor
    """`(3,)`, `z y x`, of that grid."""
    origin_index: Tensor
    """`(3,)`: canonical voxel index `z y x` at the grid's first corner."""
    scale: Tensor
    """`(3,)`: canonical voxels per grid voxel, `z y x`."""


@dataclass(frozen=True)
class SliceInput:
    """A scan as the stack of slices that the image decoder segments."""

    slices: Tensor
    """Float32 `(N, H, W)`, intensities scaled, in-plane spacing `slice_spacing_mm`."""
    axis: int
    """Canonical axis (0 z, 1 y, 2 x) along which the slices lie."""
    canonical: Canonical


@dataclass(frozen=True)
class Preprocess:
    """Applies the contract of an `InputConfig`."""

    inputs: InputConfig
    contract: int = CONTRACT_VERSION
    """That of the checkpoint; new ones are made by the present one."""

    def __post_init__(self) -> None:
        if not 1 <= self.contract <= CONTRACT_VERSION:
            raise ValueError(
                f"Preprocessing contract {self.contract} is unknown to this program, which knows 1 to "
                f"{CONTRACT_VERSION}; upgrade it."
            )

    @property
    def version(self) -> str:
        """Contract number and a digest of its settings."""
        settings = json.dumps([self.contract, *self._settings.values()], sort_keys=True)
        return f"{self.contract}-{hashlib.sha256(settings.encode()).hexdigest()[:8]}"

    @property
    def _settings(self) -> dict[str, Any]:
        inputs = asdict(self.inputs)
        if self.contract == 1:
            del inputs["sens_maps"]  # a choice since 2
            return {"inputs": inputs}
        return {"inputs": inputs} | {"quantities": {name: asdict(quantity) for name, quantity in QUANTITIES.items()}}

    def as_json(self) -> dict[str, Any]:
        """What a checkpoint says of it."""
        return {"version": self.version, "steps": self.steps, **self._settings}

    @property
    def steps(self) -> list[str]:
        """What is done to a scan, in words, for answers and cards."""
        z, y, x = self.inputs.volume_spacing_mm
        low, high = self.inputs.clip_percentiles
        standardised = (
            f"intensities clipped to foreground percentiles {low}-{high} and standardised over the foreground"
        )
        maps = (
            "quantitative maps: neither clipped nor standardised, divided by a constant of their quantity "
            "(T1 1000 ms, T2 100 ms, ADC 1e-3 mm2/s, phase pi...; asinh where the quantity is unknown)"
        )
        by_contrast = [standardised] if self.contract == 1 else [f"weighted images: {standardised}", maps]
        return [
            "turned to the nearest RAS axes (no interpolation)",
            *by_contrast,
            f"visual tokens: resampled to {z} x {y} x {x} mm (wider where the volume would not fit)",
            f"segmentation: slices across the thickest axis, resampled in plane to {self.inputs.slice_spacing_mm} mm",
            f"reconstruction: k-space on its own grid, {self.inputs.sens_maps} coil maps, each slice scaled by its "
            "zero-filled maximum",
        ]

    def scale(self, scan: Scan) -> np.ndarray:
        """Intensities `(Z, Y, X)` by contrast: maps of a quantity keep their values, all else is standardised."""
        if self.contract >= 2 and quantity_of(scan.facts) is not None:
            return scaled_map(scan.image, scan.facts)
        return self.standardise(scan.image)

    def standardise(self, image: np.ndarray) -> np.ndarray:
        """Clip to foreground percentiles, then zero mean and unit variance over the foreground.

        The foreground is what exceeds a tenth of the 99th percentile; a constant image becomes zeros.
        """
        threshold = 0.1 * np.percentile(image, 99)
        foreground = image[image > threshold]
        if foreground.size < 2 or np.ptp(foreground) == 0:
            return np.zeros(image.shape, np.float32)
        low, high = np.percentile(foreground, self.inputs.clip_percentiles)
        inside = np.clip(foreground, low, high)
        deviation = max(float(inside.std()), 1e-6)
        clipped = np.clip(image, min(0.0, low), high)
        return ((clipped - inside.mean()) / deviation).astype(np.float32)

    def volume(self, scan: Scan) -> VolumeInput:
        """The scan as one volume for the vision encoder."""
        canonical = to_canonical(self.scale(scan), scan.affine)
        resized = self._on_volume_grid(canonical)
        size = np.array(resized.shape[1:])
        background = float(resized.min())
        padded = pad_or_crop(resized, self.inputs.volume_shape, background)
        scale = np.array(canonical.array.shape) / size
        before = (np.array(self.inputs.volume_shape) - size) // 2
        return VolumeInput(
            padded,
            torch.tensor(scale * canonical.spacing_mm, dtype=torch.float32),
            torch.tensor(-before * scale, dtype=torch.float32),
            torch.tensor(scale, dtype=torch.float32),
        )

    def volume_labels(self, labels: np.ndarray, scan: Scan) -> Tensor:
        """A binary label map `(Z, Y, X)` of the scan on the grid of its volume, `(D, H, W)` bool.

        A voxel has the label where at least half of it has; where that leaves nothing, its fullest voxel keeps it.
        """
        share = self._on_volume_grid(to_canonical(labels.astype(np.float32), scan.affine))
        has_it = (share > 0) & (share >= min(0.5, float(share.max())))
        return pad_or_crop(has_it, self.inputs.volume_shape)[0]

    def _on_volume_grid(self, canonical: Canonical) -> Tensor:
        """Values at the volume's spacing, `(1, D', H', W')`, before they are padded to its shape."""
        target = np.array(self.inputs.volume_spacing_mm)
        extent_mm = np.array(canonical.array.shape) * canonical.spacing_mm
        spacing = np.maximum(target, extent_mm / np.array(self.inputs.volume_shape))
        size = np.maximum(1, np.round(extent_mm / spacing)).astype(int)
        size = np.minimum(size, self.inputs.volume_shape)
        array = torch.from_numpy(np.ascontiguousarray(canonical.array))[None, None]
        return resize(array, tuple(size.tolist()))[0]

    def slices(self, scan: Scan) -> SliceInput:
        """The scan as slices across its thickest axis (nnU-Net's anisotropy rule, in its simplest form)."""
        canonical = to_canonical(self.scale(scan), scan.affine)
        axis = int(np.argmax(np.round(canonical.spacing_mm, 3)))
        stack = np.ascontiguousarray(np.moveaxis(canonical.array, axis, 0))
        return SliceInput(resize(torch.from_numpy(stack)[:, None], self._slice_shape(canonical, axis))[:, 0],
                          axis, canonical)  # fmt: skip

    def slice_labels(self, labels: np.ndarray, scan: Scan, axis: int) -> np.ndarray:
        """A binary label map `(Z, Y, X)` of the scan on the grid of its slices, `(N, H, W)` bool."""
        canonical = to_canonical(labels.astype(np.float32), scan.affine)
        stack = torch.from_numpy(np.ascontiguousarray(np.moveaxis(canonical.array, axis, 0)))[:, None]
        return (resize(stack, self._slice_shape(canonical, axis))[:, 0] >= 0.5).numpy()

    def to_native(self, stack: Tensor, source: SliceInput) -> np.ndarray:
        """Values on the slice grid `(N, H, W)` back on the native grid `(Z, Y, X)`, linearly interpolated."""
        shape = [size for i, size in enumerate(source.canonical.array.shape) if i != source.axis]
        resized = resize(stack[:, None].float(), tuple(shape))[:, 0].numpy()
        return np.ascontiguousarray(from_canonical(np.moveaxis(resized, 0, source.axis), source.canonical))

    def _slice_shape(self, canonical: Canonical, axis: int) -> tuple[int, int]:
        """In-plane size at `slice_spacing_mm`; kept as it is where the spacing is within a tenth of it."""
        spacing = [s for i, s in enumerate(canonical.spacing_mm) if i != axis]
        shape = [s for i, s in enumerate(canonical.array.shape) if i != axis]
        target = self.inputs.slice_spacing_mm
        height, width = (
            size if abs(mm / target - 1) < 0.1 else max(1, round(size * mm / target))
            for size, mm in zip(shape, spacing, strict=True)
        )
        return height, width


def scale_kspace(kspace: Tensor, operator: SenseOperator) -> tuple[Tensor, Tensor]:
    """K-space of slices, each divided by the maximum of its zero-filled image.

    Args:
        kspace: Complex `(B, C, Y, X)`, zero where not acquired.
        operator: Coil maps and mask of the same slices.

    Returns:
        Scaled k-space and the scale `(B,)`, by which an image is multiplied to return to the units of the scanner.
    """
    scale = operator.adjoint(kspace).abs().amax(dim=(-2, -1)).clamp_min(1e-12)
    return kspace / scale[:, None, None, None], scale


def read_preprocess(folder: Path | str) -> Preprocess:
    """The contract of a checkpoint folder, an older one as it was.

    Raises:
        ValueError: If it is newer than this program, or this program would not do what it says.
    """
    saved = json.loads((Path(folder) / CONTRACT_FILE).read_text(encoding="utf-8"))
    inputs: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in saved["inputs"].items()
    }
    try:
        preprocess = Preprocess(InputConfig(**inputs), contract=int(saved["version"].partition("-")[0]))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{folder}/{CONTRACT_FILE}: {error}") from error
    if preprocess.version != saved["version"]:
        raise ValueError(
            f"{folder}/{CONTRACT_FILE} says {saved['version']}, but its settings give {preprocess.version} here: they "
            "were changed, or it was written by another version of OmniMRI. Use that version, or train the model again."
        )
    return preprocess

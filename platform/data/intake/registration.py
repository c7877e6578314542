"""Where the MNI152 brain lies in the image of a head: an affine registration by mutual information with SimpleITK.

The template has no skull. Mutual information would then blow the brain up to the skin, so a skull and a scalp of
ordinary thickness are drawn around it. The result is the same on every machine with the same SimpleITK: all voxels are
samples, on one thread.
"""

# X Y Z voxels, RAS mm: SimpleITK's world is used as it is, on both sides.

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from itertools import product
from typing import Any

import numpy as np
from scipy import ndimage
from scipy.spatial.transform import Rotation
from skimage.filters import threshold_otsu
from skimage.measure import block_reduce

from omnimri.platform.data.mni152 import load_map

_FINE_MM, _COARSE_MM = 3.0, 6.0
_PAD = 24
"""Voxels of 1 mm added around the template for skull and scalp."""
_TISSUE = 10
"""Template intensity above which a voxel is brain."""
_SKULL_MM, _SCALP_MM, _AROUND_MM = 9.0, 15.0, 20.0
"""Distances from the brain at which the skull, the scalp and the samples end."""
_BASE_Z_MM, _BELOW_MM = -25.0, 6.0
"""Below this MNI height lie face and neck, and only so many mm around the brain are sampled."""
_CENTRE_MM = np.array([0.0, -18.0, 5.0])
_VERTEX_MM = 92.0
"""MNI height of the skin over the vault."""
_VAULT_MM = 120.0
"""Of the head, from the vertex down, that is centred on the template."""
_PITCHES_DEG, _SHIFTS_Y_MM, _SHIFTS_Z_MM = (-40, -20, 0, 20, 40), (-15, 0, 15), (-40, -20, 0, 20)
_NUM_REFINED = 4
_MIN_VOLUME, _MAX_VOLUME = 0.55, 1.6
"""Of a head over the template's: from a newborn's to the largest."""
MIN_INFORMATION = 0.35
"""Mattes mutual information below which template and image have too little in common."""
MIN_LEAD = 1.15
"""Mutual information over that of the template turned by quarters and halves: heads have 1.25 to 2.7, a ball and heads
with a wrong orientation up to 1.14."""


class RegistrationError(ValueError):
    """The template does not fit an image; the message says in what way."""


@dataclass(frozen=True)
class TemplateBrain:
    """The template with its drawn skull and scalp, and its brain as points."""

    image: np.ndarray
    """Float32 `(X, Y, Z)`, 3 mm."""
    sampled: np.ndarray
    """Bool on the same grid: where the images are compared."""
    affine: np.ndarray
    points_mm: np.ndarray
    """`(N, 3)` centres of brain voxels."""


@cache
def template_brain() -> TemplateBrain:
    """The template as it is registered, made once in a process."""
    t1 = load_map("t1")
    padded = np.pad(np.asarray(t1.dataobj), _PAD)
    shift = np.eye(4)
    shift[:3, 3] = -_PAD
    image, affine = averaged(padded, t1.affine @ shift, _FINE_MM)
    tissue = image > _TISSUE
    brain = ndimage.binary_fill_holes(ndimage.binary_closing(tissue, iterations=3))
    outside_mm = _FINE_MM * ndimage.distance_transform_edt(~brain)
    for values, low, high in ((30, 0, _FINE_MM), (5, _FINE_MM, _SKULL_MM), (250, _SKULL_MM, _SCALP_MM)):
        image[(outside_mm > low) & (outside_mm <= high)] = values
    image[outside_mm > _SCALP_MM] = 0
    height_mm = affine[2, 3] + affine[2, 2] * np.arange(image.shape[2])
    sampled = (outside_mm <= _AROUND_MM) & ((height_mm > _BASE_Z_MM) | (outside_mm <= _BELOW_MM))
    return TemplateBrain(image, sampled, affine, np.argwhere(tissue) @ affine[:3, :3].T + affine[:3, 3])


def register(image: np.ndarray, affine: np.ndarray) -> np.ndarray:
    """Affine `(4, 4)` from MNI mm to the RAS mm of an image.

    Args:
        image: Magnitudes `(X, Y, Z)` of a head.
        affine: `(4, 4)`, index to RAS mm.

    Raises:
        RegistrationError: If the image is no head that is the right way up.
    """
    template = template_brain()
    fine, coarse = (averaged(image, affine, size) for size in (_FINE_MM, _COARSE_MM))
    brightest = np.percentile(fine[0], 99.5)
    moving, moving_coarse = (_to_sitk(np.minimum(array, brightest), grid) for array, grid in (fine, coarse))
    search = _Search(template, 3, 24)
    starts = _starts(*coarse)
    starts.sort(key=lambda start: search.information(start, moving_coarse), reverse=True)
    middle = _Search(template, 2, 32)
    rigid = max(
        (middle.optimise(start, moving_coarse, step_mm=4.0) for start in starts[:_NUM_REFINED]), key=lambda fit: fit[1]
    )[0]
    best, information = _Search(template, 1, 32).optimise(_as_affine(rigid), moving, step_mm=2.0)
    _check(best, information, search, moving_coarse)
    matrix = np.eye(4)
    matrix[:3, :3] = np.reshape(best.GetMatrix(), (3, 3))
    matrix[:3, 3] = np.array(best.TransformPoint((0.0, 0.0, 0.0)))
    return matrix


class _Search:
    """Mattes mutual information of the template with an image, on every n-th voxel of the template."""

    def __init__(self, template: TemplateBrain, every: int, num_bins: int) -> None:
        import SimpleITK  # an optional dependency, and 50 MB

        fixed, sampled = (_to_sitk(array, template.affine) for array in (template.image, template.sampled))
        self._fixed = SimpleITK.Shrink(fixed, [every] * 3)
        self._method = method = SimpleITK.ImageRegistrationMethod()
        method.SetMetricAsMattesMutualInformation(num_bins)
        method.SetMetricFixedMask(SimpleITK.Shrink(SimpleITK.Cast(sampled, SimpleITK.sitkUInt8), [every] * 3))
        method.SetMetricSamplingStrategy(method.NONE)
        method.SetInterpolator(SimpleITK.sitkLinear)
        # The sums of several threads differ in their last digits from run to run.
        method.SetNumberOfThreads(1)
        method.SetNumberOfWorkUnits(1)

    def information(self, transform: Any, moving: Any) -> float:
        """Mutual information under a transform, larger is better."""
        self._method.SetInitialTransform(transform, False)
        try:
            return -self._method.MetricEvaluate(self._fixed, moving)
        except RuntimeError:  # the template lies outside the image
            return 0.0

    def optimise(self, transform: Any, moving: Any, *, step_mm: float) -> tuple[Any, float]:
        """The transform, changed in place, and the mutual information it reaches."""
        self._method.SetOptimizerAsRegularStepGradientDescent(step_mm, 0.02, 100, relaxationFactor=0.7)
        self._method.SetOptimizerScalesFromPhysicalShift()
        self._method.SetInitialTransform(transform, True)
        try:
            self._method.Execute(self._fixed, moving)
        except RuntimeError:
            return transform, 0.0
        return transform, -self._method.GetMetricValue()


def _starts(image: np.ndarray, affine: np.ndarray) -> list[Any]:
    """Rigid transforms that put the template's vertex near that of the head, at several pitches."""
    import SimpleITK

    points = head_points(image, affine)
    vertex = np.percentile(points[:, 2], 99.9)
    vault = points[points[:, 2] > vertex - _VAULT_MM]
    middle = np.percentile(vault[:, :2], (1, 99), axis=0).mean(0)
    offset = np.array([*middle, vertex]) - (*_CENTRE_MM[:2], _VERTEX_MM)
    starts = []
    for pitch, y, z in product(np.deg2rad(_PITCHES_DEG), _SHIFTS_Y_MM, _SHIFTS_Z_MM):
        start = SimpleITK.Euler3DTransform()
        start.SetCenter(_CENTRE_MM.tolist())
        start.SetRotation(float(pitch), 0.0, 0.0)
        start.SetTranslation((offset + np.array([0, y, z])).tolist())
        starts.append(start)
    return starts


def head_points(image: np.ndarray, affine: np.ndarray) -> np.ndarray:
    """RAS mm `(N, 3)` of the largest bright object of an image `(X, Y, Z)`.

    Raises:
        RegistrationError: If nothing is bright.
    """
    image = np.minimum(image, np.percentile(image, 99.5))
    # Half way to Otsu's, which air that was set to zero in part does not mislead.
    objects, num_objects = ndimage.label(image > threshold_otsu(image) / 2)
    if num_objects == 0:
        raise RegistrationError("nothing stands out from the background")
    largest = 1 + np.argmax(np.bincount(objects.ravel())[1:])
    return np.argwhere(objects == largest) @ affine[:3, :3].T + affine[:3, 3]


def _check(best: Any, information: float, search: _Search, moving: Any) -> None:
    """Refuse a fit of implausible size, of little information, or hardly better than that of the template turned over.

    Raises:
        RegistrationError: For any of these.
    """
    matrix = np.reshape(best.GetMatrix(), (3, 3))
    volume = np.linalg.det(matrix)
    if not _MIN_VOLUME < volume < _MAX_VOLUME:
        raise RegistrationError(f"the best fit scales the template's volume by {volume:.2f}")
    if information < MIN_INFORMATION:
        raise RegistrationError(f"the best fit has a mutual information of {information:.2f}, below {MIN_INFORMATION}")
    turned = _as_affine(best)
    others = []
    for rotation in Rotation.create_group("O").as_matrix().round():
        turned.SetMatrix((matrix @ rotation).ravel().tolist())
        if not np.array_equal(rotation, np.eye(3)):
            others.append(search.information(turned, moving))
    if search.information(best, moving) < MIN_LEAD * max(others):
        raise RegistrationError(
            "the template fits about as well when it is turned over; the header's orientation may be wrong"
        )


def _as_affine(transform: Any) -> Any:
    """A copy with twelve parameters."""
    import SimpleITK

    copy = SimpleITK.AffineTransform(3)
    copy.SetCenter(transform.GetCenter())
    copy.SetMatrix(transform.GetMatrix())
    copy.SetTranslation(transform.GetTranslation())
    return copy


def averaged(array: np.ndarray, affine: np.ndarray, spacing_mm: float) -> tuple[np.ndarray, np.ndarray]:
    """Means over blocks of about this edge length, and the affine of the smaller grid; float32."""
    factors = np.maximum(1, np.round(spacing_mm / np.linalg.norm(affine[:3, :3], axis=0))).astype(int)
    factors = np.minimum(factors, array.shape)
    whole = array[tuple(slice(size - size % factor) for size, factor in zip(array.shape, factors, strict=True))]
    mean = block_reduce(whole, tuple(factors), np.mean).astype(np.float32, copy=False)
    smaller = affine @ np.diag([*factors, 1.0])
    smaller[:3, 3] = (affine @ [*(factors - 1) / 2, 1.0])[:3]
    return mean, smaller


def _to_sitk(array: np.ndarray, affine: np.ndarray) -> Any:
    import SimpleITK

    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    image = SimpleITK.GetImageFromArray(np.ascontiguousarray(array.transpose(2, 1, 0), dtype=np.float32))
    image.SetSpacing(spacing.tolist())
    image.SetOrigin(affine[:3, 3].tolist())
    image.SetDirection((affine[:3, :3] / spacing).ravel().tolist())
    return image

"""Image quality without a reference by MRIQC's definitions, and a fingerprint by which near copies are found.

The formulas are those of `mriqc/qc/anatomical.py` and `functional.py` (Esteban et al., PLOS ONE 2017). MRIQC computes
them on a head mask of its own; here the foreground is a triangle threshold with holes filled, so values compare
within a corpus, not with MRIQC's tables.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from scipy.fft import dctn
from scipy.ndimage import grey_opening, label, maximum_filter
from skimage.filters import threshold_otsu, threshold_triangle
from skimage.transform import resize_local_mean

from omnimri.models.geometry import to_canonical
from omnimri.models.vocabulary import structure_of
from omnimri.platform.data.schema import QUALITY_MEASURES

_DIETRICH = 1 / np.sqrt(2 / (4 - np.pi))
"""Noise of a magnitude image in air is Rayleigh distributed (Dietrich et al., JMRI 2007)."""
_DARK = 0.5
"""Air is darker than this share of the foreground's median."""
_MOST_SLICES = 8
"""Slices, evenly spread, on which noise, entropy and ghosts are measured. With all 48 slices of synthetic volumes SNR
and FBER change by less than 1 %, EFC, which knows the number of voxels, by 6 %."""
_THUMBNAIL, _FREQUENCIES = 16, 7
_NUM_BITS, _NUM_BANDS = 256, 16
_BIT_ORDER = np.random.default_rng(0).permutation(_NUM_BITS)
"""Every band gets frequencies of all kinds, or all heads would share the band of the lowest."""
_LARGEST_BUCKET = 500
"""Fingerprints with one equal band that are compared; near copies share many bands, and one of them is rare."""


@dataclass(frozen=True, kw_only=True)
class QualityLimits:
    """Bounds beyond which a volume is flagged; it is kept all the same."""

    min_snr: float = 5.0
    """Median foreground over the noise in air."""
    max_ghosting: float = 0.1
    """Mean signal of the N/2 ghost over the median foreground."""
    max_cjv: float = 1.2
    """Coefficient of joint variation of grey and white matter."""
    min_matrix: int = 16
    """Voxels along each axis of a slice."""
    max_copy_distance: int = 8
    """Bits of 256 in which the fingerprints of two near copies differ at most; 15 is the most that is searched."""

    def __post_init__(self) -> None:
        if not 0 <= self.max_copy_distance < _NUM_BANDS:
            raise ValueError(f"QualityLimits.max_copy_distance must be 0 to 15, found {self.max_copy_distance}.")


def image_quality(
    image: np.ndarray, label_map: np.ndarray | None = None, label_names: Mapping[int, str] | None = None
) -> dict[str, float | None]:
    """Every measure of `QUALITY_MEASURES`, None where it cannot be computed.

    Without noise in air (a skull-stripped or masked volume) there is no SNR, FBER or ghosting; without grey and white
    matter in the label map no CJV.

    Args:
        image: Magnitudes `(Z, Y, X)`.
        label_map: Whole numbers `(Z, Y, X)`.
        label_names: What its values mean.
    """
    values: dict[str, float | None] = dict.fromkeys(QUALITY_MEASURES)
    if label_map is not None and label_names is not None:
        values["cjv"] = _joint_variation(image, label_map, label_names)
    some = image[np.linspace(0, len(image) - 1, min(len(image), _MOST_SLICES)).round().astype(int)]
    if np.ptp(some) == 0:
        return values
    head = _foreground(some, threshold_triangle(some))
    air = maximum_filter(head.view(np.uint8), size=(1, 5, 5)) == 0
    values["efc"] = entropy_focus(some)
    signal = float(np.median(some[head])) if head.any() else 0.0
    if found := _air_and_noise(some[air], signal):
        level, noise = found
        values["snr"] = float(_DIETRICH * signal / noise)
        values["fber"] = (signal / level) ** 2
        bright = _foreground(some, threshold_otsu(some))  # a ghost stands out from air, but not so far
        values["ghosting"] = max(ghost_to_signal(some, bright, axis) for axis in (1, 2))
    return values


def quality_flags(
    shape: Sequence[int], values: Mapping[str, float | None], limits: QualityLimits, *, t1_weighted: bool
) -> list[str]:
    """What a reader should know before using a volume of `shape` `(Z, Y, X)`; CJV has bounds for T1w alone."""
    beyond = {
        "low SNR": (values["snr"] or np.inf) < limits.min_snr,
        "ghosting": (values["ghosting"] or 0.0) > limits.max_ghosting,
        "tissues not separable": t1_weighted and (values["cjv"] or 0.0) > limits.max_cjv,
        "small matrix": min(shape[1:]) < limits.min_matrix,
    }
    return [flag for flag, holds in beyond.items() if holds]


def entropy_focus(image: np.ndarray) -> float:
    """Entropy focus criterion (Atkinson et al., TMI 1997), 0 for one bright voxel to 1 for a constant image."""
    share = np.abs(image).ravel() / max(float(np.sqrt(np.square(image, dtype=np.float64).sum())), 1e-12)
    entropy = float((share * np.log(share + 1e-16)).sum())
    largest = image.size * (1 / np.sqrt(image.size)) * np.log(1 / np.sqrt(image.size))
    return float(entropy / largest)


def ghost_to_signal(image: np.ndarray, head: np.ndarray, axis: int) -> float:
    """Ghost-to-signal ratio (Giannelli et al., JMRI 2010): what lies half a field of view away, less the background.

    Args:
        image: Magnitudes `(Z, Y, X)`.
        head: True in the foreground.
        axis: Phase encoding.
    """
    ghost = np.roll(head, head.shape[axis] // 2, axis=axis) & ~head
    rest = ~ghost & ~head
    if not ghost.any() or not rest.any():
        return 0.0
    return float((image[ghost].mean() - image[rest].mean()) / np.median(image[head]))


def _foreground(image: np.ndarray, threshold: float) -> np.ndarray:
    """What is brighter, without specks and holes; the triangle is the foot of the largest peak, which mostly is air."""
    # Filters of grey values are separable, which those of binary ones are not.
    opened = grey_opening((image > threshold).view(np.uint8), size=(1, 3, 3))
    return np.stack([~_open_to_the_border(section == 0) for section in opened])


def _open_to_the_border(section: np.ndarray) -> np.ndarray:
    """What of a binary slice is connected with its edge; `binary_fill_holes` takes four times as long."""
    parts, _ = label(np.pad(section, 1, constant_values=True))
    return parts[1:-1, 1:-1] == parts[0, 0]


def _air_and_noise(outside: np.ndarray, signal: float) -> tuple[float, float] | None:
    """Median and standard deviation in air; None where it was masked, or what is outside the foreground is no air."""
    if outside.size < 2:
        return None
    level, noise = float(np.median(outside)), float(outside.std())
    return (level, noise) if 0 < level <= _DARK * signal and noise > 1e-6 * signal else None


def _joint_variation(image: np.ndarray, label_map: np.ndarray, label_names: Mapping[int, str]) -> float | None:
    """CJV (Ganzetti et al., Front. Neuroinform. 2016): `(s_wm + s_gm) / |m_wm - m_gm|`."""
    tissues = [
        image[np.isin(label_map, [value for value, label in label_names.items() if structure_of(label) == name])]
        for name in ("white matter", "grey matter")
    ]
    if min(map(len, tissues)) < 2:
        return None
    white, grey = tissues
    return float((white.std() + grey.std()) / max(abs(float(white.mean() - grey.mean())), 1e-12))


def fingerprint(image: np.ndarray, affine: np.ndarray) -> str:
    """256 bits as hexadecimal: signs of low frequencies of a 16 x 16 x 16 thumbnail turned to RAS.

    Copies that were rescaled, turned, converted or slightly resampled differ in few bits.

    Args:
        image: `(Z, Y, X)`.
        affine: `(4, 4)`, `(x, y, z, 1)` index to RAS mm.
    """
    canonical = to_canonical(image, affine).array
    thumbnail = resize_local_mean(canonical, (_THUMBNAIL,) * 3)
    spectrum = dctn(thumbnail, norm="ortho")[:_FREQUENCIES, :_FREQUENCIES, :_FREQUENCIES].ravel()
    chosen = spectrum[1 : _NUM_BITS + 1][_BIT_ORDER]  # the first is the mean
    return np.packbits(chosen > np.median(chosen)).tobytes().hex()


def near_copies(fingerprints: Sequence[str], max_distance: int) -> Iterator[tuple[int, int]]:
    """Pairs `(earlier, later)` whose fingerprints differ in at most so many bits.

    With fewer differing bits than bands, one band of 16 bits is equal: only those that share one are compared.
    """
    bits = np.array([list(bytes.fromhex(text)) for text in fingerprints], dtype=np.uint8).reshape(-1, _NUM_BITS // 8)
    buckets: dict[tuple[int, bytes], list[int]] = defaultdict(list)
    for index, row in enumerate(bits.reshape(-1, _NUM_BANDS, _NUM_BITS // 8 // _NUM_BANDS)):
        for band, value in enumerate(row):
            buckets[band, value.tobytes()].append(index)
    small = (members for members in buckets.values() if len(members) <= _LARGEST_BUCKET)
    seen = {pair for members in small for pair in combinations(members, 2)}
    for first, second in sorted(seen):
        if np.unpackbits(bits[first] ^ bits[second]).sum() <= max_distance:
            yield first, second

"""What the header of any format states of one series."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from pydicom.uid import generate_uid

from omnimri.platform.corpus.scanners import Protocol, Scanner

LPS_TO_RAS = np.array([-1.0, -1.0, 1.0])
"""Signs between the axes of DICOM and ISMRMRD and those of an affine, either way."""

_INTEGER_PEAK = {"Siemens": 1400, "GE": 4200, "Philips": 2600}
"""Where vendors' integer images have their brightest voxels, about."""


@dataclass(frozen=True, kw_only=True)
class SeriesHeader:
    """One series and the patient it is of; nothing in it belongs to a living person."""

    participant_id: str
    uid_seed: str
    """The same seed gives the same UIDs."""
    sex: str
    age_years: int
    scanner: Scanner
    protocol: Protocol
    number: int
    """Counts from 1."""
    spacing_mm: tuple[float, float, float]
    """`(z, y, x)`."""

    def uid(self, *names: object) -> str:
        """A UID of this patient for the thing that is named."""
        return str(generate_uid(entropy_srcs=[self.uid_seed, *map(str, names)]))


def integer_scale(image: np.ndarray, vendor: str) -> float:
    """Factor that brings a magnitude image into a vendor's range of integers."""
    return _INTEGER_PEAK[vendor] / float(np.percentile(image, 99.9))


def directions_lps(affine: np.ndarray) -> np.ndarray:
    """Unit vectors of x, y, z in LPS, one to a row `(3, 3)`."""
    columns = affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0)
    return (columns * LPS_TO_RAS[:, None]).T


def position_lps(affine: np.ndarray, index_xyz: tuple[float, float, float]) -> np.ndarray:
    """LPS mm `(3,)` of a voxel."""
    return (affine @ [*index_xyz, 1.0])[:3] * LPS_TO_RAS

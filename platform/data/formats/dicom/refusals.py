"""Why an instance or a series of DICOM is not read, in words that quote nothing of its header."""

from __future__ import annotations

import re

import numpy as np
import pydicom
from pydicom.dataset import Dataset
from pydicom.pixels import get_decoder

MR_IMAGE = "1.2.840.10008.5.1.4.1.1.4"
ENHANCED_MR_IMAGE = "1.2.840.10008.5.1.4.1.1.4.1"

_MAPS = frozenset(
    {
        "ADC", "EADC", "FA", "TENSOR", "TTP", "RCBV", "RCBF", "CBF", "CBV", "MTT", "PBP", "TMAX", "T1 MAP", "T2 MAP",
        "T2* MAP", "R2 MAP", "R2* MAP", "B0 MAP", "B1 MAP", "T1_MAP", "T2_MAP", "T2_STAR_MAP", "R2_MAP", "B0_MAP",
        "FIELDMAP", "SUBTRACT", "SUBTRACTION", "PROJECTION IMAGE", "MIP", "MINIP", "MAX_IP", "MIN_IP",
    }
)  # fmt: skip
"""Image Type values of maps and projections, whose intensities are not those of an acquired contrast."""

_NOT_MAGNITUDE = frozenset({"P", "PHASE", "PHASE MAP", "R", "REAL", "I", "IMAGINARY"})

TRUNCATED = ("The pixel data is too short: a truncated file.", "Transfer the file again.")


def refusal(header: Dataset) -> tuple[str, str] | None:
    """Why an instance is not a magnitude image of an MR acquisition, and what to do; None if it is one."""
    modality = re.sub(r"[^A-Z]", "", str(header.get("Modality") or "").upper())[:16]
    image_type = [str(value).upper() for value in header.get("ImageType") or []]
    description = str(header.get("SeriesDescription") or "").lower()
    if modality != "MR":
        return f"Modality {modality or 'is missing'}, expected MR.", "Only MR is read."
    if header.SOPClassUID not in (MR_IMAGE, ENHANCED_MR_IMAGE):
        return f"Not an MR image but {pydicom.uid.UID(header.SOPClassUID).name}.", "Leave it out."
    if not header.get("Rows"):
        return "The MR object holds no image.", "Leave it out."
    if str(header.get("PhotometricInterpretation", "")) not in ("MONOCHROME1", "MONOCHROME2"):
        return "A colour image, not a measured one.", "Leave it out."
    if str(header.get("BurnedInAnnotation", "")).upper() == "YES":
        return "Text is burned into the pixels and may identify the patient.", "Clean the pixels first."
    if "LOCALIZER" in image_type or re.search(r"localis|localiz|\bscout|survey|3.?plane|\bloc\b", description):
        return "A localiser.", "Nothing to do: localisers are left out."
    if _MAPS & set(image_type):
        return "A derived map or projection, not an acquired contrast.", "Nothing to do: maps are left out."
    if _NOT_MAGNITUDE & set(image_type[2:4]):
        return "A phase, real or imaginary image, not a magnitude.", "Nothing to do: only magnitudes are read."
    return None


def why_unreadable(error: BaseException, volume: list[Dataset]) -> tuple[str, str]:
    """Reason and hint for a volume that highdicom or a pixel decoder refused; library texts are matched, not quoted."""
    text = str(error).lower()
    if "less than expected" in text or "end of" in text or isinstance(error, EOFError):
        return TRUNCATED
    if "regularly" in text:
        return _uneven_spacing(volume), "Export the whole series."
    if "unable to decompress" in text or "decoder" in text or "plugin" in text:
        return _why_undecodable(str(volume[0].file_meta.get("TransferSyntaxUID", "")))
    if volume[0].SOPClassUID == ENHANCED_MR_IMAGE:
        return "The frames of the enhanced multi-frame object do not form one volume.", "Convert it with dcm2niix."
    if "frame of reference" in text or "orientation" in text or "spacing" in text:
        return "The slices do not share one orientation, spacing and frame of reference.", "Split the series."
    return f"The series cannot be made a volume ({type(error).__name__}).", "Convert it with dcm2niix."


def _why_undecodable(syntax: str) -> tuple[str, str]:
    """Reason and hint for compressed pixels: which plugin is missing, if it is that."""
    try:
        decoder = get_decoder(syntax)
    except NotImplementedError:
        return "The pixel data is compressed in a way that pydicom does not know.", "Decompress it first."
    if decoder.is_available:
        return "The compressed pixel data cannot be decoded.", "Decompress it, for example with dcmdjpeg of dcmtk."
    plugins = "; ".join(decoder.missing_dependencies)
    return (
        f"No decoder for {decoder.UID.name} is installed.",
        f"Install a plugin of pydicom ({plugins}) or decompress it.",
    )


def _uneven_spacing(volume: list[Dataset]) -> str:
    if volume[0].SOPClassUID == ENHANCED_MR_IMAGE:
        return "The frames are not evenly spaced, or several lie at one position."
    normal = slice_normal(volume[0])
    gaps = np.diff(sorted(normal @ np.array(d.ImagePositionPatient, dtype=float) for d in volume))
    return f"Slices are {gaps.min():.2f} to {gaps.max():.2f} mm apart, expected even gaps: slices are missing."


def slice_normal(dataset: Dataset) -> np.ndarray:
    """Unit slice normal in LPS: row direction times column direction."""
    orientation = np.array(dataset.ImageOrientationPatient, dtype=float)
    return np.cross(orientation[:3], orientation[3:])

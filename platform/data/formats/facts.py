"""Header facts in one vocabulary, whatever the vendor wrote: `Scan.facts` by the column names of the row schema.

Only what stands here leaves a header: free text (descriptions, comments, names, dates) is read to find a contrast or a
body part and then dropped.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from pydicom.dataset import Dataset

from omnimri.models.quantities import UNITS, plain_unit
from omnimri.platform.data.formats.sequences import Header, classify

Facts = dict[str, str | float | int | None]

VENDORS = (
    ("siemens", "Siemens"), ("philips", "Philips"), ("toshiba", "Canon"), ("canon", "Canon"),
    ("hitachi", "Fujifilm"), ("fuji", "Fujifilm"), ("united imaging", "United Imaging"), ("uih", "United Imaging"),
    ("bruker", "Bruker"), ("hyperfine", "Hyperfine"), ("esaote", "Esaote"), ("ge medical", "GE"),
    ("ge healthcare", "GE"), ("general electric", "GE"),
)  # fmt: skip
"""Substring of the lower-cased manufacturer, and the name we use; the first match decides."""

BODY_PARTS = (
    ("brain", r"brain|head|cerebr|neuro|skull"),
    (None, r"\bface\b|orbit|(?<!coronary )\bsinus(es)?\b(?! tarsi)|\bsella|pituitary|\btmj\b"),
    ("spine", r"spine|[ctl]-?spine|lumbar|thoracic|cervical"),
    ("breast", r"breast|mamm"), ("knee", r"knee"), ("prostate", r"prostat"), ("heart", r"heart|cardiac|cardio"),
    ("liver", r"liver|hepat"), ("abdomen", r"abdom"), ("pelvis", r"pelvi|uterus|rect"), ("shoulder", r"shoulder"),
    ("hip", r"\bhip"), ("ankle", r"ankle|\bfoot"), ("wrist", r"wrist|\bhand"), ("neck", r"neck|larynx|thyroid"),
    ("chest", r"chest|thorax|lung"), ("extremity", r"extremity|\barm|\bleg|elbow|femur|tibia"), ("phantom", r"phantom"),
)  # fmt: skip
"""Body part and the pattern that names it; the first match decides. Parts of a face have no name of their own: a file
that says "orbit face neck" shows more than a neck."""

_BIDS_UNITS = {"T1map": "s", "T2map": "s", "T2starmap": "s", "R1map": "1/s", "R2map": "1/s", "R2starmap": "1/s"}
"""Suffix of a BIDS file to the unit that the standard prescribes."""
_AGE_UNITS = {"Y": 1.0, "M": 1 / 12, "W": 1 / 52.18, "D": 1 / 365.25}
MAX_AGE_YEARS = 90.0
"""Ages above are reported as this number, as the HIPAA safe harbour asks."""


def vendor(manufacturer: object) -> str | None:
    """One name per manufacturer; `Other` for one we do not know, None where nothing usable is written."""
    name = str(manufacturer or "").lower().strip()
    if name in ("ge", "ge medical systems"):
        return "GE"
    for pattern, known in VENDORS:
        if pattern in name:
            return known
    return "Other" if re.search(r"[a-z]{3}", name) else None


def body_part(*texts: object) -> str | None:
    """The first body part that one of the texts names, in the order given.

    None where it is part of a face, unless another text says that the brain is there.
    """
    # An underscore is a word character to `\b`, and separates words in protocol names.
    words = [str(text or "").lower().replace("_", " ") for text in texts]
    matches = ([part for part, pattern in BODY_PARTS if re.search(pattern, text)] for text in words)
    named = [parts[0] for parts in matches if parts]
    first = next(iter(named), None)
    return "brain" if first is None and "brain" in named else first


def sex(value: object) -> str | None:
    """`F`, `M` or `O`; headers also hold empty strings and plain numbers."""
    letter = str(value or "").strip().upper()[:1]
    return letter if letter in ("F", "M", "O") else None


def age_years(value: object) -> float | None:
    """Years from a DICOM age string (`058Y`, `006M`) or a number; zero means not filled in on many scanners."""
    text = str(value if value is not None else "").strip().upper()
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([YMWD]?)", text)
    if not match:
        return None
    years = float(match[1]) * _AGE_UNITS[match[2] or "Y"]
    return min(round(years, 2), MAX_AGE_YEARS) if 0 < years < 130 else None


def number(value: object, *, scale: float = 1.0) -> float | None:
    """A finite positive number times `scale`, or None; of a list, the first."""
    if isinstance(value, (list, tuple)) or (hasattr(value, "__iter__") and not isinstance(value, (str, bytes))):
        value = next(iter(value), None)  # type: ignore[call-overload]
    try:
        result = float(value) * scale  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return None
    return round(result, 6) if math.isfinite(result) and result > 0 else None


def field_strength_t(value: object) -> float | None:
    """Nominal tesla: scanners write 1.4939999 for 1.5, and some write gauss."""
    tesla = number(value)
    if tesla is None:
        return None
    tesla = tesla / 10_000 if tesla > 100 else tesla
    nominal = min((0.055, 0.3, 0.55, 1.0, 1.5, 3.0, 4.7, 7.0, 9.4), key=lambda known: abs(known - tesla))
    return nominal if abs(nominal - tesla) <= 0.05 * nominal else round(tesla, 3)


def model_name(value: object) -> str | None:
    """The scanner model; anything but a short plain product name is dropped."""
    text = str(value or "").strip()
    return text if re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9 ._+/-]{0,39}", text) else None


def quantity_unit(text: object) -> str | None:
    """A unit of `omnimri.models.quantities`; `arbitrary` for one that is stated and not known there."""
    unit = plain_unit(text)
    return unit if unit is None or unit in UNITS else "arbitrary"


def _known_unit(text: object) -> str | None:
    """A unit of a field that also holds other words (DICOM: `US` is unspecified)."""
    unit = quantity_unit(text)
    return None if unit == "arbitrary" else unit


def plane(affine: np.ndarray) -> str:
    """Plane of the slices by the RAS axis closest to their normal."""
    normal = np.cross(affine[:3, 0], affine[:3, 1])
    return ("sagittal", "coronal", "axial")[int(np.argmax(np.abs(normal)))]


def sequence_facts(header: Header) -> Facts:
    """The columns that `sequences.classify` answers."""
    found = classify(header)
    return {
        "contrast": found.contrast,
        "quantitative": found.quantitative,
        "quantity": found.quantity,
        "contrast_agent": found.contrast_agent,
        "acquisition_type": found.acquisition_type,
    }


def dicom_facts(dataset: Mapping[str, Any] | Dataset, affine: np.ndarray) -> Facts:
    """Facts of a DICOM header; `dataset` answers `get(keyword)`."""
    get = dataset.get
    tr, te, ti = (number(get(name)) for name in ("RepetitionTime", "EchoTime", "InversionTime"))
    sequence = get("ScanningSequence") or ""
    descriptions = [get(name) for name in ("SeriesDescription", "ProtocolName")]
    header = Header(
        texts=descriptions,
        sequence_name=get("SequenceName") or get("PulseSequenceName"),
        scanning_sequence=[sequence] if isinstance(sequence, str) else list(sequence),
        tr_ms=tr, te_ms=te, ti_ms=ti,
        b_value=number(get("DiffusionBValue")),
        contrast_agent=get("ContrastBolusAgent"),
        acquisition_type=get("MRAcquisitionType"),
    )  # fmt: skip
    return {
        **_common_facts(get, header, affine),
        "quantity_unit": _known_unit(get("RescaleType")),
        "body_part": body_part(get("BodyPartExamined"), *descriptions, get("StudyDescription")),
        "model_name": model_name(get("ManufacturerModelName")),
    }


def sidecar_facts(sidecar: Mapping[str, Any], affine: np.ndarray, name: str) -> Facts:
    """Facts of a BIDS or dcm2niix JSON sidecar (times in seconds) and the file name (`sub-01_T1w.nii.gz`)."""
    get = sidecar.get
    tr, te, ti = (number(get(key), scale=1000) for key in ("RepetitionTime", "EchoTime", "InversionTime"))
    suffix = name.split(".")[0].rsplit("_", 1)[-1]
    texts = [suffix if suffix != name else "", get("SeriesDescription"), get("ProtocolName")]
    header = Header(
        texts=[*texts, name.split(".")[0]],
        sequence_name=get("SequenceName"),
        scanning_sequence=str(get("ScanningSequence") or "").replace("\\", " ").replace("_", " ").split(),
        tr_ms=tr, te_ms=te, ti_ms=ti,
        contrast_agent=get("ContrastBolusIngredient"),
        acquisition_type=get("MRAcquisitionType"),
    )  # fmt: skip
    bids_unit = _BIDS_UNITS.get(suffix) if name.startswith("sub-") else None
    return {
        **_common_facts(get, header, affine),
        "quantity_unit": quantity_unit(get("Units")) or bids_unit,
        "body_part": body_part(get("BodyPartExamined"), get("BodyPart"), *texts[1:]),
        "model_name": model_name(get("ManufacturersModelName")),
    }


def _common_facts(get: Callable[[str], Any], header: Header, affine: np.ndarray) -> Facts:
    """What DICOM headers and JSON sidecars call by the same keywords."""
    return {
        **sequence_facts(header),
        "plane": plane(affine),
        "vendor": vendor(get("Manufacturer")),
        "field_strength_t": field_strength_t(get("MagneticFieldStrength")),
        "tr_ms": header.tr_ms,
        "te_ms": header.te_ms,
        "ti_ms": header.ti_ms,
        "flip_angle_deg": number(get("FlipAngle")),
        "sex": sex(get("PatientSex")),
        "age_years": age_years(get("PatientAge")),
    }


def ismrmrd_facts(header: Any, affine: np.ndarray, *, echo: int = 0) -> Facts:
    """Facts of an ISMRMRD header (`ismrmrd.xsd.ismrmrdHeader`); fastMRI files carry the same XML."""
    system = header.acquisitionSystemInformation
    sequence = header.sequenceParameters
    subject = header.subjectInformation
    study = header.studyInformation
    measurement = header.measurementInformation
    echo_times = list(getattr(sequence, "TE", None) or [])
    tr, ti = (number(getattr(sequence, name, None)) for name in ("TR", "TI"))
    te = number(echo_times[echo] if echo < len(echo_times) else None)
    texts = [getattr(measurement, name, None) for name in ("seriesDescription", "protocolName", "sequenceName")]
    return {
        **sequence_facts(Header(texts=texts, tr_ms=tr, te_ms=te, ti_ms=ti)),
        # Raw data of a mapping protocol give the weighted images that a map is fitted to, not the map.
        "quantitative": False,
        "quantity": None,
        "plane": plane(affine),
        "body_part": body_part(getattr(study, "bodyPartExamined", None), *texts[:2]),
        "vendor": vendor(getattr(system, "systemVendor", None)),
        "model_name": model_name(getattr(system, "systemModel", None)),
        "field_strength_t": field_strength_t(getattr(system, "systemFieldStrength_T", None)),
        "tr_ms": tr,
        "te_ms": te,
        "ti_ms": ti,
        "flip_angle_deg": number(getattr(sequence, "flipAngle_deg", None)),
        "sex": sex(getattr(getattr(subject, "patientGender", None), "value", getattr(subject, "patientGender", None))),
        "age_years": None,
    }


def ismrmrd_identifiers(header: Any) -> dict[str, Any]:
    """What an ISMRMRD header says of person, place and day, by the DICOM keywords of `deid.header_identifiers`."""
    subject, study, system = header.subjectInformation, header.studyInformation, header.acquisitionSystemInformation
    sources = {
        "PatientName": (subject, "patientName"), "PatientID": (subject, "patientID"),
        "PatientBirthDate": (subject, "patientBirthdate"), "StudyDate": (study, "studyDate"),
        "AccessionNumber": (study, "accessionNumber"), "StudyID": (study, "studyID"),
        "StudyInstanceUID": (study, "studyInstanceUID"), "ReferringPhysicianName": (study, "referringPhysicianName"),
        "InstitutionName": (system, "institutionName"), "StationName": (system, "stationName"),
    }  # fmt: skip
    return {keyword: getattr(part, name, None) for keyword, (part, name) in sources.items()}

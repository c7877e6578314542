"""From an upload to one scan: read it by the door that ingest uses, choose the series, say what was done."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

import numpy as np

from omnimri.models.scan import Scan
from omnimri.platform.data.formats.kspace.prewhitening import prewhitened
from omnimri.platform.data.formats.readers import SeriesRecord, read_path
from omnimri.platform.data.undersampling import undersample
from omnimri.serve.bounds import Bounds
from omnimri.serve.config import UploadLimits
from omnimri.serve.schemas import RequestError

IMAGE_SOURCES = {"dicom": "DICOM images", "nifti": "NIfTI images"}


@dataclass(frozen=True)
class Intake:
    """One scan of an upload, and what a person should know about how it was come by."""

    scan: Scan
    source_format: str
    warnings: list[str]


def read_upload(
    uploads: Iterable[tuple[str, BinaryIO]], limits: UploadLimits, *, series: str | None, needs_kspace: bool
) -> Intake:
    """Read the uploaded parts, given as (file name, stream), in a temporary folder that is always removed.

    Raises:
        RequestError: 413 or 422 with one sentence.
    """
    with tempfile.TemporaryDirectory(prefix="omnimri-upload-") as temporary:
        folder = Path(temporary)
        Bounds(limits).save(uploads, folder)
        records, rejects = read_path(folder)
    records = [prewhitened(record) for record in records]
    if not records:
        raise RequestError(422, "unreadable", _why_unreadable(rejects))
    warnings = _unused_files(rejects)
    candidates = [record for record in records if record.scan.kspace is not None] if needs_kspace else records
    if not candidates:
        found = IMAGE_SOURCES.get(records[0].source_format, "images")
        raise RequestError(
            422,
            "kspace_needed",
            f"Reconstruction starts from raw k-space (fastMRI or ISMRMRD HDF5), but the upload holds {found}, "
            "which a scanner has already reconstructed.",
        )
    number = choose_series(candidates, series)
    if len(candidates) > 1 and series is None:
        warnings.append(
            f"The upload holds {len(candidates)} series ({_listing(candidates)}); used number {number}, "
            "the one with most slices. Choose with the field series."
        )
    chosen = candidates[number - 1]
    return Intake(chosen.scan, chosen.source_format, warnings)


def choose_series(records: list[SeriesRecord], series: str | None) -> int:
    """Number, from 1, of the series asked for by number or contrast; without a wish of the one with most slices.

    Raises:
        RequestError: 422 when the wish fits no series, with the list of what there is.
    """
    if series is None:
        return 1 + max(range(len(records)), key=lambda index: records[index].scan.image.shape[0])
    wish = series.strip().lower()
    for number, record in enumerate(records, start=1):
        if wish in (str(number), str(record.scan.facts.get("contrast") or "").lower()):
            return number
    raise RequestError(
        422, "unknown_series", f"No series fits series={series.strip()!r}; the upload holds {_listing(records)}."
    )


def ready_for_reconstruction(intake: Intake, acceleration: int | None, seed: int) -> Intake:
    """Undersampled k-space: as it was acquired, or made so where the caller asked for it.

    Raises:
        RequestError: 422 for a fully sampled file without `acceleration`, or an undersampled one with it.
    """
    mask = intake.scan.mask
    full = mask is None or bool(mask.all())
    if full and acceleration is None:
        raise RequestError(
            422,
            "fully_sampled",
            "This k-space is fully sampled, so there is nothing to recover; set acceleration (for example 4) to "
            "undersample it first and see what the model makes of it.",
        )
    if not full and acceleration is not None:
        raise RequestError(
            422, "already_undersampled", "This k-space is already undersampled; leave the field acceleration out."
        )
    if acceleration is None:
        return intake
    try:
        scan = undersample(intake.scan, acceleration=acceleration, kind="equispaced", seed=seed)
    except ValueError as error:
        raise RequestError(422, "acceleration", str(error)) from error
    kept = np.asarray(scan.mask)
    said = (
        f"Retrospectively undersampled: {int(kept.sum())} of {kept.size} phase-encoding lines kept "
        f"({acceleration}x, equispaced, seed {seed}); a real accelerated acquisition may look different."
    )
    return replace(intake, scan=scan, warnings=[*intake.warnings, said])


def _listing(records: list[SeriesRecord]) -> str:
    return ", ".join(
        f"{number}: {record.scan.facts.get('contrast') or 'unknown contrast'} with {record.scan.image.shape[0]} slices"
        for number, record in enumerate(records, start=1)
    )


def _why_unreadable(rejects: list) -> str:
    if not rejects:
        return "The upload holds no DICOM, NIfTI, fastMRI or ISMRMRD file."
    first = rejects[0]
    more = f" ({len(rejects) - 1} more files were refused.)" if len(rejects) > 1 else ""
    return f"No MRI series could be read: {_sentence(first.reason)} {_sentence(first.hint)}".strip() + more


def _unused_files(rejects: list) -> list[str]:
    reasons = sorted({_sentence(reject.reason) for reject in rejects})
    return [f"{len(rejects)} file(s) of the upload were not used: {' '.join(reasons[:3])}"] if rejects else []


def _sentence(text: str) -> str:
    text = (text or "").strip()
    return text if not text or text.endswith((".", "!", "?")) else f"{text}."

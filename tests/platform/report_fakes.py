"""Measurement reports (TID 1500) of the slices that `intake_fakes` makes, written by highdicom, with names planted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import highdicom
import numpy as np
from highdicom import sr
from pydicom.dataset import Dataset
from pydicom.sr.codedict import codes
from pydicom.sr.coding import Code
from pydicom.uid import generate_uid

from tests.platform.intake_fakes import LPS

OBSERVER, TRACKING, COMMENT = "Zwirnlein^Hilde", "Quastenflosser-7", "Oberhinterwald"
PLANTED = ("Zwirnlein", "Hilde", "Quastenflosser", "Oberhinterwald")

PERIPHERAL_ZONE = Code("279706003", "SCT", "Peripheral zone of the prostate")
TRANSITION_ZONE = Code("399384005", "SCT", "Transition zone of the prostate")
VOLUME = codes.SCT.Volume
ADC = codes.DCM.ApparentDiffusionCoefficient
CUBIC_MM = Code("mm3", "UCUM", OBSERVER)


def measured(name: Code, value: float, unit: Code, **more: Any) -> sr.Measurement:
    """One number."""
    return sr.Measurement(name=name, value=value, unit=unit, **more)


def image_region(dataset: Dataset, kind: str, points: np.ndarray, frames: list[int] | None = None) -> sr.ImageRegion:
    """A region drawn on one image: `points` in image coordinates `column row`, the first pixel from 0 to 1."""
    source = sr.SourceImageForRegion(
        referenced_sop_class_uid=dataset.SOPClassUID,
        referenced_sop_instance_uid=dataset.SOPInstanceUID,
        referenced_frame_numbers=frames,
    )
    return sr.ImageRegion(graphic_type=kind, graphic_data=np.asarray(points, dtype=float), source_image=source)


def world(points_xyz: np.ndarray, affine: np.ndarray) -> np.ndarray:
    """Voxel indices of a RAS affine in LPS mm, both `(points, 3)`."""
    points = np.asarray(points_xyz, dtype=float)
    return (LPS @ affine @ np.c_[points, np.ones(len(points))].T)[:3].T


def group(kind: type, **more: Any) -> Any:
    """A measurement group of a lesion in the left peripheral zone, with a tracking identifier that names somebody."""
    site = sr.FindingSite(anatomic_location=PERIPHERAL_ZONE, laterality=codes.SCT.Left)
    said = {
        "tracking_identifier": sr.TrackingIdentifier(uid=generate_uid(), identifier=TRACKING),
        "finding_type": codes.SCT.Lesion,
        "finding_sites": [site],
        **more,
    }
    return kind(**said)


def planar(**more: Any) -> Any:
    """A group of TID 1410."""
    return group(sr.PlanarROIMeasurementsAndQualitativeEvaluations, **more)


def volumetric(**more: Any) -> Any:
    """A group of TID 1411."""
    return group(sr.VolumetricROIMeasurementsAndQualitativeEvaluations, **more)


def of_images(**more: Any) -> Any:
    """A group of TID 1501."""
    return group(sr.MeasurementsAndQualitativeEvaluations, **more)


def make_report(evidence: list[Dataset], groups: list[Any], **more: Any) -> sr.Comprehensive3DSR:
    """A measurement report by an observer who has a name."""
    observer = sr.ObserverContext(
        observer_type=codes.DCM.Person,
        observer_identifying_attributes=sr.PersonObserverIdentifyingAttributes(name=OBSERVER),
    )
    content = sr.MeasurementReport(
        observation_context=sr.ObservationContext(observer_person_context=observer),
        procedure_reported=codes.LN.MRIUnspecifiedBodyRegion,
        imaging_measurements=groups,
    )
    report = sr.Comprehensive3DSR(
        evidence=evidence, content=content[0], series_number=20, instance_number=1,
        series_instance_uid=generate_uid(), sop_instance_uid=generate_uid(), manufacturer="Test",
        is_complete=True, institution_name=COMMENT, **more,
    )  # fmt: skip
    comment = sr.TextContentItem(
        name=codes.DCM.Comment, value=f"{COMMENT}: seen by {OBSERVER}", relationship_type="CONTAINS"
    )
    report.ContentSequence[-1].ContentSequence[0].ContentSequence.append(comment)
    return report


def save_report(path: Path, evidence: list[Dataset], groups: list[Any], **more: Any) -> Path:
    """Save a measurement report."""
    make_report(evidence, groups, **more).save_as(path)
    return path


def segment_of(path: Path, number: int) -> sr.ReferencedSegment:
    """The reference to a segment of a saved SEG."""
    return sr.ReferencedSegment.from_segmentation(highdicom.seg.segread(path), segment_number=number)


def frame_of(path: Path, frame: int, number: int) -> sr.ReferencedSegmentationFrame:
    """The reference to one frame of a saved SEG."""
    return sr.ReferencedSegmentationFrame.from_segmentation(
        highdicom.seg.segread(path), frame_number=frame, segment_number=number
    )

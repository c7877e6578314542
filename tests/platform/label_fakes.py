"""Segmentations and structure sets of the slices that `intake_fakes` makes, with labels known voxel by voxel."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import highdicom
import nibabel as nib
import numpy as np
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.sequence import Sequence
from pydicom.sr.codedict import codes
from pydicom.uid import ExplicitVRLittleEndian, RTStructureSetStorage, generate_uid

from tests.platform.intake_fakes import LPS, oblique_affine

PATIENT = {
    "PatientBirthDate": "19700101", "PatientSex": "F", "StudyID": "1", "StudyDate": "20200101",
    "StudyTime": "120000", "AccessionNumber": "A1",
}  # fmt: skip
"""Header elements that highdicom copies from an image to a segmentation."""


def turned_affine(axes: str, shape: tuple[int, ...]) -> np.ndarray:
    """The oblique affine with its axes permuted and flipped; `shape` is `(Z, Y, X)`."""
    transform = nib.orientations.axcodes2ornt(axes)
    return oblique_affine() @ nib.orientations.inv_ornt_aff(transform, shape[::-1])


def save_seg(
    path: Path,
    slices: list[Dataset],
    masks: np.ndarray,
    names: list[str],
    *,
    kind: str = "BINARY",
    types: list[Any] | None = None,
) -> Path:
    """Save a DICOM segmentation.

    Args:
        path: File to make.
        slices: As `dicom_slices` gives them, in that order.
        masks: `(Z, Y, X, segments)`; for a label map `(Z, Y, X)`.
        names: Segment labels, free text.
        kind: BINARY, FRACTIONAL or LABELMAP.
        types: Coded property types; tissue by default.
    """
    segments = [
        highdicom.seg.SegmentDescription(
            segment_number=number,
            segment_label=name,
            segmented_property_category=codes.SCT.Tissue,
            segmented_property_type=types[number - 1] if types else codes.SCT.Tissue,
            algorithm_type="MANUAL",
        )
        for number, name in enumerate(names, start=1)
    ]
    segmentation = highdicom.seg.Segmentation(
        source_images=slices, pixel_array=masks, segmentation_type=kind, segment_descriptions=segments,
        series_instance_uid=generate_uid(), series_number=9, sop_instance_uid=generate_uid(), instance_number=1,
        manufacturer="Test", manufacturer_model_name="Test", software_versions="1", device_serial_number="1",
    )  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    segmentation.save_as(path)
    return path


def save_rtstruct(
    path: Path, slices: list[Dataset], affine: np.ndarray, regions: dict[str, list[np.ndarray]], **first: Any
) -> Path:
    """Save an RT structure set.

    Args:
        path: File to make.
        slices: The series that it refers to.
        affine: RAS affine of the image that the slices were made of.
        regions: Free-text name to closed contours, each `(points, 3)` in voxel indices `x y z` of that affine.
        **first: `frame_of_reference`, `interpreted_type` or `geometric_type` instead of the usual one.
    """
    frame = first.get("frame_of_reference", slices[0].FrameOfReferenceUID)
    dataset = Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.SOPClassUID, dataset.SOPInstanceUID = RTStructureSetStorage, generate_uid()
    dataset.StudyInstanceUID, dataset.SeriesInstanceUID = slices[0].StudyInstanceUID, generate_uid()
    dataset.Modality, dataset.PatientID = "RTSTRUCT", "P-001"
    series = _item(SeriesInstanceUID=slices[0].SeriesInstanceUID)
    study = _item(RTReferencedSeriesSequence=Sequence([series]))
    reference = _item(FrameOfReferenceUID=frame, RTReferencedStudySequence=Sequence([study]))
    dataset.ReferencedFrameOfReferenceSequence = Sequence([reference])
    dataset.StructureSetROISequence, dataset.ROIContourSequence = Sequence(), Sequence()
    dataset.RTROIObservationsSequence = Sequence()
    for number, (name, contours) in enumerate(regions.items(), start=1):
        dataset.StructureSetROISequence.append(
            _item(ROINumber=number, ROIName=name, ReferencedFrameOfReferenceUID=frame)
        )
        drawn = Sequence([_contour(points, affine, first.get("geometric_type")) for points in contours])
        dataset.ROIContourSequence.append(_item(ReferencedROINumber=number, ContourSequence=drawn))
        dataset.RTROIObservationsSequence.append(
            _item(ReferencedROINumber=number, RTROIInterpretedType=first.get("interpreted_type", "GTV"))
        )
    dataset.save_as(path, enforce_file_format=True)
    return path


def _contour(points: np.ndarray, affine: np.ndarray, geometric_type: str | None) -> Dataset:
    world = (LPS @ affine @ np.c_[points, np.ones(len(points))].T)[:3].T
    return _item(
        ContourGeometricType=geometric_type or "CLOSED_PLANAR",
        NumberOfContourPoints=len(points),
        ContourData=[float(f"{value:.5f}") for value in world.ravel()],
    )


def _item(**elements: Any) -> Dataset:
    item = Dataset()
    for keyword, value in elements.items():
        setattr(item, keyword, value)
    return item

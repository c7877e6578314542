"""A DICOM series: one MR Image Storage instance for each slice (PS3.3 A.4)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import UID, ExplicitVRLittleEndian, MRImageStorage

from omnimri.platform.corpus.series import SeriesHeader, directions_lps, integer_scale, position_lps

_STUDY_DATE = "20250101"


def write_dicom_series(
    header: SeriesHeader, image: np.ndarray, affine: np.ndarray, folder: Path, rng: np.random.Generator
) -> None:
    """Write a folder of instances, numbered upwards, downwards or interleaved, as sites do.

    Args:
        header: What the headers state.
        image: Magnitude `(Z, Y, X)`.
        affine: Voxel `(x, y, z)` to RAS mm.
        folder: Is made.
        rng: Source of the numbering and of Philips' scale factors.
    """
    folder.mkdir(parents=True, exist_ok=True)
    values = image * integer_scale(image, header.scanner.vendor)
    for z, number in enumerate(instance_numbers(len(image), rng)):
        dataset = _identity(header, int(number))
        _set_acquisition(dataset, header)
        _set_geometry(dataset, header, affine, z, image.shape)
        _set_pixels(dataset, values[z], header.scanner.vendor, rng)
        dataset.save_as(folder / f"IM{number:04d}.dcm", enforce_file_format=True)


def instance_numbers(num_slices: int, rng: np.random.Generator) -> np.ndarray:
    """Instance number of every slice, from below: not always the order of positions."""
    upwards = np.arange(1, num_slices + 1)
    every_other = np.concatenate([np.arange(0, num_slices, 2), np.arange(1, num_slices, 2)])
    interleaved = np.empty_like(upwards)
    interleaved[every_other] = upwards
    return (upwards, upwards[::-1], interleaved)[int(rng.integers(3))]


def _identity(header: SeriesHeader, number: int) -> Dataset:
    """Patient, study, series and instance modules; the name says that nobody is meant."""
    dataset = Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.MediaStorageSOPClassUID = MRImageStorage
    dataset.file_meta.MediaStorageSOPInstanceUID = UID(header.uid("instance", header.number, number))
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.SOPClassUID = MRImageStorage
    dataset.SOPInstanceUID = dataset.file_meta.MediaStorageSOPInstanceUID
    dataset.PatientName, dataset.PatientID = f"Simulated^{header.participant_id}", header.participant_id
    dataset.PatientSex, dataset.PatientAge = header.sex, f"{header.age_years:03d}Y"
    dataset.PatientBirthDate = dataset.AccessionNumber = dataset.ReferringPhysicianName = ""
    dataset.StudyInstanceUID, dataset.StudyID = header.uid("study"), "1"
    dataset.StudyDate = dataset.SeriesDate = _STUDY_DATE
    dataset.StudyTime, dataset.StudyDescription = "120000", "Simulated brain"
    dataset.SeriesInstanceUID = header.uid("series", header.number)
    dataset.FrameOfReferenceUID, dataset.PositionReferenceIndicator = header.uid("frame"), ""
    dataset.Modality, dataset.SeriesNumber, dataset.InstanceNumber = "MR", header.number, number
    dataset.AcquisitionNumber = 1
    return dataset


def _set_acquisition(dataset: Dataset, header: SeriesHeader) -> None:
    """Equipment and MR image modules."""
    protocol, sequence = header.protocol, header.protocol.sequence
    dataset.Manufacturer, dataset.ManufacturerModelName = header.scanner.manufacturer, header.scanner.model
    dataset.InstitutionName = "Simulated"
    dataset.MagneticFieldStrength = f"{header.scanner.field_strength_t:g}"
    dataset.BodyPartExamined, dataset.PatientPosition = "BRAIN", "HFS"
    dataset.SeriesDescription = dataset.ProtocolName = protocol.name
    dataset.ScanningSequence = list(protocol.scanning_sequence)
    dataset.SequenceVariant = list(protocol.sequence_variant)
    dataset.ScanOptions, dataset.MRAcquisitionType = "", "2D"
    dataset.RepetitionTime, dataset.EchoTime = f"{sequence.tr_ms:g}", f"{sequence.te_ms:g}"
    if sequence.ti_ms is not None:
        dataset.InversionTime = f"{sequence.ti_ms:g}"
    dataset.FlipAngle, dataset.EchoTrainLength = f"{sequence.flip_angle_deg:g}", protocol.echo_train_length
    dataset.ImagedNucleus, dataset.NumberOfAverages, dataset.EchoNumbers = "1H", "1", 1
    dataset.ImagingFrequency = f"{42.577478 * header.scanner.field_strength_t:.4f}"
    dataset.InPlanePhaseEncodingDirection = "ROW"


def _set_geometry(dataset: Dataset, header: SeriesHeader, affine: np.ndarray, z: int, shape: tuple[int, ...]) -> None:
    """Image plane module of slice z."""
    columns, rows, normal = directions_lps(affine)
    position = position_lps(affine, (0, 0, z))
    dz, dy, dx = header.spacing_mm
    dataset.ImageOrientationPatient = [f"{value:.10f}"[:16] for value in (*columns, *rows)]
    dataset.ImagePositionPatient = [f"{value:.8f}" for value in position]
    dataset.PixelSpacing = [f"{dy:g}", f"{dx:g}"]
    dataset.SliceThickness = dataset.SpacingBetweenSlices = f"{dz:g}"
    dataset.SliceLocation = f"{float(position @ normal):.6f}"
    dataset.Rows, dataset.Columns = shape[1], shape[2]
    dataset.AcquisitionMatrix = [shape[1], 0, 0, shape[2]]


def _set_pixels(dataset: Dataset, values: np.ndarray, vendor: str, rng: np.random.Generator) -> None:
    """Pixel module; Philips rescales every slice by itself, the others store what they mean."""
    slope, intercept = 1.0, 0.0
    if vendor == "Philips":
        slope, intercept = round(float(rng.uniform(0.6, 1.8)), 6), round(float(rng.uniform(-40, 0)), 3)
        dataset.RescaleSlope, dataset.RescaleIntercept, dataset.RescaleType = f"{slope:g}", f"{intercept:g}", "US"
    stored = np.clip(np.round((values - intercept) / slope), 0, 32767).astype("<u2")
    dataset.ImageType = ["ORIGINAL", "PRIMARY", "M", "SE" if vendor == "Philips" else "ND"]
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, "MONOCHROME2"
    # GE stores signed words.
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = 16, 16, 15
    dataset.PixelRepresentation = 1 if vendor == "GE" else 0
    dataset.SmallestImagePixelValue, dataset.LargestImagePixelValue = int(stored.min()), int(stored.max())
    dataset.WindowCenter, dataset.WindowWidth = f"{0.45 * values.max():.0f}", f"{0.9 * values.max():.0f}"
    dataset.PixelData = stored.tobytes()

"""The files a scanner or a data set would give: DICOM series, NIfTI with a sidecar, fastMRI and ISMRMRD HDF5."""

# N Y X slices and in-plane voxels, C coils

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import h5py
import nibabel as nib
import numpy as np
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, MRImageStorage, generate_uid

from omnimri.platform.corpus.acquisition import Acquisition, Grid
from omnimri.platform.corpus.signal import Protocol

with warnings.catch_warnings():  # importing ismrmrd resets the warning filters of the process
    import ismrmrd
    import ismrmrd.hdf5

LPS = np.array([-1.0, -1.0, 1.0])
OVERSAMPLING = 2
"""Readout samples per image voxel in ISMRMRD files, as scanners record them."""
_INT_RANGE = 3000


@dataclass(frozen=True, kw_only=True)
class Scanner:
    """What identifies the machine in a header."""

    manufacturer: str
    model: str
    field_strength_t: float


@dataclass(frozen=True, kw_only=True)
class Series:
    """One series with everything that its files state."""

    participant_id: str
    uid_seed: str
    """Entropy of the DICOM UIDs; the same seed gives the same UIDs."""
    sex: str
    age_years: int
    scanner: Scanner
    protocol: Protocol
    number: int
    grid: Grid
    acquisition: Acquisition

    def uid(self, *names: object) -> str:
        """A UID of this patient for the named thing."""
        return str(generate_uid(entropy_srcs=[self.uid_seed, *map(str, names)]))


def write_dicom(series: Series, folder: Path) -> Path:
    """A folder of MR Image Storage files, numbered against their place for every other series."""
    path = folder / "dicom" / series.protocol.contrast
    path.mkdir(parents=True, exist_ok=True)
    peak = float(series.acquisition.image.max())
    num_slices = series.grid.num_slices
    for z in range(num_slices):
        number = z + 1 if series.number % 2 else num_slices - z
        dataset = _dicom_header(series, z, number)
        # Philips scales every slice by itself.
        own_peak = float(series.acquisition.image[z].max()) if series.scanner.manufacturer.startswith("Phil") else peak
        slope = max(own_peak, 1e-6) * _INT_RANGE / peak / _INT_RANGE
        stored = np.round(series.acquisition.image[z] / peak * _INT_RANGE / max(slope, 1e-6)).astype(np.uint16)
        dataset.RescaleSlope, dataset.RescaleIntercept, dataset.RescaleType = f"{slope:.8g}", "0", "US"
        dataset.PixelData = stored.tobytes()
        dataset.save_as(path / f"IM{number:04d}.dcm", enforce_file_format=True)
    return path


def _dicom_header(series: Series, z: int, number: int) -> Dataset:
    protocol, grid = series.protocol, series.grid
    dataset = Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.MediaStorageSOPClassUID = MRImageStorage
    dataset.file_meta.MediaStorageSOPInstanceUID = series.uid("sop", series.number, number)
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.SOPClassUID = MRImageStorage
    dataset.SOPInstanceUID = dataset.file_meta.MediaStorageSOPInstanceUID
    dataset.StudyInstanceUID, dataset.SeriesInstanceUID = series.uid("study"), series.uid("series", series.number)
    dataset.FrameOfReferenceUID = series.uid("frame")
    dataset.PatientName, dataset.PatientID = f"SIMULATED^{series.participant_id}", series.participant_id
    dataset.PatientSex, dataset.PatientAge = series.sex, f"{series.age_years:03d}Y"
    dataset.PatientBirthDate = dataset.AccessionNumber = dataset.ReferringPhysicianName = dataset.StudyID = ""
    dataset.StudyDate, dataset.StudyTime, dataset.Modality = "20250101", "120000", "MR"
    dataset.ImageType = ["ORIGINAL", "PRIMARY", "M", "ND"]
    dataset.Manufacturer, dataset.ManufacturerModelName = series.scanner.manufacturer, series.scanner.model
    dataset.MagneticFieldStrength = f"{series.scanner.field_strength_t:g}"
    dataset.BodyPartExamined, dataset.PatientPosition = "BRAIN", "HFS"
    dataset.SeriesDescription = dataset.ProtocolName = protocol.name
    dataset.SeriesNumber, dataset.InstanceNumber = series.number, number
    dataset.ScanningSequence, dataset.SequenceVariant = protocol.scanning_sequence, "SK"
    dataset.ScanOptions, dataset.MRAcquisitionType = "", "2D"
    dataset.RepetitionTime, dataset.EchoTime = f"{protocol.tr_ms:g}", f"{protocol.te_ms:g}"
    if protocol.ti_ms is not None:
        dataset.InversionTime = f"{protocol.ti_ms:g}"
    dataset.FlipAngle, dataset.EchoTrainLength = f"{protocol.flip_angle_deg:g}", 1
    _dicom_geometry(dataset, grid, z)
    return dataset


def _dicom_geometry(dataset: Dataset, grid: Grid, z: int) -> None:
    """Plane and pixel module of slice z; DICOM counts millimetres to the left, back and head."""
    dz, dy, dx = grid.spacing_mm
    axes = grid.affine[:3, :3] / np.array([dx, dy, dz]) * LPS[:, None]
    position = (grid.affine @ [0, 0, z, 1])[:3] * LPS
    dataset.ImageOrientationPatient = [f"{v:.8f}" for v in (*axes[:, 0], *axes[:, 1])]
    dataset.ImagePositionPatient = [f"{v:.6f}" for v in position]
    dataset.PixelSpacing = [f"{dy:g}", f"{dx:g}"]
    dataset.SliceThickness = dataset.SpacingBetweenSlices = f"{dz:g}"
    dataset.SliceLocation = f"{float(position @ np.cross(axes[:, 0], axes[:, 1])):.4f}"
    dataset.Rows, dataset.Columns = grid.matrix
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, "MONOCHROME2"
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit, dataset.PixelRepresentation = 16, 16, 15, 0


def write_nifti(series: Series, folder: Path) -> Path:
    """`.nii.gz` with a BIDS sidecar."""
    path = folder / "anat" / f"{series.participant_id}_{series.protocol.contrast}.nii.gz"
    save_nifti(np.round(series.acquisition.image / series.acquisition.image.max() * _INT_RANGE).astype(np.int16),
               series.grid.affine, path)  # fmt: skip
    protocol = series.protocol
    sidecar = {
        "Modality": "MR",
        "Manufacturer": series.scanner.manufacturer,
        "ManufacturersModelName": series.scanner.model,
        "MagneticFieldStrength": series.scanner.field_strength_t,
        "BodyPartExamined": "BRAIN",
        "SeriesDescription": protocol.name,
        "ProtocolName": protocol.name,
        "ScanningSequence": protocol.scanning_sequence,
        "RepetitionTime": protocol.tr_ms / 1000,
        "EchoTime": protocol.te_ms / 1000,
        "FlipAngle": protocol.flip_angle_deg,
        "SliceThickness": series.grid.spacing_mm[0],
    }
    if protocol.ti_ms is not None:
        sidecar["InversionTime"] = protocol.ti_ms / 1000
    path.with_name(path.name.replace(".nii.gz", ".json")).write_text(json.dumps(sidecar, indent=1))
    return path


def save_nifti(array: np.ndarray, affine: np.ndarray, path: Path) -> None:
    """An array `(Z, Y, X)` with the affine of its `(x, y, z)` index."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = nib.Nifti1Image(array.transpose(2, 1, 0), affine)
    image.header.set_xyzt_units("mm", "sec")
    image.set_qform(affine, code=1)
    image.set_sform(affine, code=1)
    nib.save(image, path)


def write_fastmri(series: Series, folder: Path) -> Path:
    """FastMRI layout (arXiv 1811.08839), with our affine in the attribute `affine_ras` since it has none of its own."""
    path = folder / "raw" / f"{series.participant_id}_{series.protocol.contrast}.h5"
    path.parent.mkdir(parents=True, exist_ok=True)
    rss = series.acquisition.image
    with h5py.File(path, "w") as file:
        file["kspace"] = series.acquisition.kspace
        file["reconstruction_rss"] = rss
        file["ismrmrd_header"] = np.bytes_(_header_xml(series, oversampling=1))
        file.attrs["acquisition"] = f"AX{series.protocol.contrast.upper()}"
        file.attrs["max"], file.attrs["norm"] = float(rss.max()), float(np.linalg.norm(rss))
        file.attrs["patient_id"] = series.participant_id
        file.attrs["affine_ras"] = series.grid.affine.ravel()
    return path


def write_ismrmrd(series: Series, folder: Path) -> Path:
    """One acquisition per slice and line, readout oversampled, two noise scans first."""
    path = folder / "raw" / f"{series.participant_id}_{series.protocol.contrast}.mrd.h5"
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = _oversampled(series.acquisition.kspace)
    acquisitions = _acquisitions(series, lines)
    with h5py.File(path, "w") as file:
        group = file.create_group("dataset")
        group.create_dataset("xml", data=np.array([_header_xml(series, oversampling=OVERSAMPLING)], dtype=object),
                             dtype=h5py.string_dtype())  # fmt: skip
        group.create_dataset("data", data=acquisitions, maxshape=(None,), chunks=(96,))
    return path


def _oversampled(kspace: np.ndarray) -> np.ndarray:
    """`(N, C, Y, X)` with twice the field of view along the readout Y."""
    images = np.fft.fftshift(np.fft.ifft(np.fft.ifftshift(kspace, axes=-2), axis=-2, norm="ortho"), axes=-2)
    extra = kspace.shape[-2] // 2
    wide = np.pad(images, ((0, 0), (0, 0), (extra, extra), (0, 0)))
    return np.fft.fftshift(np.fft.fft(np.fft.ifftshift(wide, axes=-2), axis=-2, norm="ortho"), axes=-2).astype(
        np.complex64
    )


def _acquisitions(series: Series, kspace: np.ndarray) -> np.ndarray:
    """Structured array of `ismrmrd.hdf5.acquisition_dtype`: noise scans, then every line of every slice."""
    num_slices, num_coils, num_samples, num_lines = kspace.shape
    total = 2 + num_slices * num_lines
    acquisitions = np.empty(total, dtype=ismrmrd.hdf5.acquisition_dtype)
    acquisitions["head"] = np.zeros(total, dtype=ismrmrd.hdf5.acquisition_header_dtype)
    head = acquisitions["head"]
    head["version"], head["number_of_samples"], head["center_sample"] = 1, num_samples, num_samples // 2
    head["available_channels"] = head["active_channels"] = num_coils
    head["scan_counter"], head["sample_time_us"] = np.arange(total), 5.0
    axes = series.grid.affine[:3, :3] / np.array(series.grid.spacing_mm[::-1]) * LPS[:, None]
    head["phase_dir"], head["read_dir"], head["slice_dir"] = axes.T
    head["idx"]["slice"][2:] = np.repeat(np.arange(num_slices), num_lines)
    head["idx"]["kspace_encode_step_1"][2:] = np.tile(np.arange(num_lines), num_slices)
    centre = [num_lines // 2, num_samples // OVERSAMPLING // 2]
    positions = np.array([(series.grid.affine @ [*centre, z, 1])[:3] * LPS for z in range(num_slices)])
    head["position"][2:] = np.repeat(positions, num_lines, axis=0)
    head["flags"][:2] = 1 << (ismrmrd.ACQ_IS_NOISE_MEASUREMENT - 1)
    noise = np.random.default_rng(series.number).normal(size=(2, num_coils, 2 * num_samples)).astype(np.float32)
    data = np.ascontiguousarray(kspace.transpose(0, 3, 1, 2)).reshape(-1, num_coils * num_samples).view(np.float32)
    for index in range(total):
        acquisitions[index]["traj"] = np.zeros(0, np.float32)
        acquisitions[index]["data"] = noise[index].ravel() if index < 2 else data[index - 2]
    return acquisitions


def _header_xml(series: Series, *, oversampling: int) -> str:
    """The ISMRMRD header that both raw formats carry."""
    schema = ismrmrd.xsd
    height, width = series.grid.matrix
    dz, dy, dx = series.grid.spacing_mm
    protocol = series.protocol

    def space(factor: int) -> object:
        return schema.encodingSpaceType(
            matrixSize=schema.matrixSizeType(x=height * factor, y=width, z=1),
            fieldOfView_mm=schema.fieldOfViewMm(x=height * dy * factor, y=width * dx, z=dz),
        )

    limits = schema.encodingLimitsType(
        kspace_encoding_step_1=schema.limitType(minimum=0, maximum=width - 1, center=width // 2),
        slice=schema.limitType(minimum=0, maximum=series.grid.num_slices - 1, center=series.grid.num_slices // 2),
    )
    header = schema.ismrmrdHeader(
        subjectInformation=schema.subjectInformationType(patientID=series.participant_id, patientGender=series.sex),
        studyInformation=schema.studyInformationType(studyInstanceUID=series.uid("study"), bodyPartExamined="BRAIN"),
        measurementInformation=schema.measurementInformationType(
            measurementID=str(series.number), patientPosition=schema.patientPositionType.HFS,
            protocolName=protocol.name, seriesDescription=protocol.name,
        ),
        acquisitionSystemInformation=schema.acquisitionSystemInformationType(
            systemVendor=series.scanner.manufacturer, systemModel=series.scanner.model,
            systemFieldStrength_T=series.scanner.field_strength_t,
            receiverChannels=series.acquisition.kspace.shape[1],
        ),
        experimentalConditions=schema.experimentalConditionsType(
            H1resonanceFrequency_Hz=round(42_577_478 * series.scanner.field_strength_t)
        ),
        encoding=[schema.encodingType(
            encodedSpace=space(oversampling), reconSpace=space(1), encodingLimits=limits,
            trajectory=schema.trajectoryType.CARTESIAN,
        )],
        sequenceParameters=schema.sequenceParametersType(
            TR=[protocol.tr_ms], TE=[protocol.te_ms], flipAngle_deg=[protocol.flip_angle_deg],
            TI=[protocol.ti_ms] if protocol.ti_ms is not None else [],
        ),
    )  # fmt: skip
    return schema.ToXML(header)


WRITERS: dict[str, Callable[[Series, Path], Path]] = {
    "dicom": write_dicom,
    "fastmri": write_fastmri,
    "nifti": write_nifti,
    "ismrmrd": write_ismrmrd,
}
"""By the name of the format; the order is the one that formats rotate in."""

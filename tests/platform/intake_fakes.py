"""Small files of every format that intake reads, written by the formats' own libraries from known arrays."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import h5py
import ismrmrd
import nibabel as nib
import numpy as np
from pydicom.datadict import tag_for_keyword
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.sequence import Sequence
from pydicom.uid import ExplicitVRLittleEndian, generate_uid

from omnimri.models.scan import Scan

LPS = np.diag([-1.0, -1.0, 1.0, 1.0])
MR_IMAGE = "1.2.840.10008.5.1.4.1.1.4"


def random_image(seed: int, shape: tuple[int, int, int] = (5, 8, 6)) -> np.ndarray:
    """Whole numbers without any symmetry, `(Z, Y, X)`."""
    return np.random.default_rng(seed).integers(1, 2000, size=shape).astype(np.float32)


def oblique_affine(spacing_xyz: tuple[float, float, float] = (1.5, 2.0, 4.0), angle: float = 0.3) -> np.ndarray:
    """RAS affine, tilted about two axes and off the origin, right-handed."""
    c, s = np.cos(angle), np.sin(angle)
    tilt = np.array([[1, 0, 0], [0, c, -s], [0, s, c]]) @ np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]])
    affine = np.eye(4)
    affine[:3, :3] = tilt @ np.diag(spacing_xyz)
    affine[:3, 3] = (-31.0, 12.5, 7.0)
    return affine


def dicom_slices(image: np.ndarray, affine: np.ndarray, seed: int = 0, **header: Any) -> list[Dataset]:
    """One MR instance per slice; Instance Numbers are shuffled, and every slice has a rescale of its own.

    Args:
        image: `(Z, Y, X)`, what a reader must return.
        affine: RAS.
        seed: Of the shuffle.
        **header: Elements to set or replace on every instance.
    """
    lps = LPS @ affine
    spacing = np.linalg.norm(lps[:3, :3], axis=0)
    row, column = lps[:3, 0] / spacing[0], lps[:3, 1] / spacing[1]
    uids = {name: generate_uid(entropy_srcs=[name, str(seed)]) for name in ("study", "series", "frame")}
    numbers = np.random.default_rng(seed).permutation(len(image)) + 1
    slices = []
    for z, plane in enumerate(image):
        dataset = Dataset()
        dataset.file_meta = FileMetaDataset()
        dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        dataset.SOPClassUID = MR_IMAGE
        dataset.SOPInstanceUID = generate_uid()
        dataset.StudyInstanceUID, dataset.SeriesInstanceUID = uids["study"], uids["series"]
        dataset.FrameOfReferenceUID = uids["frame"]
        dataset.Modality, dataset.PatientID, dataset.PatientName = "MR", "P-001", "Doe^Jane"
        dataset.Manufacturer, dataset.MagneticFieldStrength = "SIEMENS", 2.89362
        dataset.SeriesDescription, dataset.ImageType = "t1_mprage", ["ORIGINAL", "PRIMARY", "M"]
        dataset.InstanceNumber = int(numbers[z])
        dataset.ImageOrientationPatient = [float(f"{v:.9f}") for v in (*row, *column)]
        dataset.ImagePositionPatient = [float(f"{v:.7f}") for v in (lps @ [0, 0, z, 1])[:3]]
        dataset.PixelSpacing = [float(f"{spacing[1]:.9f}"), float(f"{spacing[0]:.9f}")]
        dataset.SliceThickness = float(spacing[2])
        dataset.Rows, dataset.Columns = plane.shape
        dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, "MONOCHROME2"
        dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit, dataset.PixelRepresentation = 16, 16, 15, 0
        slope, intercept = 0.25 * (1 + z % 3), float(-z)
        dataset.RescaleSlope, dataset.RescaleIntercept = slope, intercept
        dataset.PixelData = np.round((plane - intercept) / slope).astype(np.uint16).tobytes()
        for keyword, value in header.items():
            setattr(dataset, keyword, value)
        slices.append(dataset)
    return slices


def save_dicom(slices: list[Dataset], folder: Path, prefix: str = "IM") -> Path:
    """Save instances as files; the names follow the shuffled Instance Numbers."""
    folder.mkdir(parents=True, exist_ok=True)
    for index, dataset in enumerate(slices):
        name = f"{prefix}{int(dataset.InstanceNumber):04d}-{index}.dcm"
        dataset.save_as(folder / name, enforce_file_format=True, overwrite=True)
    return folder


def enhanced_object(slices: list[Dataset]) -> Dataset:
    """An Enhanced MR object of `dicom_slices`, its frames in the order of their Instance Numbers."""
    ordered = sorted(slices, key=lambda dataset: dataset.InstanceNumber)
    first = ordered[0]
    enhanced = Dataset()
    enhanced.update({tag: first[tag] for tag in first.keys() if tag.group != 0x7FE0})  # noqa: SIM118
    enhanced.file_meta = first.file_meta
    for keyword in (
        "ImagePositionPatient",
        "ImageOrientationPatient",
        "PixelSpacing",
        "RescaleSlope",
        "RescaleIntercept",
    ):
        del enhanced[keyword]
    enhanced.SOPClassUID = "1.2.840.10008.5.1.4.1.1.4.1"
    enhanced.NumberOfFrames = len(ordered)
    enhanced.PixelData = b"".join(dataset.PixelData for dataset in ordered)
    shared = Dataset()
    shared.PixelMeasuresSequence = _item(first, "PixelSpacing", "SliceThickness")
    shared.PlaneOrientationSequence = _item(first, "ImageOrientationPatient")
    shared.MREchoSequence = Sequence([Dataset()])
    shared.MREchoSequence[0].EffectiveEchoTime = 97.0
    enhanced.SharedFunctionalGroupsSequence = Sequence([shared])
    enhanced.PerFrameFunctionalGroupsSequence = Sequence([_frame(dataset) for dataset in ordered])
    return enhanced


def _frame(dataset: Dataset) -> Dataset:
    frame = Dataset()
    frame.PlanePositionSequence = _item(dataset, "ImagePositionPatient")
    frame.PixelValueTransformationSequence = _item(dataset, "RescaleSlope", "RescaleIntercept")
    frame.PixelValueTransformationSequence[0].RescaleType = "US"
    frame.FrameContentSequence = Sequence([Dataset()])
    return frame


def _item(dataset: Dataset, *keywords: str) -> Sequence:
    item = Dataset()
    item.update({tag_for_keyword(keyword): dataset[keyword] for keyword in keywords})
    return Sequence([item])


def assert_same_voxels(scan: Scan, reference: nib.Nifti1Image) -> None:
    """The same value at the same place, up to the order in which the axes are stored."""
    transform = nib.orientations.io_orientation(np.linalg.inv(reference.affine) @ scan.affine)
    turned = nib.orientations.apply_orientation(scan.image.transpose(2, 1, 0), transform)
    affine = scan.affine @ nib.orientations.inv_ornt_aff(transform, scan.image.shape[::-1])
    np.testing.assert_allclose(affine, reference.affine, atol=1e-3)
    np.testing.assert_allclose(turned, reference.get_fdata(dtype=np.float32), rtol=1e-6)


def rescalable(image: np.ndarray) -> np.ndarray:
    """An image that survives the rescale of `dicom_slices` exactly: multiples of 12 plus the intercept."""
    offsets = -np.arange(len(image), dtype=np.float32)[:, None, None]
    return (np.round(image / 12) * 12 + offsets + 12 * len(image)).astype(np.float32)


def save_nifti(path: Path, image: np.ndarray, affine: np.ndarray) -> Path:
    """Save `(Z, Y, X)` or `(T, Z, Y, X)`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(np.ascontiguousarray(image.T), affine), path)
    return path


def coil_kspace(image: np.ndarray, num_coils: int = 3, seed: int = 0) -> np.ndarray:
    """K-space `(Z, C, Y, X)` of an image seen by coils whose squares add up to one, so that RSS gives it back."""
    rng = np.random.default_rng(seed)
    weights = rng.standard_normal((num_coils, 2)) @ [1, 1j]
    weights /= np.sqrt((np.abs(weights) ** 2).sum())
    coils = image[:, None] * weights[:, None, None]
    return fft(coils, (-2, -1)).astype(np.complex64)


def fft(array: np.ndarray, axes: tuple[int, ...]) -> np.ndarray:
    """Centred orthonormal transform, written out here so that the reader is checked against another hand."""
    return np.fft.fftshift(np.fft.fftn(np.fft.ifftshift(array, axes=axes), axes=axes, norm="ortho"), axes=axes)


def ismrmrd_header(
    shape: tuple[int, int, int], spacing_zyx: tuple[float, float, float], *, oversampling: int = 1
) -> str:
    """XML header of a Cartesian acquisition; `shape` is `(Z, Y, X)` with readout along Y and phase encoding along X."""
    _, y, x = shape
    dz, dy, dx = spacing_zyx
    return f"""<?xml version="1.0"?>
<ismrmrdHeader xmlns="http://www.ismrm.org/ISMRMRD">
  <subjectInformation><patientName>Doe^Jane</patientName><patientID>P-001</patientID>
    <patientGender>F</patientGender></subjectInformation>
  <measurementInformation><patientPosition>HFS</patientPosition><protocolName>t2_tse_tra</protocolName>
  </measurementInformation>
  <acquisitionSystemInformation><systemVendor>GE MEDICAL SYSTEMS</systemVendor>
    <systemFieldStrength_T>1.5</systemFieldStrength_T></acquisitionSystemInformation>
  <experimentalConditions><H1resonanceFrequency_Hz>63500000</H1resonanceFrequency_Hz></experimentalConditions>
  <encoding>
    <encodedSpace><matrixSize><x>{y * oversampling}</x><y>{x}</y><z>1</z></matrixSize>
      <fieldOfView_mm><x>{y * dy * oversampling}</x><y>{x * dx}</y><z>{dz}</z></fieldOfView_mm></encodedSpace>
    <reconSpace><matrixSize><x>{y}</x><y>{x}</y><z>1</z></matrixSize>
      <fieldOfView_mm><x>{y * dy}</x><y>{x * dx}</y><z>{dz}</z></fieldOfView_mm></reconSpace>
    <encodingLimits><kspace_encoding_step_1><minimum>0</minimum><maximum>{x - 1}</maximum><center>{x // 2}</center>
      </kspace_encoding_step_1></encodingLimits>
    <trajectory>cartesian</trajectory>
  </encoding>
  <sequenceParameters><TR>4000</TR><TE>95</TE><flipAngle_deg>150</flipAngle_deg></sequenceParameters>
</ismrmrdHeader>"""


def save_fastmri(path: Path, kspace: np.ndarray, header: str | None = None, **attributes: Any) -> Path:
    """Save k-space `(Z, C, Y, X)` in the fastMRI layout; `mask=` becomes a dataset."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        file["kspace"] = kspace
        if header is not None:
            file["ismrmrd_header"] = header
        if (mask := attributes.pop("mask", None)) is not None:
            file["mask"] = mask
        file.attrs.update(attributes)
    return path


def save_ismrmrd(
    path: Path,
    kspace: np.ndarray,
    affine: np.ndarray,
    *,
    oversampling: int = 2,
    lines: np.ndarray | None = None,
    repetition_of_line: np.ndarray | None = None,
    noise: np.ndarray | None = None,
    dwell_us: tuple[float, float] = (5.0, 5.0),
    seed: int = 0,
) -> Path:
    """Save k-space `(Z, C, Y, X)` as ISMRMRD: noise scan first, slices and lines in random order, readout oversampled.

    Args:
        path: File to make.
        kspace: Without oversampling.
        affine: RAS affine of the image grid.
        oversampling: Of the readout.
        lines: Phase-encoding lines to write; all by default.
        repetition_of_line: Repetition counter by line; zero by default.
        noise: Samples of the noise scan `(C, N)`, an empty array for none; ones by default, which are no noise.
        dwell_us: Sample times of the noise scan and of image lines.
        seed: Of the order.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    num_slices, num_coils, num_readout, num_lines = kspace.shape
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    oversampled = _oversample(kspace, oversampling)
    directions = (LPS @ affine)[:3, :3] / spacing
    rng = np.random.default_rng(seed)
    numbers = rng.permutation(num_slices)  # slice counters that say nothing about position
    with ismrmrd.Dataset(str(path), "dataset", create_if_needed=True) as file:
        header = ismrmrd_header((num_slices, num_readout, num_lines), tuple(spacing[::-1]), oversampling=oversampling)
        file.write_xml_header(header)
        noise = np.ones((num_coils, 16)) if noise is None else noise
        for part in np.split(noise.astype(np.complex64), 2, axis=1) if noise.size else []:
            scan = ismrmrd.Acquisition.from_array(np.ascontiguousarray(part))
            scan.setFlag(ismrmrd.ACQ_IS_NOISE_MEASUREMENT)
            scan.sample_time_us = dwell_us[0]
            file.append_acquisition(scan)
        written = range(num_lines) if lines is None else np.flatnonzero(lines)
        for z, line in rng.permutation([(z, line) for z in range(num_slices) for line in written]):
            acquisition = ismrmrd.Acquisition.from_array(np.ascontiguousarray(oversampled[z, :, :, line]))
            acquisition.sample_time_us = dwell_us[1]
            acquisition.center_sample = num_readout * oversampling // 2
            acquisition.idx.kspace_encode_step_1 = line
            acquisition.idx.slice = numbers[z]
            acquisition.idx.repetition = 0 if repetition_of_line is None else repetition_of_line[line]
            center = LPS @ affine @ [num_lines // 2, num_readout // 2, z, 1]
            acquisition.position[:] = center[:3]
            acquisition.phase_dir[:], acquisition.read_dir[:], acquisition.slice_dir[:] = directions.T
            file.append_acquisition(acquisition)
    return path


def _oversample(kspace: np.ndarray, factor: int) -> np.ndarray:
    """K-space of the same object in a field of view that is `factor` times longer along the readout."""
    num_readout = kspace.shape[-2]
    axes = (-2,)
    image = np.fft.fftshift(np.fft.ifft(np.fft.ifftshift(kspace, axes=axes), axis=-2, norm="ortho"), axes=axes)
    before = num_readout * factor // 2 - num_readout // 2
    padding = [(0, 0)] * (kspace.ndim - 2) + [(before, num_readout * factor - num_readout - before), (0, 0)]
    return fft(np.pad(image, padding), axes).astype(np.complex64)

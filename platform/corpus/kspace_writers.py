"""Raw k-space in HDF5: the layout of fastMRI and ISMRMRD datasets.

The transform is that of `physics.fft2c`: centred, orthonormal, over Y (readout) and X (phase encoding).
"""

# Z slices, C coils, Y readout, X phase encoding, L acquisitions

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch

from omnimri.models.physics import fft2c, ifft2c
from omnimri.platform.corpus.acquisition import add_noise, combine
from omnimri.platform.corpus.series import SeriesHeader, directions_lps, position_lps

with warnings.catch_warnings():
    # ismrmrd.hdf5 sets the process's warning filter to "default" when it is imported.
    import ismrmrd
    import ismrmrd.hdf5

OVERSAMPLING = 2
"""Readout samples to an image voxel in ISMRMRD files, as scanners record them."""
NUM_NOISE_SCANS = 2
_LARMOR_HZ_PER_T = 42_577_478


def write_fastmri_file(
    header: SeriesHeader, coil_images: np.ndarray, noise_std: float, affine: np.ndarray, path: Path,
    rng: np.random.Generator,
) -> None:  # fmt: skip
    """FastMRI's layout (Zbontar et al., arXiv 1811.08839), without its readout oversampling.

    FastMRI keeps no geometry. The attribute `affine_ras` adds it: 16 numbers, row by row, of the affine from the voxel
    index `(x, y, z)` of `reconstruction_rss[z, y, x]` to RAS mm; the XML header repeats it as a user parameter.

    Args:
        header: What the header states.
        coil_images: Complex `(Z, C, Y, X)` without noise.
        noise_std: Of the real and of the imaginary part.
        affine: Voxel `(x, y, z)` to RAS mm.
        path: The file.
        rng: Source of the noise and of the receiver gain.
    """
    kspace = _gain(rng) * add_noise(_kspace(coil_images), noise_std, rng)
    image = combine(ifft2c(torch.from_numpy(kspace)).numpy())
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        file["kspace"], file["reconstruction_rss"] = kspace, image
        file["ismrmrd_header"] = np.bytes_(_header_xml(header, kspace.shape, affine, oversampling=1))
        contrast = {"T1w": "T1", "T2w": "T2", "FLAIR": "FLAIR", "PD": "PD"}[header.protocol.contrast]
        file.attrs["acquisition"] = f"AX{contrast}"
        file.attrs["max"], file.attrs["norm"] = float(image.max()), float(np.linalg.norm(image))
        file.attrs["patient_id"] = header.participant_id
        file.attrs["affine_ras"] = affine.ravel()


def write_ismrmrd_file(
    header: SeriesHeader, coil_images: np.ndarray, noise_std: float, affine: np.ndarray, path: Path,
    rng: np.random.Generator,
) -> None:  # fmt: skip
    """One acquisition for each line of each slice, readout oversampled, after noise scans; arguments as above."""
    extra = coil_images.shape[-2] * (OVERSAMPLING - 1) // 2
    wide = np.pad(coil_images, ((0, 0), (0, 0), (extra, extra), (0, 0)))
    gain = _gain(rng)
    kspace = gain * add_noise(_kspace(wide), noise_std, rng)  # (Z, C, 2 Y, X)
    noise_shape = (NUM_NOISE_SCANS, kspace.shape[1] * kspace.shape[2])
    noise = gain * add_noise(np.zeros(noise_shape, np.complex64), noise_std, rng)
    path.parent.mkdir(parents=True, exist_ok=True)
    xml = _header_xml(header, coil_images.shape, affine, oversampling=OVERSAMPLING)
    with h5py.File(path, "w") as file:
        group = file.create_group("dataset")
        group.create_dataset("xml", data=np.array([xml], dtype=object), dtype=h5py.string_dtype("ascii"))
        acquisitions = _acquisitions(kspace, noise, affine)
        group.create_dataset("data", data=acquisitions, maxshape=(None,), chunks=(kspace.shape[-1],))


def _kspace(coil_images: np.ndarray) -> np.ndarray:
    return fft2c(torch.from_numpy(np.ascontiguousarray(coil_images))).numpy()


def _gain(rng: np.random.Generator) -> np.float32:
    """Receivers count in units of their own."""
    return np.float32(10 ** rng.uniform(-5, -3))


def _acquisitions(kspace: np.ndarray, noise: np.ndarray, affine: np.ndarray) -> np.ndarray:
    """`(L,)` of `ismrmrd.hdf5.acquisition_dtype`: noise scans, then lines, every other slice first.

    A position is that of voxel `(X // 2, Y // 2)`, where the centred transform has its origin. Directions and positions
    are LPS.
    """
    num_slices, num_coils, num_samples, num_lines = kspace.shape
    slices = np.concatenate([np.arange(0, num_slices, 2), np.arange(1, num_slices, 2)])
    total = len(noise) + num_slices * num_lines
    acquisitions = np.empty(total, dtype=ismrmrd.hdf5.acquisition_dtype)
    head = np.zeros(total, dtype=ismrmrd.hdf5.acquisition_header_dtype)
    lines = slice(len(noise), None)
    head["version"], head["scan_counter"], head["sample_time_us"] = 1, np.arange(total), 5.0
    head["number_of_samples"], head["center_sample"] = num_samples, num_samples // 2
    head["available_channels"] = head["active_channels"] = num_coils
    head["flags"][: len(noise)] = 1 << (ismrmrd.ACQ_IS_NOISE_MEASUREMENT - 1)
    head["phase_dir"], head["read_dir"], head["slice_dir"] = directions_lps(affine)
    head["idx"]["slice"][lines] = np.repeat(slices, num_lines)
    head["idx"]["kspace_encode_step_1"][lines] = np.tile(np.arange(num_lines), num_slices)
    centre = (num_lines // 2, num_samples // OVERSAMPLING // 2)
    positions = np.array([position_lps(affine, (*centre, z)) for z in slices])
    head["position"][lines] = np.repeat(positions, num_lines, axis=0)
    _flag_ends(head, lines, num_slices, num_lines)
    acquisitions["head"] = head
    samples = kspace[slices].transpose(0, 3, 1, 2).reshape(-1, num_coils * num_samples)
    for index, values in enumerate(np.concatenate([noise, samples]).view(np.float32)):
        acquisitions[index]["traj"], acquisitions[index]["data"] = np.zeros(0, np.float32), values
    return acquisitions


def _flag_ends(head: np.ndarray, lines: slice, num_slices: int, num_lines: int) -> None:
    """Mark the first and the last line of every slice, and the end of the measurement."""
    flags = head["flags"][lines].reshape(num_slices, num_lines)
    flags[:, 0] |= np.uint64(1 << (ismrmrd.ACQ_FIRST_IN_SLICE - 1))
    flags[:, -1] |= np.uint64(1 << (ismrmrd.ACQ_LAST_IN_SLICE - 1))
    flags[-1, -1] |= np.uint64(1 << (ismrmrd.ACQ_LAST_IN_MEASUREMENT - 1))


def _header_xml(header: SeriesHeader, shape: tuple[int, ...], affine: np.ndarray, *, oversampling: int) -> str:
    """The ISMRMRD header, which fastMRI files carry too, for k-space `(Z, C, Y, X)`."""
    xsd, scanner, protocol = ismrmrd.xsd, header.scanner, header.protocol
    sequence = protocol.sequence
    document = xsd.ismrmrdHeader(
        subjectInformation=xsd.subjectInformationType(patientID=header.participant_id, patientGender=header.sex),
        studyInformation=xsd.studyInformationType(
            studyInstanceUID=header.uid("study"), studyDescription="Simulated brain", bodyPartExamined="BRAIN"
        ),
        measurementInformation=xsd.measurementInformationType(
            measurementID=str(header.number), patientPosition=xsd.patientPositionType.HFS,
            protocolName=protocol.name, seriesDescription=protocol.name,
            seriesInstanceUIDRoot=header.uid("series", header.number), frameOfReferenceUID=header.uid("frame"),
        ),
        acquisitionSystemInformation=xsd.acquisitionSystemInformationType(
            systemVendor=scanner.manufacturer, systemModel=scanner.model,
            systemFieldStrength_T=scanner.field_strength_t, receiverChannels=shape[1],
            relativeReceiverNoiseBandwidth=1.0,  # the simulated receiver has no filter
        ),
        experimentalConditions=xsd.experimentalConditionsType(
            H1resonanceFrequency_Hz=round(_LARMOR_HZ_PER_T * scanner.field_strength_t)
        ),
        encoding=[_encoding(header, shape, oversampling)],
        sequenceParameters=xsd.sequenceParametersType(
            TR=[sequence.tr_ms], TE=[sequence.te_ms], TI=[] if sequence.ti_ms is None else [sequence.ti_ms],
            flipAngle_deg=[sequence.flip_angle_deg], sequence_type=protocol.scanning_sequence[-1],
        ),
        userParameters=xsd.userParametersType(
            userParameterString=[xsd.userParameterStringType(
                name="affine_ras", value=" ".join(f"{value:.9g}" for value in affine.ravel())
            )]
        ),
    )  # fmt: skip
    return xsd.ToXML(document)


def _encoding(header: SeriesHeader, shape: tuple[int, ...], oversampling: int) -> Any:
    """Encoded and reconstructed grid; ISMRMRD's x is the readout."""
    xsd = ismrmrd.xsd
    num_slices, _, readout, lines = shape
    dz, dy, dx = header.spacing_mm

    def space(factor: int) -> Any:
        return xsd.encodingSpaceType(
            matrixSize=xsd.matrixSizeType(x=readout * factor, y=lines, z=1),
            fieldOfView_mm=xsd.fieldOfViewMm(x=readout * dy * factor, y=lines * dx, z=dz),
        )

    limits = xsd.encodingLimitsType(
        kspace_encoding_step_1=xsd.limitType(minimum=0, maximum=lines - 1, center=lines // 2),
        slice=xsd.limitType(minimum=0, maximum=num_slices - 1, center=num_slices // 2),
    )
    return xsd.encodingType(
        encodedSpace=space(oversampling), reconSpace=space(1), encodingLimits=limits,
        trajectory=xsd.trajectoryType.CARTESIAN, echoTrainLength=header.protocol.echo_train_length,
    )  # fmt: skip

"""An engine whose answers are known, and scans as files, for tests of the HTTP contract."""

import io
import json
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path

import h5py
import nibabel as nib
import numpy as np
import torch
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, MRImageStorage, generate_uid

from omnimri.models.boxes import Box, BoxCoder, boxes_to_text
from omnimri.models.config import tiny
from omnimri.models.decoding import TextAnswer
from omnimri.models.detection import Detection
from omnimri.models.engine import Prompt, Reconstruction, Segmentation
from omnimri.models.instructions import OUTLINED
from omnimri.models.physics import fft2c
from omnimri.models.preprocess import Preprocess
from omnimri.models.prompts import untagged
from omnimri.models.scan import Scan

SHAPE = (6, 40, 36)
OBLIQUE = np.array([[-3.9, 0.1, 0.5, 70.0], [0.1, 4.0, -0.9, -80.0], [0.1, 0.6, 5.9, -20.0], [0.0, 0.0, 0.0, 1.0]])
BOX = (2, 10, 8, 4, 20, 16)
VERSION = "known-answers-1"


class KnownAnswers:
    """Has the API of `omnimri.models.engine.Engine`; segments by threshold, reconstructs by zero filling."""

    version = VERSION
    preprocess = Preprocess(tiny().inputs)
    detection = Detection()

    def encode(self, scan: Scan, instruction: str, task: str) -> Prompt:
        if scan.image.max() == 0:
            raise ValueError("The scan is empty.")
        answer = "Normal brain. No lesion." * (20 if instruction == "At length." else 1)
        if task == "detect":
            coder = BoxCoder(scan, self.preprocess)
            answer = boxes_to_text([Box(label="old infarct", side="left", box_voxel=BOX)], coder)
        return Prompt(
            task=task, instruction=instruction, token_ids=np.frombuffer(answer.encode(), np.uint8).astype(np.int64),
            embeds=np.zeros((len(answer), 4), np.float32), queries=None,
            warnings=(f"Encoded for {task}.", *(f"Told: {told}" for told in [scan.facts.get(OUTLINED)] if told)),
        )  # fmt: skip

    def generate_text(
        self, prompt: Prompt, *, max_new_tokens: int, temperature: float, seed: int, grammar: str | None = None,
        on_text: Callable[[str], None] | None = None,
    ) -> TextAnswer:  # fmt: skip
        if prompt.instruction == "Crash.":
            raise RuntimeError("a bug of ours")
        text = bytes(prompt.token_ids.astype(np.uint8)).decode()[:max_new_tokens]
        for word in untagged(text).split(" ") if on_text else ():
            on_text(f"{word} ")
        return TextAnswer(
            text=f"{text} {grammar}" if grammar else text, token_ids=list(prompt.token_ids), logprob=-1.0,
            box_logprobs=(float(np.log(0.8)),) * text.count("{"), finished=max_new_tokens >= len(prompt.token_ids),
        )  # fmt: skip

    def score_choices(self, prompt: Prompt, choices: Sequence[str]) -> np.ndarray:
        return np.eye(len(choices), dtype=np.float32)[1]

    def reconstruct(self, scan: Scan, prompt: Prompt, *, num_steps: int, seed: int, num_samples: int) -> Reconstruction:
        spread = np.full(scan.image.shape, float(num_steps), np.float32) if num_samples > 1 else None
        return Reconstruction(image=scan.image.astype(np.complex64), uncertainty=spread, residual=0.25)

    def segment(self, scan: Scan, prompts: dict[str, Prompt], *, num_steps: int) -> Segmentation:
        for prompt in prompts.values():
            _wait_where_told(prompt.instruction)
        edges = np.linspace(0.2, 1.0, len(prompts) + 1)
        bands = list(zip(prompts, edges[:-1], edges[1:], strict=True))
        masks = {name: (scan.image >= low) & (scan.image < high) for name, low, high in bands}
        return Segmentation(masks=masks, probabilities={name: mask.astype(np.float32) for name, mask in masks.items()})


def _wait_where_told(instruction: str) -> None:
    """An instruction that is the path of a named pipe holds the replica until the pipe's writer closes it."""
    if instruction.startswith("/"):
        with Path(instruction).open() as pipe:
            pipe.read()


def known_answers(parts: tuple[str, ...]) -> KnownAnswers:
    assert len(parts) == 1, "each deployment asks for its own part only"
    return KnownAnswers()


def model_folder(folder: Path) -> Path:
    """What the ingress reads of a checkpoint: the index and the preprocessing contract."""
    folder.mkdir()
    (folder / "omnimri.json").write_text(json.dumps({"format": 1, "version": VERSION, "parts": []}))
    (folder / "preprocessing.json").write_text(json.dumps(KnownAnswers.preprocess.as_json()))
    return folder


def head_image(shape: tuple[int, int, int] = SHAPE) -> np.ndarray:
    """A bright ellipse with a gradient, `(Z, Y, X)` in 0 to 0.99."""
    z, y, x = np.meshgrid(*(np.linspace(-1, 1, size) for size in shape), indexing="ij")
    return (np.clip(0.6 + 0.4 * y, 0, 0.99) * (x**2 + y**2 + 0.3 * z**2 < 0.7)).astype(np.float32)


def write_nifti(path: Path, image: np.ndarray | None = None) -> Path:
    array = head_image() if image is None else image
    nib.Nifti1Image(array.transpose(2, 1, 0), OBLIQUE).to_filename(path)
    return path


def write_fastmri(path: Path, *, mask: np.ndarray | None = None) -> Path:
    """Two coils of the head in the fastMRI layout."""
    image = torch.from_numpy(head_image()).to(torch.complex64)
    weight = torch.linspace(0.2, 1.0, SHAPE[2])
    kspace = torch.stack([fft2c(image * weight), fft2c(image * weight.flip(0))], dim=1).numpy()
    with h5py.File(path, "w") as file:
        file["kspace"] = kspace if mask is None else kspace * mask
        if mask is not None:
            file["mask"] = mask
        file.attrs["acquisition"] = "AXT2"
        file.attrs["affine_ras"] = OBLIQUE.ravel()
    return path


def write_dicom_zip(path: Path, *, modality: str = "MR", description: str = "AX FLAIR") -> Path:
    """A classic axial series of the head, one instance per slice, of a patient with a name."""
    pixels = (head_image() * 1000).astype(np.uint16)
    series, study = generate_uid(), generate_uid()
    with zipfile.ZipFile(path, "w") as archive:
        for index, plane in enumerate(pixels):
            buffer = io.BytesIO()
            instance = _instance(plane, index, modality, series, study)
            instance.SeriesDescription = description
            instance.save_as(buffer, enforce_file_format=True)
            archive.writestr(f"Doe_Jane/{len(pixels) - index:03d}.dcm", buffer.getvalue())
    return path


def _instance(plane: np.ndarray, index: int, modality: str, series: str, study: str) -> Dataset:
    instance = Dataset()
    instance.file_meta = FileMetaDataset()
    instance.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    instance.SOPClassUID = MRImageStorage if modality == "MR" else CTImageStorage
    instance.SOPInstanceUID = generate_uid()
    instance.SeriesInstanceUID, instance.StudyInstanceUID = series, study
    instance.FrameOfReferenceUID = study
    instance.PatientName, instance.PatientID = "Doe^Jane", "MRN-778899"
    instance.Modality, instance.Manufacturer, instance.BodyPartExamined = modality, "SIEMENS", "BRAIN"
    instance.ImageType = ["ORIGINAL", "PRIMARY", "M", "ND"]
    instance.ScanningSequence, instance.SequenceVariant = "IR", "SK"
    instance.EchoTime, instance.RepetitionTime, instance.InversionTime = 90.0, 9000.0, 2500.0
    instance.InstanceNumber = index + 1
    instance.Rows, instance.Columns = plane.shape
    instance.PixelSpacing, instance.SliceThickness = [4.0, 4.0], 6.0
    instance.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
    instance.ImagePositionPatient = [-70.0, -80.0, 6.0 * index]
    instance.SamplesPerPixel, instance.PhotometricInterpretation = 1, "MONOCHROME2"
    instance.BitsAllocated = instance.BitsStored = 16
    instance.HighBit, instance.PixelRepresentation = 15, 0
    instance.PixelData = plane.tobytes()
    return instance

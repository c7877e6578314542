"""What the tests of the built-in corpus share: every series of a corpus folder, read back."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np

from omnimri.models.scan import Scan
from omnimri.platform.corpus.anatomy import Template
from omnimri.platform.corpus.corpus import CorpusConfig, write_patient
from omnimri.platform.corpus.patient import Patient
from omnimri.platform.data.formats.readers import read_path


@dataclass(frozen=True)
class WrittenSeries:
    """One series on disk with what its annotation says."""

    folder: Path
    path: Path
    entry: dict[str, Any]
    patient: Patient

    @cached_property
    def record(self) -> Any:
        (record,), rejects = read_path(self.path)
        assert not rejects
        return record

    @property
    def scan(self) -> Scan:
        return self.record.scan

    @cached_property
    def label_image(self) -> nib.Nifti1Image:
        return nib.load(self.folder / self.entry["label_map"])

    @property
    def labels(self) -> np.ndarray:
        """`(Z, Y, X)`."""
        return np.asarray(self.label_image.dataobj).transpose(2, 1, 0)


def write_patients(out: Path, template: Template, config: CorpusConfig) -> Path:
    """The patients of a corpus in this process, without Ray."""
    for index in range(config.num_patients):
        write_patient(Patient.draw(index, config.seed), template, out, config)
    return out


def all_series(out: Path, seed: int) -> Iterator[WrittenSeries]:
    for folder in sorted(out.glob("sub-*")):
        patient = Patient.draw(int(folder.name.removeprefix("sub-")) - 1, seed)
        for path, entry in json.loads((folder / "annotations.json").read_text())["series"].items():
            yield WrittenSeries(folder, folder / path, entry, patient)

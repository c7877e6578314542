"""The built-in corpus says what it shows: geometry, side, contrast and words agree with what was simulated."""

import json
from dataclasses import replace
from pathlib import Path

import h5py
import nibabel as nib
import numpy as np
import pydicom
import pytest
import torch

from omnimri.models.physics import ifft2c, root_sum_of_squares
from omnimri.models.vocabulary import DIAGNOSES, TISSUES
from omnimri.platform.corpus.anatomy import Template, draw_head, load_template
from omnimri.platform.corpus.corpus import CorpusConfig, Patient, write_corpus, write_patient
from omnimri.platform.corpus.signal import LESIONS, PROTOCOLS, signal
from omnimri.platform.corpus.signal import TISSUES as RELAXATION
from omnimri.platform.data.readers import read_path

CONFIG = CorpusConfig(num_patients=5, seed=3)


@pytest.fixture(scope="module")
def template() -> Template:
    return load_template()


@pytest.fixture(scope="module")
def corpus(template: Template, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five patients: every diagnosis once."""
    out = tmp_path_factory.mktemp("corpus")
    for index in range(5):
        write_patient(index, template, out, CONFIG)
    return out


def series_of(corpus: Path) -> list[tuple[Path, dict]]:
    """Every series with its annotation."""
    found = []
    for sidecar in sorted(corpus.glob("sub-*/annotations.json")):
        entries = json.loads(sidecar.read_text())["series"]
        found += [(sidecar.parent / path, entry) for path, entry in entries.items()]
    return found


def labels_of(path: Path, entry: dict) -> nib.Nifti1Image:
    root = next(parent for parent in path.parents if parent.name.startswith("sub-"))
    return nib.load(root / entry["label_map"])


def test_five_patients_hold_every_diagnosis() -> None:
    for seed in range(4):
        assert {Patient.draw(i, seed).diagnosis for i in range(5, 10)} == set(DIAGNOSES)


def test_every_file_is_read_on_the_grid_of_its_label_map(corpus: Path) -> None:
    formats = set()
    for path, entry in series_of(corpus):
        (record,), rejects = read_path(path)
        labels = labels_of(path, entry)
        assert not rejects
        assert record.scan.image.shape == labels.shape[::-1]
        np.testing.assert_allclose(record.scan.affine, labels.affine, atol=1e-4)
        formats.add(record.source_format)
    assert formats == {"dicom", "nifti", "fastmri", "ismrmrd"}


def test_lesions_lie_on_the_side_that_their_boxes_and_reports_name(corpus: Path) -> None:
    checked = 0
    for path, entry in series_of(corpus):
        affine = labels_of(path, entry).affine
        for box in entry["boxes"]:
            z1, y1, x1, z2, y2, x2 = box["box_voxel"]
            x_mm = (affine @ [(x1 + x2 - 1) / 2, (y1 + y2 - 1) / 2, (z1 + z2 - 1) / 2, 1])[0]
            if abs(x_mm) > 8 and box["side"] != "midline":
                assert (x_mm < 0) == (box["side"] == "left")
                assert box["side"] in entry["report"]
                checked += 1
    assert checked > 10


def test_boxes_are_the_bounds_of_their_labels(corpus: Path) -> None:
    for path, entry in series_of(corpus):
        labels = np.asarray(labels_of(path, entry).dataobj).transpose(2, 1, 0)
        names = {name: int(value) for value, name in entry["label_names"].items()}
        covered = np.zeros(labels.shape, bool)
        for box in entry["boxes"]:
            z1, y1, x1, z2, y2, x2 = box["box_voxel"]
            inside = labels[z1:z2, y1:y2, x1:x2] == names[box["label"]]
            assert all(inside.any(axis=axes).all() for axes in ((1, 2), (0, 2), (0, 1)))
            covered[z1:z2, y1:y2, x1:x2] = True
        assert (labels[~covered] > len(TISSUES)).sum() <= len(entry["boxes"]) + 3


def test_a_healthy_patient_has_a_normal_report(corpus: Path) -> None:
    normal = [entry for _, entry in series_of(corpus) if entry["classes"] == ["normal"]]
    assert len(normal) == 4
    for entry in normal:
        assert entry["boxes"] == []
        assert "Impression: normal" in entry["report"]
        assert entry["description"]["pathological_findings"]["masses_or_suspicious_lesions"] == ""


def test_every_filled_field_has_an_origin_and_no_other(corpus: Path) -> None:
    for _, entry in series_of(corpus):
        filled = {f"{level}.{key}" for level, fields in entry["description"].items() for key, v in fields.items() if v}
        assert filled == set(entry["description_origin"])


def test_kspace_gives_the_image_that_fastmri_stores(corpus: Path) -> None:
    path = next(path for path, _ in series_of(corpus) if path.suffix == ".h5" and ".mrd" not in path.name)
    with h5py.File(path) as file:
        image = root_sum_of_squares(ifft2c(torch.tensor(file["kspace"][...])))
        np.testing.assert_allclose(image.numpy(), file["reconstruction_rss"][...], rtol=1e-3, atol=1e-5)


def test_ismrmrd_without_its_oversampling_gives_the_image_back(corpus: Path) -> None:
    """A patient's two raw series share anatomy: the same voxels are inside the head in both."""
    for patient in sorted(corpus.glob("sub-*")):
        raw = sorted((patient / "raw").iterdir())
        images = [read_path(path)[0][0].scan.image for path in raw]
        heads = [image > 0.25 * np.percentile(image, 99) for image in images]
        assert (heads[0] & heads[1]).sum() / (heads[0] | heads[1]).sum() > 0.8


def test_cerebrospinal_fluid_is_dark_on_t1_and_flair_and_bright_on_t2() -> None:
    for tissues in RELAXATION.values():
        value = {name: {c: signal(r, p) for c, p in PROTOCOLS.items()} for name, r in tissues.items()}
        fluid, grey, white = (value[name] for name in TISSUES)
        assert fluid["T1w"] < grey["T1w"] < white["T1w"]
        assert fluid["T2w"] > grey["T2w"] > white["T2w"]
        assert fluid["FLAIR"] < 0.3 * white["FLAIR"]
        assert grey["PD"] > white["PD"]


def test_lesions_look_as_expected() -> None:
    for tissues in RELAXATION.values():
        white = {c: signal(tissues["white matter"], p) for c, p in PROTOCOLS.items()}
        look = {name: {c: signal(r, p) / white[c] for c, p in PROTOCOLS.items()} for name, r in LESIONS.items()}
        assert look["cavity"]["T2w"] > 2 > 0.6 > look["cavity"]["FLAIR"]
        for bright in ("gliosis", "plaque", "mass", "oedema"):
            assert look[bright]["FLAIR"] > 1.3
            assert look[bright]["T1w"] < 1
        assert look["blood core"]["T1w"] > 1.1 > 0.8 > look["blood core"]["T2w"]


def test_left_is_not_right(template: Template) -> None:
    symmetric = template.tissues[1:3].sum(0)
    warped = draw_head(template, np.random.default_rng(0), 40).tissues[1:3].sum(0)

    def asymmetry(image: np.ndarray) -> float:
        """Difference from the best mirror image along x, in parts of the mean."""
        shifts = range(-3, 4)
        return min(float(np.abs(image - np.roll(image[::-1], s, axis=0)).mean()) for s in shifts) / float(image.mean())

    assert asymmetry(warped) > 2 * asymmetry(symmetric)


def test_instance_numbers_run_against_position_in_some_series(corpus: Path) -> None:
    directions = set()
    for path, _ in series_of(corpus):
        if path.is_dir():
            headers = [pydicom.dcmread(file, stop_before_pixels=True) for file in path.iterdir()]
            headers.sort(key=lambda d: d.InstanceNumber)
            directions.add(np.sign(headers[-1].ImagePositionPatient[2] - headers[0].ImagePositionPatient[2]))
    assert directions == {-1, 1}


def test_a_patient_is_the_same_in_any_corpus(template: Template, tmp_path: Path, corpus: Path) -> None:
    write_patient(1, template, tmp_path, replace(CONFIG, num_patients=500))
    again, before = tmp_path / "sub-0002", corpus / "sub-0002"
    assert (again / "annotations.json").read_bytes() == (before / "annotations.json").read_bytes()
    for path in sorted(before.rglob("*.dcm")):
        assert path.read_bytes() == (again / path.relative_to(before)).read_bytes()


def test_corpus_streams_through_ray_and_is_complete_once(ray_cluster: None, tmp_path: Path) -> None:
    config = CorpusConfig(num_patients=2, num_slices=4, matrix=(32, 32), spacing_mm=(30.0, 7.0, 6.0))
    summary = write_corpus(tmp_path / "corpus", config)
    assert [row["participant_id"] for row in summary.participants] == ["sub-0001", "sub-0002"]
    card = json.loads((tmp_path / "corpus" / "dataset.json").read_text())
    assert card["simulated"] is True
    assert "Not evidence of clinical performance" in card["notice"]
    assert len(write_corpus(tmp_path / "corpus", config).participants) == 2
    with pytest.raises(ValueError, match="other settings"):
        write_corpus(tmp_path / "corpus", replace(config, seed=9))

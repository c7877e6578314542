"""The files of the built-in corpus say what they show: geometry, side, labels, k-space and words agree."""

import json
from dataclasses import replace
from pathlib import Path

import h5py
import ismrmrd
import numpy as np
import pydicom
import pytest
import torch
from scipy import ndimage

from omnimri.models.physics import ifft2c, root_sum_of_squares
from omnimri.models.vocabulary import CONTRASTS, DIAGNOSES, FINDINGS, TISSUES
from omnimri.platform.corpus.anatomy import Template, load_template
from omnimri.platform.corpus.corpus import NOTICE, CorpusConfig, write_corpus, write_patient
from omnimri.platform.corpus.dicom_writer import instance_numbers
from omnimri.platform.corpus.patient import Patient
from omnimri.platform.corpus.series import LPS_TO_RAS
from omnimri.platform.data.formats.kspace.prewhitening import prewhitened
from omnimri.platform.evaluation.text import label_text
from tests.platform.corpus_files import WrittenSeries, all_series, write_patients

SEED = 3
CONFIG = CorpusConfig(num_patients=5, seed=SEED)


@pytest.fixture(scope="module")
def template() -> Template:
    return load_template()


@pytest.fixture(scope="module")
def corpus(template: Template, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five patients: every diagnosis once."""
    return write_patients(tmp_path_factory.mktemp("corpus"), template, CONFIG)


@pytest.fixture(scope="module")
def series(corpus: Path) -> list[WrittenSeries]:
    return list(all_series(corpus, SEED))


def test_every_contrast_of_every_patient_is_written_once_and_half_of_them_raw(series: list[WrittenSeries]) -> None:
    formats = {(s.folder.name, s.record.scan.facts["contrast"]): s.record.source_format for s in series}
    assert len(formats) == len(series) == 5 * len(CONTRASTS)
    for patient in {s.folder.name for s in series}:
        assert sorted(formats[patient, c] for c in CONTRASTS) == ["dicom", "fastmri", "ismrmrd", "nifti"]


def test_four_patients_in_a_row_bring_every_contrast_in_every_format(series: list[WrittenSeries]) -> None:
    pairs = {(s.scan.facts["contrast"], s.record.source_format) for s in series if s.folder.name <= "sub-0004"}
    assert len(pairs) == 16


def test_label_map_and_image_are_aligned_in_every_format(series: list[WrittenSeries]) -> None:
    for s in series:
        assert s.scan.image.shape == s.labels.shape
        np.testing.assert_allclose(s.scan.affine, s.label_image.affine, atol=2e-3)
        head = s.scan.image > 0.15 * np.percentile(s.scan.image, 99)
        brain = s.labels > 0
        assert head[brain].mean() > 0.75
        # Turned round or shifted, the label map fits its image worse: tissues are less alike within a label.
        here, turned = (_spread_within_labels(s.scan.image, labels) for labels in (s.labels, s.labels[:, ::-1]))
        shifted = _spread_within_labels(s.scan.image, np.roll(s.labels, 3, axis=2))
        assert here < 0.97 * turned
        assert here < 0.99 * shifted


def _spread_within_labels(image: np.ndarray, labels: np.ndarray) -> float:
    """Mean absolute deviation from the median of the label, brain only."""
    parts = [image[labels == value] for value in (1, 2, 3)]
    return float(sum(np.abs(part - np.median(part)).sum() for part in parts) / sum(map(len, parts)))


def test_the_nose_points_forwards_and_the_top_upwards(series: list[WrittenSeries]) -> None:
    """By the affine alone: eyes, bright on T2, lie in front of and below the brain's centre, one on each side."""
    for s in series:
        if s.scan.facts["contrast"] != "T2w":
            continue
        index = np.argwhere(s.labels > 0)[:, ::-1]
        centre = s.scan.affine[:3, :3] @ index.mean(0) + s.scan.affine[:3, 3]
        outside = ndimage.binary_dilation(s.labels > 0, iterations=2)
        bright, _ = ndimage.label((s.scan.image > 0.55 * s.scan.image.max()) & ~outside)
        sizes = np.bincount(bright.ravel())[1:]
        globes = np.argsort(-sizes)[:2] + 1
        places = np.array([s.scan.affine[:3, :3] @ np.argwhere(bright == g).mean(0)[::-1] + s.scan.affine[:3, 3]
                           for g in globes]) - centre  # fmt: skip
        assert (places[:, 1] > 45).all()
        assert (places[:, 2] < -10).all()
        assert places[:, 0].min() < -15 < 15 < places[:, 0].max()


def test_lesions_lie_on_the_side_that_box_and_report_name(series: list[WrittenSeries]) -> None:
    checked = 0
    for s in series:
        middle_mm = _affine_points(s, s.labels > 0)[:, 0].mean()
        for box in s.entry["boxes"]:
            z1, y1, x1, z2, y2, x2 = box["box_voxel"]
            x_mm = (s.scan.affine @ [(x1 + x2 - 1) / 2, (y1 + y2 - 1) / 2, (z1 + z2 - 1) / 2, 1])[0] - middle_mm
            if abs(x_mm) > 8:
                assert box["side"] == ("left" if x_mm < 0 else "right")
                both = "both cerebral hemispheres" in s.entry["report"]
                assert both or f"{box['side']} " in s.entry["report"]
                checked += 1
    assert checked > 15


def _affine_points(s: WrittenSeries, mask: np.ndarray) -> np.ndarray:
    return np.argwhere(mask)[:, ::-1] @ s.scan.affine[:3, :3].T + s.scan.affine[:3, 3]


def test_boxes_are_the_connected_lesions_of_the_label_map(series: list[WrittenSeries]) -> None:
    for s in series:
        names = {name: int(value) for value, name in s.entry["label_names"].items()}
        components, count = ndimage.label(s.labels > len(TISSUES), structure=np.ones((3, 3, 3)))
        found = {
            (part[0].start, part[1].start, part[2].start, part[0].stop, part[1].stop, part[2].stop)
            for part in ndimage.find_objects(components)
        }
        assert {tuple(box["box_voxel"]) for box in s.entry["boxes"]} == found
        for box in s.entry["boxes"]:
            z1, y1, x1, z2, y2, x2 = box["box_voxel"]
            assert (s.labels[z1:z2, y1:y2, x1:x2] == names[box["label"]]).any()
        assert count == len(s.entry["boxes"])


def test_reports_say_what_is_there_how_large_and_what_is_not(series: list[WrittenSeries]) -> None:
    words = dict(zip(FINDINGS, ("infarct", "plaque", "mass", "haemorrhage"), strict=True))
    for s in series:
        report = s.entry["report"].lower()
        assert len(report.split()) <= 90
        present = {s.entry["label_names"][str(value)] for value in np.unique(s.labels) if value > len(TISSUES)}
        absent = next(part for part in report.split(". ") if part.startswith("no ") and " or " in part)
        for finding, word in words.items():
            assert (word in absent) == (finding not in present)
            assert (word in report.replace(absent, "").replace("mass effect", "")) == (finding in present)
        if present:
            extents = [2 * max(b["box_voxel"][4] - b["box_voxel"][1], b["box_voxel"][5] - b["box_voxel"][2])
                       for b in s.entry["boxes"]]  # fmt: skip
            assert f"{max(extents)} mm" in report


def test_the_report_labeller_reads_what_the_boxes_say(series: list[WrittenSeries]) -> None:
    for s in series:
        assert label_text(s.entry["report"]) == {(box["label"], box["side"]) for box in s.entry["boxes"]}


def test_a_healthy_patient_has_a_normal_report(series: list[WrittenSeries]) -> None:
    normal = [s.entry for s in series if s.entry["classes"] == ["normal"]]
    assert len(normal) == len(CONTRASTS)
    for entry in normal:
        assert entry["boxes"] == []
        assert "Impression: Normal" in entry["report"]
        assert not any(entry["description"]["pathological_findings"].values())
        assert entry["description"]["diagnostic_impression"]["suggestive_of"] == "normal"


def test_descriptions_have_the_five_levels_and_an_origin_for_every_filled_field(series: list[WrittenSeries]) -> None:
    levels = {
        "image_modality_sequence": "modality sequence plane acquisition_quality_or_artifacts",
        "visible_anatomical_structures": "bony_structures articular_structures soft_tissues_and_musculature "
        "organs_or_central_structures neurovascular_or_connective_structures spaces_or_cavities_or_joint_compartments",
        "tissue_signal_characteristics": "normal_signal_appearance abnormal_signal_patterns "
        "symmetry_and_structural_integrity",
        "pathological_findings": "structural_abnormalities signal_abnormalities_or_fluid_collections "
        "masses_or_suspicious_lesions",
        "diagnostic_impression": "suggestive_of severity_or_grading recommendation",
    }
    for s in series:
        description = s.entry["description"]
        assert {level: list(fields) for level, fields in description.items()} == {
            level: keys.split() for level, keys in levels.items()
        }
        filled = {f"{level}.{key}" for level, fields in description.items() for key, v in fields.items() if v}
        assert filled == set(s.entry["description_origin"])
        assert set(s.entry["description_origin"].values()) == {"header", "label"}


def test_signal_words_of_the_description_hold_in_the_image(series: list[WrittenSeries]) -> None:
    for s in series:
        image, labels = s.scan.image, s.labels
        fluid, white = (np.median(image[ndimage.binary_erosion(labels == v, np.ones((1, 3, 3)))]) for v in (1, 3))
        words = s.entry["description"]["tissue_signal_characteristics"]["normal_signal_appearance"]
        if words.startswith("hypointense fluid"):
            assert fluid < white
        if words.startswith("hyperintense fluid"):
            assert fluid > white


def test_headers_agree_with_the_table(series: list[WrittenSeries]) -> None:
    for s in series:
        facts, scanner = s.scan.facts, s.patient.scanner
        assert (facts["vendor"], facts["field_strength_t"]) == (scanner.vendor, scanner.field_strength_t)
        assert facts["model_name"] == scanner.model
        assert (facts["plane"], facts["body_part"]) == ("axial", "brain")
        sequence = s.patient.protocols[str(facts["contrast"])].sequence
        for name in ("tr_ms", "te_ms", "ti_ms", "flip_angle_deg"):
            assert facts[name] == (None if getattr(sequence, name) is None else pytest.approx(getattr(sequence, name)))


def test_dicom_gives_the_affine_and_the_values_back(series: list[WrittenSeries]) -> None:
    for s in series:
        if not s.path.is_dir():
            continue
        headers = [pydicom.dcmread(path) for path in s.path.iterdir()]
        for z, header in enumerate(sorted(headers, key=lambda d: float(d.SliceLocation))):
            row, column = np.array(header.ImageOrientationPatient, float).reshape(2, 3) * LPS_TO_RAS
            dy, dx = map(float, header.PixelSpacing)
            affine = s.label_image.affine
            np.testing.assert_allclose(np.array(header.ImagePositionPatient, float) * LPS_TO_RAS,
                                       (affine @ [0, 0, z, 1])[:3], atol=1e-3)  # fmt: skip
            np.testing.assert_allclose(row * dx, affine[:3, 0], atol=1e-5)
            np.testing.assert_allclose(column * dy, affine[:3, 1], atol=1e-5)
            values = header.pixel_array * float(header.get("RescaleSlope", 1)) + float(
                header.get("RescaleIntercept", 0)
            )
            np.testing.assert_allclose(s.scan.image[z], values, rtol=1e-5, atol=1e-3)
        assert "Simulated" in str(headers[0].PatientName)


def test_instance_numbers_do_not_always_run_with_position() -> None:
    orders = {tuple(instance_numbers(5, np.random.default_rng(seed))) for seed in range(20)}
    assert orders == {(1, 2, 3, 4, 5), (5, 4, 3, 2, 1), (1, 4, 2, 5, 3)}


def test_philips_scales_every_slice_by_itself(template: Template, tmp_path: Path) -> None:
    index = next(i for i in range(50) if Patient.draw(i, SEED).scanner.vendor == "Philips")
    folder = write_patient(Patient.draw(index, SEED), template, tmp_path, CONFIG)
    slopes = {str(pydicom.dcmread(path).RescaleSlope) for path in folder.glob("dicom/*/*.dcm")}
    assert len(slopes) > 20


def test_fastmri_kspace_gives_the_reconstruction_that_is_stored(series: list[WrittenSeries]) -> None:
    raw = [s for s in series if s.record.source_format == "fastmri"]
    assert raw
    for s in raw:
        with h5py.File(s.path) as file:
            kspace, stored = torch.from_numpy(file["kspace"][...]), file["reconstruction_rss"][...]
            assert file.attrs["max"] == pytest.approx(stored.max())
            assert file.attrs["norm"] == pytest.approx(np.linalg.norm(stored))
            np.testing.assert_allclose(file.attrs["affine_ras"].reshape(4, 4), s.label_image.affine, atol=1e-4)
        image = root_sum_of_squares(ifft2c(kspace)).numpy()
        np.testing.assert_allclose(image, stored, rtol=1e-4, atol=1e-4 * stored.max())
        np.testing.assert_allclose(s.scan.image, stored, rtol=1e-4, atol=1e-4 * stored.max())


def test_ismrmrd_holds_oversampled_lines_and_noise_scans(series: list[WrittenSeries]) -> None:
    raw = [s for s in series if s.record.source_format == "ismrmrd"]
    assert raw
    for s in raw:
        dataset = ismrmrd.Dataset(str(s.path), "dataset", create_if_needed=False)
        z, y, x = s.scan.image.shape
        first, last = dataset.read_acquisition(0), dataset.read_acquisition(dataset.number_of_acquisitions() - 1)
        assert dataset.number_of_acquisitions() == 2 + z * x
        assert first.is_flag_set(ismrmrd.ACQ_IS_NOISE_MEASUREMENT)
        assert last.is_flag_set(ismrmrd.ACQ_LAST_IN_MEASUREMENT)
        assert last.number_of_samples == 2 * y
        dataset.close()
        # White matter is well above the noise that the noise scans measured.
        noise = np.std(first.data.view(np.float32))
        assert 20 < np.median(s.scan.image[s.labels == 3]) / noise < 45


def test_prewhitened_ismrmrd_has_unit_noise_in_air(series: list[WrittenSeries]) -> None:
    """The corners of the image hold nothing but noise of C coils: `mean |x|^2 = 2 C`, to the noise scan's error."""
    for s in series:
        if s.record.source_format == "ismrmrd":
            white = prewhitened(s.record)
            assert white.flags == ("prewhitened",)
            corners = white.scan.image[:, [0, 1, 2, -3, -2, -1]][:, :, [0, 1, 2, -3, -2, -1]]
            assert np.square(corners).mean() == pytest.approx(2 * white.scan.kspace.shape[1], rel=0.1)


def test_contrasts_of_a_patient_show_the_same_head_whatever_the_format(series: list[WrittenSeries]) -> None:
    """Resampled by affine only, label maps of all four files agree."""
    for patient in {s.folder for s in series}:
        own = [s for s in series if s.folder == patient]
        reference = own[0]
        points = _affine_points(reference, reference.labels > len(TISSUES) - 1)
        for s in own[1:]:
            inverse = np.linalg.inv(s.scan.affine)
            index = np.round(points @ inverse[:3, :3].T + inverse[:3, 3]).astype(int)
            values = s.labels[index[:, 2], index[:, 1], index[:, 0]]
            expected = reference.labels[reference.labels > len(TISSUES) - 1]
            assert (values == expected).mean() > 0.999


def test_every_five_patients_hold_every_diagnosis_and_the_rest_varies() -> None:
    for seed in range(4):
        assert {Patient.draw(i, seed).diagnosis for i in range(5, 10)} == set(DIAGNOSES)
    patients = [Patient.draw(i, 0) for i in range(60)]
    assert {(p.scanner.vendor, p.scanner.field_strength_t) for p in patients} == {
        (vendor, field) for vendor in ("Siemens", "GE", "Philips") for field in (1.5, 3.0)
    }
    assert {p.sex for p in patients} == {"F", "M"}


def test_a_patient_is_the_same_in_any_corpus(template: Template, tmp_path: Path, corpus: Path) -> None:
    again = write_patient(Patient.draw(1, SEED), template, tmp_path, replace(CONFIG, num_patients=500))
    before = corpus / "sub-0002"
    files = {path.relative_to(before) for path in before.rglob("*") if path.is_file()}
    assert files == {path.relative_to(again) for path in again.rglob("*") if path.is_file()}
    for name in files:
        assert (again / name).read_bytes() == (before / name).read_bytes(), name
    other = write_patient(Patient.draw(1, SEED + 1), template, tmp_path / "other", CONFIG)
    assert (other / "annotations.json").read_text() != (again / "annotations.json").read_text()


def test_wrong_settings_are_refused_with_what_was_expected() -> None:
    with pytest.raises(ValueError, match="num_patients must be at least 1"):
        CorpusConfig(num_patients=0)
    with pytest.raises(ValueError, match="even matrix"):
        CorpusConfig(num_patients=1, matrix=(113, 96))


def test_a_corpus_streams_through_ray_grows_and_refuses_other_settings(ray_cluster: None, tmp_path: Path) -> None:
    config = CorpusConfig(num_patients=2, num_slices=6, matrix=(56, 48), spacing_mm=(24.0, 4.0, 4.0), num_coils=2)
    out = tmp_path / "corpus"
    first = write_corpus(out, config)
    assert (first.num_written, first.num_series) == (2, 8)
    grown = write_corpus(out, replace(config, num_patients=3))
    assert grown.num_written == 1
    lines = (out / "participants.tsv").read_text().splitlines()
    assert lines[0].split("\t") == ["participant_id", "sex", "age", "vendor", "field_strength_t", "diagnosis"]
    assert [line.split("\t")[0] for line in lines[1:]] == ["sub-0001", "sub-0002", "sub-0003"]
    card = json.loads((out / "dataset.json").read_text())
    assert card["simulated"] is True
    assert card["notice"] == NOTICE
    assert "Not evidence of clinical performance" in NOTICE
    assert not list(out.glob(".*"))
    files = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()}
    write_corpus(out, replace(config, num_patients=3))
    assert {path: path.stat().st_mtime_ns for path in files} == files, "complete already: no file may look newer"
    beyond = write_corpus(tmp_path / "beyond", replace(config, first=2, num_patients=1))
    assert [row["participant_id"] for row in beyond.participants] == ["sub-0003"]
    for name in ("annotations.json", "labels/sub-0003_T2w_dseg.nii.gz"):
        assert (tmp_path / "beyond/sub-0003" / name).read_bytes() == (out / "sub-0003" / name).read_bytes()
    with pytest.raises(ValueError, match="other settings"):
        write_corpus(out, replace(config, seed=9))
    (tmp_path / "papers").mkdir()
    (tmp_path / "papers" / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match="no corpus"):
        write_corpus(tmp_path / "papers", config)

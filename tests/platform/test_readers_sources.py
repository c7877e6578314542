"""Folders and zips: the same records from both, and bounds on what a zip may do."""

from __future__ import annotations

import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest

from omnimri.platform.data.formats.readers import read_path
from omnimri.platform.data.formats.records import ReadError, ReadLimits
from tests.platform.intake_fakes import (
    coil_kspace,
    dicom_slices,
    oblique_affine,
    random_image,
    rescalable,
    save_dicom,
    save_fastmri,
    save_nifti,
)  # fmt: skip


def _corpus(folder: Path) -> Path:
    save_dicom(dicom_slices(rescalable(random_image(0)), oblique_affine()), folder / "sub-1" / "T1w")
    save_nifti(folder / "sub-1" / "anat" / "sub-1_T2w.nii.gz", random_image(1), oblique_affine())
    (folder / "sub-1" / "anat" / "sub-1_T2w.json").write_text('{"Manufacturer": "GE"}')
    save_fastmri(folder / "sub-1" / "raw" / "sub-1_PD.h5", coil_kspace(random_image(2)))
    (folder / "README.md").write_text("three series")
    return folder


def _zip(folder: Path, path: Path) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for file in sorted(folder.rglob("*"), reverse=True):
            archive.write(file, file.relative_to(folder))
    return path


def test_a_zip_gives_what_its_folder_gives(tmp_path: Path) -> None:
    folder = _corpus(tmp_path / "corpus")
    from_folder, errors = read_path(folder)
    from_zip, zip_errors = read_path(_zip(folder, tmp_path / "corpus.zip"))
    assert errors == zip_errors == []
    assert [record.source for record in from_folder] == [
        "sub-1/T1w",
        "sub-1/anat/sub-1_T2w.nii.gz",
        "sub-1/raw/sub-1_PD.h5",
    ]
    for one, other in zip(from_folder, from_zip, strict=True):
        assert other.source == f"corpus.zip/{one.source}"
        np.testing.assert_array_equal(one.scan.image, other.scan.image)
        np.testing.assert_array_equal(one.scan.affine, other.scan.affine)
        assert one.scan.facts == other.scan.facts


def test_a_zip_inside_a_folder_is_read_where_it_lies(tmp_path: Path) -> None:
    folder = _corpus(tmp_path / "corpus")
    (tmp_path / "outer").mkdir()
    _zip(folder, tmp_path / "outer" / "a.zip")
    (tmp_path / "outer" / "broken.zip").write_bytes(b"PK\x03\x04 and nothing more")
    records, [error] = read_path(tmp_path / "outer")
    assert len(records) == 3
    assert str(error).startswith("broken.zip: Not a readable zip.")


def test_a_zip_bomb_is_refused_before_unpacking(tmp_path: Path) -> None:
    path = tmp_path / "bomb.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.dcm", b"\x00" * 2**23)
    records, [error] = read_path(path)
    assert records == []
    assert "400 times its size" in error.reason


@pytest.mark.parametrize("name", ["../outside.nii", "/etc/outside.nii", "a/../../outside.nii", "..\\outside.nii"])
def test_a_zip_that_points_outside_is_refused(tmp_path: Path, name: str) -> None:
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(name, b"x")
    records, [error] = read_path(path)
    assert records == []
    assert "outside the zip" in error.reason


@pytest.mark.parametrize(
    ("limits", "reason"),
    [(ReadLimits(max_files=2), "holds 5 files, more than 2"), (ReadLimits(max_unpacked_bytes=1000), "unpacks to")],
)
def test_limits_of_a_zip_are_kept(tmp_path: Path, limits: ReadLimits, reason: str) -> None:
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for number in range(5):
            archive.writestr(f"{number}.dcm", b"x" * 1000)
    records, [error] = read_path(path, limits)
    assert records == []
    assert reason in error.reason


def test_order_of_files_does_not_matter(tmp_path: Path) -> None:
    image = rescalable(random_image(3))
    for number, seed in enumerate((1, 2)):
        save_dicom(dicom_slices(image, oblique_affine(), seed=seed), tmp_path / str(number))
    records = [read_path(tmp_path / str(number))[0][0] for number in (0, 1)]
    np.testing.assert_array_equal(records[0].scan.image, records[1].scan.image)


@pytest.mark.parametrize("name", ["scan.xyz", "notes.txt", "image.mnc", "scan.PAR"])
def test_a_file_that_is_no_image_is_refused_when_named(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"something else" * 20)
    records, [error] = read_path(tmp_path / name)
    assert records == []
    assert error.source == name
    assert error.hint


def test_messages_do_not_carry_header_values(tmp_path: Path) -> None:
    slices = dicom_slices(rescalable(random_image(4)), oblique_affine(), PatientName="Doe^Jane", PatientID="SECRET")
    save_dicom(slices[:1] + slices[3:], tmp_path)
    for dataset in slices:
        dataset.Modality = "CT"
    save_dicom(slices, tmp_path / "ct")
    _, errors = read_path(tmp_path)
    assert len(errors) == 2
    assert not any(word in str(error) for error in errors for word in ("Doe", "SECRET"))


def test_read_errors_survive_pickling() -> None:
    error = pickle.loads(pickle.dumps(ReadError("a.nii", "Broken.", "Mend it.")))
    assert (error.source, error.reason, error.hint, str(error)) == (
        "a.nii", "Broken.", "Mend it.", "a.nii: Broken. Mend it.",
    )  # fmt: skip


def test_a_path_that_is_not_there_is_an_error_of_the_caller(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere does not exist"):
        read_path(tmp_path / "nowhere")

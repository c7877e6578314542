"""Uploads: what is refused before it is parsed, which series is used, what undersampling does."""

import gzip
import io
import zipfile
from pathlib import Path

import h5py
import nibabel as nib
import numpy as np
import pytest

from omnimri.models.scan import Scan
from omnimri.serve.bounds import Bounds, PlainNames
from omnimri.serve.config import UploadLimits
from omnimri.serve.intake import Intake, read_upload, ready_for_reconstruction
from omnimri.serve.schemas import RequestError
from tests.serve import serving_fakes as fakes

LIMITS = UploadLimits(max_upload_mb=50, max_unpacked_mb=40, max_ratio=50, max_files=20, max_voxels=10**6, max_axis=500)


def refusal(tmp_path: Path, name: str, content: bytes) -> RequestError:
    with pytest.raises(RequestError) as caught:
        Bounds(LIMITS).save([(name, io.BytesIO(content))], tmp_path)
    return caught.value


def zip_of(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def test_a_zip_bomb_is_refused_before_it_is_unpacked(tmp_path: Path) -> None:
    error = refusal(tmp_path, "a.zip", zip_of({"a.dcm": bytes(30_000_000)}))
    assert (error.status_code, error.code) == (413, "zip_bomb")
    assert [path.suffix for path in tmp_path.iterdir()] == [".zip"]


def test_a_gzip_bomb_is_refused(tmp_path: Path) -> None:
    assert refusal(tmp_path, "a.nii.gz", gzip.compress(bytes(30_000_000))).code == "zip_bomb"


def test_too_much_after_unpacking_is_refused(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).bytes(15_000_000)
    error = refusal(tmp_path, "a.zip", zip_of({"1": noise, "2": noise, "3": noise}))
    assert (error.status_code, error.code) == (413, "too_large")


def test_too_many_files_are_refused(tmp_path: Path) -> None:
    assert refusal(tmp_path, "a.zip", zip_of({f"{i}.dcm": b"x" for i in range(21)})).code == "too_many_files"


def test_a_header_that_declares_too_many_voxels_is_refused(tmp_path: Path) -> None:
    header = nib.Nifti1Header()
    header.set_data_dtype(np.uint8)
    header.set_data_shape((400, 400, 400))
    header["magic"], header["vox_offset"] = b"n+1", 352
    error = refusal(tmp_path, "a.nii", header.binaryblock + bytes(1000))
    assert error.code == "too_many_voxels"
    assert "400 x 400 x 400" in error.message


def test_hdf5_that_points_to_other_files_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "source.h5"
    with h5py.File(path, "w") as file:
        file["kspace"] = h5py.ExternalLink("/etc/hostname", "/")
    (tmp_path / "into").mkdir()
    assert refusal(tmp_path / "into", "a.h5", path.read_bytes()).code == "external_data"


def test_hdf5_that_inflates_without_end_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "source.h5"
    with h5py.File(path, "w") as file:
        file.create_dataset("kspace", data=np.zeros((8, 2, 500, 500), np.complex64), compression="gzip")
    (tmp_path / "into").mkdir()
    assert refusal(tmp_path / "into", "a.h5", path.read_bytes()).code == "zip_bomb"


def test_names_on_disk_keep_what_readers_need_and_nothing_else() -> None:
    names = PlainNames()
    originals = ("Doe_Jane/T1w.json", "Doe_Jane_T1w.nii.gz", "Doe_Jane_T1w.json", "../../etc/passwd", "C:\\x\\Doe.DCM")
    assert [names.of(original) for original in originals] == [
        "file00000.json", "file00001_T1w.nii.gz", "file00001_T1w.json", "file00002", "file00003.DCM",
    ]  # fmt: skip
    maps = ("sub-Doe/sub-Doe_T1map.nii.gz", "sub-Doe/sub-Doe_part-phase_GRE.nii.gz", "Doe_adc.nii", "Doe_FA_map.nii")
    assert [PlainNames().of(original) for original in maps] == [
        "sub-file00000_T1map.nii.gz", "sub-file00000_part-phase_GRE.nii.gz", "file00000_adc.nii",
        "file00000_FA_map.nii",
    ]  # fmt: skip


def test_parts_of_one_name_stay_apart() -> None:
    names = PlainNames()
    assert len({names.of("image.dcm") for _ in range(3)}) == 3


def test_the_temporary_folder_is_gone_after_success_and_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    scan = io.BytesIO(fakes.write_nifti(tmp_path / "scan.nii").read_bytes())
    read_upload([("scan.nii", scan)], UploadLimits(), series=None, needs_kspace=False)
    with pytest.raises(RequestError):
        read_upload([("scan.nii", io.BytesIO(b"nothing"))], UploadLimits(), series=None, needs_kspace=False)
    assert [path.name for path in tmp_path.iterdir()] == ["scan.nii"]


def read_fastmri(tmp_path: Path) -> Scan:
    content = io.BytesIO(fakes.write_fastmri(tmp_path / "k.h5").read_bytes())
    return read_upload([("k.h5", content)], UploadLimits(), series=None, needs_kspace=True).scan


def test_acceleration_must_fit_the_file(tmp_path: Path) -> None:
    full = Intake(read_fastmri(tmp_path), "fastmri", [])
    with pytest.raises(RequestError, match="fully sampled"):
        ready_for_reconstruction(full, None, seed=0)
    once = ready_for_reconstruction(full, 4, seed=0)
    assert ready_for_reconstruction(once, None, seed=0) is once
    with pytest.raises(RequestError, match="already undersampled"):
        ready_for_reconstruction(once, 4, seed=0)

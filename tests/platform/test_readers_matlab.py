"""MATLAB files: k-space and images under any name, in MATLAB's axis order; nothing is guessed and nothing evaluated."""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest
import scipy.io
import torch

from omnimri.models import physics
from omnimri.models.scan import Scan
from omnimri.platform.data.catalogue import entries
from omnimri.platform.data.catalogue.entries import ImageRule, find_dataset
from omnimri.platform.data.formats.readers import read_path
from omnimri.platform.data.formats.records import ReadError, ReadLimits
from omnimri.platform.data.intake.annotations import load_label_map
from omnimri.platform.data.intake.config import IngestConfig
from omnimri.platform.data.intake.ingest import ingest
from omnimri.platform.data.shards import Shards, load_row
from tests.platform.intake_fakes import coil_kspace, random_image

SHAPE = (5, 8, 6)

Save = Callable[[Path, dict[str, np.ndarray]], None]


def save_hdf5(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """Version 7.3 of arrays in MATLAB's order; a name with a slash is a field of a struct."""
    with h5py.File(path, "w", userblock_size=512) as file:
        for name, array in arrays.items():
            stored, word = array.T, {"c": "double", "b": "logical", "u": "uint8"}.get(array.dtype.kind, "double")
            if np.iscomplexobj(array):
                parts = np.empty(stored.shape, dtype=[("real", "<f8"), ("imag", "<f8")])
                parts["real"], parts["imag"] = stored.real, stored.imag
                stored = parts
            file[name] = stored.astype(np.uint8) if word == "logical" else stored
            file[name].attrs["MATLAB_class"] = np.bytes_(word)
        file.create_group("#refs#")["a"] = np.zeros((3, 3, 3))
        file["title"] = np.zeros((4, 1), np.uint16)
        file["title"].attrs["MATLAB_class"] = np.bytes_("char")
    _stamp(path)


def _stamp(path: Path) -> None:
    with path.open("r+b") as file:
        file.write(b"MATLAB 7.3 MAT-file, made by a test".ljust(128))


def save_plain(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """Version 5, as `save -v6` does."""
    scipy.io.savemat(path, arrays)


def save_compressed(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """Version 5 with every variable deflated, as `save -v7` does."""
    scipy.io.savemat(path, arrays, do_compression=True)


every_version = pytest.mark.parametrize("save", [save_hdf5, save_plain, save_compressed])


def in_matlab(kspace: np.ndarray) -> np.ndarray:
    """`(Z, C, Y, X)` as `(readout, phase, coils, slices)`."""
    return kspace.transpose(2, 3, 1, 0)


@every_version
@pytest.mark.parametrize("name", ["raw", "kspace", "myData"])
def test_the_only_complex_array_is_kspace_whatever_its_name(tmp_path: Path, save: Save, name: str) -> None:
    image = random_image(0, SHAPE)
    kspace = coil_kspace(image)
    others = {"mask": np.ones((8, 6)), "volume": np.ones((8, 6, 5)), "shim": np.ones((3, 3)) * 1j}
    save(tmp_path / "sub-01_T2w.mat", {name: in_matlab(kspace), **others})
    [record], errors = read_path(tmp_path)
    assert errors == []
    np.testing.assert_allclose(record.scan.kspace, kspace, rtol=1e-6)
    again = physics.root_sum_of_squares(physics.ifft2c(torch.from_numpy(record.scan.kspace)))
    np.testing.assert_allclose(again, image, rtol=1e-3, atol=0.5)
    np.testing.assert_allclose(record.scan.image, image, rtol=1e-3, atol=0.5)
    assert record.scan.facts["contrast"] == "T2w"
    assert record.source_format == ("cmrxrecon" if save is save_hdf5 and name == "kspace" else "matlab")


@every_version
def test_three_axes_are_one_slice_and_a_fifth_counts_volumes(tmp_path: Path, save: Save) -> None:
    first, second = (coil_kspace(random_image(seed, SHAPE)) for seed in (1, 2))
    save(tmp_path / "a.mat", {"k": np.stack([in_matlab(first), in_matlab(second)], axis=-1)})
    save(tmp_path / "b.mat", {"k": in_matlab(first)[..., 0]})
    records, errors = read_path(tmp_path)
    assert errors == []
    for record, kspace in zip(records, (first, second, first[:1]), strict=True):
        np.testing.assert_allclose(record.scan.kspace, kspace, rtol=1e-6)


def test_one_name_of_cmrxrecon_with_three_axes_is_one_slice(tmp_path: Path) -> None:
    kspace = coil_kspace(random_image(1, SHAPE))[:1]
    save_hdf5(tmp_path / "b.mat", {"kspace": in_matlab(kspace)[..., 0]})
    [record], _ = read_path(tmp_path)
    np.testing.assert_allclose(record.scan.kspace, kspace, rtol=1e-6)


@every_version
def test_missing_lines_become_the_mask(tmp_path: Path, save: Save) -> None:
    lines = np.array([1, 0, 1, 1, 0, 1])
    save(tmp_path / "a.mat", {"k": in_matlab(coil_kspace(random_image(3, SHAPE)) * lines)})
    [record], _ = read_path(tmp_path)
    np.testing.assert_array_equal(record.scan.mask, lines.astype(bool))


@every_version
def test_several_arrays_are_listed_with_the_knob_and_one_is_taken_by_name(tmp_path: Path, save: Save) -> None:
    first, second = (coil_kspace(random_image(seed, SHAPE)) for seed in (4, 5))
    save(tmp_path / "a.mat", {"full": in_matlab(first), "under": in_matlab(second), "mask": np.ones((8, 6))})
    records, [error] = read_path(tmp_path)
    assert records == []
    assert error.reason == "2 complex arrays of three or more axes, expected one."
    assert "The file holds full (8 x 6 x 3 x 5), under (8 x 6 x 3 x 5)." in error.hint
    assert "--set matlab_array=NAME" in error.hint
    assert "(readout, phase, coils, slices, volumes)" in error.hint
    ingest([tmp_path / "a.mat"], tmp_path / "out", IngestConfig(matlab_array="under"))
    [ref] = Shards.open(tmp_path / "out").rows
    np.testing.assert_allclose(load_row(ref, ["kspace"])["kspace"], second, rtol=1e-6)
    with pytest.raises(ValueError, match="0 ingested, 1 rejected"):
        ingest([tmp_path / "a.mat"], tmp_path / "none", IngestConfig(matlab_array="other"))
    [line] = map(json.loads, (tmp_path / "none.rejects.jsonl").read_text().splitlines())
    assert line["reason"] == "0 arrays of numbers have the name that is asked for, expected one."
    assert "The file holds full (8 x 6" in line["hint"]


@every_version
@pytest.mark.parametrize("dtype", [np.float64, np.int16, np.uint8])
def test_real_numbers_are_an_image_only_where_they_are_named(tmp_path: Path, save: Save, dtype: type) -> None:
    image = random_image(6, SHAPE) % 200
    save(tmp_path / "a.mat", {"vol": image.transpose(1, 2, 0).astype(dtype)})  # (rows, columns, slices)
    records, [error] = read_path(tmp_path)
    assert records == []
    assert error.reason == "0 complex arrays of three or more axes, expected one."
    assert "The file holds vol (8 x 6 x 5)." in error.hint
    ingest([tmp_path / "a.mat"], tmp_path / "out", IngestConfig(matlab_array="vol"))
    [ref] = Shards.open(tmp_path / "out").rows
    row = load_row(ref, ["image", "kspace", "affine", "plane", "source_format"])
    np.testing.assert_array_equal(row["image"], image)
    assert (row["kspace"], row["plane"], row["source_format"]) == (None, None, "matlab")


def test_the_catalogue_names_image_and_label_map_of_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image, labels = random_image(7, SHAPE), random_image(8, SHAPE) % 3
    rule = ImageRule(
        pattern=r"{patient:P\d+}.mat", matlab_array="img", label_member="seg", label_names={"1": "liver", "2": "spleen"}
    )
    entry = replace(find_dataset("cmrxrecon2023"), name="mine", images=(rule,), ignored=(), overlaps=())
    monkeypatch.setattr(entries, "catalogue", lambda: {"mine": entry})
    monkeypatch.setattr("omnimri.platform.data.intake.plan.catalogue", lambda: {"mine": entry})
    (tmp_path / "in").mkdir()
    for number, save in enumerate((save_hdf5, save_plain, save_compressed)):
        arrays = {"img": image + number, "seg": labels.astype(np.uint8)}
        save(tmp_path / "in" / f"P{number}.mat", {name: array.transpose(1, 2, 0) for name, array in arrays.items()})
    summary = ingest([tmp_path / "in"], tmp_path / "out", IngestConfig(dataset="mine", split_fractions=(1.0, 0.0, 0.0)))
    rows = [load_row(ref) for ref in Shards.open(tmp_path / "out").rows]
    assert (summary.num_volumes, len(rows)) == (3, 3), (tmp_path / "out.rejects.jsonl").read_text()
    for row in rows:
        np.testing.assert_array_equal(row["image"] - row["image"].min(), image - image.min())
        np.testing.assert_array_equal(row["label_map"], labels)
        assert row["label_names"] == {1: "liver", 2: "spleen"}


def test_a_label_map_with_slices_of_its_own_is_refused(tmp_path: Path) -> None:
    save_hdf5(tmp_path / "a.mat", {"seg": np.ones((8, 6, 4))})
    scan = Scan(image=random_image(9, SHAPE), affine=np.eye(4))
    with pytest.raises(ValueError, match="label map has shape"):
        load_label_map(tmp_path / "a.mat", scan, "a.mat", member="seg")


def test_a_list_of_numbers_is_no_label_map_and_a_missing_volume_is_named(tmp_path: Path) -> None:
    scan = Scan(image=random_image(9, SHAPE), affine=np.eye(4))
    with h5py.File(tmp_path / "list.mat", "w") as file:
        file["seg"] = np.ones(240)
    with pytest.raises(ReadError, match="An array of 1 axes, expected rows and columns"):
        load_label_map(tmp_path / "list.mat", scan, "a.mat", member="seg")
    save_hdf5(tmp_path / "two.mat", {"seg": np.ones((8, 6, 5, 2))})
    with pytest.raises(ReadError, match="has 2 volumes, expected one for volume 3 of its series"):
        load_label_map(tmp_path / "two.mat", scan, "a.mat", member="seg", volume=2)


def test_structs_of_version_7_3_are_looked_into_and_others_are_not(tmp_path: Path) -> None:
    kspace = in_matlab(coil_kspace(random_image(10, SHAPE)))
    save_hdf5(tmp_path / "new.mat", {"scan/raw": kspace})
    save_plain(tmp_path / "old.mat", {"scan": {"raw": kspace}, "cell": np.array([kspace, 1], dtype=object)})
    [record], [error] = read_path(tmp_path)
    assert record.source == "new.mat"
    assert (error.source, error.reason) == ("old.mat", "0 complex arrays of three or more axes, expected one.")
    assert "The file holds no array of numbers." in error.hint


def test_arrays_that_reach_into_other_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "secret.bin").write_bytes(b"\x00" * 4096)
    with h5py.File(tmp_path / "a.mat", "w", userblock_size=512) as file:
        kind = np.dtype([("real", "<f4"), ("imag", "<f4")])
        file.create_dataset("raw", shape=(4, 4, 4), dtype=kind, external=[(str(tmp_path / "secret.bin"), 0, 512)])
    _stamp(tmp_path / "a.mat")
    _, [error] = read_path(tmp_path / "a.mat")
    assert error.hint == "Copy the data into one file."


@every_version
def test_arrays_larger_than_the_limit_are_refused(tmp_path: Path, save: Save) -> None:
    save(tmp_path / "a.mat", {"k": in_matlab(coil_kspace(random_image(11, SHAPE)))})
    records, [error] = read_path(tmp_path, ReadLimits(max_array_bytes=1000))
    assert records == []
    assert "max_array_bytes" in error.hint


def test_a_bomb_in_an_old_file_is_refused_before_scipy_unpacks_it(tmp_path: Path) -> None:
    head = b"MATLAB 5.0 MAT-file".ljust(124) + struct.pack("<H", 0x0100) + b"IM"
    bomb = zlib.compress(bytes(20_000_000))
    (tmp_path / "a.mat").write_bytes(head + struct.pack("<II", 15, len(bomb)) + bomb)
    _, [error] = read_path(tmp_path, ReadLimits(max_array_bytes=5_000_000))
    assert "max_array_bytes" in error.hint


@pytest.mark.parametrize("save", [save_plain, save_compressed, save_hdf5])
def test_a_file_cut_short_is_one_refusal(tmp_path: Path, save: Save) -> None:
    save(tmp_path / "a.mat", {"k": in_matlab(coil_kspace(random_image(12, SHAPE)))})
    content = (tmp_path / "a.mat").read_bytes()
    (tmp_path / "a.mat").write_bytes(content[: len(content) // 2])
    records, errors = read_path(tmp_path)
    assert (records, len(errors)) == ([], 1)


@every_version
def test_arrays_of_other_numbers_of_axes_say_what_is_expected(tmp_path: Path, save: Save) -> None:
    save(tmp_path / "a.mat", {"k": np.ones((4, 4, 3, 2, 2, 2)) * 1j})
    _, [error] = read_path(tmp_path)
    assert error.reason == ("An array of 6 axes, expected (readout, phase, coils, slices, volumes) in MATLAB's order.")

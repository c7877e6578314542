"""NRRD, MetaImage and NumPy: the same voxel at the same place, no pickle, no more memory than a header may ask for."""

from __future__ import annotations

import pickle
import re
import zipfile
from pathlib import Path

import nrrd
import numpy as np
import pytest

from omnimri.platform.data.formats.readers import read_path
from omnimri.platform.data.formats.records import ReadError, ReadLimits
from omnimri.platform.data.formats.volumes import load
from omnimri.platform.data.intake.annotations import load_label_map
from tests.platform.catalogue_writers import SHAPE, label_array, save_metaimage, save_nrrd
from tests.platform.intake_fakes import oblique_affine, random_image, save_nifti

_NRRD = b"NRRD0004\ndimension: 3\nsizes: 2 2 2\n"
_META = b"NDims = 3\nDimSize = 2 2 2\nElementType = MET_FLOAT\nElementDataFile = "


@pytest.mark.parametrize("space", ["lps", "ras"])
@pytest.mark.parametrize("encoding", ["raw", "gzip"])
@pytest.mark.parametrize("suffix", [".nrrd", ".nhdr"])
def test_nrrd_keeps_voxels_and_their_places(tmp_path: Path, space: str, encoding: str, suffix: str) -> None:
    image, affine = random_image(0, SHAPE), oblique_affine()
    path = save_nrrd(tmp_path / f"sub-1_T2w{suffix}", image, affine, encoding=encoding, space=space)
    records, errors = read_path(tmp_path)
    assert (len(records), [error.source for error in errors]) == (1, [])
    [record] = records
    np.testing.assert_array_equal(record.scan.image, image)
    np.testing.assert_allclose(record.scan.affine, affine, atol=1e-9)
    assert (record.source_format, record.patient_key) == ("nrrd", "sub-1")
    assert (record.scan.facts["contrast"], record.source) == ("T2w", path.name)


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("suffix", [".mha", ".mhd"])
def test_metaimage_keeps_voxels_and_their_places(tmp_path: Path, compressed: bool, suffix: str) -> None:
    image, affine = random_image(1, SHAPE), oblique_affine()
    save_metaimage(tmp_path / f"case7_t2{suffix}", image, affine, compressed=compressed)
    [record], errors = read_path(tmp_path)
    assert errors == []
    np.testing.assert_array_equal(record.scan.image, image)
    np.testing.assert_allclose(record.scan.affine, affine, atol=1e-9)
    assert record.source_format == "metaimage"


def test_nrrd_is_read_as_its_own_library_reads_it(tmp_path: Path) -> None:
    voxels = np.random.default_rng(2).integers(-500, 500, size=(7, 6, 5)).astype(">i2")
    header = {
        "space": "left-posterior-superior", "space origin": [10.0, -20.0, 5.0], "endian": "big", "encoding": "gzip",
        "space directions": [[0.0, 1.5, 0.0], [0.0, 0.0, -2.0], [-3.0, 0.0, 0.0]],
    }  # fmt: skip
    nrrd.write(str(tmp_path / "a.nrrd"), voxels, header)
    array, affine = load(tmp_path / "a.nrrd", "a.nrrd", ReadLimits())
    np.testing.assert_array_equal(array[..., 0], nrrd.read(str(tmp_path / "a.nrrd"))[0])
    # Index (1, 2, 3) by hand: LPS (10 - 9, -20 + 1.5, 5 - 4), and RAS turns the first two.
    np.testing.assert_allclose((affine @ [1, 2, 3, 1])[:3], [-1.0, 18.5, 1.0])


def test_rows_of_the_metaimage_matrix_are_the_axes(tmp_path: Path) -> None:
    header = (
        "ObjectType = Image\nNDims = 3\nBinaryData = True\nBinaryDataByteOrderMSB = False\nCompressedData = False\n"
        "TransformMatrix = 0 1 0 0 0 -1 -1 0 0\nOffset = 10 -20 5\nElementSpacing = 1.5 2 3\nDimSize = 7 6 5\n"
        "ElementType = MET_SHORT\nElementDataFile = LOCAL\n"
    )
    voxels = np.arange(210, dtype="<i2")
    (tmp_path / "a.mha").write_bytes(header.encode() + voxels.tobytes())
    array, affine = load(tmp_path / "a.mha", "a.mha", ReadLimits())
    assert array[1, 2, 3, 0] == 1 + 2 * 7 + 3 * 42
    # The geometry of the NRRD above, as ITK writes it: row k of the matrix is the direction of axis k.
    np.testing.assert_allclose((affine @ [1, 2, 3, 1])[:3], [-1.0, 18.5, 1.0])


def test_a_list_axis_gives_volumes(tmp_path: Path) -> None:
    voxels = random_image(3, (2, 5, 8)).reshape(2, 5, 8, 1).repeat(6, axis=3)
    voxels[..., 1:] += np.arange(1, 6)
    header = {
        "space": "RAS",
        "space directions": [[np.nan] * 3, [1, 0, 0], [0, 1, 0], [0, 0, 1]],
        "kinds": ["list", *["domain"] * 3],
    }
    nrrd.write(str(tmp_path / "dwi.nrrd"), voxels, header)
    records, _ = read_path(tmp_path / "dwi.nrrd")
    assert [record.scan.image.shape for record in records] == [(6, 8, 5)] * 2
    np.testing.assert_array_equal(records[1].scan.image, voxels[1].transpose(2, 1, 0))


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("a.nrrd", b"no header", "Not a NRRD file"),
        ("a.mha", b"no header", "Not a MetaImage file"),
        ("a.npy", b"no header", "Not a NumPy array"),
        ("a.npz", b"no header", "Not a readable .npz file"),
        ("a.nrrd", _NRRD + b"type: float\nencoding: bzip2\n\n", "Encoding bzip2, expected"),
        ("a.nrrd", _NRRD + b"type: block\nencoding: raw\n\n", "Voxels of type block"),
        ("a.nrrd", b"NRRD0004\ntype: float\ndimension: 3\nencoding: raw\n\n", r"cannot be parsed \(KeyError\)"),
        (
            "a.nhdr", b"NRRD0004\ntype: uchar\ndimension: 3\nsizes: 2 2 2\nencoding: raw\ndata file: ../../secret\n\n",
            "voxels in another folder",
        ),
        ("a.mhd", _META + b"/etc/passwd\n", "another folder"),
        ("a.mhd", _META + b"a.raw\n", "cannot be read|beside"),
        ("a.mha", _META + b"LOCAL\n123", "3 bytes of voxels"),
        (
            "a.mha", b"NDims = 3\nDimSize = 90000 90000 90000\nElementType = MET_FLOAT\nElementDataFile = LOCAL\n",
            "The array would take .* MiB",
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_read_says_why(tmp_path: Path, name: str, content: bytes, reason: str) -> None:
    (tmp_path / name).write_bytes(content)
    records, [error] = read_path(tmp_path)
    assert records == []
    assert re.search(reason, error.reason)
    assert error.hint


def test_deflated_voxels_are_not_unpacked_beyond_their_header(tmp_path: Path) -> None:
    path = save_metaimage(tmp_path / "bomb.mha", np.zeros((64, 512, 512), np.float32), np.eye(4), compressed=True)
    path.write_bytes(path.read_bytes().replace(b"DimSize = 512 512 64", b"DimSize = 2 2 2"))
    _, [error] = read_path(path)
    assert "bytes of voxels, expected 32" in error.reason
    assert int(error.reason.split()[0]) <= 2 * 2**20


def test_numpy_arrays_are_volumes_without_a_plane(tmp_path: Path) -> None:
    image = random_image(4, SHAPE).astype(np.int16)
    np.save(tmp_path / "0042.npy", image)
    np.savez_compressed(tmp_path / "two.npz", first=image, second=np.asfortranarray(image + 1))
    records, errors = read_path(tmp_path)
    assert errors == []
    assert [record.source for record in records] == ["0042.npy", "two.npz#first", "two.npz#second"]
    for record, expected in zip(records, (image, image, image + 1), strict=True):
        np.testing.assert_array_equal(record.scan.image, expected)
        assert record.scan.facts["plane"] is None
        assert record.source_format == "numpy"


def test_pickled_objects_are_never_read(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return Path.touch, (Path(tmp_path / "sprung"),)  # type: ignore[return-value]

    np.save(tmp_path / "a.npy", np.array([Trap(), None], dtype=object))
    with zipfile.ZipFile(tmp_path / "b.npz", "w") as archive:
        archive.write(tmp_path / "a.npy", "a.npy")
    (tmp_path / "c.npy").write_bytes(pickle.dumps([1, 2]))
    records, errors = read_path(tmp_path)
    assert records == []
    assert sorted(error.source for error in errors) == ["a.npy", "b.npz#a", "c.npy"]
    assert not (tmp_path / "sprung").exists()
    assert any("Pickled objects are never read." in error.hint for error in errors)


def test_the_size_of_an_array_is_checked_before_memory_is_taken(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.zeros(SHAPE, np.float32))
    _, [error] = read_path(tmp_path, ReadLimits(max_array_bytes=1000))
    assert "The array would take" in error.reason


@pytest.mark.parametrize("suffix", [".mha", ".mhd", ".nrrd", ".nhdr"])
def test_label_maps_of_every_format_are_turned_to_their_scan(tmp_path: Path, suffix: str) -> None:
    save_nifti(tmp_path / "image.nii", random_image(5, SHAPE), oblique_affine())
    [record], _ = read_path(tmp_path / "image.nii")
    labels = label_array((1, 2, 0), SHAPE)
    # The same voxels, stored with the rows turned.
    turned = oblique_affine() @ np.array([[1, 0, 0, 0], [0, -1, 0, SHAPE[1] - 1], [0, 0, 1, 0], [0, 0, 0, 1.0]])
    save = save_metaimage if suffix.startswith(".m") else save_nrrd
    path = save(tmp_path / f"labels{suffix}", labels[:, ::-1], turned)
    np.testing.assert_array_equal(load_label_map(path, record.scan, "a"), labels)
    with pytest.raises(ReadError, match="lies up to"):
        turned[0, 3] += 1.0
        load_label_map(save(tmp_path / f"other{suffix}", labels, turned), record.scan, "a")


def test_values_above_255_are_a_mask_when_they_are_not_told_apart(tmp_path: Path) -> None:
    save_nifti(tmp_path / "image.nii", random_image(6, SHAPE), oblique_affine())
    [record], _ = read_path(tmp_path / "image.nii")
    path = save_nifti(tmp_path / "labels.nii", label_array((0, 820)), oblique_affine())
    with pytest.raises(ReadError, match="whole numbers from 0 to 255"):
        load_label_map(path, record.scan, "a")
    np.testing.assert_array_equal(load_label_map(path, record.scan, "a", is_mask=True), label_array((0, 1)))

"""Orientation, preprocessing and boxes keep track of where things are."""

import itertools

import nibabel as nib
import numpy as np
import pytest
import torch

from omnimri.models.boxes import Box, BoxCoder, boxes_to_text, text_to_boxes
from omnimri.models.config import preset
from omnimri.models.geometry import from_canonical, to_canonical, voxel_box_to_mm
from omnimri.models.preprocess import Preprocess
from omnimri.models.scan import Scan

ORIENTATIONS = [
    "".join(axes) for order in itertools.permutations(["RL", "AP", "SI"]) for axes in itertools.product(*order)
]


def scan_oriented(codes: str, shape_ras: tuple[int, int, int] = (40, 48, 12)) -> tuple[Scan, np.ndarray]:
    """A scan whose axes run along `codes`, with one bright block left, front, up; and the block's mask."""
    data = np.full(shape_ras, 1.0, np.float32)
    data += np.linspace(0, 0.5, shape_ras[0], dtype=np.float32)[:, None, None]
    block = np.zeros(shape_ras, bool)
    block[4:12, 30:40, 6:9] = True
    data[block] = 5.0
    image = nib.Nifti1Image(data, np.array([[2.0, 0, 0, -40], [0, 2.0, 0, -50], [0, 0, 6.0, -30], [0, 0, 0, 1]]))
    marked = nib.Nifti1Image(block.astype(np.uint8), image.affine)
    ornt = nib.orientations.ornt_transform(nib.orientations.axcodes2ornt("RAS"), nib.orientations.axcodes2ornt(codes))
    turned, mask = image.as_reoriented(ornt), marked.as_reoriented(ornt)
    scan = Scan(image=np.asarray(turned.dataobj).transpose(2, 1, 0), affine=turned.affine)
    return scan, np.asarray(mask.dataobj).transpose(2, 1, 0).astype(bool)


def box_of(mask: np.ndarray) -> tuple[int, ...]:
    index = np.argwhere(mask)
    return (*index.min(0).tolist(), *(index.max(0) + 1).tolist())


@pytest.mark.parametrize("codes", ORIENTATIONS)
def test_canonical_round_trip_in_all_48_orientations(codes: str) -> None:
    scan, _ = scan_oriented(codes)
    canonical = to_canonical(scan.image, scan.affine)
    assert nib.aff2axcodes(canonical.affine) == ("R", "A", "S")
    np.testing.assert_array_equal(from_canonical(canonical.array, canonical), scan.image)


@pytest.mark.parametrize("codes", ORIENTATIONS)
def test_model_sees_the_same_volume_whatever_the_file_order(codes: str) -> None:
    preprocess = Preprocess(preset("tiny").inputs)
    reference = preprocess.volume(scan_oriented("RAS")[0])
    seen = preprocess.volume(scan_oriented(codes)[0])
    torch.testing.assert_close(seen.volume, reference.volume)
    torch.testing.assert_close(seen.spacing_mm, reference.spacing_mm)


@pytest.mark.parametrize("codes", ["RAS", "LPS", "PIR", "SAL"])
def test_box_survives_the_way_through_text(codes: str) -> None:
    scan, mask = scan_oriented(codes)
    coder = BoxCoder(scan, Preprocess(preset("tiny").inputs))
    box = Box(label="old infarct", side="left", box_voxel=box_of(mask))
    (read,) = text_to_boxes(boxes_to_text([box], coder), coder)
    assert (read.label, read.side) == ("old infarct", "left")
    assert np.abs(np.array(read.box_voxel) - box.box_voxel).max() <= 1


def test_same_place_has_the_same_integers_in_every_file_order() -> None:
    preprocess = Preprocess(preset("tiny").inputs)
    written = set()
    for codes in ("RAS", "LPS", "PIR", "SAL"):
        scan, mask = scan_oriented(codes)
        written.add(tuple(BoxCoder(scan, preprocess).encode(box_of(mask))))
    assert len(written) == 1


@pytest.mark.parametrize(
    "answer", ["no box", "<bbox>[{]</bbox>", '<bbox>[{"label": "x", "box": [1, 2, 3]}]</bbox>',
               '<bbox>[{"label": "x", "box": [0, 0, 0, 1, 1, 1000]}]</bbox>']
)  # fmt: skip
def test_unreadable_detection_answers_are_refused(answer: str) -> None:
    coder = BoxCoder(scan_oriented("RAS")[0], Preprocess(preset("tiny").inputs))
    with pytest.raises(ValueError, match="Detection"):
        text_to_boxes(answer, coder)


def test_segmentation_grid_maps_back_to_native_voxels() -> None:
    preprocess = Preprocess(preset("tiny").inputs)
    scan, mask = scan_oriented("PIR")
    source = preprocess.slices(scan)
    labels = preprocess.slice_labels(mask, scan, source.axis)
    back = preprocess.to_native(torch.from_numpy(labels).float(), source) >= 0.5
    np.testing.assert_array_equal(back, mask)


def test_finer_slices_are_resampled_and_come_back() -> None:
    preprocess = Preprocess(preset("tiny").inputs)
    data = np.zeros((6, 200, 160), np.float32)
    data[2:4, 60:120, 40:100] = 1.0
    scan = Scan(image=data + 0.2, affine=np.diag([1.0, 1.0, 5.0, 1.0]))
    source = preprocess.slices(scan)
    assert tuple(source.slices.shape) == (6, 100, 80)
    labels = preprocess.slice_labels(data > 0.5, scan, source.axis)
    back = preprocess.to_native(torch.from_numpy(labels).float(), source) >= 0.5
    assert (back == (data > 0.5)).mean() > 0.995


def test_large_field_of_view_is_widened_not_cut() -> None:
    preprocess = Preprocess(preset("tiny").inputs)
    scan = Scan(image=np.random.default_rng(0).random((20, 256, 256), np.float32), affine=np.diag([2.0, 2.0, 4.0, 1.0]))
    volume = preprocess.volume(scan)
    assert tuple(volume.volume.shape) == (1, 24, 56, 48)
    assert float(volume.spacing_mm[1]) * 56 >= 512 - 1e-3


def test_voxel_box_in_millimetres_counts_whole_voxels() -> None:
    assert voxel_box_to_mm([0, 0, 0, 2, 3, 4], np.diag([2.0, 3.0, 5.0, 1.0])) == [-1.0, -1.5, -2.5, 7.0, 7.5, 7.5]


def test_constant_image_becomes_zeros() -> None:
    assert not Preprocess(preset("tiny").inputs).standardise(np.full((3, 4, 5), 7.0, np.float32)).any()

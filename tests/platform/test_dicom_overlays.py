"""Overlay planes: drawn outlines become labels; text, logos, frames and stamps do not."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from pydicom.data import get_testdata_file
from pydicom.dataset import Dataset

from omnimri.platform.data.formats.dicom.overlays import enclosed_region
from omnimri.platform.data.formats.readers import read_path
from tests.platform.intake_fakes import dicom_slices, oblique_affine, random_image, rescalable, save_dicom

SHAPE = (4, 40, 36)


def _outline(top: int = 5, left: int = 6, height: int = 14, width: int = 12) -> np.ndarray:
    plane = np.zeros(SHAPE[1:], dtype=bool)
    plane[top : top + height, left : left + width] = True
    plane[top + 1 : top + height - 1, left + 1 : left + width - 1] = False
    return plane


def _draw(dataset: Dataset, plane: np.ndarray, *, kind: str = "G", group: int = 0x6000, text: str = "") -> None:
    block = {0x0010: ("US", plane.shape[0]), 0x0011: ("US", plane.shape[1]), 0x0040: ("CS", kind),
             0x0050: ("SS", [1, 1]), 0x0100: ("US", 1), 0x0102: ("US", 0), 0x1500: ("LO", text),
             0x3000: ("OW", np.packbits(plane.ravel(), bitorder="little").tobytes())}  # fmt: skip
    for element, (vr, value) in block.items():
        dataset.add_new((group, element), vr, value)


def _slices() -> list[Dataset]:
    return dicom_slices(rescalable(random_image(0, SHAPE)), oblique_affine())


def test_hand_drawn_outline_of_a_real_image_is_filled_and_its_text_is_not() -> None:
    [record], errors = read_path(Path(get_testdata_file("examples_overlay.dcm")))
    assert errors == []
    assert record.label_map is not None
    _, y, x = np.nonzero(record.label_map)
    assert (x.min(), x.max() + 1, y.min(), y.max() + 1) == (46, 81, 139, 174)
    assert record.label_map.sum() == 920  # 128 pixels drawn and 792 inside
    assert record.label_names == {1: "lesion"}  # the series description says so; the overlay's text does not count


def test_an_outline_lies_on_its_slice(tmp_path: Path) -> None:
    slices = _slices()
    _draw(slices[2], _outline(), text="Liver")
    [record], errors = read_path(save_dicom(slices, tmp_path))
    assert errors == []
    assert record.label_map is not None
    expected = np.zeros(SHAPE, dtype=np.uint8)
    expected[2, 5:19, 6:18] = 1
    np.testing.assert_array_equal(record.label_map, expected)
    assert record.label_names == {1: "liver"}


def test_planes_are_labels_of_their_own_and_unknown_text_names_nothing(tmp_path: Path) -> None:
    slices = _slices()
    _draw(slices[0], _outline(), text="Jane Doe")
    _draw(slices[1], _outline(), group=0x6002, text="Dr Doe")
    [record], _ = read_path(save_dicom(slices, tmp_path))
    assert record.label_names == {1: "overlay 1", 2: "overlay 2"}


def test_a_declared_region_of_interest_is_taken_as_it_is(tmp_path: Path) -> None:
    slices = _slices()
    blob = np.zeros(SHAPE[1:], dtype=bool)
    blob[3:5, 3:6] = True
    _draw(slices[1], blob, kind="R", text="lesion")
    [record], _ = read_path(save_dicom(slices, tmp_path))
    assert record.label_map is not None
    np.testing.assert_array_equal(record.label_map[1], blob)


def test_what_returns_on_every_slice_is_a_stamp(tmp_path: Path) -> None:
    slices = _slices()
    for dataset in slices:
        _draw(dataset, _outline())
    [record], errors = read_path(save_dicom(slices, tmp_path))
    assert errors == []
    assert record.label_map is None


def test_overlapping_outlines_of_two_planes_cost_the_labels_only(tmp_path: Path) -> None:
    slices = _slices()
    _draw(slices[0], _outline(), text="liver")
    _draw(slices[0], _outline(top=10), group=0x6002, text="spleen")
    [record], [error] = read_path(save_dicom(slices, tmp_path))
    assert record.label_map is None
    assert "Segments overlap" in error.reason


def test_an_overlay_that_is_too_short_costs_the_labels_only(tmp_path: Path) -> None:
    slices = _slices()
    _draw(slices[0], _outline())
    slices[0][0x6000, 0x3000].value = b"\0\1"
    [record], [error] = read_path(save_dicom(slices, tmp_path))
    assert record.label_map is None
    assert error.reason.startswith("The overlays of the series cannot be read")


def _glyph(rows: str) -> np.ndarray:
    return np.array([[c == "#" for c in row] for row in rows.split()])


@pytest.mark.parametrize(
    "stroke",
    [
        np.kron(_glyph(".###. #...# #...# #...# #...# #...# .###."), np.ones((2, 2))) > 0,  # the letter O, 14 px high
        np.ones((20, 20), dtype=bool),  # a blob
        _glyph("#...........# " * 12 + "#############"),  # an open stroke
    ],
)
def test_letters_blobs_and_open_strokes_enclose_nothing(stroke: np.ndarray) -> None:
    plane = np.zeros((60, 60), dtype=bool)
    plane[10 : 10 + stroke.shape[0], 10 : 10 + stroke.shape[1]] = stroke
    assert enclosed_region(plane) is None


def test_a_frame_around_the_image_is_no_outline() -> None:
    frame = np.ones((60, 60), dtype=bool)
    frame[1:-1, 1:-1] = False
    assert enclosed_region(frame) is None

"""Pictures: radiological orientation from the affine, true proportions, legible marks."""

import numpy as np
import pytest
from nibabel.orientations import apply_orientation, axcodes2ornt, inv_ornt_aff, io_orientation, ornt_transform

from omnimri.platform.evaluation import figures

LETTERS_OF_PLANE = {"axial": ("R", "L", "A", "P"), "coronal": ("R", "L", "S", "I"), "sagittal": ("A", "P", "S", "I")}


def _stored(codes: str) -> tuple[np.ndarray, np.ndarray]:
    """A volume `z y x` stored in the given axes, bright in the patient's left anterior superior corner."""
    ras = np.zeros((6, 8, 10), np.float32)  # x to the right, y to the front, z up
    ras[:3, 4:, 5:] = 1.0
    affine = np.diag([2.0, 3.0, 5.0, 1.0])
    transform = ornt_transform(io_orientation(affine), axcodes2ornt(codes))
    stored = apply_orientation(ras, transform)
    return stored.transpose(2, 1, 0), affine @ inv_ornt_aff(transform, ras.shape)


@pytest.mark.parametrize(
    ("codes", "plane"),
    [("LPS", "axial"), ("RAS", "axial"), ("PLS", "axial"), ("LSP", "coronal"), ("RIA", "coronal"),
     ("PSR", "sagittal"), ("AIL", "sagittal")],
)  # fmt: skip
def test_every_storage_order_gives_the_same_radiological_view(codes: str, plane: str) -> None:
    volume, affine = _stored(codes)
    bright = int(volume.sum(axis=(1, 2)).argmax())
    view = figures.orient_slice(volume[bright], affine)
    assert view.letters == LETTERS_OF_PLANE[plane]
    rows, columns = np.nonzero(view.pixels)
    height, width = view.pixels.shape
    assert rows.max() < height / 2 + 1  # anterior in axial slices, superior in the others: on top
    if plane == "sagittal":
        assert columns.max() <= width / 2  # anterior: at the viewer's left
    else:
        assert columns.min() >= width / 2 - 1  # the patient's left: at the viewer's right


def test_spacing_follows_the_turned_axes_and_panels_have_true_proportions() -> None:
    volume, affine = _stored("LSP")
    view = figures.orient_slice(volume[0], affine)
    assert view.spacing_mm == (5.0, 2.0)
    picture = _picture(view)
    panel = figures.grey(picture, "image")
    height_mm, width_mm = 10 * 5.0, 6 * 2.0
    assert panel.height / panel.width == pytest.approx(height_mm / width_mm, rel=0.02)


def _picture(view: figures.SliceView) -> dict[str, np.ndarray]:
    return {
        "image": view.pixels,
        "window": np.array([0.0, 1.0]),
        "letters": np.array(view.letters),
        "spacing_mm": np.array(view.spacing_mm),
    }


def test_an_outline_runs_along_the_edge_of_its_mask() -> None:
    mask = np.zeros((20, 20), bool)
    mask[5:15, 5:15] = True
    image = figures.Image.new("L", (400, 400))
    pixels = np.asarray(figures.outlined(image, mask, (255, 0, 0)))[..., 0] > 0
    rows, columns = np.nonzero(pixels)
    assert (rows.min(), rows.max()) == pytest.approx((100, 300), abs=12)
    assert (columns.min(), columns.max()) == pytest.approx((100, 300), abs=12)
    assert not pixels[140:260, 140:260].any()


def test_boxes_of_other_slices_are_dotted() -> None:
    image = figures.Image.new("L", (200, 200))
    rectangles = np.array([[2, 2, 8, 8]])
    solid, dotted = (
        np.asarray(figures.boxed(image, (10, 10), rectangles, np.array([cut]), (0, 255, 0)))[..., 1] > 0
        for cut in (True, False)
    )
    assert 0 < dotted.sum() < solid.sum()


def test_the_error_map_is_dark_where_nothing_is_wrong() -> None:
    target = np.full((8, 8), 0.5, np.float32)
    off = target.copy()
    off[:, 4:] += 0.2  # five times brighter: full scale
    view = figures.SliceView(target, (1.0, 1.0), ("R", "L", "A", "P"))
    picture = _picture(view) | {"target": target, "4x_omnimri": off}
    pixels = np.asarray(figures.error_map(picture, "4x_omnimri").convert("RGB")).sum(axis=-1)
    assert pixels[:, :100].max() < 40
    assert pixels[:, -100:].min() > 500

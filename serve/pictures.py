"""PNG contact sheets of volumes in radiological orientation: patient right at the viewer's left, anterior on top."""

from __future__ import annotations

import io
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from omnimri.models.geometry import to_canonical
from omnimri.models.vocabulary import RESEARCH_NOTICE

TILE_PX = 224
"""Longer edge of one slice in the sheet."""
MAX_TILES = 12
COLUMNS = 4
COLOURS = (
    (86, 180, 233), (230, 159, 0), (0, 158, 115), (213, 94, 0),
    (204, 121, 167), (240, 228, 66), (0, 114, 178), (160, 160, 160),
)  # fmt: skip
"""Okabe and Ito's palette, told apart with colour-blind eyes; the vermilion comes fourth, where the lesion does."""
OPACITY = 0.4


@dataclass(frozen=True)
class SliceView:
    """Slices as a viewer sees them: row 0 on top, column 0 at the left."""

    slices: np.ndarray
    """`(N, rows, columns)`."""
    spacing_mm: tuple[float, float]
    """Row and column spacing."""
    left: str
    """Patient direction at the left edge: R or A."""
    right: str


def radiological(volume: np.ndarray, affine: np.ndarray) -> SliceView:
    """Turn `(Z, Y, X)` into pictures across its own slice axis.

    With x to the right, y to the front and z up, every one of the three planes is shown by the same two flips:
    axial and coronal with the patient's right at the left edge, sagittal looking to the left, head up throughout.
    """
    canonical = to_canonical(volume, affine)
    axis = 2 - int(canonical.transform[2, 0])
    slices = np.moveaxis(canonical.array, axis, 0)[:, ::-1, ::-1]
    row_mm, column_mm = (mm for index, mm in enumerate(canonical.spacing_mm) if index != axis)
    left, right = ("A", "P") if axis == 2 else ("R", "L")
    return SliceView(slices, (row_mm, column_mm), left, right)


def contact_sheet(
    volume: np.ndarray, affine: np.ndarray, *, labels: np.ndarray | None = None, names: dict[int, str] | None = None
) -> bytes:
    """PNG of up to twelve slices, with a label map in colours over them when given.

    Args:
        volume: Magnitude, `(Z, Y, X)`.
        affine: `(4, 4)`, index `(x, y, z)` to RAS mm.
        labels: Integer label map `(Z, Y, X)`.
        names: Label value to name, for the legend.
    """
    view = radiological(volume, affine)
    overlay = radiological(labels, affine).slices if labels is not None else None
    chosen = _spread(view.slices if overlay is None or not overlay.any() else overlay)
    window = _window(volume)
    tiles = [_tile(view, index, window, None if overlay is None else overlay[index], names or {}) for index in chosen]
    return _png(_with_footer(_sheet(tiles), names or {}))


def _spread(slices: np.ndarray) -> list[int]:
    """Indices of at most MAX_TILES slices, evenly over those that hold anything."""
    filled = np.flatnonzero(slices.reshape(len(slices), -1).any(axis=1))
    first, last = (filled[0], filled[-1]) if filled.size else (0, len(slices) - 1)
    number = min(MAX_TILES, last - first + 1)
    return sorted({int(index) for index in np.linspace(first, last, number).round()}, reverse=True)


def _window(volume: np.ndarray) -> tuple[float, float]:
    """Grey levels shown as black and white: 0 or the minimum, and the 99.5th percentile."""
    low, high = float(min(volume.min(), 0.0)), float(np.percentile(volume, 99.5))
    return (low, high) if high > low else (low, low + 1.0)


def _tile(
    view: SliceView, index: int, window: tuple[float, float], labels: np.ndarray | None, names: dict[int, str]
) -> Image.Image:
    """One slice with square pixels, its label colours and the letters of its sides."""
    low, high = window
    grey = (np.clip((view.slices[index] - low) / (high - low), 0, 1) * 255).astype(np.uint8)
    rows, columns = grey.shape
    height_mm, width_mm = rows * view.spacing_mm[0], columns * view.spacing_mm[1]
    scale = TILE_PX / max(height_mm, width_mm)
    size = max(1, round(width_mm * scale)), max(1, round(height_mm * scale))
    picture = Image.fromarray(grey).resize(size, Image.Resampling.BICUBIC).convert("RGB")
    if labels is not None:
        picture = _coloured(picture, labels, sorted(names))
    draw = ImageDraw.Draw(picture)
    font = ImageFont.load_default(12)
    draw.text((4, size[1] // 2), view.left, fill=(255, 255, 255), font=font, anchor="lm")
    draw.text((size[0] - 4, size[1] // 2), view.right, fill=(255, 255, 255), font=font, anchor="rm")
    return picture


def _coloured(picture: Image.Image, labels: np.ndarray, values: list[int]) -> Image.Image:
    """Blend the colours of a label slice over a picture; labels are enlarged without interpolation."""
    enlarged = Image.fromarray(labels.astype(np.uint8)).resize(picture.size, Image.Resampling.NEAREST)
    label_px = np.asarray(enlarged)
    pixels = np.asarray(picture).astype(np.float32)
    for rank, value in enumerate(values):
        inside = label_px == value
        pixels[inside] = (1 - OPACITY) * pixels[inside] + OPACITY * np.array(COLOURS[rank % len(COLOURS)])
    return Image.fromarray(pixels.astype(np.uint8))


def _sheet(tiles: list[Image.Image]) -> Image.Image:
    """Tiles in rows of COLUMNS on black."""
    columns = min(COLUMNS, len(tiles))
    rows = -(-len(tiles) // columns)
    width, height = tiles[0].size
    sheet = Image.new("RGB", (columns * width, rows * height))
    for position, tile in enumerate(tiles):
        sheet.paste(tile, ((position % columns) * width, (position // columns) * height))
    return sheet


def _with_footer(sheet: Image.Image, names: dict[int, str]) -> Image.Image:
    """The sheet with a line for every label and the notice below it: pictures travel without their page."""
    line = 20
    framed = Image.new("RGB", (sheet.width, sheet.height + line * (len(names) + 1) + 8))
    framed.paste(sheet, (0, 0))
    draw = ImageDraw.Draw(framed)
    font = ImageFont.load_default(14)
    for rank, value in enumerate(sorted(names)):
        top = sheet.height + 4 + rank * line
        draw.rectangle((6, top + 3, 18, top + 15), fill=COLOURS[rank % len(COLOURS)])
        draw.text((26, top + 9), names[value], fill=(230, 230, 230), font=font, anchor="lm")
    draw.text((6, framed.height - 12), f"OmniMRI. {RESEARCH_NOTICE}", fill=(180, 180, 180), font=font, anchor="lm")
    return framed


def _png(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()

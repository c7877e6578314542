"""Pictures as a radiologist expects them: patient's left at the viewer's right, anterior or head up, true proportions.

A sagittal slice is shown with anterior at the viewer's left. Every picture carries the letters of its edges, read from
the affine; nothing is interpolated before the display.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
import matplotlib.colors
import numpy as np
from PIL import Image, ImageDraw, ImageFont
from skimage.measure import find_contours

from omnimri.models.geometry import to_canonical
from omnimri.models.vocabulary import LESION, STRUCTURES, TISSUES

LONG_EDGE_PX = 352
"""Longer edge of a panel."""
ERROR_GAIN = 5
"""Errors are shown this many times brighter than the images."""
REFERENCE_COLOUR = (0, 200, 150)
PREDICTED_COLOUR = (230, 159, 0)
STRUCTURE_COLOURS = dict(zip(STRUCTURES, ((86, 180, 233), (240, 228, 66), (204, 121, 167), (230, 159, 0)), strict=True))
"""Okabe and Ito's palette, which colour-blind eyes tell apart."""


@dataclass(frozen=True)
class SliceView:
    """One slice as a viewer sees it: row 0 on top, column 0 at the left."""

    pixels: np.ndarray
    """`(rows, columns)`."""
    spacing_mm: tuple[float, float]
    """Row and column spacing."""
    letters: tuple[str, str, str, str]
    """Patient directions at the left, right, top and bottom edge."""


_LETTERS = {0: ("R", "L", "A", "P"), 1: ("R", "L", "S", "I"), 2: ("A", "P", "S", "I")}
"""Edges of a slice across the canonical axis z, y or x, after both its axes were turned."""


def orient_slice(pixels: np.ndarray, affine: np.ndarray) -> SliceView:
    """Turn one native slice `(Y, X)` to radiological orientation.

    In RAS order both in-plane axes grow against the viewing direction (x to the patient's right, y to the front, z to
    the head), so turning both gives every plane its convention.
    """
    canonical = to_canonical(pixels[None], affine)
    axis = 2 - int(canonical.transform[2, 0])
    row_mm, column_mm = (mm for index, mm in enumerate(canonical.spacing_mm) if index != axis)
    turned = np.squeeze(canonical.array, axis)[::-1, ::-1]
    return SliceView(np.ascontiguousarray(turned), (row_mm, column_mm), _LETTERS[axis])


@dataclass(frozen=True)
class Panel:
    """A finished picture with its title and one line below it."""

    title: str
    image: Image.Image
    note: str = ""

    @property
    def data_uri(self) -> str:
        """The picture as a PNG inside a `data:` address."""
        return f"data:image/png;base64,{base64.b64encode(png_bytes(self.image)).decode()}"


def png_bytes(image: Image.Image) -> bytes:
    """An image as a PNG file."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()


Picture = Mapping[str, np.ndarray]
"""The arrays of one case, as the evaluation's workers keep them."""


def grey(picture: Picture, name: str) -> Image.Image:
    """A magnitude slice in the window of its case."""
    low, high = picture["window"]
    shade = np.clip((picture[name] - low) / max(high - low, 1e-12), 0, 1)
    return _enlarged(Image.fromarray((255 * shade).astype(np.uint8)), picture)


def error_map(picture: Picture, name: str) -> Image.Image:
    """Absolute difference from the target, ERROR_GAIN times brighter, in false colours."""
    error = np.abs(picture[name] - picture["target"]) * ERROR_GAIN / max(float(picture["window"][1]), 1e-12)
    colours = matplotlib.colormaps["inferno"](np.clip(error, 0, 1))[..., :3]
    return _enlarged(Image.fromarray((255 * colours).astype(np.uint8)), picture).quantize(64)  # a quarter of the bytes


def colour_map_stops(number: int = 8) -> list[str]:
    """Colours of the error maps from nothing to full, as the style sheet of a page writes them."""
    return [matplotlib.colors.to_hex(matplotlib.colormaps["inferno"](share)) for share in np.linspace(0, 1, number)]


def _enlarged(image: Image.Image, picture: Picture) -> Image.Image:
    """The slice at panel size with square millimetres."""
    row_mm, column_mm = picture["spacing_mm"]
    height_mm, width_mm = image.height * row_mm, image.width * column_mm
    scale = LONG_EDGE_PX / max(height_mm, width_mm)
    return image.resize((round(width_mm * scale), round(height_mm * scale)), Image.Resampling.BICUBIC)


def lettered(image: Image.Image, picture: Picture) -> Image.Image:
    """The picture with the patient's directions at its edges."""
    image = image.copy()
    draw, white, black = ImageDraw.Draw(image), (255,) * len(image.getbands()), (0,) * len(image.getbands())
    middle_x, middle_y = image.width // 2, image.height // 2
    places = (
        (7, middle_y, "lm"), (image.width - 7, middle_y, "rm"), (middle_x, 6, "ma"), (middle_x, image.height - 6, "md")
    )  # fmt: skip
    for letter, (x, y, anchor) in zip(picture["letters"], places, strict=True):
        draw.text((x, y), str(letter), white, ImageFont.load_default(17), anchor, stroke_width=2, stroke_fill=black)
    return image


def tinted(image: Image.Image, mask: np.ndarray, colour: tuple[int, int, int], *, opacity: float = 0.4) -> Image.Image:
    """The picture with the inside of a mask in a colour; voxels keep their edges."""
    inside = Image.fromarray((255 * opacity * mask.astype(float)).astype(np.uint8))
    inside = inside.resize(image.size, Image.Resampling.NEAREST)
    return Image.composite(Image.new("RGB", image.size, colour), image.convert("RGB"), inside)


def outlined(image: Image.Image, mask: np.ndarray, colour: tuple[int, int, int], *, width: int = 2) -> Image.Image:
    """The picture with the outline of a mask of its slice."""
    image = image.convert("RGB")
    draw = ImageDraw.Draw(image)
    scale = np.array([image.width / mask.shape[1], image.height / mask.shape[0]])
    for contour in find_contours(np.pad(mask.astype(float), 1), 0.5):
        points = (contour[:, ::-1] - 1 + 0.5) * scale
        draw.line([tuple(point) for point in points], fill=colour, width=width, joint="curve")
    return image


def boxed(
    image: Image.Image,
    shape: tuple[int, int],
    rectangles: np.ndarray,
    cut: np.ndarray,
    colour: tuple[int, int, int],
    *,
    width: int = 2,
) -> Image.Image:
    """The picture with rectangles `(N, 4)` of its slice; dotted where the box lies in other slices (`cut` False)."""
    image = image.convert("RGB")
    draw = ImageDraw.Draw(image)
    for (top, left, bottom, right), solid in zip(rectangles, cut, strict=True):
        scale_x, scale_y = image.width / shape[1], image.height / shape[0]
        corners = (left * scale_x, top * scale_y, right * scale_x - 1, bottom * scale_y - 1)
        if solid:
            draw.rectangle(corners, outline=colour, width=width)
        else:
            _dotted_rectangle(draw, corners, colour)
    return image


def _dotted_rectangle(draw: ImageDraw.ImageDraw, corners: Sequence[float], colour: tuple[int, int, int]) -> None:
    left, top, right, bottom = corners
    for x in np.arange(left, right, 9):
        for y in (top, bottom):
            draw.line((x, y, min(x + 4, right), y), fill=colour, width=2)
    for y in np.arange(top, bottom, 9):
        for x in (left, right):
            draw.line((x, y, x, min(y + 4, bottom)), fill=colour, width=2)


RECONSTRUCTION_TITLES = {
    "zero_filled": "Zero-filled",
    "cg_sense": "CG-SENSE",
    "total_variation": "Total variation",
    "recon_unet": "U-Net",
    "varnet": "VarNet",
    "omnimri": "OmniMRI",
}
"""Methods that are shown, those of them that were run."""


def reconstruction_panels(
    picture: Picture, condition: str, values: Mapping[str, Mapping[str, float]]
) -> tuple[list[Panel], list[Panel]]:
    """Images (methods, then target) and the error maps of the methods.

    Args:
        picture: Of a reconstruction case.
        condition: Such as `4x`.
        values: Method to its `psnr` and `ssim` on this volume.
    """
    images, errors = [], []
    for method, title in RECONSTRUCTION_TITLES.items():
        if method not in values:
            continue
        note = f"PSNR {values[method]['psnr']:.1f} dB · SSIM {values[method]['ssim']:.3f}"
        name = f"{condition}_{method}"
        images.append(Panel(title, lettered(grey(picture, name), picture), note))
        errors.append(Panel(f"Error x{ERROR_GAIN}", error_map(picture, name), title))
    images.append(Panel("Target", lettered(grey(picture, "target"), picture), "fully sampled"))
    return images, errors


def segmentation_panels(picture: Picture, predicted_by: str = "OmniMRI") -> list[Panel]:
    """Image, tissues of reference and prediction in colours, and the lesion outlines of both in one picture."""
    base = grey(picture, "image")
    panels = [Panel("Image", lettered(base, picture))]
    for source, title in (("reference", "Reference"), ("predicted", predicted_by)):
        image = base
        for name in TISSUES:
            if f"{source}_{name}" in picture:
                image = tinted(image, picture[f"{source}_{name}"], STRUCTURE_COLOURS[name])
        panels.append(Panel(f"Tissues: {title}", lettered(image, picture)))
    if f"reference_{LESION}" in picture:
        image = outlined(base, picture[f"reference_{LESION}"], REFERENCE_COLOUR, width=5)
        image = outlined(image, picture[f"predicted_{LESION}"], PREDICTED_COLOUR)
        panels.append(Panel("Lesion: both", lettered(image, picture)))
    return panels


def detection_panels(picture: Picture) -> list[Panel]:
    """The slice without and with the boxes of reference and model."""
    base = grey(picture, "image")
    image = base
    # The reference is drawn wider, so that it shows beside a box that agrees with it.
    for name, colour, width in (("reference", REFERENCE_COLOUR, 5), ("predicted", PREDICTED_COLOUR, 2)):
        rectangles, cut = picture[f"{name}_rectangles"], picture[f"{name}_cut"]
        image = boxed(image, picture["image"].shape, rectangles, cut, colour, width=width)
    return [Panel("Image", lettered(base, picture)), Panel("Boxes", lettered(image, picture))]


def curves_figure(cards: Sequence[Mapping[str, Any]]) -> Image.Image:
    """Learning curves of networks side by side: loss and validation metric against seconds of training.

    Args:
        cards: `label`, `metric`, `curve` (points with `seconds`, `loss`, `metric`) and `best` of each.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.4 * len(cards), 2.8), dpi=110, layout="constrained")
    for place, card in zip(figure.subplots(1, len(cards), squeeze=False)[0], cards, strict=True):
        seconds = [point["seconds"] for point in card["curve"]]
        place.plot(seconds, [point["loss"] for point in card["curve"]], color="#5b6472", label="training loss")
        place.set(title=f"{card['label']}: {card['metric']}", xlabel="seconds of training", ylabel="loss")
        beside = place.twinx()
        scores = [math.nan if point["metric"] is None else point["metric"] for point in card["curve"]]
        beside.plot(seconds, scores, color="#0b5cad", marker="o", markersize=3)
        beside.plot(seconds[card["best"]], scores[card["best"]], color="#0b5cad", marker="*", markersize=11)
        beside.tick_params(axis="y", colors="#0b5cad")
        place.title.set_fontsize(9)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return Image.open(buffer).convert("RGB")


def plain_panel(picture: Picture) -> Panel:
    """The slice alone."""
    return Panel("", lettered(grey(picture, "image"), picture))


def strip(rows: Sequence[Sequence[Panel]]) -> Image.Image:
    """Rows of panels with their titles in one picture, for places that show a single file."""
    gap, title_px = 8, 50
    width = max(sum(panel.image.width + gap for panel in row) for row in rows) + gap
    heights = [max(panel.image.height for panel in row) + title_px for row in rows]
    sheet = Image.new("RGB", (width, sum(heights) + gap), (16, 18, 22))
    draw, top = ImageDraw.Draw(sheet), 0
    for row, height in zip(rows, heights, strict=True):
        left = gap
        for panel in row:
            draw.text((left, top + 6), panel.title, (245, 245, 245), ImageFont.load_default(18))
            draw.text((left, top + 28), panel.note, (170, 176, 186), ImageFont.load_default(14))
            sheet.paste(panel.image.convert("RGB"), (left, top + title_px))
            left += panel.image.width + gap
        top += height
    return sheet

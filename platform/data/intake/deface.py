"""Faces in volumes of heads: whether one may be recognised, and its removal by a shear plane.

The plane is that of Quickshear (Schimke and Hale, Quickshear defacing for neuroimages, USENIX HealthSec 2011): in the
sagittal projection it runs along the front lower edge of the brain's convex hull, some millimetres off. What lies in
front of it and below becomes zero. Other than Quickshear it takes the longest edge that faces the face, not the first
one, and works in millimetres of the world, so that neither voxel sizes nor axes matter.

The brain is that of the row's own label map where that labels one, else the MNI152 brain registered to the image.
"""

# Z Y X voxels of the native grid; points are RAS mm

from __future__ import annotations

import importlib.util
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from scipy import ndimage
from scipy.linalg import polar
from scipy.spatial import ConvexHull
from scipy.spatial.transform import Rotation

from omnimri.models.geometry import to_canonical
from omnimri.models.scan import Scan
from omnimri.platform.data.deid import METHOD
from omnimri.platform.data.formats.records import ReadError, SeriesRecord
from omnimri.platform.data.intake.registration import RegistrationError, averaged, head_points, register, template_brain

DEFACE_VERSION = "quickshear-1"
"""Raised when the same volume would lose other voxels; part of a defaced row's `preprocessing_version`."""
FACE_FLAG = "face may be recognisable"
DEFACED_FLAG = "defaced: quickshear"

_SHOWS_FACE = ("brain", "neck")
"""Body parts whose images may hold a face; one that is unknown may be a head as well."""
_CLEAN_FACES = "113102"  # CID 7050: clean recognisable visual features
_MARGIN_MM = 5.0
"""Between brain and plane. Quickshear's default are 10 voxels, to a mask that may miss brain."""
_SURVEY_MM = 4.0
"""Voxel size at which a head's outline is judged."""
_MIDLINE_MM = 20.0
_VAULT_MM = 120.0
"""Of the head, from the vertex down, that its length is measured on."""
_FOREHEAD, _NOSE = (0.15, 0.46), (0.72, 0.9)
"""Depths below the vertex over the head's length, 197 mm in MNI space; the tip of the nose lies at 0.75."""
_RECESS_MM = 30.0
"""Of the outline behind the forehead at the height of the nose: none in a face, 90 mm in a brain without a head."""
_WHOLE_BRAIN = ({"brain"}, {"grey matter", "white matter"})
"""Labels that make a label map one of a whole brain."""
_FACE_WORDS = frozenset(
    (
        "air", "background", "bone", "bones", "eye", "eyes", "eyeball", "eyeballs", "face", "fat", "jaw", "left",
        "lens", "mandible", "maxilla", "mouth", "muscle", "muscles", "nose", "orbit", "orbits", "right", "scalp",
        "skin", "skull", "soft", "teeth", "tissue", "tongue",
    )
)  # fmt: skip
"""A label whose name has only these words is part of a face; one of any other name may not be cut."""
_MIN_BRAIN_ML = 300.0
_NUM_SAMPLES = 20_000
_MIN_OVERLAP = 0.8
"""Share of a labelled brain that the template, moved and scaled onto it, must cover."""


@dataclass(frozen=True)
class Faceless:
    """What became of a volume that was to lose its face."""

    scan: Scan
    label_map: np.ndarray | None
    flags: list[str] | None
    """None: there was no face to remove, or it is not known."""
    version: str = ""
    """To be added to the preprocessing version."""


def deidentification(entries: Iterable[Mapping[str, Any]], *, faces_removed: bool) -> dict[str, Any]:
    """What a manifest says of how its rows were de-identified; the code for faces stands only where none is flagged."""
    if not faces_removed:
        return METHOD
    flags = Counter(flag for entry in entries for flag in entry["flags"])
    codes = METHOD["codes"] if flags[FACE_FLAG] else sorted([*METHOD["codes"], _CLEAN_FACES])
    faces = (
        f"{flags[DEFACED_FLAG]} volumes of heads were defaced ({DEFACE_VERSION}), {flags[FACE_FLAG]} were not and may "
        "show a face. Other body parts and simulated heads were left as they are."
    )
    return {**METHOD, "codes": codes, "faces": faces}


class DefaceError(ValueError):
    """A volume of a head whose face was not removed; the message says why."""


def check_installed() -> None:
    """Check for what `deface` needs beyond the usual dependencies.

    Raises:
        ValueError: If SimpleITK is not installed.
    """
    if importlib.util.find_spec("SimpleITK") is None:
        raise ValueError("deface=true needs SimpleITK, which is not installed: pip install 'omnimri[deface]'.")


def shows_face(image: np.ndarray, affine: np.ndarray) -> bool | None:
    """Whether the outline of a head reaches as far forward at the nose as at the forehead.

    It does in a face; a brain without its head, or a head without its face, recedes by centimetres.

    Args:
        image: Magnitudes `(Z, Y, X)`.
        affine: `(4, 4)`, index `(x, y, z, 1)` to RAS mm.

    Returns:
        None where the vertex, or the place of the nose, is outside the volume.
    """
    canonical = to_canonical(image, affine)
    survey, grid = averaged(canonical.array.transpose(2, 1, 0), canonical.affine, _SURVEY_MM)
    try:
        head = head_points(survey, grid)
    except RegistrationError:
        return None
    vertex = head[np.argmax(head[:, 2])]
    vault = head[head[:, 2] > vertex[2] - _VAULT_MM]
    length, middle = np.ptp(vault[:, 1]), np.percentile(vault[:, 0], (1, 99)).mean()
    midline = head[abs(head[:, 0] - middle) < _MIDLINE_MM]
    depth = (vertex[2] - midline[:, 2]) / length
    forehead, nose = (midline[(depth > low) & (depth < high), 1] for low, high in (_FOREHEAD, _NOSE))
    if forehead.size == 0:
        return None
    behind = forehead.max() - _RECESS_MM
    places = np.array([vertex, *((middle, behind, vertex[2] - share * length) for share in _NOSE)])
    index = (places - grid[:3, 3]) @ np.linalg.inv(grid[:3, :3]).T
    if (index < 1).any() or (index > np.array(survey.shape) - 2).any():
        return None
    return bool(nose.size and nose.max() > behind)


def face_flags(
    scan: Scan, facts: Mapping[str, object], measured: Mapping[str, float | None], *, simulated: bool
) -> list[str]:
    """The flag of a row from which a face could be made: raw data of a head, or a head that shows a face.

    Where the field of view does not tell, a head whose surroundings hold noise is taken to show one.
    """
    if simulated or facts["body_part"] not in _SHOWS_FACE:
        return []
    face = scan.kspace is not None or shows_face(scan.image, scan.affine)
    return [FACE_FLAG] if face or (face is None and measured["snr"] is not None) else []


def remove_face(
    record: SeriesRecord,
    facts: Mapping[str, object],
    label_map: np.ndarray | None,
    label_names: Mapping[int, str],
    boxes: Sequence[Mapping[str, Any]] | None,
    *,
    undefaced: Literal["reject", "flag"],
) -> Faceless:
    """A volume without the face that it shows; other body parts, and heads without a face, stay as they are.

    A volume of an unknown body part, or of a neck, is taken for a head.

    Args:
        record: The volume.
        facts: Of the row.
        label_map: Whole numbers `(Z, Y, X)`.
        label_names: What its values mean.
        boxes: Of findings, on the grid of the volume.
        undefaced: What becomes of a face that cannot be removed.

    Raises:
        ReadError: For such a face, if it is to be rejected.
    """
    scan = record.scan
    if facts["body_part"] not in (*_SHOWS_FACE, None):
        return Faceless(scan, label_map, None)
    try:
        defaced = deface(scan, label_map, label_names, boxes)
    except DefaceError as error:
        if undefaced == "flag":
            return Faceless(scan, label_map, [FACE_FLAG])
        hint = "Keep such volumes under a flag with undefaced=flag."
        if facts["body_part"] is None:
            hint += " If this is no head, name the body part (BodyPartExamined) in its header or sidecar."
        raise ReadError(record.source, f"Its face was not removed. {error}", hint) from None
    if defaced is None:
        return Faceless(scan, label_map, None)
    return Faceless(*defaced, [DEFACED_FLAG], f"+{DEFACE_VERSION}")


def deface(
    scan: Scan,
    label_map: np.ndarray | None = None,
    label_names: Mapping[int, str] | None = None,
    boxes: Sequence[Mapping[str, Any]] | None = None,
) -> tuple[Scan, np.ndarray | None] | None:
    """A head without its face, and its label map cut likewise; None where there is no face to remove.

    Args:
        scan: Of a head.
        label_map: Whole numbers `(Z, Y, X)`.
        label_names: What its values mean.
        boxes: Of findings, on the grid of the scan.

    Raises:
        DefaceError: If there is raw data, the brain is not found, the cut would remove a labelled structure or a
            finding that is not part of a face, or a face is left.
    """
    if scan.kspace is not None:
        raise DefaceError("k-space of a head: its face comes back with every reconstruction.")
    try:
        cut, upright = _face(scan, label_map, dict(label_names or {}))
    except DefaceError:
        if shows_face(scan.image, scan.affine) is False:
            return None
        raise
    if not scan.image[cut].any():
        return None
    _check_annotation(cut, label_map, dict(label_names or {}), boxes or ())
    image = np.where(cut, 0, scan.image).astype(scan.image.dtype, copy=False)
    if np.ptp(image) == 0 or shows_face(image, upright @ scan.affine):
        raise DefaceError("The outline still is that of a face after the cut.")
    cut_scan = Scan(image=image, affine=scan.affine, facts=scan.facts)
    return cut_scan, None if label_map is None else np.where(cut, 0, label_map).astype(label_map.dtype, copy=False)


def _face(scan: Scan, label_map: np.ndarray | None, label_names: dict[int, str]) -> tuple[np.ndarray, np.ndarray]:
    """True `(Z, Y, X)` in front of and below the shear plane, and the rotation `(4, 4)` of the world to the head.

    Raises:
        DefaceError: If no brain is found.
    """
    brain = None if label_map is None else labelled_brain(label_map, label_names, scan.affine)
    if brain is not None:
        points, upright = brain, np.eye(4)
    else:
        try:
            canonical = to_canonical(scan.image, scan.affine)
            to_image = register(canonical.array.transpose(2, 1, 0), canonical.affine)
        except RegistrationError as error:
            raise DefaceError(f"No brain was found: {error}.") from error
        points = template_brain().points_mm @ to_image[:3, :3].T + to_image[:3, 3]
        upright = np.eye(4)
        upright[:3, :3] = polar(to_image[:3, :3])[0].T
    normal = shear_normal(points, upright[0, :3])
    limit_mm = (points @ normal).max() + _MARGIN_MM
    # The distance along the normal is a sum of one term for each axis.
    x, y, z = (normal @ scan.affine[:3, axis] * np.arange(size) for axis, size in enumerate(scan.image.shape[::-1]))
    return z[:, None, None] + y[:, None] + x > limit_mm - normal @ scan.affine[:3, 3], upright


def shear_normal(points: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Unit vector to the front and below, square to the longest such edge of the brain's sagittal outline.

    Args:
        points: `(N, 3)` of the brain.
        right: Unit vector to the right of the head, near that of the world.

    Raises:
        DefaceError: If the outline has no edge that faces the face.
    """
    front = np.array([0.0, 1.0, 0.0]) - right[1] * right
    front /= np.linalg.norm(front)
    up = np.cross(right, front)
    outline = ConvexHull(points @ np.stack([front, up], axis=1))
    lengths = np.linalg.norm(np.diff(outline.points[outline.simplices], axis=1)[:, 0], axis=1)
    outward = outline.equations[:, :2]
    lengths[(outward[:, 0] < 0.1) | (outward[:, 1] > -0.3)] = 0
    if lengths.max() == 0:
        raise DefaceError("The outline of the brain has no edge towards the face.")
    forward, upward = outward[np.argmax(lengths)]
    return forward * front + upward * up


def labelled_brain(label_map: np.ndarray, label_names: Mapping[int, str], affine: np.ndarray) -> np.ndarray | None:
    """Surface `(N, 3)` of the brain that a label map holds; None unless it is whole and upright.

    Specks apart from the largest object are no brain. Upright means that the template, moved and scaled onto it, covers
    more of it than when it is turned by quarters and halves.

    Args:
        label_map: Whole numbers `(Z, Y, X)`.
        label_names: What its values mean.
        affine: `(4, 4)`, index `(x, y, z, 1)` to RAS mm.
    """
    if not any(needed <= set(label_names.values()) for needed in _WHOLE_BRAIN):
        return None
    values = [value for value, name in label_names.items() if not _of_face(name)]
    objects, num_objects = ndimage.label(np.isin(label_map, values))
    if num_objects == 0:
        return None
    brain = objects == 1 + np.argmax(np.bincount(objects.ravel())[1:])
    if np.count_nonzero(brain) * abs(np.linalg.det(affine[:3, :3])) < 1000 * _MIN_BRAIN_ML:
        return None
    inside, surface = (
        np.argwhere(voxels)[:, ::-1] @ affine[:3, :3].T + affine[:3, 3]
        for voxels in (brain, brain & ~ndimage.binary_erosion(brain))
    )
    return surface if _is_upright(inside[:: max(1, len(inside) // _NUM_SAMPLES)]) else None


def _is_upright(points: np.ndarray) -> bool:
    """Whether the template covers points of a brain `(N, 3)`, and less of them when it is turned."""
    template = template_brain()
    brain = np.zeros(template.image.shape, dtype=bool)
    to_index = np.linalg.inv(template.affine)
    brain[tuple(np.round(template.points_mm @ to_index[:3, :3].T + to_index[:3, 3]).astype(int).T)] = True
    brain = ndimage.binary_closing(brain, iterations=3)
    scale = template.points_mm.std(0).mean() / points.std(0).mean()
    centred = (points - points.mean(0)) * scale

    def overlap(rotation: np.ndarray) -> float:
        placed = centred @ rotation.T + template.points_mm.mean(0)
        index = (placed @ to_index[:3, :3].T + to_index[:3, 3]).T
        return float(ndimage.map_coordinates(brain.astype(np.float32), index, order=0).mean())

    upright = overlap(np.eye(3))
    return upright > _MIN_OVERLAP and upright >= max(map(overlap, Rotation.create_group("O").as_matrix().round()))


def _check_annotation(
    cut: np.ndarray, label_map: np.ndarray | None, label_names: dict[int, str], boxes: Sequence[Mapping[str, Any]]
) -> None:
    """Refuse a cut through what somebody marked.

    Raises:
        DefaceError: If a labelled voxel or the middle of a box would go.
    """
    values = [] if label_map is None else np.unique(label_map[cut]).tolist()
    names = {label_names.get(value, f"label {value}") for value in values if value}
    lost = sorted(name for name in names if not _of_face(name))
    for box in boxes:
        z1, y1, x1, z2, y2, x2 = box["box_voxel"]
        if cut[(z1 + z2 - 1) // 2, (y1 + y2 - 1) // 2, (x1 + x2 - 1) // 2]:
            lost.append("a box")
    if lost:
        raise DefaceError(f"The cut would remove what is marked: {', '.join(lost)}.")


def _of_face(name: str) -> bool:
    return _FACE_WORDS.issuperset(name.lower().replace("_", " ").split())

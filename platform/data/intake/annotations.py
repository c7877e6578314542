"""`annotations.json`: what a data set knows of its series beyond their headers.

The file lies in any folder at or above the series and names them relative to itself; the nearest one that lists a
series counts::

    {"patient": {"participant_id": "sub-0001", "sex": "F", "age_years": 54},
     "series": {"anat/sub-0001_T1w.nii.gz": {
         "label_map": "labels/sub-0001_T1w_dseg.nii.gz", "label_names": {"1": "grey matter"},
         "boxes": [{"label": "old infarct", "side": "left", "box_voxel": [z1, y1, x1, z2, y2, x2]}],
         "classes": ["old infarct"], "report": "...", "description": {}, "description_origin": {}}}}

A DICOM series is named by its folder. Every entry is optional; an empty list says "annotated, nothing there". Boxes are
half-open voxels of the grid that ingest stores (`Scan`: z along the slice normal).
"""

from __future__ import annotations

import json
import posixpath
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any

import nibabel as nib
import numpy as np
from pydantic import ValidationError

from omnimri.models.scan import Scan
from omnimri.platform.data.formats import matlab
from omnimri.platform.data.formats.facts import Facts, age_years, sex
from omnimri.platform.data.formats.nifti import NIFTI_ERRORS
from omnimri.platform.data.formats.records import ReadError, ReadLimits, quiet_libraries
from omnimri.platform.data.formats.sources import Archive, Folder
from omnimri.platform.data.formats.volumes import detached, kind_of, load, load_array
from omnimri.platform.language.description import Description

_GRID_TOLERANCE = 0.1
"""Voxels by which a label map's grid may be displaced; headers round."""

_MAX_JSON_BYTES = 64 * 2**20


@dataclass(frozen=True, kw_only=True)
class Annotation:
    """What one sidecar says about one series. None means not annotated."""

    participant_id: str = ""
    facts: Facts = field(default_factory=dict)
    label_map: str = ""
    """Relative to the container."""
    label_names: dict[int, str] = field(default_factory=dict)
    boxes: list[dict[str, Any]] | None = None
    classes: list[str] | None = None
    report: str | None = None
    description: dict[str, Any] | None = None
    description_origin: dict[str, str] | None = None

    # What only the layout of a catalogued data set says.
    layout_facts: Facts = field(default_factory=dict)
    """Facts that the layout states; they win over what a file name suggests."""
    structures: dict[str, str] = field(default_factory=dict)
    """Mask file to the one structure that it holds."""
    foreground: str = ""
    """What every value but zero of the label map means."""
    label_volumes: tuple[int, ...] | None = None
    """Volumes of the series that the label map speaks of; None for all."""
    box_grid: tuple[int, int] | None = None
    """Rows and columns, in the middle of the slice, that boxes count in; None for the whole slice."""
    boxes_flipped: bool = False
    """Boxes count rows from the last."""
    volumes: dict[int, dict[str, Any]] = field(default_factory=dict)
    """Volume of the series to the fields that are different for it."""

    def of_volume(self, volume: int) -> Annotation:
        """What is said of one volume of the series."""
        return replace(self, **self.volumes.get(volume, {}), volumes={})


@dataclass(frozen=True)
class Sidecars:
    """All annotation files of one container."""

    patients: dict[str, dict[str, Any]]
    """Folder of the sidecar to its patient block."""
    series: dict[str, tuple[str, dict[str, Any]]]
    """Series path relative to the container, to the sidecar's folder and its entry; deeper sidecars win."""

    def find(self, names: tuple[str, ...]) -> Annotation | None:
        """The annotation of a series by its files: the file itself or a folder that holds all of them.

        Raises:
            ValueError: If the entry is not made as the format says.
        """
        for candidate in _candidates(names):
            if candidate in self.series:
                folder, entry = self.series[candidate]
                return _annotation(folder, entry, self.patients[folder])
        return None

    def label_maps(self) -> frozenset[str]:
        """Every file that some entry names as its label map."""
        maps = (
            _below(folder, entry["label_map"])
            for folder, entry in self.series.values()
            if isinstance(entry.get("label_map"), str)
        )
        return frozenset(name for name in maps if name)


def parse_sidecars(contents: Mapping[str, bytes], prefix: str) -> tuple[Sidecars, list[ReadError]]:
    """Parse annotation files, name to content; what cannot be parsed is returned as errors."""
    patients: dict[str, dict[str, Any]] = {}
    series: dict[str, tuple[str, dict[str, Any]]] = {}
    errors = []
    # The deepest sidecar comes last and wins.
    for name in sorted(contents, key=lambda n: (n.count("/"), n)):
        folder = PurePosixPath(name).parent.as_posix()
        try:
            listed, patient = _parse(contents[name])
        except ValueError as error:
            errors.append(ReadError(prefix + name, f"Not a valid annotation file: {error}.", "Correct it."))
            continue
        patients[folder] = patient
        for path, entry in listed.items():
            inside = _below(folder, path)
            if inside and isinstance(entry, dict):
                series[inside] = (folder, entry)
            else:
                errors.append(
                    ReadError(prefix + name, "An entry names a file above it or is no object.", "Correct it.")
                )
    return Sidecars(patients, series), errors


def _parse(content: bytes) -> tuple[dict[str, Any], dict[str, Any]]:
    """The series and patient blocks.

    Raises:
        ValueError: If the JSON or its shape is wrong; the text quotes nothing of the content.
    """
    if len(content) > _MAX_JSON_BYTES:
        raise ValueError(f"larger than {_MAX_JSON_BYTES // 2**20} MiB")
    try:
        document = json.loads(content)
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError):
        raise ValueError("not JSON") from None
    series = document.get("series") if isinstance(document, dict) else None
    patient = document.get("patient", {}) if isinstance(document, dict) else None
    if not isinstance(series, dict) or not isinstance(patient, dict):
        raise ValueError("expected an object with `series` and `patient` objects")
    return series, patient


def _below(folder: str, path: str) -> str | None:
    """A path relative to a folder, as seen from the container; None if it leaves the folder."""
    joined = posixpath.normpath(posixpath.join(folder, path))
    is_inside = not path.startswith("/") and (folder == "." or joined == folder or joined.startswith(f"{folder}/"))
    return joined if is_inside and not joined.startswith("..") else None


def _candidates(names: tuple[str, ...]) -> list[str]:
    """Names under which a series may be listed: its file if it is one, then the folders that hold all its files."""
    common = posixpath.commonpath([posixpath.dirname(name) for name in names]) if names else ""
    folders = [common, *(p.as_posix() for p in PurePosixPath(common).parents)] if common else []
    return [*(names if len(names) == 1 else ()), *(folder for folder in folders if folder != ".")]


def _annotation(folder: str, entry: dict[str, Any], patient: dict[str, Any]) -> Annotation:
    label_map = _below(folder, entry["label_map"]) if isinstance(entry.get("label_map"), str) else ""
    boxes = entry.get("boxes")
    if boxes is not None:
        boxes = [_box(box) for box in _expect(boxes, list, "boxes")]
    classes = entry.get("classes")
    if classes is not None:
        classes = [_expect(name, str, "classes") for name in _expect(classes, list, "classes")]
    optional: dict[str, Any] = {key: entry.get(key) for key in ("report", "description", "description_origin")}
    for key, kind in (("report", str), ("description", dict), ("description_origin", dict)):
        if optional[key] is not None:
            _expect(optional[key], kind, key)
    optional["description"] = _description(optional["description"])
    names = _expect(entry.get("label_names", {}), dict, "label_names")
    return Annotation(
        participant_id=str(patient.get("participant_id") or ""),
        facts={"sex": sex(patient.get("sex")), "age_years": age_years(patient.get("age_years"))},
        label_map=label_map or "",
        label_names={int(value): str(name) for value, name in names.items()},
        boxes=boxes,
        classes=classes,
        **optional,
    )


def _description(given: dict[str, Any] | None) -> dict[str, Any] | None:
    """A description with all keys of the template; one that says nothing counts as none."""
    try:
        description = Description.model_validate(given or {})
    except ValidationError as error:
        # The library quotes the values, which may be anyone's words.
        levels = {str(entry["loc"][0]) for entry in error.errors(include_input=False)} & set(Description.model_fields)
        where = f" in {', '.join(sorted(levels))}" if levels else ""
        raise ValueError(f"`description` has unknown keys or values that are no strings{where}") from None
    return description.model_dump() if any(description.filled()) else None


def _expect(value: Any, kind: type, key: str) -> Any:
    if not isinstance(value, kind):
        raise ValueError(f"`{key}` holds {type(value).__name__}, expected {kind.__name__}")
    return value


def _box(box: Any) -> dict[str, Any]:
    corners = _expect(_expect(box, dict, "boxes").get("box_voxel"), list, "box_voxel")
    if len(corners) != 6 or not all(isinstance(value, int) for value in corners):
        raise ValueError("`box_voxel` holds other than six whole numbers z1 y1 x1 z2 y2 x2")
    side = box.get("side")
    return {"label": str(box.get("label", "")), "side": str(side) if side else None, "box_voxel": corners}


def merge_facts(facts: Facts, annotation: Annotation) -> Facts:
    """Facts with gaps filled from the annotation; what the header says stays, unless a layout states otherwise."""
    return {**facts, **{k: v for k, v in annotation.facts.items() if facts.get(k) is None}, **annotation.layout_facts}


def placed_boxes(annotation: Annotation, shape: tuple[int, ...]) -> list[dict[str, Any]] | None:
    """Boxes on the grid of a volume `(Z, Y, X)`, from the part of the slice that they count in."""
    if annotation.boxes is None or (annotation.box_grid is None and not annotation.boxes_flipped):
        return annotation.boxes
    _, num_y, num_x = shape
    rows, columns = annotation.box_grid or (num_y, num_x)
    top, left = num_y // 2 - rows // 2, num_x // 2 - columns // 2
    placed = []
    for box in annotation.boxes:
        z1, y1, x1, z2, y2, x2 = box["box_voxel"]
        if annotation.boxes_flipped:
            y1, y2 = rows - y2, rows - y1
        placed.append({**box, "box_voxel": [z1, y1 + top, x1 + left, z2, y2 + top, x2 + left]})
    return placed


def check_boxes(boxes: list[dict[str, Any]], shape: tuple[int, ...]) -> None:
    """Check that boxes lie in a volume `(Z, Y, X)`.

    Raises:
        ValueError: If one is empty or reaches outside.
    """
    for box in boxes:
        low, high = box["box_voxel"][:3], box["box_voxel"][3:]
        if not all(0 <= a < b <= size for a, b, size in zip(low, high, shape, strict=True)):
            raise ValueError(f"Box {box['box_voxel']} is empty or outside the volume {shape}.")


def read_labels(
    annotation: Annotation, container: Folder | Archive, scan: Scan, source: str, volume: int = 0
) -> tuple[np.ndarray | None, dict[int, str]]:
    """The label map of one volume, uint8 `(Z, Y, X)`, and the names of its values.

    Raises:
        ReadError: If it is not there, cannot be read, or lies on another grid.
    """
    if annotation.label_volumes is not None and volume not in annotation.label_volumes:
        return None, {}
    if annotation.structures:
        return _merged_structures(annotation.structures, container, scan, source)
    if not annotation.label_map:
        return None, {}
    labels = _label_array(container, annotation.label_map, scan, source, volume, is_mask=bool(annotation.foreground))
    return labels, {1: annotation.foreground} if annotation.foreground else annotation.label_names


def _merged_structures(
    structures: dict[str, str], container: Folder | Archive, scan: Scan, source: str
) -> tuple[np.ndarray, dict[int, str]]:
    """One label map of one mask for each structure, numbered in their order; where masks overlap, the last counts."""
    labels = np.zeros(scan.image.shape, dtype=np.uint8)
    for value, name in enumerate(structures, start=1):
        labels[_label_array(container, name, scan, source, 0, is_mask=True) > 0] = value
    return labels, dict(enumerate(structures.values(), start=1))


def _label_array(
    container: Folder | Archive, label_map: str, scan: Scan, source: str, volume: int, *, is_mask: bool
) -> np.ndarray:
    name, _, member = label_map.partition("#")
    if not container.holds(name):
        raise ReadError(source, "The label map that annotations.json or the layout names is not there.", "Add it.")
    with container.local([name, *detached(container, name)]) as paths:
        return load_label_map(paths[name], scan, source, volume=volume, member=member, is_mask=is_mask)


def load_label_map(
    path: Path, scan: Scan, source: str, *, volume: int = 0, member: str = "", is_mask: bool = False
) -> np.ndarray:
    """A label map on the grid of its scan, uint8 `(Z, Y, X)`; stored with other axes or flips, it is turned.

    Args:
        path: NIfTI, NRRD, MetaImage, NumPy or MATLAB.
        scan: The volume that it labels.
        source: Name of the volume in errors.
        volume: Which label map of a file with several.
        member: Array of a `.npz` or MATLAB file.
        is_mask: Every value but zero counts as one.

    Raises:
        ReadError: If it cannot be read, lies on another grid, or holds other than whole numbers up to 255.
    """
    labels, affine = _label_voxels(path, scan, source, volume, member)
    if not np.isfinite(affine).all() or abs(np.linalg.det(affine[:3, :3])) < 1e-9:
        raise ReadError(source, "The affine of the label map is singular.", "Repair it; the volume was kept.")
    transform = nib.orientations.io_orientation(np.linalg.inv(scan.affine) @ affine)
    if np.isnan(transform).any():
        raise ReadError(source, "The axes of the label map are all but parallel.", "Repair it; the volume was kept.")
    turned = nib.orientations.apply_orientation(labels, transform)
    turned_affine = affine @ nib.orientations.inv_ornt_aff(transform, labels.shape)
    _check_grid(turned.shape, turned_affine, scan, source)
    values = turned.transpose(2, 1, 0)
    if is_mask:
        return np.ascontiguousarray((values != 0).astype(np.uint8))
    if values.min() < 0 or values.max() > 255 or (values != np.round(values)).any():
        raise ReadError(source, "The label map holds other than whole numbers from 0 to 255.", "The volume was kept.")
    return np.ascontiguousarray(values.astype(np.uint8))


def _label_voxels(path: Path, scan: Scan, source: str, volume: int, member: str) -> tuple[np.ndarray, np.ndarray]:
    """Labels `(X, Y, Z)` as stored, and their affine; the shape is checked before memory is taken where it can be."""
    kind = "matlab" if path.suffix.lower() == ".mat" else kind_of(path.name)
    if kind in ("numpy", "matlab"):
        array = (matlab.load_array if kind == "matlab" else load_array)(path, member, source, ReadLimits())
        # Samples of one slice have no slice axis; a single array has no sample axis.
        is_list = array.ndim == 4 or (array.ndim == 3 and scan.image.shape[0] == 1)
        if is_list and volume >= len(array):
            raise _too_few(len(array), volume, source)
        chosen = array[volume] if is_list else array
        if chosen.size != scan.image.size:
            raise _wrong_shape(chosen.shape, scan, source)
        return chosen.reshape(scan.image.shape).transpose(2, 1, 0), scan.affine
    if kind:
        labels, affine = load(path, path.name, ReadLimits())
        if sorted(labels.shape[:3]) != sorted(scan.image.shape):
            raise _wrong_shape(labels.shape[2::-1], scan, source)
        if 1 < labels.shape[3] <= volume:
            raise _too_few(labels.shape[3], volume, source)
        return labels[..., volume if labels.shape[3] > 1 else 0], affine
    try:
        with quiet_libraries():
            image = nib.Nifti1Image.from_filename(path)
            # The header is checked first: it may declare an array of any size.
            if sorted(image.shape[:3]) != sorted(scan.image.shape) or len(image.shape) > 4:
                raise _wrong_shape(image.shape[::-1], scan, source)
            voxels = image.dataobj if len(image.shape) == 3 else image.dataobj[..., min(volume, image.shape[3] - 1)]
            return np.asanyarray(voxels), np.asarray(image.affine, dtype=np.float64)
    except ReadError:
        raise
    except NIFTI_ERRORS as error:
        reason = f"The label map cannot be read ({type(error).__name__})."
        raise ReadError(source, reason, "Repair it; the volume was kept.") from error


def _too_few(num_volumes: int, volume: int, source: str) -> ReadError:
    reason = f"The label map has {num_volumes} volumes, expected one for volume {volume + 1} of its series."
    return ReadError(source, reason, "Add what is missing; the volume was kept.")


def _wrong_shape(shape: tuple[int, ...], scan: Scan, source: str) -> ReadError:
    reason = f"The label map has shape {shape}, its series {scan.image.shape}."
    return ReadError(source, reason, "Resample it to the grid of its series; the volume was kept.")


def _check_grid(shape_xyz: tuple[int, ...], affine: np.ndarray, scan: Scan, source: str) -> None:
    if shape_xyz != scan.image.shape[::-1]:
        raise _wrong_shape(shape_xyz[::-1], scan, source)
    corners = np.array([[x, y, z, 1] for x in (0, shape_xyz[0]) for y in (0, shape_xyz[1]) for z in (0, shape_xyz[2])])
    displacement_mm = np.linalg.norm((corners @ (affine - scan.affine).T)[:, :3], axis=1).max()
    if displacement_mm > _GRID_TOLERANCE * min(scan.spacing_mm):
        raise ReadError(
            source, f"The grid of the label map lies up to {displacement_mm:.1f} mm from that of its series.",
            "Give it the affine of its series; the volume was kept.",
        )  # fmt: skip

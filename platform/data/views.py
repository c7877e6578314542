"""The three views of a row (paper, section 2.2): image-only, paired vision-text, instruction-response.

A source is a name, a kind, the columns it reads, the rows it accepts, and a pure function from a row and a generator
to a sample. `models.collate` joins samples to batches.
"""

# Z Y X voxels of the native grid, C coils, S slices per sample, D H W the encoder's grid

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from omnimri.models import special_tokens as special
from omnimri.models.instructions import OUTLINED
from omnimri.models.physics import SenseOperator, root_sum_of_squares
from omnimri.models.scan import Scan
from omnimri.models.vocabulary import CONTRASTS, LESION, PLANES
from omnimri.platform.data.draws import (
    ViewOptions,
    draw_indices,
    drawn_patches,
    drawn_slices,
    drawn_structures,
    foreign_structures,
    to_slice_grid,
)
from omnimri.platform.data.labels import dense_labels, known_labels, structure_mask
from omnimri.platform.data.patches import cut_patches, draw_corners
from omnimri.platform.data.shards import RowRef, row_to_scan
from omnimri.platform.data.undersampling import reconstruction_arrays, undersample
from omnimri.platform.language.evidence import Evidence
from omnimri.platform.language.instruct import (
    draw_text_pair,
    drawn_context,
    reconstruct_pair,
    segment_pair,
)
from omnimri.platform.language.outline import imagined_outline

Row = Mapping[str, Any]
Sample = dict[str, Any]
LoadRow = Callable[[], Row]
"""Reads one row of a study when it is drawn."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """One kind of sample."""

    kind: str
    """`image`, `paired` or `instruction`: the columns of the paper's Table 2."""
    columns: tuple[str, ...]
    """Columns that `make` reads."""
    accepts: Callable[[RowRef], bool]
    make: Callable[[Any, np.random.Generator, ViewOptions], Sample]
    """Of a row; with `by_study` of a `LoadRow` for each row of a study that is accepted."""
    by_study: bool = False
    """A sample shows several rows of one study."""


def image_sample(row: Row, _: np.random.Generator, options: ViewOptions) -> Sample:
    """The whole volume and its acquisition attributes; nothing of it is drawn."""
    volume = options.preprocess.volume(row_to_scan(row))
    return {"volume": volume.volume.numpy(), "attributes": _attributes(row)}


def slice_sample(row: Row, rng: np.random.Generator, options: ViewOptions) -> Sample:
    """Single slices as volumes of depth one, `volumes` `(S, 1, 1, H, W)`."""
    slices = options.preprocess.slices(row_to_scan(row)).slices
    chosen = draw_indices(np.ptp(slices.numpy(), axis=(1, 2)) > 0.5, options.slices_per_sample, rng)
    attributes = np.repeat(_attributes(row)[None], len(chosen), axis=0)
    return {"volumes": to_slice_grid(slices[chosen], options).numpy()[:, None, None], "attributes": attributes}


def labelled_sample(row: Row, rng: np.random.Generator, options: ViewOptions) -> Sample:
    """Patches of one volume, `volumes` `(P, 1, d, h, w)`, and their `labels` `(P, L, d, h, w)`, if `known` `(P, L)`.

    Half of them lie about a lesion where the volume has one; each may be mirrored.
    """
    scan = row_to_scan(row)
    volume = options.preprocess.volume(scan).volume[0]
    labels = dense_labels(row, lambda mask: options.preprocess.volume_labels(mask, scan))
    foreground = labels[LESION] if labels[LESION].any() else volume > volume.min()
    shape = _patch_shape(volume.shape)
    corners = draw_corners(foreground.numpy(), shape, options.patches_per_sample, rng)
    patches = [cut_patches(array.float(), corners, shape, 0.0) for array in (volume, *labels.values())]
    return _labelled(row, torch.stack(patches, dim=1), rng)


def labelled_slices_sample(row: Row, rng: np.random.Generator, options: ViewOptions) -> Sample:
    """Slices of one volume as volumes of depth one, with the fields of `labelled_sample`.

    Half of them show a lesion where the volume has one; each may be mirrored.
    """
    scan = row_to_scan(row)
    source = options.preprocess.slices(scan)
    labels = dense_labels(row, lambda mask: torch.as_tensor(options.preprocess.slice_labels(mask, scan, source.axis)))
    cut = drawn_slices(labels[LESION], source.slices > source.slices.min(), rng, options)
    slices = [cut(array).float() for array in (source.slices, *labels.values())]
    return _labelled(row, torch.stack(slices, dim=1)[:, :, None], rng)


def _labelled(row: Row, cut: torch.Tensor, rng: np.random.Generator) -> Sample:
    """Fields of a labelled sample from image and labels `(P, 1 + L, d, h, w)`, half of them mirrored."""
    mirrored = rng.random(len(cut)) < 0.5
    cut[mirrored] = cut[mirrored].flip(-1)
    return {
        "volumes": cut[:, :1].numpy(),
        "labels": cut[:, 1:].numpy() > 0,
        "known": np.repeat(known_labels(row)[None], len(cut), axis=0),
    }


def _patch_shape(shape: Sequence[int]) -> tuple[int, int, int]:
    """A third of the depth and half of the plane, in whole eights."""
    z, y, x = (min(size, -(-size // (8 * parts)) * 8) for size, parts in zip(shape, (3, 2, 2), strict=True))
    return z, y, x


def paired_sample(row: Row, rng: np.random.Generator, options: ViewOptions) -> Sample:
    """Volume with its description or its report, in either order."""
    return _volume_fields(row, options) | {
        "text": _drawn_text(row, rng),
        "image_first": bool(rng.random() < 0.5),
        "text_group": _text_group(row),
    }


def interleaved_sample(study: Sequence[LoadRow], rng: np.random.Generator, options: ViewOptions) -> Sample:
    """Several contrasts of a study, each with its own text, all volumes before their texts or all after them.

    Volumes are `(M, 1, D, H, W)`, in an order that is drawn.
    """
    rows = _drawn_rows(study, options.volumes_per_sequence, rng)
    return _stacked([_volume_fields(row, options) for row in rows]) | {
        "texts": [_drawn_text(row, rng) for row in rows],
        "image_first": bool(rng.random() < 0.5),
        "text_group": _text_group(rows[0]),
    }


def paired_slices_sample(row: Row, rng: np.random.Generator, options: ViewOptions) -> Sample:
    """Several slices of a volume in their order, `(S, 1, 1, H, W)`, with the volume's description or report."""
    source = options.preprocess.slices(row_to_scan(row))
    chosen = draw_indices(np.ptp(source.slices.numpy(), axis=(1, 2)) > 0.5, options.slices_per_sample, rng)
    in_plane_mm = options.preprocess.inputs.slice_spacing_mm
    spacing_mm = np.array([source.canonical.spacing_mm[source.axis], in_plane_mm, in_plane_mm], np.float32)
    return {
        "volume": to_slice_grid(source.slices[chosen], options).numpy()[:, None, None],
        "spacing_mm": np.repeat(spacing_mm[None], len(chosen), axis=0),
        "contrast": np.full(len(chosen), contrast_index(row["contrast"]), np.int64),
        "image_kind": special.SLICE,
        "texts": [_drawn_text(row, rng)],
        "image_first": bool(rng.random() < 0.5),
        "text_group": _text_group(row),
    }


def _drawn_text(row: Row, rng: np.random.Generator) -> str:
    """Description or report."""
    texts = [text for text in (description_text(row["description"]), row["report"]) if text]
    return texts[int(rng.integers(len(texts)))]


def _text_group(row: Row) -> int:
    """The same number for all texts of a study."""
    return int(hashlib.sha256(f"{row['study_id']}".encode()).hexdigest()[:12], 16)


def _drawn_rows(study: Sequence[LoadRow], most: int, rng: np.random.Generator) -> list[Row]:
    """Two to `most` rows of a study in random order; the others are not read."""
    count = int(rng.integers(2, min(len(study), most) + 1))
    return [study[i]() for i in rng.permutation(len(study))[:count]]


def _stacked(volumes: Sequence[Sample]) -> Sample:
    """The fields of several volumes, joined along a new first axis."""
    return {name: np.stack([fields[name] for fields in volumes]) for name in volumes[0]}


def text_sample(row: Row, rng: np.random.Generator, options: ViewOptions) -> Sample:
    """Detection, diagnosis, report, description or a question, by what the row is labelled with."""
    pair, evidence = draw_text_pair(
        row, options.preprocess, rng, tasks=options.text_tasks, question_share=options.question_share
    )
    facts = drawn_context(evidence, rng, is_text=True, hides=pair.hides)
    is_told = rng.random() < options.outlined_share
    if is_told and (outline := imagined_outline(row, options.preprocess, rng)):
        facts[OUTLINED] = outline
    return _volume_fields(row, options) | {
        "task": pair.task,
        "instruction": pair.instruction,
        "facts": facts,
        "answer": pair.answer,
    }


def study_sample(study: Sequence[LoadRow], rng: np.random.Generator, options: ViewOptions) -> Sample:
    """A text task about one volume of a study, which the request shows first, with other contrasts behind it."""
    asked, *others = _drawn_rows(study, options.volumes_per_sequence, rng)
    sample = text_sample(asked, rng, options)
    shown = [{name: sample[name] for name in _VOLUME_FIELDS}, *(_volume_fields(row, options) for row in others)]
    facts = [sample["facts"], *(_contrast_alone(row, rng) for row in others)]
    return sample | _stacked(shown) | {"facts": facts}


def _contrast_alone(row: Row, rng: np.random.Generator) -> dict[str, str | int]:
    """Context of a volume that is not asked about: more could give an answer away."""
    return drawn_context(Evidence.of_row(row), rng, is_text=False, hides=("plane",))


def reconstruction_sample(row: Row, rng: np.random.Generator, options: ViewOptions) -> Sample:
    """Undersampled slices of one volume and their truth, each scaled so that its zero-filled maximum is one."""
    acceleration = int(rng.choice(options.accelerations))
    scan = undersample(
        row_to_scan(row),
        acceleration=acceleration,
        kind=str(rng.choice(["equispaced", "random"], p=[1 - options.random_mask_share, options.random_mask_share])),
        seed=int(rng.integers(2**31)),
    )
    full = torch.tensor(row["kspace"])
    signal = root_sum_of_squares(full).amax(dim=(-2, -1)).numpy()
    chosen = draw_indices(np.asarray(signal > 0.1 * signal.max()), options.slices_per_sample, rng)
    arrays = reconstruction_arrays(scan, chosen, options.preprocess.inputs.sens_maps)
    maps = torch.from_numpy(arrays["sens_maps"])
    target = SenseOperator(maps, torch.tensor(True)).adjoint(full[chosen])
    arrays["target"] = (target / torch.from_numpy(arrays.pop("scale"))[:, None, None]).numpy()
    return _volume_fields(row, options, scan) | arrays | {
        "task": "reconstruct",
        "instruction": reconstruct_pair(rng).instruction,
        "facts": drawn_context(Evidence.of_row(row), rng, is_text=False, acceleration=acceleration),
    }  # fmt: skip


def segmentation_sample(row: Row, rng: np.random.Generator, options: ViewOptions) -> Sample:
    """Slices of one volume and the masks of several structures, `slice_target` `(S, N, H, W)`.

    Half of the slices show a lesion where the volume has one. With `patch_shape` they are patches: `slices` is
    `(S, D, H, W)`, `slice_target` `(S, N, D, H, W)`.
    """
    scan = row_to_scan(row)
    names: dict[int, str] = row["label_names"]
    structures = drawn_structures(names, options.structures_per_sample, rng)
    foreign = foreign_structures(row["body_part"])
    if foreign and options.foreign_share:
        structures = [str(rng.choice(foreign)) if rng.random() < options.foreign_share else s for s in structures]
    source = options.preprocess.slices(scan)

    def on_slices(mask: np.ndarray) -> torch.Tensor:
        return torch.as_tensor(options.preprocess.slice_labels(mask, scan, source.axis))

    masks = {name: on_slices(structure_mask(row["label_map"], names, name)) for name in {*structures, LESION}}
    anatomy = on_slices(row["label_map"] > 0)
    cut = drawn_slices(masks[LESION], anatomy, rng, options) if options.patch_shape is None else drawn_patches(
        masks[LESION] if masks[LESION].any() else anatomy, rng, options
    )  # fmt: skip
    return _volume_fields(row, options) | {
        "task": "segment",
        "instruction": [segment_pair(name, rng).instruction for name in structures],
        "facts": drawn_context(Evidence.of_row(row), rng, is_text=False),
        "slices": cut(source.slices).numpy(),
        "slice_target": torch.stack([cut(masks[name]) for name in structures], dim=1).numpy(),
    }


def description_text(description: str | None) -> str:
    """The five-level description as one line: what is known, level by level."""
    if not description:
        return ""
    levels = json.loads(description)
    known = [str(value) for level in levels.values() for value in level.values() if value]
    return "; ".join(known)


_VOLUME_FIELDS = ("volume", "spacing_mm", "contrast")


def _volume_fields(row: Row, options: ViewOptions, scan: Scan | None = None) -> Sample:
    volume = options.preprocess.volume(scan or row_to_scan(row))
    return {
        "volume": volume.volume.numpy(),
        "spacing_mm": volume.spacing_mm.numpy(),
        "contrast": np.int64(contrast_index(row["contrast"])),
    }


def contrast_index(contrast: str | None) -> int:
    """Index of a contrast in the alignment layer's table; the last one is unknown."""
    return CONTRASTS.index(contrast) if contrast in CONTRASTS else len(CONTRASTS)


def _attributes(row: Row) -> np.ndarray:
    """Contrast, plane and anatomy as integers, -1 where unknown."""
    body = row["body_part"]
    anatomy = int(hashlib.sha256(body.encode()).hexdigest()[:8], 16) if body else -1
    return np.array([_index(CONTRASTS, row["contrast"]), _index(PLANES, row["plane"]), anatomy], dtype=np.int64)


def _index(names: tuple[str, ...], value: str | None) -> int:
    return names.index(value) if value in names else -1


def _any_row(_: RowRef) -> bool:
    return True


def _is_told_of(ref: RowRef) -> bool:
    """Whether a report or a model tells of the volume; a header alone is told of many volumes in the same words."""
    return ref.has_report or ref.generated is not None


_FACTS = (
    "image", "affine", "contrast", "quantitative", "quantity", "quantity_unit", "plane", "body_part",
    "field_strength_t", "vendor", "study_id", "contrast_agent", "acquisition_type", "sex", "age_years",
)  # fmt: skip

SOURCES: dict[str, Source] = {
    "image": Source(kind="image", columns=_FACTS, accepts=_any_row, make=image_sample),
    "image.slices": Source(kind="image", columns=_FACTS, accepts=_any_row, make=slice_sample),
    "image.labelled": Source(
        kind="image",
        columns=(*_FACTS, "label_map", "label_names"),
        accepts=lambda ref: ref.has_labels,
        make=labelled_sample,
    ),
    "image.labelled_slices": Source(
        kind="image",
        columns=(*_FACTS, "label_map", "label_names"),
        accepts=lambda ref: ref.has_labels,
        make=labelled_slices_sample,
    ),
    "paired": Source(
        kind="paired",
        columns=(*_FACTS, "description", "report"),
        accepts=_is_told_of,
        make=paired_sample,
    ),
    "paired.interleaved": Source(
        kind="paired",
        columns=(*_FACTS, "description", "report"),
        accepts=_is_told_of,
        make=interleaved_sample,
        by_study=True,
    ),
    "paired.slices": Source(
        kind="paired",
        columns=(*_FACTS, "description", "report"),
        accepts=_is_told_of,
        make=paired_slices_sample,
    ),
    "instruct.reconstruct": Source(
        kind="instruction",
        columns=(*_FACTS, "kspace", "mask"),
        accepts=lambda ref: ref.fully_sampled,
        make=reconstruction_sample,
    ),
    "instruct.segment": Source(
        kind="instruction",
        columns=(*_FACTS, "label_map", "label_names"),
        accepts=lambda ref: ref.has_labels,
        make=segmentation_sample,
    ),
    "instruct.text": Source(
        kind="instruction",
        columns=(*_FACTS, "boxes", "classes", "report", "description", "label_map", "label_names"),
        accepts=lambda ref: ref.has_report or ref.has_boxes or ref.has_classes or ref.has_labels,
        make=text_sample,
    ),
    "instruct.study": Source(
        kind="instruction",
        columns=(*_FACTS, "boxes", "classes", "report", "description", "label_map", "label_names"),
        accepts=lambda ref: ref.has_report or ref.has_boxes or ref.has_classes or ref.has_labels,
        make=study_sample,
        by_study=True,
    ),
}

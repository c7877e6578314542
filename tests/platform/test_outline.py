"""What the text decoder is told of the drawn lesions, held against volumes whose lesions are known."""

import json
import re
from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from omnimri.models.boxes import BoxCoder
from omnimri.models.config import InputConfig
from omnimri.models.instructions import OUTLINED, context_sentence
from omnimri.models.metrics import box_iou
from omnimri.models.preprocess import Preprocess
from omnimri.models.scan import Scan
from omnimri.models.vocabulary import LESION, TISSUES
from omnimri.platform.data.draws import ViewOptions
from omnimri.platform.data.schema import FACTS
from omnimri.platform.data.views import text_sample
from omnimri.platform.language.outline import drawn_outline, imagined_outline, outlined
from tests.platform.language_cases import Stored, lesions_of, mirrored, random_case, true_sides

PREPROCESS = Preprocess(InputConfig(volume_shape=(40, 48, 40), volume_spacing_mm=(4.0, 4.0, 4.0), slice_spacing_mm=4.0))
NAMES = {1: "white matter", 2: "grey matter", 3: "haemorrhage"}
SEEDS = range(12)


def one_finding(seed: int) -> Stored:
    """A random case whose lesions are all of one kind."""
    case = random_case(seed)
    return replace(case, labels=np.where(case.labels > 2, 3, case.labels).astype(np.uint8))


def scan_of(case: Stored) -> Scan:
    return Scan(image=case.image, affine=case.affine, facts={"contrast": "T2w", "plane": "axial"})


def told_of(case: Stored) -> str:
    """Of a decoder that draws what the labels hold."""
    structures = {TISSUES[2]: 1, TISSUES[1]: 2, LESION: 3, TISSUES[0]: 99}
    drawn = {name: (case.labels == value).astype(np.float32) for name, value in structures.items()}
    return drawn_outline(scan_of(case), drawn, PREPROCESS)


def row_of(case: Stored, **more: Any) -> dict[str, Any]:
    row = dict.fromkeys(FACTS) | {"image": case.image, "affine": case.affine, "study_id": "s", "description": None}
    return row | {"label_map": case.labels, "label_names": NAMES, "boxes": None, "classes": None, "report": None} | more


def places(sentence: str) -> list[tuple[str, list[int]]]:
    return [(side, json.loads(box)) for side, box in re.findall(r"(left|right|midline) (\[[\d, ]+\])", sentence)]


@pytest.mark.parametrize("seed", SEEDS)
def test_what_is_drawn_is_told_with_number_side_and_place(seed: int) -> None:
    case = one_finding(seed)
    lesions, sentence = lesions_of(case, 3), told_of(case)
    if not lesions:
        assert sentence == "no lesion."
        return
    assert sentence.startswith(f"{len(lesions)} lesion")
    found = places(sentence)
    assert sorted(side for side, _ in found) == sorted(true_sides(case, 3))
    coder = BoxCoder(scan_of(case), PREPROCESS)
    told = np.array([coder.decode(box) for _, box in found], dtype=float)
    to_voxel = np.linalg.inv(case.affine)
    true = []
    for points in lesions:
        index = np.round((np.c_[points, np.ones(len(points))] @ to_voxel.T)[:, 2::-1])
        true.append([*index.min(0), *(index.max(0) + 1)])
    assert box_iou(np.array(true), told).max(axis=1).min() > 0.3


def test_the_mirror_image_is_told_of_with_the_other_side() -> None:
    case = next(case for case in map(one_finding, SEEDS) if "left" in told_of(case))
    sides = [Counter(side for side, _ in places(told_of(c))) for c in (case, mirrored(case))]
    assert sides[0]["left"] == sides[1]["right"]
    assert sides[0]["right"] == sides[1]["left"]


def test_imagined_drawings_miss_and_invent_as_decoders_do() -> None:
    """Of a lesion of 30 mm one in ten is missed, of one of 5 mm nearly half; one healthy head in five gets a lesion."""
    told: dict[float, list[str]] = {}
    for radius_mm in (0.0, 2.5, 15.0):
        case = one_finding(0)
        labels = np.where(case.labels > 2, 1, case.labels).astype(np.uint8)
        centre = np.argwhere(labels == 1)[np.count_nonzero(labels == 1) // 2]
        grid = np.stack(np.meshgrid(*map(np.arange, labels.shape), indexing="ij"), axis=-1) - centre
        spacing = scan_of(case).spacing_mm
        labels[np.sqrt(((grid * spacing) ** 2).sum(-1)) < radius_mm] = 3
        row = row_of(replace(case, labels=labels))
        told[radius_mm] = [str(imagined_outline(row, PREPROCESS, np.random.default_rng(seed))) for seed in range(200)]
    none = {radius: np.mean([sentence == "no lesion." for sentence in told[radius]]) for radius in told}
    assert none[0.0] == pytest.approx(0.8, abs=0.08)
    assert none[15.0] == pytest.approx(0.1 * 0.8, abs=0.06)
    assert none[15.0] + 0.2 < none[2.5] < none[0.0] - 0.2
    assert len(set(told[15.0])) > 20  # edges differ


def test_nothing_is_told_where_nobody_looked_for_lesions() -> None:
    case, rng = one_finding(1), np.random.default_rng(0)
    assert imagined_outline(row_of(case, label_map=None), PREPROCESS, rng) is None
    assert imagined_outline(row_of(case, label_names={1: "white matter"}), PREPROCESS, rng) is None


def test_text_samples_are_told_as_often_as_the_options_say() -> None:
    row = row_of(next(case for case in map(one_finding, SEEDS) if lesions_of(case, 3)), classes=["haemorrhage"])
    for share in (0.0, 0.5, 1.0):
        options = ViewOptions(preprocess=PREPROCESS, outlined_share=share)
        samples = [text_sample(row, np.random.default_rng(seed), options) for seed in range(24)]
        assert np.mean([OUTLINED in sample["facts"] for sample in samples]) == pytest.approx(
            share, abs=0.3 * share * (1 - share) * 4
        )


def test_the_sentence_stands_behind_the_context() -> None:
    told = outlined(scan_of(one_finding(0)), "no lesion.")
    assert context_sentence(told.facts) == "This is an axial T2w MRI. Outlined: no lesion. "

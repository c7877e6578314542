"""Specialists: they start where the data are, learn, are not trained twice, and say what they found in places."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from omnimri.models import metrics
from omnimri.models.boxes import Box
from omnimri.models.config import preset
from omnimri.models.physics import ifft2c, root_sum_of_squares
from omnimri.models.preprocess import Preprocess
from omnimri.models.scan import Scan
from omnimri.models.vocabulary import DIAGNOSES, LESION, NORMAL, STRUCTURES, TISSUES
from omnimri.platform.data.shards import Shards, load_row, row_to_scan
from omnimri.platform.evaluation import baselines
from omnimri.platform.evaluation.image_cases import reference_masks, segmentation_values
from omnimri.platform.evaluation.mask_boxes import boxes_of
from omnimri.platform.evaluation.text import label_text
from omnimri.platform.specialists import fit as fit_module
from omnimri.platform.specialists.augment import augment_slices
from omnimri.platform.specialists.diagnosis import DiagnosisConfig, SliceClassifier
from omnimri.platform.specialists.findings import Detector, Reporter, best_threshold
from omnimri.platform.specialists.fit import FitConfig, fit, learning_rate
from omnimri.platform.specialists.networks import num_parameters
from omnimri.platform.specialists.reconstruction import (
    NETWORKS,
    ReconstructionConfig,
    Reconstructor,
    train_reconstruction,
)
from omnimri.platform.specialists.rows import Rows
from omnimri.platform.specialists.segmentation import (
    SegmentationConfig,
    Segmenter,
    segmentation_network,
    train_segmentation,
    with_neighbours,
)
from omnimri.platform.specialists.specialists import CARD, RivalsLoader, SpecialistsConfig, train_missing
from tests.platform.evaluation_fakes import SHAPE, phantom_affine, phantom_row, write_phantoms

SMALL = (8, 8, 16, 16, 16)
INPUTS = replace(
    preset("tiny").inputs, volume_shape=SHAPE, volume_spacing_mm=(6.0, 4.0, 4.0), slice_spacing_mm=4.0
)  # fmt: skip
CONFIG = SpecialistsConfig(
    recon_unet=ReconstructionConfig(steps=2, channels=SMALL, validations=1),
    varnet=ReconstructionConfig(steps=2, channels=SMALL, cascades=1, validations=1),
    segment_unet=SegmentationConfig(steps=2, channels=SMALL, validations=1),
    classifier=DiagnosisConfig(steps=2, init_features=8, growth_rate=4, blocks=(1, 1), validations=1),
)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Shards:
    """Six patients of two volumes: four to train on, one to validate, one held out with an infarct."""
    splits = ("train", "train", "train", "train", "val", "test")
    rows = [phantom_row(i, split=splits[i // 2], patient=i // 2) for i in range(12)]
    return write_phantoms(tmp_path_factory.mktemp("phantoms") / "data", rows)


def _acquired(scan: Scan, acceleration: int = 4) -> baselines.Acquisition:
    mask = baselines.case_mask(
        scan, "row", acceleration=acceleration, center_fraction=0.08, kind="equispaced", seed=0
    )  # fmt: skip
    return baselines.acquire(scan, mask)


def _held_out(shards: Shards) -> tuple[dict[str, Any], Scan]:
    row = load_row(shards.select(split="test").rows[0])
    return row, row_to_scan(row)


@pytest.mark.parametrize("method", sorted(NETWORKS))
@pytest.mark.parametrize("reference", baselines.REFERENCES)
def test_an_untrained_network_leaves_the_data_as_they_are(method: str, reference: Any, shards: Shards) -> None:
    torch.manual_seed(0)
    network = NETWORKS[method](ReconstructionConfig(steps=1, channels=SMALL, cascades=3, reference=reference))
    acquisition = _acquired(_held_out(shards)[1])
    zero_filled = baselines.zero_filled(acquisition).abs()
    if reference == "rss":
        zero_filled = root_sum_of_squares(ifft2c(acquisition.kspace))
    torch.testing.assert_close(Reconstructor(network)(acquisition), zero_filled, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("method", "steps"), [("recon_unet", 60), ("varnet", 50)])
def test_a_reconstruction_specialist_beats_zero_filled_on_a_held_out_patient(
    method: Any, steps: int, shards: Shards
) -> None:
    config = ReconstructionConfig(steps=steps, channels=SMALL, cascades=2, accelerations=(4,), validations=2)
    train = shards.select(split="train").rows
    network, fitted = train_reconstruction(method, train, shards.select(split="val").rows, config, sens_maps="acs")
    scan = _held_out(shards)[1]
    acquisition, target = _acquired(scan), baselines.reference_magnitude(scan)
    own = metrics.psnr(target, Reconstructor(network)(acquisition).numpy())
    assert own > metrics.psnr(target, acquisition.scan.image) + 1.0
    assert [point.steps for point in fitted.curve] == [steps // 2, steps]
    assert fitted.curve[1].loss < fitted.curve[0].loss


def test_a_segmentation_specialist_finds_tissues_of_a_held_out_patient(shards: Shards) -> None:
    config = SegmentationConfig(steps=40, channels=SMALL, validations=1, lr=5e-3)
    preprocess = Preprocess(INPUTS)
    network, _ = train_segmentation(shards.select(split="train").rows, [], config, preprocess)
    row, scan = _held_out(shards)
    masks = reference_masks(row)
    untrained = Segmenter(segmentation_network(config), preprocess, 1)
    trained = Segmenter(network, preprocess, 1)
    scores = [
        segmentation_values(masks, segment(scan, list(masks)))["dice_tissues"] for segment in (untrained, trained)
    ]
    assert scores[1] > max(0.6, scores[0])


def test_neighbours_are_the_slices_beside_and_ends_are_repeated() -> None:
    slices = torch.arange(3.0)[:, None, None].expand(3, 2, 2)
    assert with_neighbours(slices, 1)[:, :, 0, 0].tolist() == [[0, 0, 1], [0, 1, 2], [1, 2, 2]]


def test_masks_move_with_their_slices() -> None:
    torch.manual_seed(1)
    masks = torch.zeros(8, 1, 64, 64)
    masks[:, :, 20:40, 24:50] = 1
    slices, moved = augment_slices(3 * masks, masks)
    assert moved is not None
    inside = slices[moved > 0].mean()
    assert inside > slices[moved == 0].mean() + 2
    assert set(moved.unique().tolist()) == {0.0, 1.0}
    assert not torch.equal(moved[0], moved[1])


def _probabilities(*cubes: tuple[tuple[slice, slice, slice], float]) -> dict[str, np.ndarray]:
    """A head of white matter with lesions of some probability."""
    shape = (8, 40, 40)
    found = {name: np.zeros(shape, np.float32) for name in STRUCTURES}
    found[TISSUES[2]][1:7, 4:36, 4:36] = 0.9
    for place, probability in cubes:
        found[LESION][place] = probability
    return found


LEFT = (slice(2, 4), slice(10, 14), slice(27, 33))  # high columns are the patient's left: see phantom_affine
RIGHT = (slice(3, 5), slice(20, 24), slice(6, 12))


def _head() -> Scan:
    return Scan(image=np.ones((8, 40, 40), np.float32), affine=phantom_affine(0.0), facts={"contrast": "T2w"})


def test_boxes_are_the_connected_parts_of_the_mask_with_their_sides_and_scores() -> None:
    found = _probabilities((LEFT, 0.6), (RIGHT, 0.9))
    boxes = boxes_of(_head(), found, "haemorrhage", threshold=0.5)
    assert [(box.label, box.side, box.box_voxel) for box in boxes] == [
        ("haemorrhage", "right", (3, 20, 6, 5, 24, 12)),
        ("haemorrhage", "left", (2, 10, 27, 4, 14, 33)),
    ]
    assert [box.score for box in boxes] == pytest.approx([0.9, 0.6])
    assert len(boxes_of(_head(), found, "haemorrhage", threshold=0.7)) == 1
    assert Detector(lambda _: found, None, 0.5)(_head())[0].label == LESION


def test_the_edge_of_a_lesion_is_the_one_that_finds_most_on_the_validation_split() -> None:
    truth = [Box(label="old infarct", side="left", box_voxel=(2, 10, 27, 4, 14, 33))]
    assert best_threshold([(_head(), _probabilities((LEFT, 0.3)), truth)], 0.1) == 0.2
    assert best_threshold([(_head(), _probabilities((LEFT, 0.9)), truth)], 0.1) == 0.5
    assert best_threshold([(_head(), _probabilities(), [])], 0.1) == 0.5
    assert best_threshold([], 0.1) == 0.5


def test_the_template_report_says_what_was_found_and_a_healthy_head_is_normal() -> None:
    infarct, normal = np.eye(len(DIAGNOSES))[1], np.eye(len(DIAGNOSES))[DIAGNOSES.index(NORMAL)]
    found = _probabilities((LEFT, 0.8))
    report = Reporter(lambda _: found, lambda _: infarct, 0.5)(_head())
    assert label_text(report) == {("old infarct", "left")}
    healthy = Reporter(lambda _: found, lambda _: normal, 0.5)(_head())
    assert label_text(healthy) == frozenset()
    assert "Normal." in healthy


def test_a_volume_is_what_its_most_telling_slice_is() -> None:
    network = SliceClassifier(DiagnosisConfig(steps=1, sharpness=50.0))
    logits = torch.full((6, len(DIAGNOSES)), -4.0)
    logits[:, 0] = 4.0
    assert network.pooled(logits).argmax() == DIAGNOSES.index(NORMAL)
    logits[3] = torch.tensor([-4.0, 4.0, -4.0, -4.0, -4.0])
    pooled = network.pooled(logits)
    assert pooled.argmax() == 1
    assert pooled[0] < 0


class _Line(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))


def test_the_best_validated_weights_are_kept() -> None:
    network = _Line()
    scores = iter([1.0, 3.0, 2.0])
    seen = []

    def validate() -> float:
        seen.append(float(network.weight.detach()))
        return next(scores)

    config = FitConfig(steps=9, validations=3, lr=0.1)
    fitted = fit(network, lambda: (network.weight - 5).square().sum(), validate, config)
    assert fitted.best == 1
    assert float(network.weight.detach()) == seen[1]
    assert [point.steps for point in fitted.curve] == [3, 6, 9]


def test_a_budget_of_seconds_ends_in_time_and_the_rate_ends_low(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a clock that goes on by a sixteenth of a second whenever it is read, so twice a step."""
    clock = itertools.count()
    monkeypatch.setattr(fit_module, "time", SimpleNamespace(perf_counter=lambda: next(clock) / 16))
    network = _Line()
    config = FitConfig(seconds=0.375, validations=2)
    fitted = fit(network, lambda: (network.weight - 1).square().sum(), lambda: float("nan"), config)
    assert [(point.steps, point.seconds) for point in fitted.curve] == [(3, 0.19), (6, 0.38)]
    assert learning_rate(1.0, config) == pytest.approx(0.01 * config.lr)
    assert learning_rate(0.1, config) == config.lr
    with pytest.raises(ValueError, match="give seconds or steps"):
        FitConfig(seconds=1.0, steps=2)


def test_rows_beyond_the_memory_are_read_again(shards: Shards) -> None:
    loaded: list[int] = []

    def prepare(row: dict[str, Any]) -> np.ndarray:
        loaded.append(1)
        return np.zeros(2**19, np.uint8)

    rows = Rows(shards.rows[:4], ("row_id",), prepare, cache_mb=1)
    for _ in range(3):
        assert len(list(rows)) == 4
    assert len(loaded) == 4 + 2 * 2
    with pytest.raises(ValueError, match="None of 4 rows"):
        next(Rows(shards.rows[:4], ("row_id",), lambda _: None).endless(np.random.default_rng(0)))


def test_a_finished_specialist_is_not_trained_again_and_another_setting_is(shards: Shards, tmp_path: Path) -> None:
    cards = train_missing(shards, tmp_path, CONFIG, INPUTS)
    assert {card["name"] for card in cards} == {"recon_unet", "varnet", "segment_unet", "classifier"}
    assert all(card["patients"] == 4 for card in cards)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/model.safetensors")}
    assert train_missing(shards, tmp_path, CONFIG, INPUTS) == cards
    assert {path: path.stat().st_mtime_ns for path in before} == before
    (tmp_path / "varnet" / CARD).unlink()  # killed before it was finished
    train_missing(shards, tmp_path, replace(CONFIG, classifier=replace(CONFIG.classifier, seed=1)), INPUTS)
    again = {path.parent.name for path, then in before.items() if path.stat().st_mtime_ns != then}
    assert again == {"varnet", "classifier"}
    assert not list(tmp_path.rglob("*.pt")) + list(tmp_path.rglob("*.pkl"))


def test_loaded_specialists_answer_every_task_and_are_what_was_trained(shards: Shards, tmp_path: Path) -> None:
    cards = train_missing(shards, tmp_path, CONFIG, INPUTS)
    rivals = RivalsLoader(tmp_path, CONFIG, INPUTS)()
    _, scan = _held_out(shards)
    assert {task: list(methods) for task, methods in rivals.items()} == {
        "reconstruct": ["recon_unet", "varnet"], "diagnose": ["classifier"], "segment": ["segment_unet"],
        "detect": ["segment_boxes"], "report": ["template"],
    }  # fmt: skip
    assert rivals["reconstruct"]["varnet"](_acquired(scan)).shape == SHAPE
    masks = rivals["segment"]["segment_unet"](scan, list(STRUCTURES))
    assert all(mask.shape == SHAPE and mask.dtype == bool for mask in masks.values())
    assert rivals["diagnose"]["classifier"](scan).sum() == pytest.approx(1.0)
    assert isinstance(rivals["report"]["template"](scan), str)
    saved = json.loads((tmp_path / "segment_unet" / CARD).read_text())
    assert saved["parameters"] == num_parameters(segmentation_network(CONFIG.segment_unet))
    assert saved in cards


def test_without_labelled_rows_the_others_are_trained(shards: Shards, tmp_path: Path) -> None:
    rows = Shards([replace(ref, has_labels=False, fully_sampled=False) for ref in shards.rows], shards.manifests)
    assert [card["name"] for card in train_missing(rows, tmp_path, CONFIG, INPUTS)] == ["classifier"]
    assert set(RivalsLoader(tmp_path, CONFIG, INPUTS)()) == {"diagnose"}

"""The whole evaluation on phantoms, with an engine that knows the truth and one that is wrong about everything."""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from omnimri.models.boxes import Box
from omnimri.models.detection import read_detection
from omnimri.models.instructions import OUTLINED
from omnimri.models.scan import Scan
from omnimri.models.vocabulary import LESION
from omnimri.platform.data.shards import Shards
from omnimri.platform.evaluation.baselines import SenseSetting
from omnimri.platform.evaluation.calibration import fit_platt
from omnimri.platform.evaluation.cases import BLANK, CEILING, MASK_BOXES, MODEL, CaseContext, CaseResult
from omnimri.platform.evaluation.config import EvaluateConfig
from omnimri.platform.evaluation.evaluate import evaluate, log_evaluation, plan, spread_over_patients
from omnimri.platform.evaluation.floors import shuffled
from omnimri.platform.evaluation.image_cases import segmentation_values
from omnimri.platform.evaluation.summary import format_table, summarise
from omnimri.platform.evaluation.text_cases import box_table, report_values
from omnimri.platform.evaluation.workers import RUNNERS
from omnimri.platform.tracking import Tracker, connect
from tests.platform.evaluation_fakes import FakePrompt, KnowingEngine, KnowingLoader, phantom_row, write_phantoms

CONFIG = EvaluateConfig(
    accelerations=(3,), center_fractions=(0.15,), max_slices=4, bootstrap_samples=100, tuning_volumes=1,
    cg_weights=(0.005, 0.05), cg_steps=(5,), cs_weights=(0.003,), cs_steps=(20,), cases_per_task=2,
)  # fmt: skip


SETTINGS = {
    "cg_sense": {3: SenseSetting()},
    "l1_wavelet": {3: SenseSetting(0.003, 30)},
    "total_variation": {3: SenseSetting(0.003, 40)},
}


@pytest.fixture(scope="module")
def rows() -> list[dict[str, Any]]:
    """Four patients of two volumes each, the last two for the test; one volume came without k-space."""
    splits = ("train", "val", "test", "test")
    return [phantom_row(i, split=splits[i // 2], patient=i // 2, kspace=i != 7) for i in range(8)]


@pytest.fixture(scope="module")
def shards(rows: list[dict[str, Any]], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shards]:
    return write_phantoms(tmp_path_factory.mktemp("phantoms") / "data", rows)


@pytest.mark.slow
def test_a_model_that_knows_the_truth_scores_perfectly(
    rows: list[dict[str, Any]], shards: Shards, tmp_path: Path, ray_cluster: None
) -> None:
    summary = evaluate(Path("model"), shards, tmp_path, CONFIG, command="x", engine_loader=KnowingLoader(rows))
    tasks = summary.tasks
    assert tasks["reconstruct"]["3x"][MODEL]["psnr"].value > 50
    assert tasks["reconstruct"]["3x"][MODEL]["psnr"].n == 3
    assert tasks["reconstruct"]["3x"][MODEL]["uncertainty_correlation"].value > 0.99
    assert tasks["reconstruct"]["3x"][MODEL]["uncertainty_ratio"].value == pytest.approx(1.0, rel=1e-3)
    assert "uncertainty_ratio" not in tasks["reconstruct"]["3x"]["cg_sense"]
    assert tasks["segment"]["volume"][MODEL]["dice_tissues"].value == 1.0
    assert tasks["segment"]["volume"][MODEL]["dice_lesion"].n == 2
    assert tasks["segment"]["volume"][MODEL]["lesion_false_alarm"].value == 0.0
    assert tasks["detect"]["iou_0.1"][MODEL]["sensitivity"].value == 1.0
    assert tasks["detect"]["iou_0.1"][BLANK]["sensitivity"].value == 0.0
    assert tasks["detect"]["iou_0.1"][MASK_BOXES]["sensitivity"].value == 1.0
    assert tasks["diagnose"]["patient"][MODEL]["balanced_accuracy"].value == 1.0
    assert tasks["diagnose"]["patient"]["majority_class"]["balanced_accuracy"].value == 0.5
    assert tasks["report"]["volume"][MODEL]["hallucination_rate"].value == 0.0
    assert tasks["report"]["volume"][BLANK]["omission_rate"].value == 1.0
    assert any("central 4 slices" in note for note in summary.notes)
    assert any("the best of 2 settings on split 'val'" in note for note in summary.notes)
    assert any(note.startswith("Total variation at 3x: weight 0.003, 20 iterations") for note in summary.notes)
    assert 0 < tasks["reconstruct"]["3x"]["l1_wavelet"]["residual"].value < 0.3

    written = json.loads((tmp_path / "summary.json").read_text())
    assert written["header"]["model_version"] == "fake-1"
    assert written["header"]["num_patients"] == 2
    assert written["header"]["data_digest"] == shards.digest
    html = (tmp_path / "index.html").read_text()
    assert "Research use only, not for diagnosis." in html
    assert "http://" not in html
    assert "https://" not in html
    assert html.count("data:image/png;base64,") >= 10
    assert (tmp_path / "figures" / "reconstruct_3x.png").stat().st_size > 1000
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    with Tracker.start(uri, "evaluate", params=CONFIG) as tracker:
        log_evaluation(tracker, summary, tmp_path, source="phantoms")
    assert tracker.run.data.metrics["segment/volume/omnimri/dice_tissues"] == 1.0
    names = {entry.path for entry in connect(uri).list_artifacts(tracker.run_id)}
    assert {"index.html", "summary.json", "figures"} <= names

    lines = [json.loads(line) for line in (tmp_path / "cases.jsonl").read_text().splitlines()]
    assert {line["task"] for line in lines} == set(CONFIG.tasks)


def _case(row: dict[str, Any], task: str, *, garbled: bool = True, **changes: Any) -> CaseResult:
    context = CaseContext(
        engine=KnowingLoader([row], garbled)(Path()), config=dataclasses.replace(CONFIG, **changes), settings=SETTINGS,
        frequencies=np.full(5, 0.2),
    )  # fmt: skip
    return RUNNERS[task](context, row | {"label_names": dict(row["label_names"])})


def _values(result: CaseResult, method: str = MODEL) -> dict[str, Any]:
    (record,) = [record for record in result.records if record.method == method]
    return record.values


def test_a_model_that_returns_its_input_reconstructs_like_zero_filled() -> None:
    result = _case(phantom_row(1, split="test", patient=1), "reconstruct")
    assert _values(result)["psnr"] == pytest.approx(_values(result, "zero_filled_rss")["psnr"])
    assert _values(result)["psnr"] < _values(result, "cg_sense")["psnr"]
    assert _values(result)["uncertainty_ratio"] == _values(result)["uncertainty_coverage"] == 0.0
    assert np.isnan(_values(result)["uncertainty_correlation"])
    assert _values(result, "cg_sense")["residual"] < _values(result, "zero_filled")["residual"]


def test_against_a_root_sum_of_squares_all_lines_are_a_ceiling() -> None:
    """Against the coil combination they are the target."""
    row = phantom_row(1, split="test", patient=1)
    squares = _case(row, "reconstruct", reference="rss")
    assert _values(squares, CEILING)["psnr"] > _values(squares, "cg_sense")["psnr"] + 3
    combined = _case(row, "reconstruct")
    assert CEILING not in {record.method for record in combined.records}
    assert not np.array_equal(combined.picture["target"], squares.picture["target"])


@dataclasses.dataclass(frozen=True)
class ListeningEngine(KnowingEngine):
    """Writes down what every text prompt is told of the drawing."""

    told: list[tuple[str, bool, Any]] = dataclasses.field(default_factory=list)

    def encode(self, scan: Scan, instruction: str, task: str) -> FakePrompt:
        if task != "segment":
            self.told.append((task, bool(np.ptp(scan.image) == 0), scan.facts.get(OUTLINED)))
        return super().encode(scan, instruction, task)


@pytest.mark.parametrize("task", ["detect", "diagnose", "report"])
def test_text_is_told_what_the_model_draws_of_the_image_it_is_shown(task: str) -> None:
    """The infarct of the phantom, and of a blank image nothing; no truth of the row reaches the prompt otherwise."""
    row = phantom_row(1, split="test", patient=1)
    for config, of_image, of_blank in (
        (CONFIG, "1 lesion, up to ", "no lesion."),
        (dataclasses.replace(CONFIG, outline=False), "", ""),
    ):
        engine = ListeningEngine({row["te_ms"]: row})
        RUNNERS[task](CaseContext(engine=engine, config=config, settings=SETTINGS, frequencies=np.full(5, 0.2)), row)
        assert {is_blank for _, is_blank, _ in engine.told} == {True, False}
        for _, is_blank, outline in engine.told:
            expected = of_blank if is_blank else of_image
            assert outline is None if not expected else outline.startswith(expected)
            assert is_blank or not expected or ": left [" in outline


def test_an_unreadable_box_answer_is_counted_and_finds_nothing() -> None:
    row = phantom_row(1, split="test", patient=1)
    result = _case(row, "detect")
    values = _values(result)
    assert values["parsed"] == 0.0
    assert _values(result, MASK_BOXES)["matched"] == 0, "this engine draws nothing either"
    assert MASK_BOXES not in {record.method for record in _case(row, "detect", mask_boxes=False).records}
    assert (values["matched"], values["num_reference"], values["side_correct"]) == (0, 1, 0.0)


def test_candidates_are_matched_in_falling_order_of_score() -> None:
    box = {"label": "old infarct", "side": "left"}
    reference = [Box(**box, box_voxel=(0, 0, 0, 4, 4, 4))]
    candidates = [
        Box(**box, box_voxel=(0, 0, 0, 4, 4, 3), score=0.9, logprob=-1.0),
        Box(**box, box_voxel=(0, 0, 0, 4, 4, 4), score=0.2, logprob=-3.0),
    ]
    table = box_table(candidates, reference, 0.1, is_calibrated=True)
    assert table["box_right"][:3] == [1.0, 0.0, -1.0]
    assert table["box_scores"][:3] == [0.9, 0.2, -1.0]
    assert table["box_raw"][:2] == pytest.approx([np.exp(-1), np.exp(-3)])
    assert table["num_candidates"] == table["num_calibrated"] == 2
    assert np.isnan(box_table([], [], 0.1, is_calibrated=False)["num_calibrated"])
    drawn = [dataclasses.replace(box, logprob=None) for box in reversed(candidates)]
    assert box_table(drawn, reference, 0.1) | {"num_calibrated": 2, "box_raw": table["box_raw"]} == table
    assert max(box_table(drawn, reference, 0.1)["box_raw"]) == -1.0


def test_a_shuffled_answer_brings_all_candidates_of_the_other_patient() -> None:
    """Patients 1 and 3 have an infarct in one place, so only the box in the corner is wrong for either."""
    rows = [phantom_row(i, split="test", patient=i) for i in (1, 3)]
    own = [record for row in rows for record in _case(row, "detect", garbled=False).records if record.method == MODEL]
    assert [len(record.texts["candidates"]) for record in own] == [2, 2]
    for record, floor in zip(own, shuffled(own, CONFIG), strict=True):
        expected = {name: value for name, value in record.values.items() if name not in ("seconds", "num_calibrated")}
        assert {name: floor.values[name] for name in expected} == expected
        assert floor.values["box_right"][:3] == [1.0, 0.0, -1.0]


def test_without_drawn_answers_there_is_no_free_response_curve() -> None:
    context = CaseContext(
        engine=KnowingLoader([row := phantom_row(1, split="test", patient=1)])(Path()),
        config=dataclasses.replace(CONFIG, box_samples=0), settings={}, frequencies=np.full(5, 0.2),
    )  # fmt: skip
    records = RUNNERS["detect"](context, row).records
    summary = summarise([*records, *shuffled(records, CONFIG)], CONFIG, {})
    assert "sensitivity_1fp" not in summary.tasks["detect"]["iou_0.1"][MODEL]
    assert "| Sensitivity " in format_table(summary)


def test_platt_finds_the_map_that_made_the_outcomes() -> None:
    rng = np.random.default_rng(0)
    logprobs = rng.uniform(-40, -5, 20_000)
    right = rng.random(20_000) < 1 / (1 + np.exp(-(0.2 * logprobs + 3)))
    fit = fit_platt(np.exp(logprobs), right, split="val", data_digest="d")
    assert (fit.slope, fit.intercept) == (pytest.approx(0.2, rel=0.05), pytest.approx(3, rel=0.05))
    assert fit.num_right == right.sum()
    assert fit_platt(np.exp(logprobs), ~right, split="val", data_digest="d") is None
    assert fit_platt(np.exp(logprobs), np.ones_like(right), split="val", data_digest="d") is None


@pytest.mark.slow
def test_scores_are_calibrated_on_the_tuning_split_and_kept_with_the_checkpoint(
    tmp_path: Path, ray_cluster: None
) -> None:
    patients = {5: "train", 1: "val", 2: "val", 3: "test", 4: "test"}
    rows = [phantom_row(i, split=patients[i], patient=i, kspace=False) for i in patients]
    shards = write_phantoms(tmp_path / "data", rows)
    config = dataclasses.replace(CONFIG, tasks=("detect",), calibrate=True)
    model = tmp_path / "model"
    model.mkdir()
    summary = evaluate(model, shards, tmp_path / "out", config, engine_loader=KnowingLoader(rows))
    detection = read_detection(model)
    assert detection.calibration.split == "val"
    assert detection.calibration.data_digest == shards.digest
    assert detection.labels == ("old infarct",)
    values = summary.tasks["detect"]["iou_0.1"][MODEL]
    assert values["sensitivity_1fp"].value == 1.0
    assert values["ece"].value < values["ece_raw"].value
    assert any("calibrated on" in note for note in summary.notes)


def test_an_invented_finding_counts_as_hallucination_and_omission() -> None:
    values = _values(_case(phantom_row(1, split="test", patient=1), "report"))
    assert (values["supported_findings"], values["predicted_findings"], values["reference_findings"]) == (0, 1, 1)
    assert values["labeller_agrees"] == 1.0


def test_empty_masks_score_zero_where_there_is_tissue_and_nothing_where_there_is_no_lesion() -> None:
    healthy = _values(_case(phantom_row(0, split="test", patient=0), "segment"))
    assert healthy["dice_tissues"] == 0.0
    assert np.isnan(healthy["dice_lesion"])
    assert healthy["lesion_false_alarm"] == 0.0


def test_a_mask_counts_for_the_structure_that_it_covers_most() -> None:
    grey, white, empty = (np.arange(8).reshape(2, 4) // 3 == part for part in range(3))
    empty[:] = False
    reference = {"grey matter": grey, "white matter": white, LESION: empty}
    for answer, expected in (
        ({"grey matter": grey, "white matter": white}, (2, 2)),
        ({"grey matter": white, "white matter": white}, (2, 1)),
        ({"grey matter": empty, "white matter": white}, (1, 1)),
    ):
        values = segmentation_values(reference, {**answer, LESION: empty})
        assert (values["num_drawn"], values["num_drawn_right"]) == expected


def test_a_healthy_case_is_cleared_by_a_report_without_findings() -> None:
    normal, ill = "No focal lesion is seen.", "There is an old infarct in the left frontal lobe."
    assert [report_values(normal, answer)["cleared"] for answer in (normal, ill)] == [1.0, 0.0]
    assert np.isnan(report_values(ill, normal)["cleared"])


def test_a_lesion_on_the_patients_left_is_shown_at_the_viewers_right() -> None:
    picture = _case(phantom_row(1, split="test", patient=1), "detect", garbled=False).picture
    ((top, left, bottom, right),) = picture["reference_rectangles"]
    width = picture["image"].shape[1]
    assert list(picture["letters"]) == ["R", "L", "A", "P"]
    assert left > width / 2
    assert (bottom - top, right - left) == (6, 5)
    np.testing.assert_array_equal(picture["reference_rectangles"], picture["predicted_rectangles"])


def test_an_acquisition_without_all_lines_has_no_target() -> None:
    row = phantom_row(1, split="test", patient=1)
    row["mask"] = np.arange(40) % 2 == 0
    assert "no fully sampled reference" in _case(row, "reconstruct").skipped


def test_limits_are_spread_over_patients_and_reported(shards: Shards) -> None:
    chosen = spread_over_patients(shards.select(split="test").rows, 2)
    assert len({ref.patient_id for ref in chosen}) == 2
    units, notes = plan(shards, EvaluateConfig(max_volumes=1, tasks=("segment",)))
    assert len(units) == 1
    assert notes == ["segment: 1 of 4 volumes scored (max_volumes, max_image_volumes)."]
    limited = EvaluateConfig(max_volumes=3, max_image_volumes=2)
    assert (limited.volume_limit("segment"), limited.volume_limit("report")) == (2, 3)


def test_a_split_without_rows_is_refused(shards: Shards, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no row of split 'nowhere'"):
        evaluate(Path("model"), shards, tmp_path, EvaluateConfig(split="nowhere"), engine_loader=KnowingLoader([]))

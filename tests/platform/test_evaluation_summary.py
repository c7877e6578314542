"""From records to numbers: pooling, patients, verdicts, and what is said where there is no number."""

import json
import math
from typing import Any

import numpy as np
import pytest

from omnimri.platform.evaluation.cases import BLANK, MODEL, SHUFFLED, Record
from omnimri.platform.evaluation.config import EvaluateConfig
from omnimri.platform.evaluation.floors import shuffled
from omnimri.platform.evaluation.measures import QUALITY
from omnimri.platform.evaluation.page import choose
from omnimri.platform.evaluation.summary import format_table, summarise

CONFIG = EvaluateConfig(bootstrap_samples=200)
FACTS = {"vendor": "GE", "field_strength_t": 3.0, "sex": "F", "age_years": 50.0, "contrast": "T1w"}


def _record(task: str, index: int, values: dict[str, Any], method: str = MODEL, **changes: Any) -> Record:
    facts = FACTS | changes.pop("facts", {})
    condition = {"reconstruct": "4x", "detect": "iou_0.1"}.get(task, "volume")
    return Record(
        task=task, condition=condition, method=method, row_id=f"r{index}", patient_id=f"p{index}", facts=facts,
        values=values,
    )  # fmt: skip


def _box_counts(matched: int, reference: int, predicted: int) -> dict[str, float]:
    return {
        "matched": matched, "matched_label": matched, "num_reference": reference, "num_predicted": predicted,
        "false_positives": predicted - matched, "best_iou": 0.5, "side_correct": 1.0, "parsed": 1.0,
    }  # fmt: skip


def test_shares_are_pooled_over_volumes_not_averaged() -> None:
    records = [_record("detect", 0, _box_counts(1, 1, 1)), _record("detect", 1, _box_counts(0, 3, 1))]
    values = summarise(records, CONFIG, {}).tasks["detect"]["iou_0.1"][MODEL]
    assert values["sensitivity"].value == 0.25
    assert values["precision"].value == 0.5
    assert values["false_positives"].value == 0.5


def test_cases_without_a_value_are_left_out_and_counted() -> None:
    dice = [0.8, 0.6, math.nan]
    records = [_record("segment", i, {"dice_tissues": 0.9, "dice_lesion": value}) for i, value in enumerate(dice)]
    values = summarise(records, CONFIG, {}).tasks["segment"]["volume"][MODEL]
    assert values["dice_lesion"].value == pytest.approx(0.7)
    assert values["dice_lesion"].n == 2
    assert values["dice_tissues"].n == 3


def test_the_interval_holds_the_value_and_needs_two_patients() -> None:
    records = [_record("reconstruct", i, {"psnr": 30.0 + i, "ssim": 0.9}) for i in range(8)]
    value = summarise(records, CONFIG, {}).tasks["reconstruct"]["4x"][MODEL]["psnr"]
    assert value.interval[0] < value.value == 33.5 < value.interval[1]
    alone = summarise(records[:1], CONFIG, {}).tasks["reconstruct"]["4x"][MODEL]["psnr"]
    assert alone.value == 30.0
    assert alone.interval is None


def test_a_verdict_is_paired_so_a_steady_gain_is_seen_among_large_differences() -> None:
    spread = np.linspace(20, 40, 6)
    records = [_record("reconstruct", i, {"psnr": value + 1, "ssim": 0.9}) for i, value in enumerate(spread)]
    records += [_record("reconstruct", i, {"psnr": value, "ssim": 0.9}, "cg_sense") for i, value in enumerate(spread)]
    summary = summarise(records, CONFIG, {})
    own = summary.tasks["reconstruct"]["4x"][MODEL]["psnr"]
    other = summary.tasks["reconstruct"]["4x"]["cg_sense"]["psnr"]
    assert own.interval[0] < other.interval[1]  # the intervals overlap
    (verdict,) = summary.verdicts
    assert verdict.beats is True
    assert verdict.difference == pytest.approx(1.0)
    assert verdict.interval == pytest.approx((1.0, 1.0))


@pytest.mark.parametrize(
    ("ours", "beats", "words"),
    [(0.0, False, "does NOT beat"), (-1.0, False, "does NOT beat"), (1.0, True, "beats CG-SENSE")],
)
def test_what_does_not_beat_its_baseline_is_said_plainly(ours: float, beats: bool, words: str) -> None:
    records = [_record("reconstruct", i, {"psnr": 30 + i + ours, "ssim": 0.9}) for i in range(4)]
    records += [_record("reconstruct", i, {"psnr": 30.0 + i, "ssim": 0.9}, "cg_sense") for i in range(4)]
    summary = summarise(records, CONFIG, {})
    assert summary.verdicts[0].beats is beats
    assert words in format_table(summary)


def test_a_gain_that_may_be_chance_is_not_called_a_win() -> None:
    gains = [3.0, -2.0, 2.0, -1.5]
    records = [_record("reconstruct", i, {"psnr": 30 + gain, "ssim": 0.9}) for i, gain in enumerate(gains)]
    records += [_record("reconstruct", i, {"psnr": 30.0, "ssim": 0.9}, "cg_sense") for i in range(4)]
    summary = summarise(records, CONFIG, {})
    assert summary.verdicts[0].beats is None
    assert "not clearly better than CG-SENSE" in format_table(summary)


def test_what_cannot_be_computed_says_why() -> None:
    counts = {"matched": 0, "predicted": 0, "reference": 0, "supported_findings": 0, "predicted_findings": 0,
              "reference_findings": 0, "agrees": 1.0, "bleu4": math.nan, "rouge_l": math.nan}  # fmt: skip
    summary = summarise([_record("report", i, counts) for i in range(2)], CONFIG, {})
    values = summary.tasks["report"]["volume"][MODEL]
    assert values["label_f1"].value is None
    assert values["label_f1"].reason == "not computed: no finding in either text"
    assert values["bleu4"].reason.startswith("not computed: ")
    assert "segment: not computed" in format_table(summary)


def test_diagnosis_is_scored_per_volume_and_per_patient() -> None:
    right, wrong, surer = [0.6, 0.4, 0, 0, 0], [0.4, 0.6, 0, 0, 0], [0.9, 0.1, 0, 0, 0]
    records = [
        _record("diagnose", 0, {"truth": 0, "probabilities": surer}),
        _record("diagnose", 1, {"truth": 0, "probabilities": wrong}),
        _record("diagnose", 2, {"truth": 1, "probabilities": wrong}),
        _record("diagnose", 3, {"truth": 1, "probabilities": right}),
    ]
    same_patient = [Record(**{**vars(r), "patient_id": "ab"[i // 2]}) for i, r in enumerate(records)]
    conditions = summarise(same_patient, CONFIG, {}).tasks["diagnose"]
    assert conditions["volume"][MODEL]["accuracy"].value == 0.5
    assert conditions["volume"][MODEL]["accuracy"].n == 4
    assert conditions["patient"][MODEL]["accuracy"].n == 2
    assert conditions["patient"][MODEL]["macro_auroc"].value == 1.0


def test_subgroups_show_every_level_and_the_unknown() -> None:
    records = [
        _record("reconstruct", i, {"psnr": 30.0 + 5 * (i % 2), "ssim": 0.9}, facts={"vendor": vendor, "age_years": age})
        for i, (vendor, age) in enumerate([("GE", 39.0), ("Siemens", 61.0), ("GE", None), (None, 45.0)])
    ]
    groups = summarise(records, CONFIG, {}).subgroups["reconstruct"]["4x"]
    assert groups["vendor"]["GE"].value == 30.0
    assert groups["vendor"]["GE"].n == 2
    assert set(groups["vendor"]) == {"GE", "Siemens", "unknown"}
    assert set(groups["age_years"]) == {"0-39", "40-59", "60 and over", "unknown"}
    assert set(groups["field_strength_t"]) == {"3 T"}


def test_the_summary_is_plain_json_and_flat_for_tracking() -> None:
    records = [_record("detect", i, _box_counts(0, 0, 0)) for i in range(2)]
    records += [_record("detect", i, _box_counts(0, 0, 0), BLANK) for i in range(2)]
    summary = summarise(records, CONFIG, {"split": "test"}, ["a note"])
    data = json.loads(json.dumps(summary.as_json(), allow_nan=False))
    assert data["tasks"]["detect"]["iou_0.1"]["omnimri"]["sensitivity"]["value"] is None
    assert "detect/iou_0.1/omnimri/sensitivity" not in summary.flat()
    assert summary.flat()["detect/iou_0.1/omnimri/parse_rate"] == 1.0


def test_records_survive_json_with_their_missing_values() -> None:
    record = _record("segment", 0, {"dice_tissues": 0.5, "dice_lesion": math.nan})
    again = Record.from_json(json.loads(json.dumps(record.as_json(), allow_nan=False)))
    assert math.isnan(again.values["dice_lesion"])
    assert again.values["dice_tissues"] == 0.5


def test_shown_cases_are_worst_median_and_best() -> None:
    records = [_record("reconstruct", i, {"psnr": float(value)}) for i, value in enumerate([5, 3, 9, 1, 7])]
    chosen = choose(records, "psnr", 3)
    assert [rank for rank, _ in chosen] == ["worst of 5", "median of 5", "best of 5"]
    assert [record.values["psnr"] for _, record in chosen] == [1, 5, 9]
    assert len(choose(records[:1], "psnr", 3)) == 1


def _against_a_unet(shift: float) -> Any:
    """Twelve patients with a spread of several dB between them and a tenth of that between methods."""
    rng = np.random.default_rng(0)
    level, noise = rng.normal(30, 3, 12), rng.normal(0, 0.2, 12)
    records = [_record("reconstruct", i, {"psnr": v + shift, "ssim": 0.9}) for i, v in enumerate(level + noise)]
    records += [_record("reconstruct", i, {"psnr": v, "ssim": 0.9}, "recon_unet") for i, v in enumerate(level)]
    return next(v for v in summarise(records, CONFIG, {}, compared=QUALITY).verdicts if v.metric == "psnr")


def test_the_paired_interval_holds_zero_for_equal_methods_and_not_for_shifted_ones() -> None:
    equal, better, worse = (_against_a_unet(shift) for shift in (0.0, 0.5, -0.5))
    assert equal.interval[0] < 0 < equal.interval[1]
    assert 0 < better.interval[0] < better.difference < better.interval[1] < 1
    assert worse.interval[1] < 0
    assert (better.beats, worse.beats) == (True, False)


def test_specialists_are_summarised_without_a_model() -> None:
    records = [_record("reconstruct", i, {"psnr": 30.0 + i, "ssim": 0.9}, "varnet") for i in range(3)]
    records += [_record("reconstruct", i, {"psnr": 25.0, "ssim": 0.8}, "zero_filled") for i in range(3)]
    summary = summarise(records, CONFIG, {})
    assert summary.verdicts == []
    assert summary.subgroups["reconstruct"]["4x"]["vendor"]["GE"].value == 31.0
    assert "the first is VarNet" in format_table(summary)


def test_a_shuffled_image_is_another_patients_and_tells_nothing() -> None:
    records = []
    for i in range(40):  # two volumes of each of twenty patients, every other one with an infarct, all answered rightly
        truth = (i // 2) % 2
        probabilities = [0.1] * 5
        probabilities[truth] = 0.6
        record = _record("diagnose", i, {"truth": truth, "probabilities": probabilities, "truth_probability": 0.6})
        records.append(Record(**{**vars(record), "patient_id": f"p{i // 2}"}))
    floor = shuffled(records, CONFIG)
    assert [record.method for record in floor] == [SHUFFLED] * 40
    values = summarise([*records, *floor], CONFIG, {}).tasks["diagnose"]["volume"]
    assert values[MODEL]["macro_auroc"].value == 1.0
    low, high = values[SHUFFLED]["macro_auroc"].interval
    assert low < 0.5 < high
    assert shuffled(records[:2], CONFIG) == []

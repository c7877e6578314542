"""Steps of the image decoder against time: the scores are the evaluation's, and every step is paid for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from omnimri.jobs import benchmark as job
from omnimri.models.engine import Engine
from omnimri.models.omnimri import OmniMRI
from omnimri.models.tokenizer import train_tokenizer
from omnimri.platform.benchmark.sampling import SamplingConfig, benchmark_sampling, sampling_figure
from omnimri.platform.data.shards import Shards
from omnimri.platform.evaluation.cases import MODEL, CaseContext
from omnimri.platform.evaluation.config import EvaluateConfig
from omnimri.platform.evaluation.image_cases import reconstruct_case
from tests.platform.evaluation_fakes import phantom_row, write_phantoms
from tests.platform.smallest import SMALLEST

ROWS = [phantom_row(i, split="train" if i == 3 else "test", patient=i // 2) for i in range(4)]
ONE_VOLUME = {"accelerations": (4,), "max_volumes": 1, "max_slices": 4}


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Shards:
    return write_phantoms(tmp_path_factory.mktemp("phantoms") / "data", ROWS)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Untrained, with a last layer that says something, so that every step changes the image."""
    torch.manual_seed(0)
    model = OmniMRI(SMALLEST)
    torch.nn.init.normal_(model.image_decoder.reconstruct_trunk.last.weight)
    tokenizer = train_tokenizer(["Reconstruct the image."] * 3, SMALLEST.backbone.vocab_size)
    folder = tmp_path_factory.mktemp("checkpoint")
    model.save(folder, tokenizer, version="test-1", run={})
    return folder


@pytest.fixture(scope="module")
def engine(checkpoint: Path) -> Engine:
    return Engine.load(checkpoint)


def test_the_scores_are_those_of_the_evaluation(engine: Engine, shards: Shards) -> None:
    measured = benchmark_sampling(engine, shards, SamplingConfig(steps=(3, 1), max_slices=4, repeats=1))
    assert (measured["patients"], measured["volumes"], measured["slices"]) == (2, 3, 12)
    held_out = [row | {"label_names": dict(row["label_names"])} for row in ROWS if row["split"] == "test"]
    for number in (1, 3):
        scored = EvaluateConfig(reconstruct_steps=number, max_slices=4, uncertainty_samples=0)
        context = CaseContext(engine=engine, config=scored, settings={}, frequencies=np.full(5, 0.2))
        records = [record for row in held_out for record in reconstruct_case(context, row).records]
        for condition, found in measured["accelerations"].items():
            for name in ("psnr", "ssim"):
                by_method = {
                    method: np.mean([r.values[name] for r in records if (r.condition, r.method) == (condition, method)])
                    for method in (MODEL, "zero_filled")
                }
                assert found["steps"][str(number)][name] == pytest.approx(by_method[MODEL], abs=1e-4)
                assert found["zero_filled"][name] == pytest.approx(by_method["zero_filled"], abs=1e-4)


def test_a_gain_is_the_difference_from_the_fewest_steps(engine: Engine, shards: Shards) -> None:
    measured = benchmark_sampling(engine, shards, SamplingConfig(steps=(1, 2), max_slices=4, repeats=1))
    for found in measured["accelerations"].values():
        first, second = found["steps"]["1"], found["steps"]["2"]
        assert first["psnr_gain"] == {"mean": 0.0, "interval": [0.0, 0.0]}
        assert second["psnr_gain"]["mean"] == pytest.approx(second["psnr"] - first["psnr"], abs=2e-4)
        assert second["psnr_gain"]["mean"] != 0
        low, high = second["psnr_gain"]["interval"]
        assert low <= second["psnr_gain"]["mean"] <= high


@pytest.mark.parametrize("number", [1, 4])
def test_every_step_is_one_more_evaluation_of_the_network(engine: Engine, shards: Shards, number: int) -> None:
    calls: list[Any] = []
    handle = engine.model.image_decoder.reconstruct_trunk.register_forward_hook(lambda *_: calls.append(1))
    with handle:
        benchmark_sampling(engine, shards, SamplingConfig(steps=(number,), repeats=2, **ONE_VOLUME))
    assert len(calls) == number * (1 + 2)  # scored once, timed twice


def test_the_plot_shows_the_numbers(
    checkpoint: Path, shards: Shards, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = str(Path(shards.rows[0].path).parents[1])
    options = ["--steps", "1", "2", "--limit", "2", "--slices", "3", "--repeats", "1", "--out", str(tmp_path / "out")]
    assert job.main(["sampling", folder, "--model", str(checkpoint), *options]) == 0
    measured = json.loads((tmp_path / "out" / "sampling.json").read_text())
    assert measured["machine"] in capsys.readouterr().out
    assert (tmp_path / "out" / "sampling.png").stat().st_size > 1000
    axes = sampling_figure(measured).axes[0]
    lines = {line.get_label(): line for line in axes.lines}
    for name, found in measured["accelerations"].items():
        points = [[step["ms_per_slice"], step["psnr"]] for step in found["steps"].values()]
        np.testing.assert_allclose(lines[f"{name}, OmniMRI"].get_xydata(), points)
    texts = [text.get_text() for text in axes.texts]
    assert [text.partition("\n")[0] for text in texts] == ["1 step", "2 steps"] * 2


def test_what_cannot_be_sampled_is_refused(
    checkpoint: Path, shards: Shards, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = str(Path(shards.rows[0].path).parents[1])
    common = ["sampling", folder, "--limit", "1", "--slices", "2", "--repeats", "1", "--out", str(tmp_path / "out")]
    assert job.main([*common, "--model", str(tmp_path / "none")]) == 1
    assert "expected an OmniMRI checkpoint" in capsys.readouterr().err
    assert job.main([*common, "--model", str(checkpoint), "--steps", "99"]) == 1
    assert "num_steps=99: expected 1 to 50" in capsys.readouterr().err
    images = write_phantoms(tmp_path / "images", [phantom_row(0, split="test", patient=0, kspace=False)])
    with pytest.raises(ValueError, match="no volume to reconstruct"):
        benchmark_sampling(Engine.load(checkpoint), images, SamplingConfig())
    with pytest.raises(ValueError, match="repeats must not be empty or 0"):
        SamplingConfig(repeats=0)

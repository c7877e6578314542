"""Samples that show several contrasts of a study or several slices: where they come from, and that they train."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from omnimri.models import special_tokens as special
from omnimri.models.config import preset
from omnimri.models.engine import Engine
from omnimri.models.vocabulary import CONTRASTS
from omnimri.platform.data.shards import Shards, load_row, row_to_scan, studies
from omnimri.platform.data.stream import SampleMaker, StreamConfig, stream_batches
from omnimri.platform.overrides import apply_overrides
from omnimri.platform.training.omnimri_kit import OmniMRIKit
from omnimri.platform.training.recipes import recipe
from omnimri.platform.training.schedule import build_schedule
from omnimri.platform.training.stages import STAGES
from omnimri.platform.training.trainer import run_stage, run_stages
from tests.platform.shards_fakes import write_shards
from tests.platform.smallest import SMALLEST, smallest_run

NEW = ("paired.interleaved", "paired.slices", "instruct.study")
LOCAL = StreamConfig(num_tasks=0, prefetch=0)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shards(tmp_path_factory.mktemp("interleaved") / "balls", patients=4)


def maker(data: Path, *sources: str, split: str = "train", seed: int = 0) -> SampleMaker:
    kit = OmniMRIKit()
    return SampleMaker(
        sources={name: kit.source_rows(name, [str(data)], SMALLEST, split) for name in sources}, seed=seed
    )


def test_rows_of_a_study_stay_together_and_apart_from_others(data: Path) -> None:
    rows = Shards.open(data).rows
    found = studies(rows)
    assert [study.rows[0].study_id for study in found] == [f"study-{i}" for i in range(4)]
    assert sorted(ref.row_id for study in found for ref in study.rows) == sorted(ref.row_id for ref in rows)
    assert all(len({(ref.study_id, ref.split) for ref in study.rows}) == 1 for study in found)
    elsewhere = [replace(ref, dataset="other") for ref in rows]
    assert len(studies([*rows, *elsewhere])) == 8
    assert studies(rows[:1]) == []


def test_the_held_out_patient_is_in_no_training_sample(data: Path) -> None:
    train, val = (
        OmniMRIKit().source_rows("paired.interleaved", [str(data)], SMALLEST, split).rows for split in ("train", "val")
    )
    assert {ref.study_id for study in train for ref in study.rows} == {"study-0", "study-1", "study-2"}
    assert {ref.study_id for study in val for ref in study.rows} == {"study-3"}


def test_an_interleaved_sample_pairs_each_volume_with_its_own_text(data: Path) -> None:
    make = maker(data, "paired.interleaved")
    seen, orders = set(), set()
    for index in range(24):
        sample = make("paired.interleaved", index)
        count = len(sample["texts"])
        assert 2 <= count <= 4
        assert sample["volume"].shape == (count, 1, *SMALLEST.inputs.volume_shape)
        assert len(set(sample["contrast"].tolist())) == count
        reported = [text for text in sample["texts"] if text.startswith("Axial")]
        for text in reported:
            assert CONTRASTS[sample["contrast"][sample["texts"].index(text)]] in text
        seen.add(count)
        orders.add(sample["image_first"])
    assert seen == {2, 3, 4}
    assert orders == {True, False}


def test_only_the_rows_that_are_shown_are_read(data: Path, tmp_path: Path) -> None:
    """A study may have twenty series: those that were not drawn may even be gone."""
    source = OmniMRIKit(view={"volumes_per_sequence": 2}).source_rows(
        "paired.interleaved", [str(data)], SMALLEST, "train"
    )
    readers = source.load(source.rows[0])
    asked: list[int] = []

    def reader(number: int) -> Any:
        def read() -> Any:
            asked.append(number)
            return readers[number]()

        return read

    source.make([reader(i) for i in range(4)], np.random.default_rng(0))
    assert len(asked) == len(set(asked)) == 2


def test_a_row_that_fails_names_its_study(data: Path) -> None:
    make = maker(data, "paired.interleaved")
    bound = make.sources["paired.interleaved"]
    broken = tuple(replace(ref, path="/nowhere") for ref in bound.rows[0].rows)
    bound = replace(bound, rows=[replace(bound.rows[0], rows=broken)])
    with pytest.raises(FileNotFoundError) as error:
        SampleMaker(sources={"paired.interleaved": bound}, seed=0)("paired.interleaved", 0)
    assert "from row 'row-0-0 row-0-1 row-0-2 row-0-3'" in error.value.__notes__[0]


def test_a_mixture_with_the_new_sources_resumes_exactly(data: Path) -> None:
    schedule = build_schedule(dict.fromkeys((*NEW, "paired"), 1.0), dict.fromkeys((*NEW, "paired"), 2), 16, seed=3)

    def read(first: int) -> list[Any]:
        return list(stream_batches(schedule.slots(first), maker(data, *NEW, "paired"), list, config=LOCAL))

    whole, rest = read(0), read(9)
    assert len(rest) == 7
    for before, after in zip(whole[9:], rest, strict=True):
        for left, right in zip(before, after, strict=True):
            assert left.keys() == right.keys()
            assert all(np.array_equal(left[name], right[name]) for name in left)


def test_slices_of_a_volume_come_in_order_with_one_text(data: Path) -> None:
    sample = maker(data, "paired.slices")("paired.slices", 0)
    height, width = SMALLEST.inputs.slice_shape
    assert sample["volume"].shape == (4, 1, 1, height, width)
    assert sample["spacing_mm"][0].tolist() == [12.0, 4.0, 4.0]
    assert sample["image_kind"] == special.SLICE
    assert len(sample["texts"]) == 1


def test_a_study_sample_answers_about_the_volume_it_shows_first(data: Path) -> None:
    make = maker(data, "instruct.study")
    reports = 0
    for index in range(30):
        sample = make("instruct.study", index)
        assert len(sample["facts"]) == len(sample["volume"]) >= 2
        for fact, contrast in zip(sample["facts"], sample["contrast"], strict=True):
            assert fact.get("contrast", CONTRASTS[contrast]) == CONTRASTS[contrast]
        if sample["task"] == "report":
            reports += 1
            assert CONTRASTS[sample["contrast"][0]] in sample["answer"]
    assert reports > 0


def test_the_new_sources_are_weighted_by_name_and_shares_are_exact() -> None:
    run = recipe("tiny", "mixture", ["data"], "out")
    kinds = OmniMRIKit().kinds()
    before = run.train.multimodal.shares(STAGES["multimodal"], kinds)
    assert before == {"paired": 0.8, "instruct.text": 0.2}
    weights = {"paired.interleaved": 2, "paired.slices": 1, "instruct.study": 1}
    changed = apply_overrides(
        run,
        [
            *(f"train.multimodal.weights.{name}={weight}" for name, weight in weights.items()),
            "pack_length=512",
        ],
    )
    assert changed.pack_length == 512
    stage = changed.train.multimodal
    shares = stage.shares(STAGES["multimodal"], kinds)
    assert shares == pytest.approx(
        {"paired": 0.2, "paired.interleaved": 0.4, "paired.slices": 0.2, "instruct.text": 0.1, "instruct.study": 0.1}
    )
    counts = build_schedule(shares, stage.rows_per_step, stage.num_slots, 0).counts()
    assert counts == {name: round(share * stage.num_slots) for name, share in shares.items()}


@pytest.mark.parametrize("preset_name", ["tiny", "small", "base", "7b"])
def test_every_recipe_leaves_them_out_until_they_are_asked_for(preset_name: str) -> None:
    run, kinds = recipe(preset_name, "x", ["data"], "out"), OmniMRIKit().kinds()
    for name, stage in STAGES.items():
        assert not set(NEW) & set(run.stage(name).shares(stage, kinds))
        assert set(NEW) <= set(run.stage(name).rows_per_step) & set(run.stage(name).weights)


def test_a_row_without_tokens_is_refused() -> None:
    run = recipe("tiny", "x", ["data"], "out")
    with pytest.raises(ValueError, match=r"pack_length must be 1 or more, or none; found 0"):
        replace(run, pack_length=0)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning", "ignore:`torch.distributed:FutureWarning")
def test_stages_three_and_four_train_on_them(data: Path, tmp_path: Path) -> None:
    """Packed or not, a run begins with the same text loss, and it falls; the last stage's model serves studies."""
    run = smallest_run(data, tmp_path)
    weights = {**run.train.multimodal.weights, **dict.fromkeys(NEW, 1.0)}
    stages = {
        name: replace(run.stage(name), steps=2 if name in ("vision", "align") else 19, log_every=10) for name in STAGES
    }
    for name in ("align", "multimodal"):
        stages[name] = replace(stages[name], weights=weights)
    stages["align"] = replace(stages["align"], steps=4)
    only_text = dict.fromkeys(weights, 0.0) | {"instruct.text": 0.5, "instruct.study": 0.5}
    stages["instruct"] = replace(stages["instruct"], weights=only_text, steps=4)
    run = replace(run, train=replace(run.train, **stages))
    *_, aligned = run_stages(["vision", "align"], run)
    losses: dict[int | None, dict[str, float]] = {}
    for pack_length in (None, 100):
        packed = replace(run, pack_length=pack_length, out=str(tmp_path / f"{pack_length}"))
        result = run_stage("multimodal", packed, init=Path(aligned.model_folder))
        losses[pack_length] = result.losses["loss_text"]
        assert losses[pack_length]["last_tenth"] < losses[pack_length]["first_tenth"] - 0.1
    np.testing.assert_allclose(losses[100]["first_tenth"], losses[None]["first_tenth"], rtol=1e-5)  # of one step
    answered = run_stage("instruct", packed, init=Path(result.model_folder))
    _serves_several_contrasts(Engine.load(answered.model_folder), data)


def _serves_several_contrasts(engine: Engine, data: Path) -> None:
    """A request is laid out and embedded as training lays it out, and is one sequence from position 0 on."""
    first, second, *_ = [row_to_scan(load_row(ref)) for ref in Shards.open(data).rows]
    alone = engine.encode(first, "Report this MRI.", "report")
    both = engine.encode(first, "Report this MRI.", "report", others=[second])
    pad = engine.tokenizer.convert_tokens_to_ids(special.IMAGE_PAD)
    assert (both.token_ids == pad).sum() == 2 * (alone.token_ids == pad).sum()
    start = int(np.flatnonzero(alone.token_ids == pad)[-1]) + 1
    np.testing.assert_array_equal(both.embeds[:start], alone.embeds[:start])
    chances = engine.score_choices(both, ["normal", "old infarct"])
    assert chances.sum() == pytest.approx(1)
    swapped = engine.encode(second, "Report this MRI.", "report", others=[first])
    assert not np.array_equal(swapped.embeds, both.embeds)


def test_the_corpus_presets_hold_a_whole_study() -> None:
    """Four volumes and their texts fit the positions that every preset's backbone has."""
    for name in ("tiny", "small", "base", "7b"):
        config = preset(name)
        grid = [-(-s // t) for s, t in zip(config.inputs.volume_shape, config.vision.token_stride, strict=True)]
        assert 4 * (int(np.prod(grid)) + 512) <= config.backbone.max_positions

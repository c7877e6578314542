"""Fields of a nested config are changed by name, and only to values of their type."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest

from omnimri.platform.overrides import apply_overrides, flatten, known_keys
from omnimri.platform.training.recipes import recipe


@dataclass(frozen=True, kw_only=True)
class Batch:
    global_size: int = 8
    micro_size: int = 2

    def __post_init__(self) -> None:
        if self.global_size % self.micro_size:
            raise ValueError(f"global_size ({self.global_size}) must be a multiple of micro_size ({self.micro_size}).")


@dataclass(frozen=True, kw_only=True)
class Stage:
    lr: float = 1e-3
    weights: dict[str, float] = field(default_factory=lambda: {"paired": 1.0, "instruct.segment": 1.0})
    options: dict[str, Any] = field(default_factory=dict)
    batch: Batch = field(default_factory=Batch)


@dataclass(frozen=True, kw_only=True)
class Run:
    name: str
    stage: dict[str, Stage] = field(default_factory=lambda: {"align": Stage(), "instruct": Stage()})
    out: Path = Path("runs")
    shape: tuple[int, int, int] = (8, 16, 16)
    folders: tuple[str, ...] = ()
    limit: int | None = None
    precision: Literal["bf16", "fp32"] = "bf16"
    resume: bool = False
    budget: int | float | None = None


RUN = Run(name="first")


@pytest.mark.parametrize(
    ("assignment", "key", "expected"),
    [
        ("name=second", "name", "second"),
        ("out=a/b", "out", Path("a/b")),
        ("shape=4,8,8", "shape", (4, 8, 8)),
        ("shape=[4, 8, 8]", "shape", (4, 8, 8)),
        ("folders=a,b", "folders", ("a", "b")),
        ("folders=", "folders", ()),
        ("limit=1e4", "limit", 10_000),
        ("limit=none", "limit", None),
        ("precision=fp32", "precision", "fp32"),
        ("resume=yes", "resume", True),
        ("budget=0.5", "budget", 0.5),
        ("budget=3", "budget", 3),
        ("stage.align.lr=1e-4", "stage.align.lr", 1e-4),
        ("stage.align.weights.instruct.segment=0", "stage.align.weights.instruct.segment", 0.0),
        ("stage.instruct.batch.micro_size=4", "stage.instruct.batch.micro_size", 4),
        ("name=a=b", "name", "a=b"),
    ],
)
def test_a_value_is_read_as_the_type_of_its_field(assignment: str, key: str, expected: object) -> None:
    changed = flatten(apply_overrides(RUN, [assignment]))
    assert changed[key] == expected
    assert type(changed[key]) is type(expected)
    assert {k: v for k, v in changed.items() if k != key} == {k: v for k, v in flatten(RUN).items() if k != key}


def test_a_mapping_is_replaced_by_json_with_its_values_typed() -> None:
    changed = apply_overrides(RUN, ['stage.align.weights={"image": 1}', 'stage.align.options={"depth": 2, "on": true}'])
    assert changed.stage["align"].weights == {"image": 1.0}
    assert changed.stage["align"].options == {"depth": 2, "on": True}
    assert changed.stage["instruct"] == RUN.stage["instruct"]


def test_checks_of_a_part_see_all_its_new_values_at_once() -> None:
    changed = apply_overrides(RUN, ["stage.align.batch.micro_size=3", "stage.align.batch.global_size=9"])
    assert changed.stage["align"].batch == Batch(global_size=9, micro_size=3)
    with pytest.raises(ValueError, match=r"global_size \(8\) must be a multiple of micro_size \(3\)"):
        apply_overrides(RUN, ["stage.align.batch.micro_size=3"])


@pytest.mark.parametrize(
    ("assignments", "message"),
    [
        (["name"], r"--set name: expected key=value, for example --set name="),
        (
            ["stage.align.lrr=1"],
            r"unknown key\. Did you mean stage\.align\.lr\? Known keys: name, .*stage\.align\.lr, ",
        ),
        (["lr=1"], r"Did you mean stage\.align\.lr\?"),
        (["stage.align=1"], "unknown key"),
        (["limit=2.5"], r"--set limit=2\.5: expected a whole number"),
        (["stage.align.lr=fast"], r"--set stage\.align\.lr=fast: expected a number"),
        (["shape=1,2"], "expected 3 values separated by commas"),
        (["precision=fp8"], "expected one of bf16, fp32"),
        (["resume=maybe"], "expected true or false"),
        (["stage.align.weights=3"], "expected a JSON object"),
        (["stage.align.weights={}", "stage.align.weights.paired=1"], "give one of them"),
    ],
)
def test_a_wrong_assignment_says_what_was_expected(assignments: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        apply_overrides(RUN, assignments)


def as_written(value: object) -> str:
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    return json.dumps(value) if isinstance(value, dict) else str(value)


def test_every_value_can_be_set_to_what_it_is() -> None:
    values = flatten(RUN)
    assert set(values) <= set(known_keys(RUN))
    assert apply_overrides(RUN, [f"{key}={as_written(value)}" for key, value in values.items()]) == RUN


def test_an_entry_may_be_named_as_if_it_lay_inside_another() -> None:
    """Sources are named so: `paired` and `paired.interleaved` are two entries of one mapping."""
    run = recipe("tiny", "x", ["data"], "out")
    weights = "train.multimodal.weights"
    changed = apply_overrides(run, [f"{weights}.paired=0", f"{weights}.paired.interleaved=0.5"])
    before, after = run.train.multimodal.weights, changed.train.multimodal.weights
    assert after == before | {"paired": 0.0, "paired.interleaved": 0.5}

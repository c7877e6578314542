"""Pseudonyms change with the key, splits do not."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest

from omnimri.platform.data.deid import KEY_VARIABLE, assign_splits, load_key, pseudonym, whitelisted

FRACTIONS = (0.7, 0.1, 0.2)


def _patients(count: int) -> list[tuple[str, str]]:
    return [("set", f"p{number}") for number in range(count)]


def test_key_file_is_made_once_and_private(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(KEY_VARIABLE, raising=False)
    key = load_key(tmp_path / "shards.key")
    assert load_key(tmp_path / "shards.key") == key
    assert stat.S_IMODE((tmp_path / "shards.key").stat().st_mode) == 0o600
    monkeypatch.setenv(KEY_VARIABLE, "another key of some length")
    assert load_key(tmp_path / "shards.key") == b"another key of some length"
    monkeypatch.setenv(KEY_VARIABLE, "short")
    with pytest.raises(ValueError, match=f"{KEY_VARIABLE}: the pseudonym key has 5 characters"):
        load_key(tmp_path / "shards.key")


def test_pseudonym_depends_on_every_part_and_on_the_key() -> None:
    assert pseudonym(b"k", "a", "b") == pseudonym(b"k", "a", "b")
    assert (
        len({pseudonym(b"k", "a", "b"), pseudonym(b"l", "a", "b"), pseudonym(b"k", "ab"), pseudonym(b"k", "a", "c")})
        == 4
    )


@pytest.mark.parametrize(
    ("count", "expected"), [(1, (1, 0, 0)), (2, (2, 0, 0)), (3, (1, 1, 1)), (10, (7, 1, 2)), (24, (17, 2, 5))]
)
def test_ranked_split_has_the_shares_asked_for(count: int, expected: tuple[int, int, int]) -> None:
    splits = list(assign_splits(_patients(count), FRACTIONS, seed=0, by="rank").values())
    assert tuple(splits.count(name) for name in ("train", "val", "test")) == expected


def test_split_does_not_depend_on_order_and_changes_with_the_seed() -> None:
    patients = _patients(40)
    splits = assign_splits(patients, FRACTIONS, seed=0, by="rank")
    assert assign_splits(patients[::-1], FRACTIONS, seed=0, by="rank") == splits
    assert assign_splits(patients, FRACTIONS, seed=1, by="rank") != splits


def test_hashed_split_keeps_every_patient_where_it_is_when_the_corpus_grows() -> None:
    before = assign_splits(_patients(40), FRACTIONS, seed=0, by="hash")
    after = assign_splits(_patients(400), FRACTIONS, seed=0, by="hash")
    assert {patient: after[patient] for patient in before} == before
    assert 250 < list(after.values()).count("train") < 310


def test_only_known_facts_pass() -> None:
    assert set(whitelisted({"contrast": "T1w", "PatientName": "Doe"})) >= {"contrast", "sex"}
    assert "PatientName" not in whitelisted({"PatientName": "Doe"})

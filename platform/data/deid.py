"""Pseudonyms, splits and free text. Raw identifiers stay in the process that read them; rows carry keyed hashes.

A pseudonym is an HMAC-SHA256 under a secret key, so that nobody without the key can test a guess. The split must not
change with the key: it is drawn from a hash under a public salt, and that hash is not stored.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import re
import secrets
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pydicom.dataset import Dataset

from omnimri.platform.data.formats.facts import Facts
from omnimri.platform.data.schema import FACTS

KEY_VARIABLE = "OMNIMRI_DEID_KEY"
"""Environment variable that holds the key; it wins over the key file."""

METHOD = {
    "profile": "DICOM PS3.15 Annex E, Basic Application Level Confidentiality Profile",
    "codes": ["113100", "113103", "113105"],  # CID 7050: basic profile; clean graphics; clean descriptors
    "by": "Only listed facts leave a header; identifiers become keyed pseudonyms; dates and private elements are "
    "dropped; pixels whose header says that text is burnt in are refused; words of the header are removed from texts.",
}
"""What a manifest says of how its rows were de-identified."""

SPLITS = ("train", "val", "test")
_SPLIT_SALT = b"omnimri split 1"
_MIN_KEY_LENGTH = 16


def has_key(path: Path) -> bool:
    """Whether a pseudonym key is given, in the environment or in its file."""
    return bool(os.environ.get(KEY_VARIABLE, "").strip()) or path.is_file()


def load_key(path: Path) -> bytes:
    """The pseudonym key: from the environment, else from the key file, which is made (mode 0600) if it is not there.

    Keep the file apart from the data, or delete it: with it, pseudonyms of known patients can be computed again.

    Raises:
        ValueError: If the key is shorter than 16 characters.
    """
    given = os.environ.get(KEY_VARIABLE, "").strip()
    where = KEY_VARIABLE if given else str(path)
    if not given:
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with os.fdopen(descriptor, "w", encoding="ascii") as file:
                file.write(secrets.token_hex(32))
        given = path.read_text(encoding="ascii").strip()
    if len(given) < _MIN_KEY_LENGTH:
        raise ValueError(f"{where}: the pseudonym key has {len(given)} characters, expected {_MIN_KEY_LENGTH} or more.")
    return given.encode()


def pseudonym(key: bytes, *parts: str) -> str:
    """Sixteen hexadecimal digits of HMAC-SHA256 over the parts."""
    return hmac.new(key, "\x1f".join(parts).encode(), hashlib.sha256).hexdigest()[:16]


def assign_splits(
    patients: Iterable[tuple[str, str]],
    fractions: tuple[float, float, float],
    *,
    seed: int,
    by: str,
    counts: Mapping[str, Counter[str]] | None = None,
) -> dict[tuple[str, str], str]:
    """Put every patient of every data set in one split.

    Args:
        patients: `(dataset, raw patient key)`.
        fractions: Shares of train, val and test.
        seed: Another seed is another split.
        by: `rank` cuts the patients of a data set, ordered by hash, at exactly these shares (at least one patient in
            every split that has a share, from three patients on). `hash` decides each patient on its own, so that
            a data set may grow and no patient changes sides, at the price of shares that hold only on average.
        counts: Other patients of a data set that have a split already; `rank` brings the sum nearest to the shares.
    """
    draws: dict[str, dict[str, float]] = {}
    for dataset, patient in patients:
        draws.setdefault(dataset, {})[patient] = _draw(seed, dataset, patient)
    splits: dict[tuple[str, str], str] = {}
    for dataset, of_patient in draws.items():
        if by == "hash":
            chosen = {patient: _split_at(value, fractions) for patient, value in of_patient.items()}
        else:
            ordered = sorted(of_patient, key=lambda patient: (of_patient[patient], patient))
            there = (counts or {}).get(dataset, Counter())
            wanted = Counter(_ranked_splits(len(ordered) + there.total(), fractions))
            wanted.subtract(there)
            # Where one split holds too many already, the others want more than there are: train goes short first.
            open_places = [split for split in SPLITS for _ in range(wanted[split])][-len(ordered) :]
            chosen = dict(zip(ordered, open_places, strict=True))
        splits.update({(dataset, patient): split for patient, split in chosen.items()})
    return splits


def _draw(seed: int, dataset: str, patient: str) -> float:
    """A number in [0, 1) that only the seed, the data set and the patient decide."""
    digest = hmac.new(_SPLIT_SALT, f"{seed}\x1f{dataset}\x1f{patient}".encode(), hashlib.sha256).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def _split_at(value: float, fractions: tuple[float, float, float]) -> str:
    train, val, _ = fractions
    return "train" if value < train else "val" if value < train + val else "test"


def _ranked_splits(num_patients: int, fractions: tuple[float, float, float]) -> list[str]:
    least = 1 if num_patients >= len(SPLITS) else 0
    val, test = (max(least, round(share * num_patients)) if share > 0 else 0 for share in fractions[1:])
    if fractions[0] <= 0:
        val = num_patients - test
    return ["train"] * (num_patients - val - test) + ["val"] * val + ["test"] * test


PERSON_NAMES = (
    "PatientName", "OtherPatientNames", "PatientBirthName", "PatientMotherBirthName", "ReferringPhysicianName",
    "PerformingPhysicianName", "NameOfPhysiciansReadingStudy", "OperatorsName", "RequestingPhysician",
)  # fmt: skip
DATES = ("PatientBirthDate", "StudyDate", "SeriesDate", "AcquisitionDate", "ContentDate", "AcquisitionDateTime")
OTHER_IDENTIFIERS = (
    "PatientID", "OtherPatientIDs", "AccessionNumber", "StudyID", "InstitutionName", "InstitutionAddress",
    "StationName", "PatientAddress", "PatientTelephoneNumbers", "DeviceSerialNumber", "StudyInstanceUID",
    "SeriesInstanceUID", "SOPInstanceUID", "FrameOfReferenceUID", "InstitutionalDepartmentName",
)  # fmt: skip
REMOVED = "[removed]"
_SHORTEST_IDENTIFIER = 3


def header_identifiers(header: Mapping[str, Any] | Dataset) -> tuple[str, ...]:
    """What in a header names a person, a place or a day, as free text about the series might repeat it.

    Args:
        header: Answers `get(keyword)` with DICOM keywords: a DICOM header or a JSON sidecar.

    Returns:
        Words of person names, dates as they are commonly written, and other identifiers whole.
    """
    found: set[str] = set()
    for keyword in PERSON_NAMES:
        found.update(re.split(r"[\s^=,;]+", str(header.get(keyword) or "")))
    for keyword in DATES:
        found.update(_written_dates(str(header.get(keyword) or "")))
    found.update(str(header.get(keyword) or "").strip() for keyword in OTHER_IDENTIFIERS)
    return tuple(
        sorted((text for text in found if len(text) >= _SHORTEST_IDENTIFIER), key=lambda text: (-len(text), text))
    )


def _written_dates(value: str) -> list[str]:
    """A DICOM or ISO date as reports write it: 19700131, 1970-01-31, 31.01.1970, 31/01/1970, 01/31/1970..."""
    match = re.match(r"(\d{4})-?(\d{2})-?(\d{2})", value)
    if not match:
        return []
    year, month, day = match.groups()
    numbers = [[year, month, day], [day, month, year], [month, day, year]]
    numbers += [[part.lstrip("0") for part in parts] for parts in numbers]
    return [separator.join(parts) for parts in numbers for separator in ("", "-", ".", "/")]


def scrub(value: Any, identifiers: Iterable[str]) -> Any:
    """Replace identifiers by `[removed]` in a text, or in every text of nested lists and dictionaries."""
    if isinstance(value, Mapping):
        return {key: scrub(item, identifiers) for key, item in value.items()}
    if isinstance(value, list):
        return [scrub(item, identifiers) for item in value]
    words = "|".join(re.escape(text) for text in identifiers)
    if not isinstance(value, str) or not words:
        return value
    return re.sub(rf"(?<![A-Za-z0-9])(?:{words})(?![A-Za-z0-9])", REMOVED, value, flags=re.IGNORECASE)


def whitelisted(facts: Mapping[str, object]) -> Facts:
    """Only the facts that the schema knows; anything else that a reader put there stays behind."""
    return {name: facts.get(name) for name in FACTS}  # type: ignore[misc]

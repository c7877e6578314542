r"""The catalogue of public MRI data sets: one row per set in `catalogue.toml`, which is data and not code.

A row says what a set holds and how its files are laid out; `layout` turns it into keys and annotations of the files
that are found. Adding a set is adding a row, and a fixture in tests/platform/catalogue_fixtures.py::

    [[dataset]]
    name = "my-set"                       # what `omnimri ingest --dataset` takes
    title = "My Set"
    family = "folder-nii"                 # of FAMILIES
    anatomy = ["knee"]
    tasks = ["segmentation"]              # of TASKS
    layout = "{patient}/{T1,T2}.nii.gz, {patient}/cartilage.nii.gz"
    licence = "CC BY 4.0"                 # "unknown" unless somebody has read it
    access = "Zenodo"
    citation = "doi"
    evidence = "opened"                   # how the row was checked
    facts = { body_part = "knee" }        # fills what headers leave open
    [[dataset.images]]
    pattern = '{patient:\d+}/{contrast}.nii.gz'
    contrasts = { T1 = "T1w", T2 = "T2w" }
    label_map = ["{patient}/cartilage.nii.gz"]
    label_names = { 1 = "femoral cartilage", 2 = "tibial cartilage" }

Every field of a pattern that is no wildcard is one folder or part of a name; see `patterns.Pattern`.
"""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from functools import cache
from pathlib import Path
from typing import Any

from omnimri.platform.data.deid import SPLITS

CATALOGUE_PATH = Path(__file__).with_name("catalogue.toml")

UNKNOWN = "unknown"

ANATOMIES = (
    "brain", "fetal brain", "head and neck", "spine", "breast", "heart", "abdomen", "liver", "kidney", "cervix",
    "prostate", "knee", "extremity", "whole body", "phantom",
)  # fmt: skip

TASKS = ("segmentation", "detection", "diagnosis", "reconstruction", "report", "pretraining")
"""What a set has targets for; `pretraining` means images alone."""

EVIDENCE = ("opened", "repository", "file tree", "index", "page", "recall")
"""How a row was checked: files opened; a repository that reads the set; a published file tree; the index of Imaging
Data Commons; a public page; from memory only, not verified."""

UNVERIFIED = ("page", "recall")
"""Evidence that does not vouch for the layout."""


@dataclass(frozen=True)
class Family:
    """Sets that one reader serves."""

    formats: tuple[str, ...]
    """Source formats as readers name them."""
    summary: str


_HDF5 = ("fastmri", "cc359", "skm-tea", "fastmri-prostate")

FAMILIES = {
    "brats-nii": Family(("nifti",), "NIfTI, a folder per case, contrasts and one label map by the end of the name"),
    "folder-nii": Family(("nifti", "metaimage"), "NIfTI in folders, everything by a pattern of the path"),
    "flat-nii": Family(("nifti",), "NIfTI in one folder, everything by a pattern of the name"),
    "msd": Family(("nifti",), "Medical Segmentation Decathlon: labels and channels of a 4D file from dataset.json"),
    "nnunet": Family(("nifti",), "nnU-Net: labels and channels of numbered files from dataset.json"),
    "bids": Family(("nifti",), "BIDS: entities of the names, participants.tsv, derivatives"),
    "totalseg": Family(("nifti",), "one volume per subject and one mask file for each structure"),
    "cardiac-nii": Family(("nifti",), "NIfTI of heart phases with Info.cfg or a table of phases and diagnoses"),
    "dicom-tcia": Family(("dicom",), "DICOM of TCIA or Imaging Data Commons, keys from the headers"),
    "dicom-folder": Family(("dicom",), "DICOM in folders that name the patient"),
    "nrrd": Family(("nrrd",), "NRRD, attached or detached"),
    "metaimage": Family(("metaimage", "nifti"), "MetaImage (.mha, .mhd)"),
    "npy": Family(("numpy",), "one NumPy array per volume, tables of diagnoses"),
    "npz": Family(("numpy",), "NumPy archives of samples with their labels"),
    "kspace-h5": Family(_HDF5, "k-space in HDF5, every array layout told by its content"),
    "kspace-mat": Family(("cmrxrecon", "matlab"), "k-space, or images that the rule names, in MATLAB files"),
    "ismrmrd-h5": Family(("ismrmrd",), "k-space as ISMRMRD acquisitions"),
    "csv-boxes": Family(_HDF5, "a table of boxes over the volumes of another set"),
    "json-report": Family(("nifti",), "reports in a JSON or CSV file beside the volumes"),
}


@dataclass(frozen=True, kw_only=True)
class ImageRule:
    """Which files are volumes, and where their labels lie."""

    pattern: str
    patient: str = "{patient}"
    """What tells patients apart, of the fields; without those fields, the header or the file name does."""
    contrasts: Mapping[str, str] = field(default_factory=dict)
    """Word that `{contrast}` stands for in the pattern, to our name of the contrast; empty where we have none."""
    values: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    """Field of the pattern to what its words mean."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """Facts that the layout states of these files; they win over what is guessed from a name."""
    label_map: tuple[str, ...] = ()
    """Paths with the fields of the image, `**/` for any folders; the first that is there counts."""
    structures: str = ""
    """Pattern of mask files, one for each `{structure}`."""
    label_names: Mapping[str, str] = field(default_factory=dict)
    """Value of the label map to its meaning."""
    foreground: str = ""
    """What every value but zero of the label map means, where the values are not told apart."""
    classes: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    """Field of the pattern to the classes that its words mean."""
    card: str = ""
    """Path of the dataset.json that names labels and channels."""
    matlab_array: str = ""
    """Array of a MATLAB file that is the volume: complex k-space, or real numbers, which are an image only where this
    names them."""
    samples: bool = False
    """Arrays hold single slices or volumes along their first axis."""
    label_member: str = ""
    """Array of the same `.npz` or MATLAB file with one label map per sample."""
    class_member: str = ""
    """Array of the same `.npz` with one class per sample."""


@dataclass(frozen=True, kw_only=True)
class TableRule:
    """A table of facts, classes, boxes or reports, and how its rows find their volumes."""

    path: str
    """With fields of the image."""
    join: Mapping[str, str | int]
    """Field of the image to the name or number of the column that holds it; empty: the only row counts."""
    header: tuple[str, ...] = ()
    """Names of the columns where the file has none."""
    classes: tuple[Mapping[str, Any], ...] = ()
    """`column` and `values`: what its values mean, empty for a negative; rows count where `unless` is an empty column.
    Or `columns = "*"`: one column per class."""
    boxes: Mapping[str, Any] = field(default_factory=dict)
    """Columns `label slice x y width height` of boxes in slices; `flip_y`, and `grid` rows and columns they count in.
    Rows without `x` are no boxes."""
    report: tuple[str | int, ...] = ()
    """Columns of text, put one below the other."""
    facts: Mapping[str, str] = field(default_factory=dict)
    """Fact to its column."""
    label_frames: tuple[str, ...] = ()
    """Columns that hold the numbers of the labelled volumes of a 4D file, from zero."""
    split: Mapping[str, Any] = field(default_factory=dict)
    """`is`: official split of all volumes in the table. Or `column` and `values`: what its words mean, in the rows
    where the columns of `where` hold what it says."""


@dataclass(frozen=True, kw_only=True)
class Ignored:
    """Files that belong to the layout and are not read, with the reason."""

    pattern: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class DatasetEntry:
    """One public data set."""

    name: str
    title: str
    family: str
    anatomy: tuple[str, ...]
    tasks: tuple[str, ...]
    layout: str
    """As its authors lay it out, in words."""
    licence: str
    """`unknown` unless it was read; what is only remembered stands in `access`."""
    access: str
    citation: str
    evidence: str
    """Of EVIDENCE."""
    images: tuple[ImageRule, ...]
    tables: tuple[TableRule, ...] = ()
    ignored: tuple[Ignored, ...] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)
    """Fill what headers leave open."""
    splits: Mapping[str, str] = field(default_factory=dict)
    """Official split (train, val or test) by the name of a folder, or of an array of an archive as `file#array`; `*`
    stands for anything. The folder nearest to the file counts, and a split that a table states wins."""
    overlaps: tuple[str, ...] = ()
    """Names of entries, or free text, with volumes in common: keep them in one split."""
    unread: tuple[str, ...] = ()
    """Of `tasks`: targets that the set has and we do not read, for the reason that `notes` gives."""
    subjects: str = ""
    notes: str = ""

    def __post_init__(self) -> None:
        for value, known in ((self.family, FAMILIES), (self.evidence, EVIDENCE)):
            if value not in known:
                raise ValueError(f"{self.name}: {value!r} is none of {', '.join(known)}.")
        for values, words in ((self.anatomy, ANATOMIES), (self.tasks, TASKS)):
            if not values or set(values) - set(words):
                raise ValueError(f"{self.name}: {', '.join(values) or 'nothing'}, expected some of {', '.join(words)}.")
        if set(self.unread) - set(self.tasks) or (self.unread and not self.notes):
            raise ValueError(
                f"{self.name}: unread {', '.join(self.unread)} must be of its tasks, with notes that say why."
            )
        if unknown := sorted({*self.splits.values(), *self._splits_of_tables} - set(SPLITS)):
            raise ValueError(f"{self.name}: split {', '.join(unknown)}, expected some of {', '.join(SPLITS)}.")
        if not self.images:
            raise ValueError(f"{self.name}: no [[dataset.images]], so no file would be read.")

    @property
    def _splits_of_tables(self) -> set[str]:
        return {
            name
            for rule in self.tables
            if rule.split
            for name in rule.split.get("values", {"": rule.split.get("is")}).values()
        }

    @property
    def is_verified(self) -> bool:
        """Somebody looked at files, at a file tree or at code that reads them."""
        return self.evidence not in UNVERIFIED

    @property
    def stated_licence(self) -> str | None:
        """The licence for the rows of a corpus; None where it is unknown."""
        return None if self.licence == UNKNOWN else self.licence


def parse_catalogue(text: str) -> dict[str, DatasetEntry]:
    """Entries by name.

    Raises:
        ValueError: If the text is no TOML, or a row is not made as `DatasetEntry` says.
    """
    try:
        rows = tomllib.loads(text).get("dataset", [])
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"The catalogue is no TOML: {error}.") from error
    entries: dict[str, DatasetEntry] = {}
    for row in rows:
        entry = _entry(row)
        if entry.name in entries:
            raise ValueError(f"{entry.name} stands twice in the catalogue.")
        entries[entry.name] = entry
    return entries


def _entry(row: dict[str, Any]) -> DatasetEntry:
    parts = {"images": ImageRule, "tables": TableRule, "ignored": Ignored}
    nested = {
        key: tuple(_build(kind, part, f"{row.get('name')}: [[dataset.{key}]]") for part in row.get(key, []))
        for key, kind in parts.items()
    }
    return _build(DatasetEntry, {**row, **nested}, str(row.get("name")))


def _build(kind: Any, values: dict[str, Any], where: str) -> Any:
    known = {part.name for part in fields(kind)}
    if unknown := sorted(set(values) - known):
        raise ValueError(f"{where}: unknown {', '.join(unknown)}; known: {', '.join(sorted(known))}.")
    try:
        return kind(**{key: tuple(value) if isinstance(value, list) else value for key, value in values.items()})
    except TypeError as error:
        raise ValueError(f"{where}: {error}.") from error


@cache
def catalogue() -> Mapping[str, DatasetEntry]:
    """Every entry by its name, in the order of the file."""
    return parse_catalogue(CATALOGUE_PATH.read_text(encoding="utf-8"))


def find_dataset(name: str) -> DatasetEntry:
    """The entry of that name.

    Raises:
        ValueError: If there is none; the message names the closest.
    """
    if name in catalogue():
        return catalogue()[name]
    raise ValueError(
        f"The catalogue has no data set {name!r}.{suggestion(name)} `omnimri datasets` lists all {len(catalogue())}."
    )


def suggestion(name: str) -> str:
    """A sentence with the names that look like this one; empty without any."""
    close = difflib.get_close_matches(name.lower(), catalogue(), n=3, cutoff=0.7)
    return f" Did you mean {' or '.join(close)}?" if close else ""


def overlap_group(name: str) -> str:
    """One name for all catalogued sets that share images with a set, directly or through others; else the name itself.

    The same patient number in two sets of a group is taken for the same person when patients are split.
    """
    return _overlap_groups().get(name, name)


@cache
def _overlap_groups() -> Mapping[str, str]:
    """Name of a set to the first name of its group."""
    neighbours: dict[str, set[str]] = {name: set() for name in catalogue()}
    for name, entry in catalogue().items():
        for other in neighbours.keys() & set(entry.overlaps):
            neighbours[name].add(other)
            neighbours[other].add(name)
    groups: dict[str, str] = {}
    for name in sorted(neighbours):
        waiting = [] if name in groups else [name]
        while waiting:
            member = waiting.pop()
            if member not in groups:
                groups[member] = name
                waiting += neighbours[member]
    return groups

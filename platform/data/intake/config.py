"""How a corpus is made from files; every field can be set by `omnimri ingest --set`."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field, fields
from typing import Literal

from omnimri.platform.data.formats.dicom.web import DicomwebConfig
from omnimri.platform.data.formats.records import ReadLimits
from omnimri.platform.data.intake.deface import check_installed
from omnimri.platform.data.intake.quality import QualityLimits

CHANGES_VOXELS = {"changes_voxels": True}
"""Metadata of a field whose value changes what is stored of a file: part of the preprocessing version of its rows."""


@dataclass(frozen=True, kw_only=True)
class IngestConfig:
    """How a corpus is made from files."""

    dataset: str | None = None
    """Name of the data set; None takes it from dataset.json or dataset_description.json of the source. A name of the
    catalogue also reads the sources in the layout that the catalogue describes."""
    licence: str | None = None
    """Licence of the data set; None takes it from the same file."""
    seed: int = 0
    """Another seed splits the patients differently."""
    split_fractions: tuple[float, float, float] = (0.7, 0.1, 0.2)
    """Shares of patients in train, val and test."""
    split_by: Literal["rank", "hash", "official"] = "rank"
    """`rank`: exactly these shares of this corpus. `hash`: a patient keeps its split when the data set grows.
    `official`: the split that the layout of a catalogued set states (its test set is test even without labels), and
    `rank` among the patients of whom none is stated. A person who is in several sets, or parts of a set, goes to test
    if one of them says so, else to val if one does."""
    items_per_shard: int = 20
    """Series that one task reads into one Parquet file."""
    bytes_per_shard: int = 256 * 2**20
    """Bytes of source files after which a shard is full, whatever the number of series."""
    files_per_probe: int = 512
    """Headers that one task reads."""
    cpus_per_task: float = 1.0
    """Logical CPUs that Ray reserves for one task."""
    compression_level: int = 1
    """Of zstd. Noise does not compress: level 1 is as small as 9 within a few percent."""
    overwrite: bool = False
    """Replace a corpus that is in the way."""
    append: bool = False
    """Add to a corpus that is there: its rows stay, and its patients keep their splits."""
    dicomweb: DicomwebConfig = field(default_factory=DicomwebConfig)
    """How a DICOMweb service is asked."""
    limits: ReadLimits = field(default_factory=ReadLimits)
    max_coils: int | None = field(default=None, metadata=CHANGES_VOXELS)
    """Compress k-space of more coils to so many virtual ones; None keeps the coils as they are."""
    prewhiten: bool = field(default=True, metadata=CHANGES_VOXELS)
    """Whiten k-space by the noise scan of its file, before coils are compressed, and flag it; a file without noise scan
    stays as it is. On by default, because images are combined, coils compressed and reconstructions weighed as if noise
    were white; served models whiten uploads too."""
    matlab_array: str | None = None
    """Array to read of MATLAB files: complex k-space, or an image of real numbers. None takes the only complex array of
    three or more axes, or the one that the catalogue names."""
    quality: QualityLimits = field(default_factory=QualityLimits)
    """Beyond what a volume is flagged; it is kept."""
    describe: bool = True
    """Derive a description from headers, labels and reports where the annotation of a volume brings none."""
    deface: bool = False
    """Remove the face from images of heads; needs the extra `deface`. Simulated heads keep theirs."""
    undefaced: Literal["reject", "flag"] = "reject"
    """What becomes, with `deface`, of a head whose face cannot be removed: k-space, no brain found, or a cut through
    what is labelled. It is rejected into the ledger, or kept as it is under the flag that its face may show."""

    def __post_init__(self) -> None:
        if abs(sum(self.split_fractions) - 1) > 1e-6 or min(self.split_fractions) < 0:
            raise ValueError(f"split_fractions must be three shares that add up to 1, found {self.split_fractions}.")
        if min(self.items_per_shard, self.bytes_per_shard, self.files_per_probe) < 1:
            raise ValueError("items_per_shard, bytes_per_shard and files_per_probe must be 1 or more.")
        if self.overwrite and self.append:
            raise ValueError("overwrite replaces a corpus and append adds to it: set one of them.")
        if self.max_coils is not None and self.max_coils < 1:
            raise ValueError(f"max_coils must be 1 or more, or none, found {self.max_coils}.")
        if self.undefaced not in ("reject", "flag"):
            raise ValueError(f"undefaced must be reject or flag, found {self.undefaced}.")
        if self.deface:
            check_installed()

    @property
    def voxel_settings(self) -> dict[str, object]:
        """The settings that change voxels, where they are not the default: a field added later changes no version."""
        values = asdict(self)
        return {
            field.name: values[field.name]
            for field in fields(self)
            if field.metadata.get("changes_voxels") and getattr(self, field.name) != field.default
        }

    @property
    def voxel_digest(self) -> str:
        """Eight digits that tell apart settings which change voxels."""
        return hashlib.sha256(json.dumps(self.voxel_settings, sort_keys=True).encode()).hexdigest()[:8]

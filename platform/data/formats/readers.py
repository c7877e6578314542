"""Find the volumes of a file, folder or zip, and read them: DICOM, NIfTI, NRRD, MetaImage, NumPy, MATLAB and k-space.

Reading is in two steps. `probe_files` looks at headers only and `group` makes one work item of each series; `read_item`
then reads one item and returns what failed beside what was read. `ingest` runs both steps on many machines; `read_path`
runs them here.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

from pydicom.dataset import Dataset

from omnimri.platform.data.formats import matlab, nifti, volumes
from omnimri.platform.data.formats.dicom import labels as dicom_labels
from omnimri.platform.data.formats.dicom import reports as dicom_reports
from omnimri.platform.data.formats.dicom import series as dicom
from omnimri.platform.data.formats.kspace import hdf5 as kspace
from omnimri.platform.data.formats.kspace import layouts as kspace_layouts
from omnimri.platform.data.formats.records import UNREADABLE, ReadError, ReadLimits, SeriesRecord, quiet_libraries
from omnimri.platform.data.formats.sources import Archive, Folder, Source, open_container, open_sources

ANNOTATIONS_NAME = "annotations.json"

VOLUME_KINDS = (
    "dicom", "nifti", "nrrd", "metaimage", "numpy", "fastmri", "ismrmrd", "matlab", *kspace_layouts.LAYOUTS,
)  # fmt: skip
"""Kinds of files that hold volumes; their records carry the same word as `source_format`."""

_FORMATS = "DICOM, NIfTI, NRRD, MetaImage, NumPy and MATLAB arrays, fastMRI, CMRxRecon and ISMRMRD HDF5"
_HDF5_MAGIC = b"\x89HDF\r\n\x1a\n"
_DICOM_SUFFIXES = frozenset({"", ".dcm", ".ima", ".dicom"})
_AUXILIARY_SUFFIXES = frozenset(
    {".json", ".tsv", ".csv", ".bval", ".bvec", ".bvals", ".bvecs", ".cfg", ".txt", ".md", ".rst", ".html", ".pdf"}
)
_AUXILIARY_NAMES = frozenset({"DICOMDIR", "README", "CHANGES", "LICENSE", "LICENCE", "VERSION"})
_CONVERTIBLE = {
    ".par": "Philips PAR/REC", ".rec": "Philips PAR/REC", ".mgz": "FreeSurfer MGH", ".mgh": "FreeSurfer MGH",
    ".mnc": "MINC", ".hdr": "Analyze or NIfTI pair", ".img": "Analyze or NIfTI pair", ".brik": "AFNI", ".head": "AFNI",
    ".dat": "vendor raw data", ".mrd": "streamed MRD", ".7": "vendor raw data",
}  # fmt: skip
_ATTACHED_KINDS = {
    "dicom label": "A segmentation or structure set",
    "dicom report": "A measurement report",
}  # fmt: skip
"""Kinds of DICOM objects that speak of a series, and how the ledger calls them."""

_LABEL_ENDINGS = ("_dseg", "_mask", "_probseg")
"""BIDS suffixes of NIfTI files that hold labels, not images."""


@dataclass(frozen=True, kw_only=True)
class Probe:
    """What the header of one file says."""

    name: str
    """Relative to its container."""
    kind: str
    """Of VOLUME_KINDS, or `dicom label`, `dicom report`, `label`, `auxiliary` or `rejected`."""
    num_bytes: int = 0
    series: str = ""
    """Files of one kind with the same series belong together. A label object or report is a series of its own."""
    references: tuple[str, ...] = ()
    """Series that a label object (DICOM segmentation, RT structure set) or a measurement report belongs to; a report
    may also name label objects by their instance."""
    instance: str = ""
    patient: str = ""
    study: str = ""
    member: str = ""
    """Array of an archive of arrays."""
    samples: bool = False
    """The first axis of the array counts samples."""
    matlab_array: str = ""
    """Array to read of a MATLAB file; empty takes the only complex one."""
    mark: str = ""
    """Differs between files of one name and other content."""
    companion: str = ""
    """File with the voxels of a detached header."""
    reason: str = ""
    hint: str = ""


@dataclass(frozen=True, kw_only=True)
class WorkItem:
    """One series to read: what a task needs to know."""

    kind: str
    container: str
    """Absolute path of the folder or zip."""
    names: tuple[str, ...]
    """Files relative to the container, sorted."""
    source: str
    """How records and the ledger call it: relative to what the caller named."""
    num_bytes: int
    sidecar: str = ""
    """JSON beside a NIfTI file, or the voxels of a detached header."""
    labels: tuple[str, ...] = ()
    """DICOM segmentations and RT structure sets that refer to the series, relative to the container."""
    reports: tuple[str, ...] = ()
    """DICOM measurement reports that refer to the series or to its labels, relative to the container."""
    prefix: str = ""
    """What the ledger puts before names of the container."""
    member: str = ""
    """Array of an archive of arrays."""
    samples: bool = False
    """The first axis of the array counts samples."""
    matlab_array: str = ""
    """Array to read of a MATLAB file; empty takes the only complex one."""
    mark: str = ""
    """Differs between series of one name and other content; that of a DICOM series is its instances."""
    patient: str = ""
    study: str = ""
    series: str = ""


def read_path(path: Path, limits: ReadLimits | None = None) -> tuple[list[SeriesRecord], list[ReadError]]:
    """Read everything in a file, folder or zip into memory.

    Args:
        path: What to read.
        limits: Bounds on sizes; the defaults are those of `ReadLimits`.

    Returns:
        One record per volume in a fixed order, and what was refused, with reasons. A zip that cannot be opened is
        one refusal.

    Raises:
        FileNotFoundError: If nothing is there.
    """
    limits = limits or ReadLimits()
    sources, errors = open_sources([path], limits)
    records: list[SeriesRecord] = []
    for source in sources:
        items, refused = group(probe_files(source.container, source.sizes), source)
        errors += refused
        for item in items:
            read, failed = read_item(item, limits)
            records += read
            errors += failed
    return records, errors


def probe_files(container: Folder | Archive, sizes: Mapping[str, int]) -> list[Probe]:
    """Look at the headers of some files of a container (name to bytes); never raises for what a file holds."""
    probes = (_probe(container, name, num_bytes) for name, num_bytes in sizes.items())
    return [part for probe in probes for part in _members(container, probe)]


def _members(container: Folder | Archive, probe: Probe) -> list[Probe]:
    """One probe for each array of an archive of arrays; any other probe as it is."""
    if probe.kind != "numpy" or not probe.name.lower().endswith(".npz"):
        return [probe]
    with container.local([probe.name]) as paths, paths[probe.name].open("rb") as stream:
        members = volumes.array_members(stream, probe.name)
    keys = ((member, f"{probe.series}#{member}", f"{probe.patient}#{member}") for member in members)
    return [replace(probe, member=member, series=series, patient=patient) for member, series, patient in keys]


def _probe(container: Folder | Archive, name: str, num_bytes: int) -> Probe:
    try:
        probe = _identify(container, name, num_bytes)
        is_volume = probe.kind in VOLUME_KINDS and not probe.instance
        return replace(probe, mark=container.mark(name)) if is_volume else probe
    except ReadError as error:
        # Refused instances of one series, and one reason, become one line of the ledger.
        return Probe(name=name, kind="rejected", reason=error.reason, hint=error.hint, num_bytes=num_bytes)
    except UNREADABLE as error:
        reason = f"The file cannot be opened ({type(error).__name__})."
        return Probe(name=name, kind="rejected", reason=reason, hint="Copy it again.", num_bytes=num_bytes)


def _identify(container: Folder | Archive, name: str, num_bytes: int) -> Probe:
    """Decide by name and first bytes what a file is.

    Raises:
        ReadError: If it is nothing that can be read.
    """
    path = PurePosixPath(name)
    suffix = path.suffix.lower()
    if nifti.is_nifti(name):
        if nifti.stem(name).endswith(_LABEL_ENDINGS):
            return Probe(name=name, kind="label", num_bytes=num_bytes)
        with container.open(name) as stream:
            nifti.probe(stream, name)
        patient, study, series = nifti.keys(name)
        return Probe(name=name, kind="nifti", num_bytes=num_bytes, patient=patient, study=study, series=series)
    with container.open(name) as stream:
        head = stream.read(132)
    if kind := volumes.kind_of(name):
        return _volume_probe(container, name, kind, num_bytes)
    if head.startswith(matlab.MAGIC_OLD):
        patient, study, series = volumes.keys(name)
        return Probe(name=name, kind="matlab", num_bytes=num_bytes, patient=patient, study=study, series=series)
    if head.startswith((_HDF5_MAGIC, matlab.MAGIC_HDF5)):
        with container.local([name]) as paths:
            keys = kspace.probe(paths[name], name)
        return Probe(
            name=name, kind=keys.layout, num_bytes=num_bytes, patient=keys.patient, study=keys.study, series=name
        )
    is_auxiliary = suffix in _AUXILIARY_SUFFIXES or path.name.upper() in _AUXILIARY_NAMES
    if (head[128:] == b"DICM" or suffix in _DICOM_SUFFIXES) and not is_auxiliary:
        with container.open(name) as stream, quiet_libraries():
            return _dicom_probe(dicom.probe(stream, name, num_bytes), name, num_bytes)
    if is_auxiliary:
        return Probe(name=name, kind="auxiliary", num_bytes=num_bytes)
    if suffix == ".zip":
        raise ReadError(name, "A zip inside a folder or zip.", "Name it as a source of its own, or unpack it.")
    if suffix in _CONVERTIBLE:
        raise ReadError(name, f"{_CONVERTIBLE[suffix]} is not read.", "Convert it to NIfTI or ISMRMRD HDF5.")
    raise ReadError(name, f"Unknown file type {suffix or 'without extension'}.", f"Read are {_FORMATS}.")


def _dicom_probe(header: Dataset, name: str, num_bytes: int) -> Probe:
    """The probe of an instance: an image, labels, or a report."""
    instance = str(header.get("SOPInstanceUID") or name)
    if dicom_labels.is_label_object(header):
        return Probe(
            name=name, kind="dicom label", num_bytes=num_bytes, series=instance, instance=instance,
            references=dicom_labels.references(header),
        )  # fmt: skip
    if dicom_reports.is_report(header):
        return Probe(
            name=name, kind="dicom report", num_bytes=num_bytes, series=instance, instance=instance,
            references=dicom_reports.references(header),
        )  # fmt: skip
    patient, study, series = dicom.keys(header)
    return Probe(
        name=name, kind="dicom", num_bytes=num_bytes, patient=patient, study=study, series=series, instance=instance
    )


def _volume_probe(container: Folder | Archive, name: str, kind: str, num_bytes: int) -> Probe:
    """The probe of a NRRD, MetaImage or NumPy file.

    Raises:
        ReadError: If it is none.
    """
    with container.open(name) as stream:
        header = volumes.array_members(stream, name) if kind == "numpy" else volumes.read_header(stream, name)
    companion = "" if isinstance(header, tuple) else header.data_file
    patient, study, series = volumes.keys(name)
    return Probe(
        name=name, kind=kind, num_bytes=num_bytes, series=series, patient=patient, study=study,
        companion=PurePosixPath(name).with_name(companion).as_posix() if companion else "",
    )  # fmt: skip


def group(
    probes: Iterable[Probe], source: Source, *, label_maps: frozenset[str] = frozenset()
) -> tuple[list[WorkItem], list[ReadError]]:
    """Make one work item per series, whatever the order of the probes.

    Args:
        probes: Of all files of one source.
        source: Where the files are.
        label_maps: Files that annotations name as label maps, which are no volumes of their own.

    Returns:
        Items sorted by source, and one error per refused series or file.
    """
    series: dict[tuple[str, str], dict[str, Probe]] = defaultdict(dict)
    refused: dict[tuple[str, str, str], list[str]] = defaultdict(list)
    ordered = sorted(probes, key=lambda p: p.name)
    companions = {probe.companion for probe in ordered} | label_maps
    for probe in ordered:
        path = PurePosixPath(probe.name)
        # Instances of one folder that are refused for one reason share a line; every other file has a line of its own.
        folder = path.parent.as_posix() if path.suffix.lower() in _DICOM_SUFFIXES else probe.name
        if probe.kind in (*VOLUME_KINDS, *_ATTACHED_KINDS) and probe.name not in label_maps:
            members = series[(probe.kind, probe.series)]
            first = members.setdefault(probe.instance or probe.name, probe)
            if first is not probe:
                hint = f"Nothing to do: the one in {source.prefix}{PurePosixPath(first.name).parent}/ is enough."
                refused[(folder, "A copy of an instance that is there already.", hint)].append(probe.name)
        elif probe.name not in companions and (refusal := _refusal(probe, source.named_alone)):
            refused[(folder, *refusal)].append(probe.name)
    attached = _resolved([next(iter(m.values())) for (kind, _), m in series.items() if kind in _ATTACHED_KINDS])
    known = {uid for kind, uid in series if kind == "dicom"}
    for probe in attached:
        if not known & set(probe.references):
            folder = PurePosixPath(probe.name).parent.as_posix()
            reason = f"{_ATTACHED_KINDS[probe.kind]} whose series is not among the MR series of this source."
            refused[(folder, reason, "Put both into one folder or zip.")].append(probe.name)
    items = [
        _work_item(kind, list(members.values()), [p for p in attached if uid in p.references], source)
        for (kind, uid), members in series.items()
        if kind not in _ATTACHED_KINDS
    ]
    errors = [
        ReadError(f"{source.prefix}{files[0]}" + (f" and {len(files) - 1} more" if files[1:] else ""), reason, hint)
        for (_, reason, hint), files in refused.items()
    ]
    return sorted(items, key=lambda i: (i.source, i.series)), sorted(errors, key=lambda e: (e.source, e.reason))


def _resolved(attached: list[Probe]) -> list[Probe]:
    """The same probes; what refers to a label object refers to its series too."""
    labels = {probe.instance: probe.references for probe in attached if probe.kind == "dicom label"}
    return [
        replace(probe, references=probe.references + tuple(uid for r in probe.references for uid in labels.get(r, ())))
        for probe in attached
    ]


def _refusal(probe: Probe, named_alone: bool) -> tuple[str, str] | None:
    """Reason and hint of a file that is no volume; None for what merely lies beside volumes."""
    if probe.kind == "rejected":
        return probe.reason, probe.hint
    if probe.kind == "label":
        return "A label map that no annotations.json names.", "List it under its series in annotations.json."
    if probe.kind == "auxiliary" and named_alone:
        return "Not an image.", f"Read are {_FORMATS}."
    return None


def _work_item(kind: str, members: list[Probe], attached: list[Probe], source: Source) -> WorkItem:
    files = tuple(member.name for member in members)
    folders = {PurePosixPath(name).parent.as_posix() for name in files}
    # A series that fills a folder is called by the folder.
    name = files[0] if len(files) == 1 or folders == {"."} else min(folders)
    sidecar = PurePosixPath(files[0]).with_name(f"{nifti.stem(files[0])}.json").as_posix()
    return WorkItem(
        kind=kind,
        container=str(source.container.path.absolute()),
        names=files,
        source=source.prefix + name + (f"#{members[0].member}" if members[0].member else ""),
        num_bytes=sum(probe.num_bytes for probe in (*members, *attached)),
        sidecar=sidecar if kind == "nifti" and source.container.holds(sidecar) else members[0].companion,
        labels=tuple(probe.name for probe in attached if probe.kind == "dicom label"),
        reports=tuple(probe.name for probe in attached if probe.kind == "dicom report"),
        prefix=source.prefix,
        member=members[0].member,
        samples=members[0].samples,
        matlab_array=members[0].matlab_array,
        mark=" ".join(sorted(probe.instance or probe.mark for probe in (*members, *attached))),
        patient=members[0].patient,
        study=members[0].study,
        series=members[0].series,
    )


def read_item(item: WorkItem, limits: ReadLimits) -> tuple[list[SeriesRecord], list[ReadError]]:
    """Read the volumes of one series; what a file holds never raises, it is returned as an error."""
    try:
        container = open_container(Path(item.container), limits)
        with container.local(filter(None, (*item.names, item.sidecar, *item.labels, *item.reports))) as paths:
            return _read_local(item, paths, limits)
    except ReadError as error:
        return [], [error]
    except UNREADABLE as error:
        return [], [ReadError(item.source, f"The series cannot be read ({type(error).__name__}).", "Copy it again.")]


def _read_local(
    item: WorkItem, paths: dict[str, Path], limits: ReadLimits
) -> tuple[list[SeriesRecord], list[ReadError]]:
    first = paths[item.names[0]]
    if item.kind == "dicom":
        labels, reports = ({item.prefix + name: paths[name] for name in names} for names in (item.labels, item.reports))
        return dicom.read_series([paths[name] for name in item.names], item.source, limits, labels, reports)
    if item.kind == "nifti":
        return nifti.read_nifti(first, item.source, limits, paths.get(item.sidecar))
    if item.kind == "matlab" or (item.kind == "cmrxrecon" and item.matlab_array):
        return matlab.read_matlab(first, item.source, limits, item.matlab_array)
    if item.kind in kspace_layouts.LAYOUTS:
        return kspace_layouts.read_layout(first, item.source, limits)
    if volumes.kind_of(first.name):
        return volumes.read_volume(first, item.source, limits, member=item.member, samples=item.samples)
    return kspace.read_kspace(first, item.source, limits)

"""Ingest beside two single-process loops over the same files: how fast each is, and what Ray costs.

The plain loop is what people write: group files by the series that their headers name, read with pydicom and nibabel,
sort, stack, rescale, affine, and the same Parquet row with its quality and digests, voxels as the float32 that a
script has in hand. It does not de-identify or look for duplicates, and refuses nothing. The MONAI loop is its
documented way to load: LoadImage, Orientation, Spacing (here at the file's own spacing); it is told which files are a
series, and writes nothing.
"""

from __future__ import annotations

import os
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import nibabel as nib
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pydicom
import ray

from omnimri.models.scan import Scan
from omnimri.platform.data.formats.readers import WorkItem, group, probe_files
from omnimri.platform.data.formats.records import ReadLimits, SeriesRecord
from omnimri.platform.data.formats.sources import Folder, Source, open_sources
from omnimri.platform.data.intake.config import IngestConfig
from omnimri.platform.data.intake.ingest import ingest
from omnimri.platform.data.intake.writer import PlannedItem, make_row, write_shard
from omnimri.platform.data.schema import SCHEMA, pack_array

_KINDS = ("dicom", "nifti")


def benchmark_ingest(sources: Sequence[Path], *, repeats: int = 1) -> dict[str, Any]:
    """Seconds of every way to read the DICOM series and NIfTI files of some sources; a connected Ray is expected.

    Args:
        sources: Folders, zips or files.
        repeats: Times each way is run; the fastest counts. With one, ingest and the process per core are timed with
            the start of their workers.

    Returns:
        `series`, `volumes`, `bytes`, `cpus`; `seconds` by way; `speedup` of ingest over the plain loop; `scaling`: what
        a process per core gains on this machine without Ray; `overhead_per_core`: the share of time that ingest needs
        beyond that, for Ray, pseudonyms, splits, duplicates and the report.

    Raises:
        ValueError: If the sources hold neither.
    """
    items = find_items(sources)
    if not items:
        raise ValueError(f"No DICOM series and no NIfTI file in {', '.join(map(str, sources))}.")
    cpus = min(os.cpu_count() or 1, int(ray.cluster_resources().get("CPU", 1)))
    seconds: dict[str, float] = {}
    volumes: dict[str, int] = {}
    with ProcessPoolExecutor(cpus, mp_context=get_context("spawn")) as pool:
        ways: dict[str, Callable[[Path, Path], int]] = {
            "ingest": _by_ingest,
            "own functions, one process": _by_own_functions,
            "own functions, one process per core": partial(_by_own_functions_on_all_cores, pool),
            "pydicom and nibabel, one process": _by_plain_loop,
            "MONAI LoadImage, Orientation, Spacing": lambda files, _: _by_monai(items, files),
        }
        for name, way in ways.items():
            for _ in range(repeats):
                with TemporaryDirectory(prefix="omnimri-benchmark-") as folder:
                    files = _linked(items, Path(folder) / "files")
                    started = time.perf_counter()
                    volumes[name] = way(files, Path(folder))
                    seconds[name] = min(seconds.get(name, np.inf), time.perf_counter() - started)
    without_ray = seconds["own functions, one process per core"]
    return {
        "series": len(items),
        "bytes": sum(item.num_bytes for item in items),
        "cpus": cpus,
        "volumes": volumes,
        "seconds": {name: round(value, 3) for name, value in seconds.items()},
        "speedup": round(seconds["pydicom and nibabel, one process"] / seconds["ingest"], 3),
        "scaling": round(seconds["own functions, one process"] / without_ray, 3),
        "overhead_per_core": round(seconds["ingest"] / without_ray - 1, 3),
    }


def find_items(sources: Sequence[Path]) -> list[WorkItem]:
    """The DICOM series and NIfTI files of folders; what lies in a zip is left out, the plain loops read files."""
    opened, _ = open_sources(sources, ReadLimits())
    found = []
    for source in opened:
        items, _ = group(probe_files(source.container, source.sizes), source)
        found += [item for item in items if item.kind in _KINDS and source.container.path.is_dir()]
    return found


def _linked(items: Sequence[WorkItem], files: Path) -> Path:
    """A folder with a folder of links for each item: MONAI reads a DICOM series by its folder."""
    for number, item in enumerate(items):
        for name in item.names:
            link = files / f"{number:06d}" / Path(name).name
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(Path(item.container) / name)
    return files


def _by_ingest(files: Path, out: Path) -> int:
    return ingest([files], out / "shards", IngestConfig()).num_volumes


def _by_own_functions(files: Path, out: Path) -> int:
    planned = [_planned(item) for item in find_items([files])]
    report = write_shard(planned, out / "shard.parquet", IngestConfig())
    return len(report.rows)


def _by_own_functions_on_all_cores(pool: Executor, files: Path, out: Path) -> int:
    names, size = Folder(files).names(), IngestConfig().files_per_probe
    parts = [dict(list(names.items())[start : start + size]) for start in range(0, len(names), size)]
    probes = [probe for found in pool.map(partial(probe_files, Folder(files)), parts) for probe in found]
    items, _ = group(probes, Source(Folder(files), "", names))
    step = IngestConfig().items_per_shard
    chunks = [items[start : start + step] for start in range(0, len(items), step)]
    shards = [out / f"shard-{number}.parquet" for number in range(len(chunks))]
    return sum(pool.map(_write_chunk, chunks, shards))


def _write_chunk(items: Sequence[WorkItem], shard: Path) -> int:
    return len(write_shard([_planned(item) for item in items], shard, IngestConfig()).rows)


def _planned(item: WorkItem) -> PlannedItem:
    return PlannedItem(
        item=item, dataset="benchmark", licence=None, simulated=False, split="train",
        patient_id="p", study_id="s", series_id="e", person_id="o", item_id="i",
    )  # fmt: skip


def _by_plain_loop(files: Path, out: Path) -> int:
    series: dict[str, list[Path]] = defaultdict(list)
    for path in sorted(path for path in files.rglob("*") if path.is_file()):
        is_nifti = path.name.endswith((".nii", ".nii.gz"))
        series[str(path) if is_nifti else pydicom.dcmread(path, stop_before_pixels=True).SeriesInstanceUID].append(path)
    with pq.ParquetWriter(out / "plain.parquet", SCHEMA, compression="zstd", compression_level=1,
                          use_dictionary=False) as writer:  # fmt: skip
        for name, paths in series.items():
            array, affine = _load_nifti(paths[0]) if name == str(paths[0]) else _load_dicom(paths)
            for volume in array:
                writer.write_table(pa.Table.from_pylist([_plain_row(volume, affine)], schema=SCHEMA))
    return pq.ParquetFile(out / "plain.parquet").metadata.num_rows


def _plain_row(volume: np.ndarray, affine: np.ndarray) -> dict[str, Any]:
    record = SeriesRecord(
        scan=Scan(image=volume, affine=affine, facts={}), source="", source_format="",
        patient_key="", study_key="", series_key="",
    )  # fmt: skip
    item = WorkItem(kind="", container="", names=(), source="", num_bytes=0)
    return {**make_row(record, _planned(item), IngestConfig()).values, "image": pack_array(volume)}


def _load_dicom(paths: Sequence[Path]) -> tuple[np.ndarray, np.ndarray]:
    """`(1, Z, Y, X)` and the affine, as a script would do it."""
    datasets = [pydicom.dcmread(path) for path in paths]
    row, column = (np.array(datasets[0].ImageOrientationPatient[k : k + 3], float) for k in (0, 3))
    normal = np.cross(row, column)
    datasets.sort(key=lambda d: normal @ np.array(d.ImagePositionPatient, float))
    array = np.stack(
        [
            d.pixel_array * np.float32(d.get("RescaleSlope", 1)) + np.float32(d.get("RescaleIntercept", 0))
            for d in datasets
        ]
    )
    first, last = (np.array(datasets[k].ImagePositionPatient, float) for k in (0, -1))
    step = (last - first) / max(len(datasets) - 1, 1) if len(datasets) > 1 else normal
    between_rows, between_columns = map(float, datasets[0].PixelSpacing)
    affine = np.eye(4)
    affine[:3] = np.column_stack([row * between_columns, column * between_rows, step, first])
    affine[:2] *= -1  # LPS to RAS
    return array[None].astype(np.float32), affine


def _load_nifti(path: Path) -> tuple[np.ndarray, np.ndarray]:
    image = nib.load(path)
    array = np.asarray(image.dataobj, dtype=np.float32)  # type: ignore[attr-defined]
    array = array.reshape(*array.shape[:3], -1)
    return np.ascontiguousarray(array.transpose(3, 2, 1, 0)), np.asarray(image.affine)  # type: ignore[attr-defined]


def _by_monai(items: Sequence[WorkItem], files: Path) -> int:
    from monai.transforms import Compose, LoadImage, Orientation, Spacing

    done = 0
    for item, folder in zip(items, sorted(files.iterdir()), strict=True):
        reader, path = ("PydicomReader", folder) if item.kind == "dicom" else ("NibabelReader", next(folder.iterdir()))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it tries every reader that it knows, and says which are not installed
            image = LoadImage(reader=reader, ensure_channel_first=True)(path)
        spacing = tuple(float(v) for v in image.pixdim)  # type: ignore[attr-defined]
        Compose([Orientation(axcodes="RAS", labels=None), Spacing(pixdim=spacing)])(image)
        done += int(image.shape[0])
    return done

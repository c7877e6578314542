"""What training sees of a file is what serving sees of it: through ingest, shards and views, and through an upload."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from omnimri.models.config import preset
from omnimri.models.physics import SenseOperator, ifft2c, root_sum_of_squares, undersampling_mask
from omnimri.models.preprocess import Preprocess
from omnimri.models.quantities import quantity_of
from omnimri.models.scan import Scan
from omnimri.platform.data.catalogue.entries import catalogue
from omnimri.platform.data.draws import ViewOptions
from omnimri.platform.data.intake.config import IngestConfig
from omnimri.platform.data.intake.ingest import ingest
from omnimri.platform.data.shards import Shards, load_row
from omnimri.platform.data.undersampling import reconstruction_arrays
from omnimri.platform.data.views import SOURCES
from omnimri.serve.config import UploadLimits
from omnimri.serve.intake import read_upload
from tests.platform.intake_fakes import coil_kspace, oblique_affine, random_image, save_fastmri, save_nifti

LIMITS = UploadLimits(max_upload_mb=50, max_unpacked_mb=40, max_ratio=50, max_files=20, max_voxels=10**6, max_axis=500)
PREPROCESS = Preprocess(preset("tiny").inputs)
SHAPE = (6, 40, 36)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Path]]:
    """A weighted image, maps of known and unknown quantity, and raw data, as people upload them."""
    folder = tmp_path_factory.mktemp("files")
    names = ("sub-01_T1w", "sub-02_T1map", "sub-03_adc", "sub-04_ktrans", "sub-05_part-phase_GRE")
    for seed, name in enumerate(names):
        save_nifti(folder / f"{name}.nii.gz", random_image(seed, SHAPE), oblique_affine())
    (folder / "sub-03_adc.json").write_text(json.dumps({"Units": "10^-6 mm^2/s"}))
    save_fastmri(folder / "file1.h5", coil_kspace(random_image(9, SHAPE)), acquisition="AXT2")
    found = {name: [folder / f"{name}.nii.gz"] for name in names} | {"kspace": [folder / "file1.h5"]}
    found["sub-03_adc"].append(folder / "sub-03_adc.json")
    return found


@pytest.fixture(scope="module")
def rows(files: dict[str, list[Path]], tmp_path_factory: pytest.TempPathFactory, ray_cluster: None) -> list[dict]:
    out = tmp_path_factory.mktemp("corpus") / "shards"
    ingest([files["kspace"][0].parent], out, IngestConfig())
    return [load_row(ref) for ref in Shards.open(out).rows]


def uploaded(paths: list[Path]) -> Scan:
    streams = [(path.name, path.open("rb")) for path in paths]
    try:
        return read_upload(streams, LIMITS, series=None, needs_kspace=False).scan
    finally:
        for _, stream in streams:
            stream.close()


def test_views_and_uploads_give_equal_tensors(files: dict[str, list[Path]], rows: list[dict]) -> None:
    options = ViewOptions(preprocess=PREPROCESS, slices_per_sample=SHAPE[0])
    seen = set()
    for name, paths in files.items():
        scan = uploaded(paths)
        [row] = [row for row in rows if np.array_equal(row["image"], scan.image)]
        columns = {column: row[column] for column in SOURCES["image"].columns}
        sample = SOURCES["image"].make(columns, np.random.default_rng(0), options)
        np.testing.assert_array_equal(sample["volume"], PREPROCESS.volume(scan).volume.numpy(), err_msg=name)
        seen.add((row["quantity"], row["quantity_unit"], row["quantitative"]))
    assert seen == {
        (None, None, False), ("T1", "s", True), ("ADC", "10-6mm2/s", True), (None, None, True), ("phase", None, True),
        (None, None, None),
    }  # fmt: skip


def test_raw_data_are_scaled_alike_whatever_their_units(rows: list[dict]) -> None:
    [row] = [row for row in rows if row["kspace"] is not None]
    mask = undersampling_mask(SHAPE[2], acceleration=3, center_fraction=0.2)

    def undersampled(factor: float) -> Scan:
        kspace = row["kspace"] * np.float32(factor) * mask
        image = root_sum_of_squares(ifft2c(torch.from_numpy(kspace))).numpy()
        return Scan(image=image, affine=np.eye(4), kspace=kspace, mask=mask)

    small, large = (reconstruction_arrays(undersampled(factor), np.arange(SHAPE[0])) for factor in (1e-6, 1e4))
    np.testing.assert_allclose(small["kspace"], large["kspace"], atol=1e-5)
    operator = SenseOperator(torch.from_numpy(small["sens_maps"]), torch.from_numpy(mask))
    peaks = operator.adjoint(torch.from_numpy(small["kspace"])).abs().amax((1, 2))
    torch.testing.assert_close(peaks, torch.ones(SHAPE[0]))


def test_no_raw_data_of_the_catalogue_are_taken_for_a_map() -> None:
    """Raw data of a mapping protocol give weighted images, in the units of the receiver."""
    for entry in catalogue().values():
        if "reconstruction" in entry.tasks:
            for rule in entry.images:
                contrasts = [*rule.contrasts.values(), *rule.values.get("contrast", {}).values(), "T2w"]
                assert not {quantity_of({**entry.facts, **rule.facts, "contrast": c}) for c in contrasts} - {None}

"""The preprocessing contract: what scales an image, what a checkpoint says of it, and what an old one gets."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from omnimri.models.config import InputConfig, preset
from omnimri.models.physics import SenseOperator, estimate_sens_maps
from omnimri.models.preprocess import CONTRACT_FILE, CONTRACT_VERSION, Preprocess, read_preprocess, scale_kspace
from omnimri.models.quantities import QUANTITIES, UNITS, plain_unit, quantity_of
from omnimri.models.scan import Scan

NATIVE = InputConfig(volume_shape=(4, 12, 10), volume_spacing_mm=(3.0, 2.0, 2.0), slice_spacing_mm=2.0)
AFFINE = np.diag([2.0, 2.0, 3.0, 1.0])


def t1_map(seed: int, **facts: str | float | None) -> Scan:
    """T1 in ms of `(4, 12, 10)` voxels on the grid of NATIVE; one voxel has 812 ms in every map."""
    values = np.random.default_rng(seed).uniform(0, 3000 + 1000 * seed, (4, 12, 10)).astype(np.float32)
    values[1, 2, 3] = 812.0
    return Scan(image=values, affine=AFFINE, facts={"quantitative": True, "quantity": "T1", **facts})


def test_the_same_t1_is_the_same_input_in_every_map() -> None:
    preprocess = Preprocess(NATIVE)
    for seed in range(3):
        scan = t1_map(seed)
        assert preprocess.slices(scan).slices[1, 2, 3] == pytest.approx(0.812)
        assert preprocess.volume(scan).volume[0, 1, 2, 3] == pytest.approx(0.812)
        torch.testing.assert_close(preprocess.slices(scan).slices, torch.from_numpy(scan.image / 1000))
        weighted = replace(scan, facts={"quantitative": False, "contrast": "T1w"})
        assert preprocess.slices(weighted).slices[1, 2, 3] != pytest.approx(0.812)


def test_a_label_on_the_volumes_grid_is_the_larger_half_and_never_lost() -> None:
    """Voxels of the volume hold two by two of the scan: three of four are enough, one alone is kept, none is none."""
    coarse = Preprocess(replace(NATIVE, volume_shape=(4, 6, 5), volume_spacing_mm=(3.0, 4.0, 4.0)))
    labels = np.zeros((4, 12, 10), bool)
    assert not coarse.volume_labels(labels, t1_map(0)).any()
    labels[1, 3, 4] = True
    assert coarse.volume_labels(labels, t1_map(0)).nonzero().tolist() == [[1, 1, 2]]
    labels[2, 4:6, 6:8] = True
    labels[2, 5, 7] = False
    assert coarse.volume_labels(labels, t1_map(0)).nonzero().tolist() == [[2, 2, 3]]


def test_a_map_in_seconds_and_one_in_milliseconds_are_one_input() -> None:
    preprocess, scan = Preprocess(NATIVE), t1_map(0)
    seconds = replace(scan, image=scan.image / 1000, facts={**scan.facts, "quantity_unit": "s"})
    torch.testing.assert_close(preprocess.volume(seconds).volume, preprocess.volume(scan).volume)


def test_outliers_of_a_map_are_not_clipped_and_leave_the_rest_alone() -> None:
    preprocess, scan = Preprocess(NATIVE), t1_map(0)
    spoiled = scan.image.copy()
    spoiled[0, 0, 0], spoiled[0, 0, 1] = 1e6, np.nan
    seen = preprocess.scale(replace(scan, image=spoiled))
    assert seen[0, 0, 0] == pytest.approx(1000)
    assert seen[0, 0, 1] == 0
    np.testing.assert_array_equal(seen[1:], preprocess.scale(scan)[1:])


@pytest.mark.parametrize(
    ("facts", "value", "seen"),
    [
        ({"quantity": "ADC"}, 800.0, 0.8),
        ({"contrast": "ADC"}, 800.0, 0.8),
        ({"quantity": "ADC", "quantity_unit": "mm2/s"}, 800e-6, 0.8),
        ({"quantity": "ADC", "quantity_unit": "10^-3 mm²/s"}, 0.8, 0.8),
        ({"quantity": "phase"}, -np.pi / 2, -0.5),
        ({"quantity": "phase", "quantity_unit": "deg"}, 90.0, 0.5),
        ({"quantity": "phase", "quantity_unit": "arbitrary"}, 2048.0, np.arcsinh(2048.0)),
        ({"quantity": "T2", "quantity_unit": "mm2/s"}, 80.0, np.arcsinh(80.0)),
        ({"quantity": None}, 3.0, np.arcsinh(3.0)),
    ],
)
def test_known_values_of_other_quantities(facts: dict[str, str | None], value: float, seen: float) -> None:
    image = np.random.default_rng(0).uniform(-1, 1, (3, 4, 5)).astype(np.float32)
    image[1, 1, 1] = value
    scan = Scan(image=image, affine=AFFINE, facts={"quantitative": True, **facts})
    assert Preprocess(NATIVE).scale(scan)[1, 1, 1] == pytest.approx(seen, rel=1e-5)


def test_every_quantity_is_measured_in_a_known_unit() -> None:
    for quantity in QUANTITIES.values():
        assert quantity.unit in UNITS
    assert {plain_unit(unit) for unit in UNITS} == set(UNITS)
    assert [plain_unit(text) for text in ("µm²/s", "mm^2/s", "10^-6 mm²/s", "1e-6 mm2/s", "sec", "[ms]", "Hz", "")] == [
        "um2/s", "mm2/s", "10-6mm2/s", "10-6mm2/s", "s", "ms", "hz", None,
    ]  # fmt: skip
    assert quantity_of({"contrast": "T1w", "quantitative": False}) is None
    assert quantity_of({}) is None


@pytest.mark.parametrize("facts", [{"contrast": "T2w"}, {"quantity": "T2", "quantitative": True}])
def test_slices_of_an_oblique_scan_come_back_to_their_voxels(facts: dict[str, str | bool]) -> None:
    """Linear in space, so that resampling there and back is exact but at the border."""
    index = np.stack(np.meshgrid(*map(np.arange, (6, 40, 36)), indexing="ij")).astype(np.float32)
    image = 20 + index[1] + 2 * index[2] + 3 * index[0]
    tilt = np.array([[0.0, 0.0, -4.0], [0.9, 0.05, 0.0], [-0.05, 0.9, 0.0]])
    affine = np.eye(4)
    affine[:3, :3] = tilt
    scan = Scan(image=image, affine=affine, facts=facts)
    preprocess = Preprocess(NATIVE)
    source = preprocess.slices(scan)
    assert source.slices.shape != image.shape
    back, scaled = preprocess.to_native(source.slices, source), preprocess.scale(scan)
    assert back.shape == image.shape
    inside = (slice(None), slice(3, -3), slice(3, -3))
    np.testing.assert_allclose(back[inside], scaled[inside], atol=0.03 * np.ptp(scaled))


def test_kspace_is_scaled_slice_by_slice_to_a_zero_filled_maximum_of_one(rng: torch.Generator) -> None:
    kspace = torch.randn(3, 4, 16, 20, dtype=torch.complex64, generator=rng)
    kspace = kspace * torch.tensor([1e-6, 1.0, 1e5])[:, None, None, None]
    mask = torch.arange(20) % 2 == 0
    mask[7:13] = True
    operator = SenseOperator(estimate_sens_maps(kspace * mask, mask), mask)
    scaled, scale = scale_kspace(kspace * mask, operator)
    torch.testing.assert_close(operator.adjoint(scaled).abs().amax((1, 2)), torch.ones(3))
    torch.testing.assert_close(scaled * scale[:, None, None, None], kspace * mask)


# ---- In a checkpoint


def write_contract(folder: Path, content: dict) -> Path:
    (folder / CONTRACT_FILE).write_text(json.dumps(content))
    return folder


def test_a_contract_is_read_as_it_was_written(tmp_path: Path) -> None:
    preprocess = Preprocess(preset("tiny").inputs)
    assert read_preprocess(write_contract(tmp_path, preprocess.as_json())) == preprocess


def test_a_checkpoint_of_the_first_contract_gets_what_it_was_trained_on(tmp_path: Path) -> None:
    """Its file as version 1 of the program wrote it."""
    inputs = {
        "volume_shape": [24, 56, 48], "volume_spacing_mm": [6.0, 4.0, 4.0], "slice_spacing_mm": 2.0,
        "clip_percentiles": [0.5, 99.5],
    }  # fmt: skip
    preprocess = read_preprocess(write_contract(tmp_path, {"version": "1-42014399", "steps": [], "inputs": inputs}))
    assert preprocess.contract == 1 != CONTRACT_VERSION
    scan = t1_map(0)
    np.testing.assert_array_equal(preprocess.scale(scan), preprocess.standardise(scan.image))
    assert not any("quantitative" in step for step in preprocess.steps)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": "3-12345678"}, "contract 3 is unknown to this program, which knows 1 to 2; upgrade"),
        ({"version": "2-12345678"}, "says 2-12345678, but its settings give 2-"),
        ({"inputs": {"slice_spacing_mm": 1.0}}, "preprocessing.json: "),
    ],
)
def test_a_contract_that_cannot_be_kept_is_refused(change: dict, message: str, tmp_path: Path) -> None:
    content = Preprocess(preset("tiny").inputs).as_json() | change
    with pytest.raises(ValueError, match=message):
        read_preprocess(write_contract(tmp_path, content))

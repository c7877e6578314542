"""Samples for segmentation: every instruction gets the mask of the structure it names."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch

from omnimri.models.config import InputConfig
from omnimri.models.physics import estimate_sens_maps
from omnimri.models.preprocess import Preprocess
from omnimri.models.resample import pad_or_crop
from omnimri.models.vocabulary import DENSE_LABELS, FINDINGS, LESION, TISSUES
from omnimri.platform.data.draws import ViewOptions
from omnimri.platform.data.labels import structure_mask
from omnimri.platform.data.patches import draw_corners
from omnimri.platform.data.shards import Shards, load_row, row_to_scan
from omnimri.platform.data.views import (
    labelled_sample,
    labelled_slices_sample,
    reconstruction_sample,
    segmentation_sample,
)
from omnimri.platform.evaluation.image_cases import reference_masks
from tests.platform.shards_fakes import write_shards

NATIVE = InputConfig(volume_shape=(8, 32, 32), volume_spacing_mm=(12.0, 4.0, 4.0), slice_spacing_mm=4.0)
"""The grid of the fake volumes, so that nothing is resampled."""


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    folder = write_shards(tmp_path_factory.mktemp("views") / "shards")
    return [load_row(ref) for ref in Shards.open([str(folder)]).rows]


def options(slices: int, structures: int = 4) -> ViewOptions:
    return ViewOptions(
        preprocess=Preprocess(NATIVE), slices_per_sample=slices, structures_per_sample=structures, foreign_share=0.0
    )


def test_every_instruction_gets_the_mask_it_names(rows: list[dict]) -> None:
    healthy = next(row for row in rows if not structure_mask(row["label_map"], row["label_names"], LESION).any())
    anatomy = np.flatnonzero((healthy["label_map"] > 0).any(axis=(1, 2)))
    for seed in range(4):
        sample = segmentation_sample(healthy, np.random.default_rng(seed), options(len(anatomy)))
        assert sample["slice_target"].shape == (len(anatomy), 4, 32, 32)
        named = [next(s for s in (*TISSUES, LESION) if s in text) for text in sample["instruction"]]
        assert sorted(named) == sorted((*TISSUES, LESION))
        for number, structure in enumerate(named):
            truth = structure_mask(healthy["label_map"], healthy["label_names"], structure)[anatomy]
            np.testing.assert_array_equal(sample["slice_target"][:, number].sum((1, 2)), truth.sum((1, 2)))


def test_half_of_the_slices_show_the_lesion_of_a_patient_who_has_one(rows: list[dict]) -> None:
    ill = next(row for row in rows if structure_mask(row["label_map"], row["label_names"], LESION).any())
    sample = segmentation_sample(ill, np.random.default_rng(0), options(4))
    number = next(i for i, text in enumerate(sample["instruction"]) if LESION in text)
    assert sample["slice_target"][:, number].any(axis=(1, 2)).sum() >= 2


def test_patches_are_pieces_of_the_volume_with_their_masks(rows: list[dict]) -> None:
    """Nothing is resampled on the native grid: patches are found in the volume, and the masks at the same place."""
    row = next(row for row in rows if not structure_mask(row["label_map"], row["label_names"], LESION).any())
    chosen = replace(options(4), patch_shape=(4, 16, 12), patches_per_sample=6)
    sample = segmentation_sample(row, np.random.default_rng(0), chosen)
    assert sample["slices"].shape == (6, 4, 16, 12)
    assert sample["slice_target"].shape == (6, 4, 4, 16, 12)
    volume = chosen.preprocess.slices(row_to_scan(row))
    windows = np.lib.stride_tricks.sliding_window_view(volume.slices.numpy(), (4, 16, 12))
    for patch, masks in zip(sample["slices"], sample["slice_target"], strict=True):
        [corner] = np.argwhere((windows == patch).all(axis=(3, 4, 5)))
        place = tuple(slice(start, start + size) for start, size in zip(corner, (4, 16, 12), strict=True))
        for text, mask in zip(sample["instruction"], masks, strict=True):
            structure = next(s for s in (*TISSUES, LESION) if s in text)
            truth = structure_mask(row["label_map"], row["label_names"], structure)
            canonical = chosen.preprocess.slice_labels(truth, row_to_scan(row), volume.axis)
            np.testing.assert_array_equal(mask, canonical[place])


def test_half_of_the_patches_lie_about_a_lesion_and_the_others_anywhere() -> None:
    lesion = np.zeros((20, 60, 50), bool)
    lesion[2, 55, 3:6] = True  # near the edge, where a patch cannot be centred
    rng = np.random.default_rng(0)
    corners = np.array([draw_corners(lesion, (8, 16, 16), 3, rng) for _ in range(200)])
    assert (corners >= 0).all()
    assert (corners <= [12, 44, 34]).all()
    shown = [lesion[z : z + 8, y : y + 16, x : x + 16].any() for z, y, x in corners.reshape(-1, 3)]
    shown = np.reshape(shown, (200, 3))
    assert shown[:, :2].all()
    assert shown[:, 2].mean() < 0.2
    for axis, last in enumerate((12, 44, 34)):
        assert set(corners[:, 2, axis]) >= {0, last}
    nowhere = draw_corners(np.zeros_like(lesion), (8, 16, 16), 200, rng)
    assert np.std([y for _, y, _ in nowhere]) == pytest.approx(45 / np.sqrt(12), rel=0.15)


def test_a_volume_smaller_than_a_patch_is_centred_in_its_background(rows: list[dict]) -> None:
    chosen = replace(options(4), patch_shape=(9, 32, 40), patches_per_sample=1)
    sample = segmentation_sample(rows[0], np.random.default_rng(0), chosen)
    volume = chosen.preprocess.slices(row_to_scan(rows[0])).slices
    [patch] = torch.from_numpy(sample["slices"])
    torch.testing.assert_close(patch, pad_or_crop(volume, (9, 32, 40), float(volume.min())), rtol=0, atol=0)
    assert not sample["slice_target"][..., :1, :, :].any()
    assert not sample["slice_target"][..., :4].any()


def test_tissues_that_a_data_set_does_not_label_are_not_asked_for(rows: list[dict]) -> None:
    """Not labelled is not absent: an empty mask of grey matter would teach something false."""
    lesions_only = {**rows[0], "label_names": {1: "infarct"}}
    sample = segmentation_sample(lesions_only, np.random.default_rng(0), options(2, structures=2))
    assert all(LESION in text for text in sample["instruction"])


def test_numbered_labels_belong_to_their_structure() -> None:
    labels = np.arange(5, dtype=np.uint8).reshape(1, 1, 5)
    names = {1: "white matter", 2: "white matter 2", 3: "lesion", 4: "lesion 2"}
    assert structure_mask(labels, names, "white matter").ravel().tolist() == [False, True, True, False, False]
    assert structure_mask(labels, names, LESION).ravel().tolist() == [False, False, False, True, True]
    masks = reference_masks({"label_map": labels, "label_names": names, "boxes": None})
    assert {name: mask.ravel().tolist() for name, mask in masks.items()} == {
        "white matter": [False, True, True, False, False],
        LESION: [False, False, False, True, True],
    }


def test_boxes_without_outline_are_no_reference_for_segmentation() -> None:
    labels = np.ones((1, 2, 2), dtype=np.uint8)
    row = {"label_map": labels, "label_names": {1: "white matter"}}
    assert set(reference_masks({**row, "boxes": [{"label": "lesion"}]})) == {"white matter"}
    assert not reference_masks({**row, "boxes": []})[LESION].any()


@pytest.mark.parametrize(
    ("make", "shape"),
    [(labelled_sample, (4, len(DENSE_LABELS), 8, 16, 16)), (labelled_slices_sample, (4, len(DENSE_LABELS), 1, 32, 32))],
)
def test_patches_and_slices_carry_the_labels_of_their_voxels_mirrored_with_them(
    rows: list[dict], make: Callable, shape: tuple[int, ...]
) -> None:
    """White matter is one value of a made-up image: where the patch shows it, the patch's label says so."""
    ill = next(row for row in rows if structure_mask(row["label_map"], row["label_names"], LESION).any())
    white = structure_mask(ill["label_map"], ill["label_names"], "white matter")
    sample = make({**ill, "image": np.where(white, 3.0, 1.0)}, np.random.default_rng(0), options(4))
    shown, labels = sample["volumes"][:, 0], sample["labels"]
    assert labels.shape == shape
    np.testing.assert_array_equal(shown > 0, labels[:, DENSE_LABELS.index("white matter")])
    lesion = labels[:, DENSE_LABELS.index(LESION)]
    assert lesion[:2].any(axis=(1, 2, 3)).all()
    np.testing.assert_array_equal(lesion, labels[:, [DENSE_LABELS.index(f) for f in FINDINGS]].any(1))


def test_labels_that_nobody_drew_are_not_known(rows: list[dict]) -> None:
    lesions_only = {**rows[0], "label_names": {1: "haemorrhage"}}
    known = labelled_sample(lesions_only, np.random.default_rng(0), options(1))["known"]
    assert {DENSE_LABELS[i] for i in np.flatnonzero(known[0])} == {LESION, "haemorrhage"}


@pytest.mark.parametrize("method", ["acs", "espirit"])
def test_reconstruction_is_trained_on_the_coil_maps_of_the_contract(rows: list[dict], method: str) -> None:
    """Maps do not change with the scale, so those of the finished sample are those it was made with."""
    row = next(row for row in rows if row["kspace"] is not None)
    row = {**row, "kspace": np.pad(row["kspace"], ((0, 0), (0, 0), (0, 0), (16, 16)))}  # 5 centre lines of 64
    preprocess = Preprocess(replace(NATIVE, sens_maps=method))
    chosen = ViewOptions(preprocess=preprocess, slices_per_sample=2, accelerations=(2,))
    sample = reconstruction_sample(row, np.random.default_rng(0), chosen)
    kspace, mask = torch.from_numpy(sample["kspace"]), torch.from_numpy(sample["mask"])
    expected = estimate_sens_maps(kspace, mask, method=method)
    np.testing.assert_allclose(sample["sens_maps"], expected, atol=1e-4)
    assert any(f"{method} coil maps" in step for step in preprocess.steps)


def test_training_draws_every_acceleration_and_both_kinds_of_masks(rows: list[dict]) -> None:
    """Equispaced lines have gaps that differ by one at most; their number tells the acceleration."""
    row = next(row for row in rows if row["kspace"] is not None)
    row = {**row, "kspace": np.pad(row["kspace"], ((0, 0), (0, 0), (0, 0), (104, 104)))}
    wanted = range(2, 13)
    chosen = replace(options(1), accelerations=tuple(wanted), random_mask_share=0.5)
    rng = np.random.default_rng(0)
    masks = [reconstruction_sample(row, rng, chosen)["mask"][0] for _ in range(150)]
    equispaced = [mask for mask in masks if _is_equispaced(mask)]
    found = {min(wanted, key=lambda r: abs(240 / r - mask.sum())) for mask in equispaced}
    assert found == set(wanted)
    assert 50 < len(equispaced) < 100
    only = replace(chosen, random_mask_share=0.0)
    assert all(_is_equispaced(reconstruction_sample(row, rng, only)["mask"][0]) for _ in range(10))


def _is_equispaced(mask: np.ndarray) -> bool:
    gaps = np.diff(np.flatnonzero(mask[: len(mask) // 3]))
    return len(gaps) < 2 or int(np.ptp(gaps)) <= 1


def test_shares_are_between_nothing_and_all() -> None:
    with pytest.raises(ValueError, match=r"random_mask_share must be between 0 and 1, found 1\.5"):
        replace(options(1), random_mask_share=1.5)


def test_structures_of_another_part_of_the_body_have_an_empty_mask(rows: list[dict]) -> None:
    """Every prompt of them, and only where the row says what it shows; the others keep their masks."""
    row = {**rows[0], "body_part": "brain"}
    always = replace(options(2), foreign_share=1.0)
    sample = segmentation_sample(row, np.random.default_rng(0), always)
    assert not sample["slice_target"].any()
    assert not any(name in text for text in sample["instruction"] for name in (*TISSUES, LESION, "hippocampus"))
    unknown = segmentation_sample({**row, "body_part": None}, np.random.default_rng(0), always)
    assert unknown["slice_target"].any()
    rng = np.random.default_rng(1)
    some = replace(options(2), foreign_share=0.25)
    texts = [text for _ in range(20) for text in segmentation_sample(row, rng, some)["instruction"]]
    own = [any(name in text for name in (*TISSUES, LESION)) for text in texts]
    assert 0.6 < np.mean(own) < 0.9

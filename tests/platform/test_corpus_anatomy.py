"""The simulated head looks and measures like a head, and shows tissue as each contrast does."""

import csv
import importlib.util
from pathlib import Path

import numpy as np
import pytest
from scipy import ndimage

from omnimri.models.vocabulary import CONTRASTS, DIAGNOSES, TISSUES
from omnimri.platform.corpus.acquisition import ideal_image
from omnimri.platform.corpus.anatomy import CLASSES, Build, Head, Template, draw_head, load_template
from omnimri.platform.corpus.fields import smooth_field
from omnimri.platform.corpus.geometry import Grid, Pose, draw_geometry
from omnimri.platform.corpus.patient import Patient, Simulated, simulate
from omnimri.platform.corpus.places import region_of
from omnimri.platform.corpus.scanners import draw_protocols, draw_scanner
from omnimri.platform.corpus.signal import RELAXATION, Relaxation, Sequence, nulling_ti_ms, signal
from omnimri.platform.language.words import side_of

SHAPE, SPACING_MM = (24, 112, 96), (6.0, 2.0, 2.0)
AVERAGE = Build(petalia=0.045, ventricles=0.1, atrophy=0.2, marrow_mm=2.0, fat_mm=4.0)


@pytest.fixture(scope="module")
def template() -> Template:
    return load_template()


def head_of(template: Template, seed: int, build: Build = AVERAGE) -> tuple[Head, Grid]:
    rng = np.random.default_rng(seed)
    grid, pose = draw_geometry(rng, SHAPE, SPACING_MM, "F")
    return draw_head(template, build, pose, grid, rng), grid


@pytest.fixture(scope="module")
def five(template: Template) -> dict[str, Simulated]:
    """One patient of each diagnosis."""
    patients = [Patient.draw(index, 5) for index in range(5)]
    return {p.diagnosis: simulate(p, template, SHAPE, SPACING_MM, 4) for p in patients}


def contrast_images(simulated: Simulated) -> dict[str, np.ndarray]:
    field = simulated.patient.scanner.field_strength_t
    protocols = simulated.patient.protocols
    return {c: ideal_image(simulated.shares, protocols[c].sequence, field, simulated.tissue_scale) for c in CONTRASTS}


def test_a_smooth_field_has_unit_variance_and_no_fine_structure() -> None:
    field = smooth_field(np.random.default_rng(0), (60, 60, 60), (2.0, 2.0, 2.0), 12.0)
    assert field.std() == pytest.approx(1, abs=0.1)
    assert np.abs(np.diff(field, axis=0)).mean() < 0.25


def test_the_brain_has_the_volume_of_a_brain(template: Template) -> None:
    head, grid = head_of(template, 0)
    voxel_ml = np.prod(grid.fine_spacing_mm) / 1000
    fluid, grey, white = head.tissues[:3].sum((1, 2, 3)) * voxel_ml
    # Adults: about 1100-1600 ml inside the skull, 600-800 grey, 400-600 white.
    assert 1150 < fluid + grey + white < 1750
    assert 500 < grey < 900
    assert 350 < white < 650
    assert fluid > 100


def test_tissues_never_add_up_to_more_than_a_voxel(template: Template) -> None:
    head, _ = head_of(template, 1)
    assert head.tissues.min() >= 0
    assert head.tissues.sum(0).max() <= 1 + 1e-4


def test_skull_and_scalp_enclose_the_brain(template: Template) -> None:
    head, grid = head_of(template, 2)
    above_eyes = slice(grid.fine_shape[0] // 2, None)
    cavity = (head.brain > 0.5)[above_eyes]
    outside = ~ndimage.binary_dilation(cavity, iterations=2)
    bone = head.tissues[np.isin(CLASSES, ("compact bone", "marrow"))].sum(0)[above_eyes] > 0.5
    for slice_cavity, slice_bone in zip(cavity, bone, strict=True):
        if slice_cavity.sum() > 2000:
            # What is not bone falls into pieces, and the brain's piece is not that of the air in the corner.
            pieces, _ = ndimage.label(~slice_bone)
            assert pieces[0, 0] not in pieces[slice_cavity]
    assert head.tissues[CLASSES.index("fat")][above_eyes][outside].sum() > 5000


def test_left_is_not_right(template: Template) -> None:
    """A straight head on a straight grid: the template mirrors on itself, the patient does not."""
    affine = np.diag([-2.0, -2.0, 2.0, 1.0])
    affine[:3, 3] = [95.0, 90.0, -40.0]
    grid = Grid((50, 100, 96), affine, 1)
    pose = Pose(np.eye(3), np.array([0.0, -16.0, 6.0]), np.ones(3))

    def mirror_difference(build: Build, seed: int) -> np.ndarray:
        tissue = draw_head(template, build, pose, grid, np.random.default_rng(seed)).tissues[1:3].sum(0)
        return tissue - tissue[..., ::-1]

    np.testing.assert_allclose(template.grey, template.grey[::-1])
    differences = np.mean([mirror_difference(AVERAGE, seed) for seed in range(4)], axis=0)
    assert np.abs(differences).mean() > 0.02
    # The systematic part: more brain at the right (index x low is right) edge of the front (index y low).
    edge = (slice(None), slice(10, 35), slice(8, 30))
    assert differences[edge].mean() > 0


def test_ventricles_and_sulci_widen_with_atrophy(template: Template) -> None:
    young, old = (
        Build(petalia=0.045, ventricles=v, atrophy=a, marrow_mm=2, fat_mm=4) for v, a in ((0.05, 0), (0.4, 1))
    )
    fluid = [head_of(template, 3, build)[0].tissues[0].sum() for build in (young, old)]
    assert fluid[1] > 1.3 * fluid[0]


def test_a_known_spin_echo_and_the_null_of_an_inversion() -> None:
    tissue = Relaxation(t1_ms=1000, t2_ms=100, density=0.8)
    long_tr = Sequence(kind="spin echo", tr_ms=1e6, te_ms=100)
    assert signal(tissue, long_tr) == pytest.approx(0.8 * np.exp(-1))
    inversion = Sequence(kind="inversion recovery", tr_ms=9000, te_ms=10, ti_ms=nulling_ti_ms(tissue, 9000))
    assert signal(tissue, inversion) == pytest.approx(0, abs=1e-12)
    with pytest.raises(ValueError, match="ti_ms"):
        Sequence(kind="spin echo", tr_ms=500, te_ms=10, ti_ms=100)


def test_every_scanner_shows_tissues_and_lesions_as_readers_expect() -> None:
    for seed in range(40):
        rng = np.random.default_rng(seed)
        scanner = draw_scanner(rng)
        protocols = draw_protocols(scanner, rng)
        look = {
            name: {c: signal(tissue, p.sequence) for c, p in protocols.items()}
            for name, tissue in RELAXATION[scanner.field_strength_t].items()
        }
        fluid, grey, white = (look[name] for name in TISSUES)
        assert fluid["T1w"] < grey["T1w"] < white["T1w"]
        assert fluid["T2w"] > 1.5 * grey["T2w"] > 1.5 * white["T2w"]
        assert fluid["FLAIR"] < 0.25 * white["FLAIR"] < 0.25 * grey["FLAIR"]
        assert white["PD"] < grey["PD"]
        assert look["cavity"]["T2w"] > 2 * grey["T2w"]
        assert look["cavity"]["FLAIR"] < 0.5 * white["FLAIR"]
        assert look["cavity"]["T1w"] < grey["T1w"]
        for bright in ("gliosis", "plaque", "mass", "oedema"):
            assert look[bright]["FLAIR"] > 1.3 * white["FLAIR"]
            assert look[bright]["FLAIR"] > 1.05 * grey["FLAIR"]
            assert look[bright]["T1w"] < 0.95 * white["T1w"]
        assert look["blood core"]["T1w"] > white["T1w"] > grey["T1w"] > 0
        assert look["blood core"]["T2w"] < 0.8 * white["T2w"]
        assert look["blood rim"]["T2w"] < 0.3 * white["T2w"]
        assert look["compact bone"]["PD"] < 0.1 * white["PD"]


def test_images_show_their_labels_as_each_contrast_does(five: dict[str, Simulated]) -> None:
    for simulated in five.values():
        images, labels = contrast_images(simulated), simulated.labels
        mean = {c: [image[labels == value].mean() for value in (1, 2, 3)] for c, image in images.items()}
        assert mean["T1w"] == sorted(mean["T1w"])
        assert mean["T2w"] == sorted(mean["T2w"], reverse=True)
        assert mean["FLAIR"][0] < 0.75 * mean["FLAIR"][2] < 0.75 * mean["FLAIR"][1]
        lesion = labels > len(TISSUES)
        if simulated.patient.diagnosis in ("demyelinating disease", "oedematous mass"):
            assert images["FLAIR"][lesion].mean() > 1.2 * mean["FLAIR"][1]
        if simulated.patient.diagnosis == "old infarct":
            assert images["T2w"][lesion].mean() > 1.2 * mean["T2w"][1]
        if simulated.patient.diagnosis == "haemorrhage":
            assert images["T2w"][lesion].mean() < 0.7 * mean["T2w"][2]


def test_lesions_have_the_size_number_and_tissue_of_their_kind(five: dict[str, Simulated]) -> None:
    assert set(five) == set(DIAGNOSES)
    assert five["normal"].lesions == []
    assert not (five["normal"].labels > len(TISSUES)).any()
    sizes = {diagnosis: [lesion.size_mm for lesion in s.lesions] for diagnosis, s in five.items()}
    for single in ("old infarct", "oedematous mass", "haemorrhage"):
        assert len(sizes[single]) == 1
    assert 15 <= sizes["old infarct"][0] <= 50
    assert 18 <= sizes["oedematous mass"][0] <= 70
    assert 10 <= sizes["haemorrhage"][0] <= 40
    assert 2 <= len(sizes["demyelinating disease"]) <= 9
    assert {lesion.side for lesion in five["demyelinating disease"].lesions} == {"left", "right"}


def test_lesions_lie_inside_the_brain_and_nowhere_else(five: dict[str, Simulated]) -> None:
    for simulated in five.values():
        lesion = simulated.labels > len(TISSUES)
        bone_and_air = (
            1
            - sum(simulated.shares[name] for name in TISSUES)
            - sum(share for name, share in simulated.shares.items() if name not in CLASSES)
        )
        assert not lesion.any() or bone_and_air[lesion].mean() < 0.1


def test_the_brain_is_inside_the_slices(template: Template) -> None:
    for index in range(5):
        simulated = simulate(Patient.draw(index, 1), template, SHAPE, SPACING_MM, 1)
        brain = simulated.labels > 0
        assert brain[-1].mean() < 0.2
        assert not brain[:, [0, -1]].any()
        assert not brain[..., [0, -1]].any()
        head = sum(simulated.shares.values()) > 0.5
        assert head[:, :, [0, -1]].mean() < 0.02


def test_regions_agree_with_labelled_places_of_the_literature() -> None:
    """Dosenbach et al. name 160 places; those whose names are our regions must mostly be called so."""
    spec = importlib.util.find_spec("nilearn")
    assert spec is not None and spec.origin is not None
    table = Path(spec.origin).parent / "datasets" / "data" / "dosenbach_2010.csv"
    words = {"occipital": "occipital lobe", "parietal": "parietal lobe", "frontal": "frontal lobe",
             "temporal": "temporal lobe", "cerebellum": "cerebellum", "thalamus": "thalamus",
             "basal ganglia": "basal ganglia", "precentral gyrus": "frontal lobe"}  # fmt: skip
    found = []
    with table.open() as file:
        for row in csv.DictReader(file):
            region = next((region for word, region in words.items() if row["name"].endswith(word)), None)
            if region is not None:
                found.append(region_of(*(float(row[axis]) for axis in "xyz")) == region)
    assert len(found) > 50
    # The rest lie within a few millimetres of a boundary, or are named for a network and not for a lobe.
    assert np.mean(found) > 0.8


def test_left_has_negative_x() -> None:
    assert [side_of(x) for x in (-30.0, 30.0, 1.0)] == ["left", "right", "midline"]

"""Faces are removed from heads whose face and brain are known voxel by voxel, and from a real head where one is."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from scipy import ndimage
from scipy.spatial.transform import Rotation

from omnimri.models.scan import Scan
from omnimri.models.vocabulary import TISSUES
from omnimri.platform.corpus.anatomy import Build, Head, draw_head, load_template
from omnimri.platform.corpus.geometry import Grid, Pose
from omnimri.platform.data.formats.records import SeriesRecord
from omnimri.platform.data.intake.config import IngestConfig
from omnimri.platform.data.intake.deface import (
    DEFACED_FLAG,
    FACE_FLAG,
    DefaceError,
    deface,
    deidentification,
    face_flags,
    labelled_brain,
    remove_face,
    shear_normal,
    shows_face,
)  # fmt: skip
from omnimri.platform.data.intake.ingest import ingest
from omnimri.platform.data.intake.registration import RegistrationError, register
from omnimri.platform.data.shards import Shards, load_row

pytest.importorskip("SimpleITK", reason="the extra deface is not installed")

SPACING_MM = 2.0
SHAPE = (116, 120, 96)
T1_WEIGHTS = (0.25, 0.6, 1.0, 0.05, 0.6, 1.3, 0.45, 0.25)
"""Signal of the classes of `anatomy.CLASSES`."""
NAMES = dict(enumerate(TISSUES, start=1))
COLIN = Path("/usr/share/mricron/templates/ch2.nii.gz")
"""A real head, one man scanned 27 times, of Debian's package mricron-data."""


@pytest.fixture(scope="module")
def head() -> Head:
    affine = np.diag([SPACING_MM, SPACING_MM, SPACING_MM, 1.0])
    affine[:3, 3] = (-94, -130, -128)
    grid = Grid(shape=SHAPE, affine=affine, num_sub=1)
    build = Build(petalia=0.045, ventricles=0.15, atrophy=0.3, marrow_mm=2.0, fat_mm=4.0)
    pose = Pose(rotation=np.eye(3), centre_mm=np.array([0.0, -18.0, 8.0]), scale=np.array([1.02, 0.98, 1.0]))
    return draw_head(load_template(), build, pose, grid, np.random.default_rng(3))


@pytest.fixture(scope="module")
def scan(head: Head) -> Scan:
    """T1-weighted, with Rician noise."""
    rng = np.random.default_rng(4)
    signal = 400 * np.tensordot(T1_WEIGHTS, head.tissues, 1)
    image = np.abs(signal + 8 * (rng.normal(size=SHAPE) + 1j * rng.normal(size=SHAPE))).astype(np.float32)
    affine = np.diag([SPACING_MM, SPACING_MM, SPACING_MM, 1.0])
    affine[:3, 3] = (-94, -130, -128)
    return Scan(image=image, affine=affine, facts={"body_part": "brain"})


@pytest.fixture(scope="module")
def labels(head: Head) -> np.ndarray:
    return np.where(head.brain > 0.5, 1 + head.tissues[:3].argmax(0), 0).astype(np.uint8)


@pytest.fixture(scope="module")
def defaced(scan: Scan) -> Scan:
    result = deface(scan)
    assert result is not None
    return result[0]


def face_of(head: Head) -> np.ndarray:
    """Of the template: from the eyes down, in front of the temporal lobes."""
    _, y, z = head.mni_mm
    return (head.tissues.sum(0) > 0.5) & (z < -50) & (y > 45)


def canonical(scan: Scan) -> np.ndarray:
    image = nib.Nifti1Image(scan.image.transpose(2, 1, 0), scan.affine)
    return np.asarray(nib.as_closest_canonical(image).dataobj)


def test_the_face_is_gone_and_the_brain_untouched(head: Head, scan: Scan, defaced: Scan) -> None:
    face, brain = face_of(head), head.brain > 0.5
    assert face.sum() * SPACING_MM**3 > 50_000
    assert not defaced.image[face].any()
    np.testing.assert_array_equal(defaced.image[brain], scan.image[brain])
    changed = defaced.image != scan.image
    assert not defaced.image[changed].any()
    eyes = head.tissues[7] > 0.5
    assert changed[eyes].mean() > 0.4  # their lower half


def test_the_same_volume_loses_the_same_voxels_again(scan: Scan, defaced: Scan) -> None:
    again = deface(scan)
    assert again is not None
    np.testing.assert_array_equal(again[0].image, defaced.image)


@pytest.mark.parametrize("axes", ["LPS", "SAR", "ALI", "PIR"])
def test_axes_of_the_array_do_not_matter(axes: str, scan: Scan, defaced: Scan) -> None:
    image = nib.Nifti1Image(scan.image.transpose(2, 1, 0), scan.affine)
    turn = nib.orientations.ornt_transform(nib.io_orientation(scan.affine), nib.orientations.axcodes2ornt(axes))
    turned = image.as_reoriented(turn)
    result = deface(Scan(image=np.asarray(turned.dataobj).transpose(2, 1, 0), affine=turned.affine))
    assert result is not None
    np.testing.assert_array_equal(canonical(result[0]), canonical(defaced))


def resampled(array: np.ndarray, affine: np.ndarray, to: np.ndarray) -> np.ndarray:
    """`(Z, Y, X)` on another grid of the same shape."""
    index = np.linalg.inv(affine) @ to
    return ndimage.affine_transform(array.transpose(2, 1, 0), index[:3, :3], index[:3, 3], order=1).transpose(2, 1, 0)


@pytest.mark.parametrize("nodding", [False, True])
def test_a_tilted_volume_and_a_tilted_head_lose_the_same_anatomy(
    nodding: bool, head: Head, scan: Scan, defaced: Scan
) -> None:
    """The grid alone is oblique; or the patient nods, and the header does not say so."""
    middle = scan.affine @ [SHAPE[2] / 2, SHAPE[1] / 2, SHAPE[0] / 2, 1]
    tilt = np.eye(4)
    tilt[:3, :3] = Rotation.from_euler("xyz", (15, 0, 0) if nodding else (10, 7, -9), degrees=True).as_matrix()
    tilt[:3, 3] = middle[:3] - tilt[:3, :3] @ middle[:3]
    to = tilt @ scan.affine
    result = deface(Scan(image=resampled(scan.image, scan.affine, to), affine=scan.affine if nodding else to))
    assert result is not None
    cut = result[0].image == 0
    expected = resampled((defaced.image == 0).astype(np.float32), scan.affine, to) > 0.5
    tissue = resampled((head.tissues.sum(0) > 0.5).astype(np.float32), scan.affine, to) > 0.5
    brain = resampled((head.brain > 0.5).astype(np.float32), scan.affine, to) > 0.5
    dice = 2 * (cut & expected & tissue).sum() / ((cut & tissue).sum() + (expected & tissue).sum())
    assert dice > 0.93
    assert not cut[brain].any()


def test_a_labelled_brain_is_used_as_it_is(head: Head, scan: Scan, labels: np.ndarray) -> None:
    result = deface(scan, labels, NAMES)
    assert result is not None
    assert not result[0].image[face_of(head)].any()
    np.testing.assert_array_equal(result[1], labels)
    np.testing.assert_array_equal(result[0].image[labels > 0], scan.image[labels > 0])


def test_a_label_map_is_a_brain_only_if_it_is_whole_and_upright(scan: Scan, labels: np.ndarray) -> None:
    assert labelled_brain(labels, NAMES, scan.affine) is not None
    assert labelled_brain(labels, {1: "lesion", 2: "oedema", 3: "core"}, scan.affine) is None
    assert labelled_brain(np.where(np.arange(SHAPE[0])[:, None, None] > 80, labels, 0), NAMES, scan.affine) is None
    for turned in (labels[::-1], labels[:, ::-1], labels[::-1, ::-1]):
        assert labelled_brain(turned, NAMES, scan.affine) is None


def test_marks_of_the_face_go_with_it_and_others_forbid_the_cut(head: Head, scan: Scan) -> None:
    marked = face_of(head).astype(np.uint8)
    result = deface(scan, marked, {1: "left eye"})
    assert result is not None
    assert not result[1].any()
    with pytest.raises(DefaceError, match="The cut would remove what is marked: lesion"):
        deface(scan, marked, {1: "lesion"})
    z, y, x = np.argwhere(marked)[len(np.argwhere(marked)) // 2].tolist()
    with pytest.raises(DefaceError, match="a box"):
        deface(scan, boxes=[{"box_voxel": [z, y, x, z + 1, y + 1, x + 1]}])


def test_a_face_is_told_from_a_brain_and_from_a_defaced_head(head: Head, scan: Scan, defaced: Scan) -> None:
    stripped = np.where(head.brain > 0.5, scan.image, 0)
    assert shows_face(scan.image, scan.affine) is True
    assert shows_face(stripped, scan.affine) is False
    assert shows_face(defaced.image, scan.affine) is False
    assert shows_face(scan.image[80:], scan.affine) is None
    facts, noisy, silent = {"body_part": "brain"}, {"snr": 20.0}, {"snr": None}
    # Air that the scanner set to zero does not hide a face.
    assert face_flags(scan, facts, silent, simulated=False) == [FACE_FLAG]
    assert face_flags(replace(scan, image=defaced.image), facts, noisy, simulated=False) == []
    assert face_flags(scan, facts, noisy, simulated=True) == []
    assert face_flags(scan, {"body_part": "neck"}, noisy, simulated=False) == [FACE_FLAG]
    assert face_flags(scan, {"body_part": "knee"}, noisy, simulated=False) == []
    kspace = replace(scan, image=stripped, kspace=np.zeros((SHAPE[0], 1, 2, 2), np.complex64))
    assert face_flags(kspace, facts, silent, simulated=False) == [FACE_FLAG]


@pytest.mark.parametrize(("part", "is_cut"), [("brain", True), ("neck", True), (None, True), ("knee", False)])
def test_only_what_cannot_show_a_face_is_left_without_a_look(part: str | None, is_cut: bool, scan: Scan) -> None:
    keys = {"patient_key": "p", "study_key": "s", "series_key": "s"}
    record = SeriesRecord(scan=scan, source="a.nii", source_format="nifti", **keys)
    faceless = remove_face(record, {"body_part": part}, None, {}, None, undefaced="reject")
    assert faceless.flags == ([DEFACED_FLAG] if is_cut else None)


def test_there_is_nothing_to_remove_from_a_brain(head: Head, scan: Scan) -> None:
    assert deface(replace(scan, image=np.where(head.brain > 0.5, scan.image, 0))) is None


def test_a_shear_plane_touches_the_outline_of_a_known_shape() -> None:
    """A wedge whose front lower side falls by 30 degrees towards the back."""
    y, z = np.meshgrid(np.linspace(-80, 80, 81), np.linspace(-80, 80, 81))
    wedge = (z > np.tan(np.deg2rad(30)) * (y - 40)) & (z < 60)
    points = np.stack([0 * y[wedge], y[wedge], z[wedge]], axis=1)
    points[::2, 0], points[1::2, 0] = -50, 50
    normal = shear_normal(points, np.array([1.0, 0, 0]))
    np.testing.assert_allclose(normal, [0, np.sin(np.deg2rad(30)), -np.cos(np.deg2rad(30))], atol=0.02)


@pytest.mark.parametrize("turn", [np.s_[::-1], np.s_[:, ::-1]])
def test_a_head_in_a_wrong_orientation_is_not_registered(turn: tuple, scan: Scan) -> None:
    with pytest.raises(RegistrationError):
        register(scan.image[turn].transpose(2, 1, 0), scan.affine)


def test_what_is_no_head_is_not_registered() -> None:
    noise = np.random.default_rng(0).rayleigh(1, (80, 80, 60)).astype(np.float32)
    with pytest.raises(RegistrationError):
        register(noise, np.diag([3.0, 3.0, 3.0, 1.0]))


@pytest.fixture(scope="module")
def source(scan: Scan, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A head, what may be one, and a knee."""
    folder = tmp_path_factory.mktemp("heads")
    rng = np.random.default_rng(5)
    image = nib.Nifti1Image(scan.image.transpose(2, 1, 0), scan.affine)
    for name, part in (("sub-1/sub-1_T1w", "BRAIN"), ("sub-2/sub-2_T1w", "KNEE"), ("sub-3/sub-3_T1w", None)):
        path = folder / f"{name}.nii.gz"
        path.parent.mkdir()
        if name.startswith("sub-3"):
            noise = rng.rayleigh(50, (40, 40, 40)).astype(np.float32)
            image = nib.Nifti1Image(noise, np.diag([4.0, 4.0, 4.0, 1.0]))
        elif part == "KNEE":
            image = nib.Nifti1Image(1.5 * np.asarray(image.dataobj)[::-1], scan.affine)
        nib.save(image, path)
        path.with_name(f"{path.name[:-7]}.json").write_text(json.dumps({"BodyPartExamined": part} if part else {}))
    return folder


def rows_by_part(out: Path) -> dict[str | None, dict]:
    return {row["body_part"]: row for row in json.loads((out / "manifest.json").read_text())["rows"]}


def quality_of_brain(out: Path) -> dict[str, float | None]:
    [ref] = Shards.open(out).select(body_part="brain").rows
    return load_row(ref, ["quality"])["quality"]


def test_ingest_leaves_faces_unless_told(source: Path, tmp_path: Path, ray_cluster: None) -> None:
    kept = ingest([source], tmp_path / "kept", IngestConfig())
    removed = ingest([source], tmp_path / "removed", IngestConfig(deface=True))
    again = ingest([source], tmp_path / "again", IngestConfig(deface=True))
    assert kept.num_volumes == 3
    assert removed.digest == again.digest != kept.digest
    before, after = rows_by_part(kept.out), rows_by_part(removed.out)
    assert FACE_FLAG in before["brain"]["flags"]
    assert DEFACED_FLAG in after["brain"]["flags"]
    assert FACE_FLAG not in after["brain"]["flags"]
    assert after["knee"]["digest"] == before["knee"]["digest"]
    assert after["brain"]["digest"] != before["brain"]["digest"]
    # What is cut is no air, and the two stay near copies.
    assert after["brain"]["fingerprint"] == before["brain"]["fingerprint"]
    measured = [quality_of_brain(out) for out in (kept.out, removed.out)]
    assert measured[0] == measured[1]
    assert None not in after, "what may be a head and has no brain to be found is rejected"
    [line] = removed.rejects_path.read_text().splitlines()
    assert "Its face was not removed. No brain was found" in line
    assert "undefaced=flag" in line
    method = json.loads((removed.out / "manifest.json").read_text())["deidentification"]
    assert "113102" in method["codes"]
    assert "113102" not in json.loads((kept.out / "manifest.json").read_text())["deidentification"]["codes"]


def test_ingest_keeps_faces_under_a_flag_if_told(source: Path, tmp_path: Path, ray_cluster: None) -> None:
    flagged = ingest([source / "sub-3"], tmp_path / "flagged", IngestConfig(deface=True, undefaced="flag"))
    assert FACE_FLAG in rows_by_part(flagged.out)[None]["flags"]
    assert "113102" not in json.loads((flagged.out / "manifest.json").read_text())["deidentification"]["codes"]


def test_a_manifest_claims_clean_faces_only_where_none_is_left() -> None:
    defaced, left = {"flags": [DEFACED_FLAG]}, {"flags": ["low SNR", FACE_FLAG]}
    assert "113102" in deidentification([defaced], faces_removed=True)["codes"]
    assert "113102" not in deidentification([defaced, left], faces_removed=True)["codes"]
    assert "faces" not in deidentification([left], faces_removed=False)


def test_k_space_of_a_head_cannot_be_defaced(scan: Scan) -> None:
    with pytest.raises(DefaceError, match="its face comes back with every reconstruction"):
        deface(replace(scan, kspace=np.zeros((SHAPE[0], 1, 2, 2), np.complex64)))


def test_a_missing_library_is_named_before_anything_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install 'omnimri\[deface\]'"):
        IngestConfig(deface=True)
    assert not IngestConfig().deface


@pytest.mark.skipif(not COLIN.exists(), reason="mricron-data is not installed")
def test_a_real_head_loses_its_face_and_keeps_its_brain() -> None:
    """Colin27 lies in MNI space, with its brain beside it."""
    image, brain = nib.load(COLIN), nib.load(COLIN.with_name("ch2bet.nii.gz")).get_fdata() > 0
    voxels = image.get_fdata(dtype=np.float32)
    result = deface(Scan(image=voxels.transpose(2, 1, 0), affine=image.affine))
    assert result is not None
    cut = result[0].image.transpose(2, 1, 0)
    index = np.indices(cut.shape)
    y, z = (index[axis] + image.affine[axis, 3] for axis in (1, 2))
    assert not cut[(y > 60) & (z < -45)].any()
    np.testing.assert_array_equal(cut[brain], voxels[brain])

"""Random label maps with known lesions, stored in any orientation."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import permutations, product

import numpy as np
from scipy.spatial import KDTree
from scipy.spatial.transform import Rotation

from omnimri.platform.language.derive import Known

ORIENTATIONS = tuple(product(permutations(range(3)), product((1, -1), repeat=3)))
"""The 48 ways to store a volume: order of the axes, and their signs."""

NAMES = {1: "white matter", 2: "grey matter", 3: "demyelinating plaque", 4: "haemorrhage", 7: "something new",
         9: "tumour label 2"}  # fmt: skip
FINDINGS = {3: "demyelinating plaque", 4: "haemorrhage"}


@dataclass(frozen=True)
class Stored:
    """Arrays `(Z, Y, X)` and the affine of index `(x, y, z)`."""

    labels: np.ndarray
    image: np.ndarray
    affine: np.ndarray

    def known(self, **more: object) -> Known:
        return Known(image=self.image, affine=self.affine, label_map=self.labels, label_names=NAMES, **more)  # type: ignore[arg-type]


def random_case(seed: int) -> Stored:
    """A two-tissue brain with up to five ellipsoid lesions, stored in any orientation, oblique for every third seed."""
    rng = np.random.default_rng(seed)
    spacing = rng.uniform(1.5, 5.0, 3)
    shape = np.ceil(np.array([130, 150, 120]) / spacing).astype(int)
    affine = _affine(rng, spacing, shape, tilt=seed % 3 == 0)
    points = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), axis=-1) @ affine[:3, :3].T + affine[:3, 3]
    centre = points.reshape(-1, 3).mean(axis=0)
    radius = np.sqrt((((points - centre) / [58, 68, 52]) ** 2).sum(-1))
    labels = np.where(radius < 0.75, 1, np.where(radius < 1, 2, 0)).astype(np.uint8)
    for _ in range(rng.integers(0, 6)):
        at = centre + rng.uniform([-40, -40, -30], [40, 40, 30])
        axes = Rotation.random(rng=rng).as_matrix() / rng.uniform(2, 14, 3)
        inside = (((points - at) @ axes) ** 2).sum(-1) < 1
        labels[inside & (radius < 1)] = rng.choice([3, 3, 4, 9])
    image = rng.uniform(0.95, 1.05, shape) * np.choose(np.minimum(labels, 5), [5, 100, 70, 140, 40, 90])
    case = Stored(labels.T.copy(), image.T.astype(np.float32).copy(), affine)
    return stored_as(case, *ORIENTATIONS[rng.integers(len(ORIENTATIONS))])


def _affine(rng: np.random.Generator, spacing: np.ndarray, shape: np.ndarray, *, tilt: bool) -> np.ndarray:
    turn = Rotation.from_euler("xyz", rng.uniform(-25, 25, 3), degrees=True).as_matrix() if tilt else np.eye(3)
    affine = np.eye(4)
    affine[:3, :3] = turn @ np.diag(spacing)
    affine[:3, 3] = rng.uniform(-20, 20, 3) - affine[:3, :3] @ (shape / 2)
    return affine


def stored_as(case: Stored, order: tuple[int, ...], signs: tuple[int, ...]) -> Stored:
    """The same voxels in another order of axes, some of them backwards, with the affine to match."""
    shape = np.array(case.labels.T.shape)
    matrix = np.zeros((4, 4))
    matrix[3, 3] = 1
    for new, (old, sign) in enumerate(zip(order, signs, strict=True)):
        matrix[old, new] = sign
        matrix[old, 3] = 0 if sign > 0 else shape[old] - 1
    arrays = (_turned(array, order, signs) for array in (case.labels, case.image))
    return Stored(*arrays, case.affine @ matrix)


def _turned(array: np.ndarray, order: tuple[int, ...], signs: tuple[int, ...]) -> np.ndarray:
    turned = array.T.transpose(order)[tuple(slice(None, None, sign) for sign in signs)]
    return np.ascontiguousarray(turned.T)


def mirrored(case: Stored) -> Stored:
    """The same patient with left and right exchanged."""
    return Stored(case.labels, case.image, np.diag([-1.0, 1, 1, 1]) @ case.affine)


def lesions_of(case: Stored, value: int) -> list[np.ndarray]:
    """RAS mm `(N, 3)` of each lesion of three voxels or more, found by flooding instead of labelling."""
    return [_ras(case, np.array(sorted(part))) for part in _floods(case.labels == value) if len(part) >= 3]


def _floods(mask: np.ndarray) -> Iterator[set[tuple[int, ...]]]:
    left = set(map(tuple, np.argwhere(mask).tolist()))
    steps = [step for step in product((-1, 0, 1), repeat=3) if any(step)]
    while left:
        part, edge = set(), [left.pop()]
        while edge:
            voxel = edge.pop()
            part.add(voxel)
            near = {tuple(v + s for v, s in zip(voxel, step, strict=True)) for step in steps} & left
            left -= near
            edge += near
        yield part


def _ras(case: Stored, index_zyx: np.ndarray) -> np.ndarray:
    return index_zyx[:, ::-1] @ case.affine[:3, :3].T + case.affine[:3, 3]


def true_sides(case: Stored, value: int) -> list[str]:
    """Side of each lesion against the middle of all that is labelled brain or finding."""
    middle = _ras(case, np.argwhere(np.isin(case.labels, [1, 2, 3, 4]))).mean(axis=0)[0]
    offsets = [points.mean(axis=0)[0] - middle for points in lesions_of(case, value)]
    return ["midline" if abs(x) < 5 else "right" if x > 0 else "left" for x in offsets]


def true_extent_mm(case: Stored, value: int) -> float:
    """Longest edge of a lesion's box along the axes of the grid that are not much coarser than the finest."""
    steps = case.affine[:3, :3]
    lengths = np.linalg.norm(steps, axis=0)
    fine = lengths <= 1.5 * lengths.min()
    edges = [np.ptp(points @ (steps / lengths), axis=0) + lengths for points in lesions_of(case, value)]
    return float(max((edge[fine].max() for edge in edges), default=0.0))


def true_site(case: Stored, value: int) -> str:
    """The tissue that is more than half of what lies within 5 mm along each axis of the grid."""
    lengths = np.linalg.norm(case.affine[:3, :3], axis=0)
    to_grid = np.linalg.inv(case.affine[:3, :3] / lengths)
    lesion = np.concatenate(lesions_of(case, value)) @ to_grid.T
    outside = np.argwhere(~np.isin(case.labels, list(FINDINGS)))
    distance, _ = KDTree(lesion).query(_ras(case, outside) @ to_grid.T, p=np.inf, distance_upper_bound=5.5)
    around = case.labels[tuple(outside[distance <= 5].T)]
    return next((NAMES[tissue] for tissue in (1, 2) if 2 * (around == tissue).sum() > around.size), "")

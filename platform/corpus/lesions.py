"""Four kinds of lesion that differ in signal, size, shape and place, with their exact extent.

A lesion is planned in the template (where, how large), so that it lies in the right tissue; it is drawn in a patient's
head by the template coordinates of the voxels, and so follows that patient's anatomy.
"""

# Z Y X voxels of the fine grid

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from scipy.spatial.transform import Rotation

from omnimri.models.vocabulary import DIAGNOSES, FINDINGS
from omnimri.platform.corpus.anatomy import Head, Push, Template
from omnimri.platform.corpus.fields import ramp, smooth_field
from omnimri.platform.corpus.geometry import Grid

FINDING_OF = dict(zip(DIAGNOSES, (None, *FINDINGS), strict=True))
"""The finding that stands behind each diagnosis; None in a healthy head."""

UNLABELLED_PARTS = ("halo",)
"""Parts that a reader would not draw around: the thin oedema beside fresh blood."""

_LATERAL_VENTRICLE_MM = np.array([18.0, -15.0, 18.0])
_MAX_TRIES = 5000


@dataclass(frozen=True, kw_only=True)
class Blob:
    """An ellipsoid with a wavy surface."""

    centre_mm: np.ndarray
    """MNI `(3,)`."""
    radii_mm: np.ndarray
    rotation: np.ndarray
    """`(3, 3)`: columns are the axes of the ellipsoid."""
    roughness: float
    """Standard deviation of the radius as a share of it."""


@dataclass(frozen=True, kw_only=True)
class LesionPlan:
    """What will be drawn, before the head exists."""

    finding: str | None
    blobs: tuple[Blob, ...] = ()
    apex_mm: np.ndarray | None = None
    """Deep point of an infarct's wedge."""
    margin_mm: float = 0.0
    """Width of the oedema, rim or gliosis around."""
    push: Push | None = None


@dataclass(frozen=True)
class Lesions:
    """What was put into one head."""

    finding: str | None
    parts: dict[str, np.ndarray] = field(default_factory=dict)
    """Part of a lesion, as `signal.RELAXATION` names it, to its share `(Z, Y, X)` of each voxel."""

    def labelled(self, shape: tuple[int, int, int]) -> np.ndarray:
        """Share of each voxel that belongs to the finding."""
        total = np.zeros(shape, np.float32)
        for name, share in self.parts.items():
            if name not in UNLABELLED_PARTS:
                total += share
        return total


def plan_lesions(template: Template, diagnosis: str, rng: np.random.Generator) -> LesionPlan:
    """Where a diagnosis will show and how large; nothing for a normal head."""
    finding = FINDING_OF[diagnosis]
    if finding is None:
        return LesionPlan(finding=None)
    planner = dict(zip(FINDINGS, (_plan_infarct, _plan_plaques, _plan_mass, _plan_haemorrhage), strict=True))
    return planner[finding](template, rng)


def draw_lesions(plan: LesionPlan, head: Head, grid: Grid, rng: np.random.Generator) -> Lesions:
    """The planned lesions in a head; shares never add up to more than the brain holds."""
    if plan.finding is None:
        return Lesions(None)
    painter = dict(zip(FINDINGS, (_paint_infarct, _paint_plaques, _paint_mass, _paint_haemorrhage), strict=True))
    waves = smooth_field(rng, grid.fine_shape, grid.fine_spacing_mm, 9.0)
    parts = painter[plan.finding](plan, head, waves)
    return Lesions(plan.finding, {name: share.astype(np.float32) for name, share in parts.items()})


def _plan_infarct(template: Template, rng: np.random.Generator) -> LesionPlan:
    """A wedge with its base on the cortex of one hemisphere, 15 to 45 mm, pointing to the lateral ventricle."""
    centre = _site(template, rng, low=(30, -80, -15), high=(62, 50, 55), tissue="grey")
    inward = _LATERAL_VENTRICLE_MM * [np.sign(centre[0]), 1, 1] - centre
    length = float(np.linalg.norm(inward))
    depth = rng.uniform(15, min(38, 0.85 * length))
    wedge = Blob(
        centre_mm=centre, radii_mm=np.full(3, depth), rotation=np.eye(3), roughness=float(rng.uniform(0.06, 0.12))
    )
    return LesionPlan(
        finding="old infarct", blobs=(wedge,), apex_mm=centre + inward * depth / length,
        margin_mm=float(rng.uniform(3.0, 4.5)),
    )  # fmt: skip


def _paint_infarct(plan: LesionPlan, head: Head, waves: np.ndarray) -> dict[str, np.ndarray]:
    """The cavity reaches the skull; what is left of the wedge around it is gliosis."""
    (blob,) = plan.blobs
    assert plan.apex_mm is not None
    axis = blob.centre_mm - plan.apex_mm
    depth = np.linalg.norm(axis)
    offset = head.mni_mm - _column(plan.apex_mm)
    along = np.einsum("i,izyx->zyx", (axis / depth).astype(np.float32), offset)
    across = np.sqrt(np.maximum((offset**2).sum(0) - along**2, 0))
    wavy = 1 + blob.roughness * waves
    # Half the base is a little under half the depth; the base bulges to the brain's surface.
    inside_mm = np.minimum(along, (2.5 + 0.42 * np.clip(along, 0, None)) * wavy - across)
    inside_mm = np.minimum(inside_mm, 1.3 * depth - np.sqrt((offset**2).sum(0)))
    cavity = ramp(inside_mm - plan.margin_mm)
    # Fluid of the sulci stays fluid: only tissue turns gliotic.
    gliosis = (ramp(inside_mm) - cavity) * (head.tissues[1] + head.tissues[2])
    return {"cavity": cavity * head.brain, "gliosis": np.clip(gliosis, 0, None)}


def _plan_plaques(template: Template, rng: np.random.Generator) -> LesionPlan:
    """Three to nine ovoids of 5 to 12 mm beside the ventricles of both hemispheres, standing out from them."""
    blobs: list[Blob] = []
    first = int(rng.integers(2))
    for index in range(int(rng.integers(3, 10))):
        side = (-1) ** (index + first)
        centre = _site(template, rng, low=(17, -50, 6), high=(30, 32, 26), tissue="white", side=side)
        lengths = (rng.uniform(3.5, 6.0), rng.uniform(2.8, 4.6), rng.uniform(2.8, 5.5))
        turn = Rotation.from_euler("yz", rng.normal(0, 15, 2), degrees=True).as_matrix()
        blobs.append(Blob(centre_mm=centre, radii_mm=np.array(lengths), rotation=turn, roughness=0.07))
    return LesionPlan(finding="demyelinating plaque", blobs=tuple(blobs))


def _paint_plaques(plan: LesionPlan, head: Head, waves: np.ndarray) -> dict[str, np.ndarray]:
    tissue = head.tissues[1] + head.tissues[2]
    inside = [ramp(_inside_mm(blob, head, waves)) for blob in plan.blobs]
    return {"plaque": np.max(inside, axis=0) * tissue}


def _plan_mass(template: Template, rng: np.random.Generator) -> LesionPlan:
    """A solid mass of 18 to 35 mm in one hemisphere, with oedema around it and brain pushed aside."""
    centre = _site(template, rng, low=(22, -68, 2), high=(46, 44, 48), tissue="white")
    radius = float(rng.uniform(9, 17.5))
    blob = _round(centre, radius, rng, roughness=0.09)
    push = Push(centre_mm=centre, radius_mm=radius, amount_mm=float(0.25 * radius + rng.uniform(0, 1.5)))
    return LesionPlan(finding="oedematous mass", blobs=(blob,), margin_mm=float(rng.uniform(7, 12)), push=push)


def _paint_mass(plan: LesionPlan, head: Head, waves: np.ndarray) -> dict[str, np.ndarray]:
    """Oedema spreads through white matter and hardly into cortex, hence its fingers."""
    inside_mm = _inside_mm(plan.blobs[0], head, waves)
    solid = head.tissues[:3].sum(0)
    mass = ramp(inside_mm) * solid
    white = np.clip(head.tissues[2] * 1.6 - 0.3, 0, 1)
    near = ramp(inside_mm + 3.0)
    reach = ramp(inside_mm + plan.margin_mm * (1 + 0.25 * waves), 5.0)
    oedema = np.maximum(reach * white, near * (head.tissues[1] + head.tissues[2])) * (1 - ramp(inside_mm))
    return {"mass": mass, "oedema": np.clip(oedema, 0, solid - mass)}


def _plan_haemorrhage(template: Template, rng: np.random.Generator) -> LesionPlan:
    """A bleed of 12 to 35 mm in the basal ganglia or thalamus, less often in a lobe."""
    if rng.random() < 0.65:
        centre = _site(template, rng, low=(14, -22, 0), high=(30, 12, 12), tissue="any")
    else:
        centre = _site(template, rng, low=(24, -70, 5), high=(44, 45, 45), tissue="white")
    radius = float(rng.uniform(7.5, 17.5))
    push = Push(centre_mm=centre, radius_mm=radius, amount_mm=float(0.2 * radius))
    blob = _round(centre, radius, rng, roughness=0.07)
    return LesionPlan(finding="haemorrhage", blobs=(blob,), margin_mm=float(rng.uniform(2.2, 3.2)), push=push)


def _paint_haemorrhage(plan: LesionPlan, head: Head, waves: np.ndarray) -> dict[str, np.ndarray]:
    inside_mm = _inside_mm(plan.blobs[0], head, waves)
    brain = head.brain
    whole, core = ramp(inside_mm), ramp(inside_mm - plan.margin_mm)
    halo = (ramp(inside_mm + 3.5, 3.0) - whole) * (head.tissues[1] + head.tissues[2])
    return {"blood core": core * brain, "blood rim": (whole - core) * brain, "halo": np.clip(halo, 0, None)}


def _site(
    template: Template, rng: np.random.Generator, *, low: tuple[float, ...], high: tuple[float, ...], tissue: str,
    side: int | None = None,
) -> np.ndarray:  # fmt: skip
    """A point of the template in a tissue, in a box given for x > 0 and mirrored at random unless `side` says."""
    sign = side or int(rng.choice((-1, 1)))
    for _ in range(_MAX_TRIES):
        point = rng.uniform(low, high) * [sign, 1, 1]
        grey, white = template.at(point)
        if {"grey": grey > 0.6, "white": white > 0.7, "any": grey + white > 0.7}[tissue]:
            return point
    raise AssertionError(f"no {tissue} matter between {low} and {high} of the template")


def _round(centre: np.ndarray, radius: float, rng: np.random.Generator, *, roughness: float) -> Blob:
    """A roundish blob in a random position."""
    return Blob(
        centre_mm=centre, radii_mm=radius * np.array([1.0, rng.uniform(0.8, 1.0), rng.uniform(0.8, 1.0)]),
        rotation=Rotation.random(rng=rng).as_matrix(), roughness=roughness,
    )  # fmt: skip


def _inside_mm(blob: Blob, head: Head, waves: np.ndarray) -> np.ndarray:
    """About how deep each voxel lies inside a blob, in mm of the template; negative outside."""
    offset = head.mni_mm - _column(blob.centre_mm)
    along = np.einsum("ji,jzyx->izyx", (blob.rotation / blob.radii_mm).astype(np.float32), offset)
    distance = np.sqrt((along**2).sum(0))
    return (1 + blob.roughness * waves - distance) * np.float32(np.mean(blob.radii_mm))


def _column(vector: np.ndarray) -> np.ndarray:
    return vector.astype(np.float32)[:, None, None, None]

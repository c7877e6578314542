"""Scanners and their protocols: the names and numbers that headers of three vendors hold."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from omnimri.models.vocabulary import CONTRASTS
from omnimri.platform.corpus.signal import RELAXATION, Sequence, nulling_ti_ms


@dataclass(frozen=True, kw_only=True)
class Scanner:
    """What identifies the machine in a header."""

    vendor: str
    """As the row schema names it: Siemens, GE or Philips."""
    manufacturer: str
    """As the header spells it."""
    model: str
    field_strength_t: float


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """One contrast as a scanner is set to take it."""

    contrast: str
    name: str
    """Series description."""
    sequence: Sequence
    scanning_sequence: tuple[str, ...]
    """DICOM (0018,0020)."""
    sequence_variant: tuple[str, ...]
    """DICOM (0018,0021)."""
    echo_train_length: int


_MANUFACTURERS = {
    "Siemens": ("SIEMENS", "Siemens HealthCare GmbH", "Siemens Healthineers"),
    "GE": ("GE MEDICAL SYSTEMS",),
    "Philips": ("Philips Medical Systems", "Philips Healthcare", "Philips"),
}
_MODELS = {
    ("Siemens", 1.5): ("Avanto", "Aera", "MAGNETOM Sola"),
    ("Siemens", 3.0): ("Skyra", "Prisma", "MAGNETOM Vida"),
    ("GE", 1.5): ("Signa HDxt", "Optima MR450w", "SIGNA Artist"),
    ("GE", 3.0): ("DISCOVERY MR750", "DISCOVERY MR750w", "SIGNA Architect"),
    ("Philips", 1.5): ("Achieva", "Ingenia", "Ingenia Ambition S"),
    ("Philips", 3.0): ("Achieva dStream", "Ingenia", "Ingenia Elition X"),
}
_NAMES = {
    "Siemens": {"T1w": "t1_se_tra", "T1w GR": "t1_fl2d_tra", "T2w": "t2_tse_tra", "FLAIR": "t2_tirm_tra_dark-fluid",
                "PD": "pd_tse_tra"},
    "GE": {"T1w": "Ax T1 SE", "T1w GR": "Ax T1 FSPGR", "T2w": "Ax T2 FSE", "FLAIR": "Ax T2 FLAIR", "PD": "Ax PD FSE"},
    "Philips": {"T1w": "T1W_SE", "T1w GR": "T1W_FFE", "T2w": "T2W_TSE", "FLAIR": "FLAIR_longTR", "PD": "PDW_TSE"},
}  # fmt: skip


def draw_scanner(rng: np.random.Generator) -> Scanner:
    """A scanner; Siemens and 3 T are the more common ones, as in public collections."""
    vendor = str(rng.choice(list(_MANUFACTURERS), p=(0.4, 0.3, 0.3)))
    field = float(rng.choice((1.5, 3.0), p=(0.4, 0.6)))
    manufacturer, model = (str(rng.choice(names)) for names in (_MANUFACTURERS[vendor], _MODELS[vendor, field]))
    return Scanner(vendor=vendor, manufacturer=manufacturer, model=model, field_strength_t=field)


def draw_protocols(scanner: Scanner, rng: np.random.Generator) -> dict[str, Protocol]:
    """One protocol for each contrast, in the order of CONTRASTS, with a site's own timings."""
    draw = {"T1w": _t1, "T2w": _t2, "FLAIR": _flair, "PD": _pd}
    return {contrast: draw[contrast](scanner, rng) for contrast in CONTRASTS}


def _t1(scanner: Scanner, rng: np.random.Generator) -> Protocol:
    """Spin echo, or at 3 T as often a spoiled gradient echo."""
    if scanner.field_strength_t > 2 and rng.random() < 0.5:
        sequence = Sequence(
            kind="gradient echo", tr_ms=_near(rng, 230, 20), te_ms=round(float(rng.uniform(2.4, 4.0)), 2),
            flip_angle_deg=_near(rng, 75, 5),
        )  # fmt: skip
        return _protocol(scanner, "T1w", sequence, ("GR",), ("SP",), 1, name="T1w GR")
    sequence = Sequence(kind="spin echo", tr_ms=_near(rng, 540, 40), te_ms=_near(rng, 11, 2))
    return _protocol(scanner, "T1w", sequence, ("SE",), ("SK",), 1)


def _t2(scanner: Scanner, rng: np.random.Generator) -> Protocol:
    sequence = Sequence(kind="spin echo", tr_ms=_near(rng, 4600, 500), te_ms=_near(rng, 98, 6), flip_angle_deg=150)
    return _protocol(scanner, "T2w", sequence, ("SE",), ("SK",), 15)


def _flair(scanner: Scanner, rng: np.random.Generator) -> Protocol:
    """The inversion time that nulls fluid, as sites set it to the next 50 ms."""
    tr_ms = _near(rng, 9000, 400)
    fluid = RELAXATION[scanner.field_strength_t]["cerebrospinal fluid"]
    ti_ms = 50.0 * round(nulling_ti_ms(fluid, tr_ms) / 50)
    sequence = Sequence(
        kind="inversion recovery", tr_ms=tr_ms, te_ms=_near(rng, 118, 6), ti_ms=ti_ms, flip_angle_deg=150
    )
    return _protocol(scanner, "FLAIR", sequence, ("SE", "IR"), ("SK",), 16)


def _pd(scanner: Scanner, rng: np.random.Generator) -> Protocol:
    sequence = Sequence(kind="spin echo", tr_ms=_near(rng, 2600, 200), te_ms=_near(rng, 16, 3), flip_angle_deg=150)
    return _protocol(scanner, "PD", sequence, ("SE",), ("SK",), 7)


def _protocol(
    scanner: Scanner, contrast: str, sequence: Sequence, kinds: tuple[str, ...], variants: tuple[str, ...],
    echo_train_length: int, *, name: str | None = None,
) -> Protocol:  # fmt: skip
    return Protocol(
        contrast=contrast, name=_NAMES[scanner.vendor][name or contrast], sequence=sequence, scanning_sequence=kinds,
        sequence_variant=variants, echo_train_length=echo_train_length,
    )  # fmt: skip


def _near(rng: np.random.Generator, middle: float, spread: float) -> float:
    """A whole number near the middle."""
    return float(round(rng.uniform(middle - spread, middle + spread)))

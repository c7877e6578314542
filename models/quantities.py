"""Physical quantities that maps hold: the units they come in, and the one fixed scale by which a model sees each.

The same T1 is the same number in every map, so a map keeps its values: they are divided by a constant of the quantity,
never by a statistic of the image.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

UNITS: Mapping[str, tuple[str, float]] = {
    "s": ("time", 1.0), "ms": ("time", 1e-3),
    "1/s": ("rate", 1.0), "hz": ("rate", 1.0), "1/ms": ("rate", 1e3),
    "m2/s": ("diffusivity", 1.0), "mm2/s": ("diffusivity", 1e-6), "um2/ms": ("diffusivity", 1e-9),
    "10-3mm2/s": ("diffusivity", 1e-9), "um2/s": ("diffusivity", 1e-12), "10-6mm2/s": ("diffusivity", 1e-12),
    "1": ("share", 1.0), "%": ("share", 1e-2), "ppm": ("share", 1e-6), "ppb": ("share", 1e-9),
    "ml/100g/min": ("perfusion", 1.0), "cm/s": ("velocity", 1e-2), "m/s": ("velocity", 1.0), "mm/s": ("velocity", 1e-3),
    "rad": ("angle", 1.0), "deg": ("angle", math.pi / 180),
}  # fmt: skip
"""Unit, as `plain_unit` writes it, to what it measures and its size in SI."""


@dataclass(frozen=True)
class Quantity:
    """What one kind of map holds."""

    unit: str
    """Of UNITS; values are taken to be in it where the file states none."""
    reference: float
    """Value, in that unit, that the model sees as one: about what tissue has, so that inputs are of order one."""


QUANTITIES: Mapping[str, Quantity] = {
    "T1": Quantity("ms", 1000.0), "T2": Quantity("ms", 100.0), "T2*": Quantity("ms", 50.0),
    "T1rho": Quantity("ms", 100.0), "R1": Quantity("1/s", 1.0), "R2": Quantity("1/s", 10.0),
    "R2*": Quantity("1/s", 20.0), "ADC": Quantity("um2/s", 1000.0), "MD": Quantity("um2/s", 1000.0),
    "FA": Quantity("1", 1.0), "PDFF": Quantity("%", 100.0), "CBF": Quantity("ml/100g/min", 50.0),
    "QSM": Quantity("ppm", 0.1), "B0": Quantity("hz", 100.0), "B1": Quantity("%", 100.0),
    "velocity": Quantity("cm/s", 100.0), "phase": Quantity("rad", math.pi),
}  # fmt: skip
"""Quantities that are told apart, as the column `quantity` names them; ADC and MD in 1e-6 mm2/s, as scanners write."""


def plain_unit(text: object) -> str | None:
    """A unit as UNITS writes it (`mm^2/s`, `10^-6 mm²/s`, `µm2/s`, `sec`, `[ms]`); None where nothing is stated."""
    plain = str(text or "").strip().lower().strip("[]")
    for written, ours in (("²", "2"), ("⁻³", "-3"), ("⁻⁶", "-6"), ("µ", "u"), ("μ", "u"), ("**", ""), ("^", "")):
        plain = plain.replace(written, ours)
    plain = "".join(plain.split()).replace("*", "").replace("x10", "10").replace("1e-", "10-").replace("·", "")
    spellings = {
        "sec": "s", "seconds": "s", "msec": "ms", "milliseconds": "ms", "s-1": "1/s", "ms-1": "1/ms", "percent": "%",
        "radians": "rad", "radian": "rad", "degrees": "deg", "degree": "deg", "ratio": "1", "fraction": "1",
        "none": "1", "unitless": "1", "mm2s-1": "mm2/s", "um2s-1": "um2/s", "ml/100g/minute": "ml/100g/min",
    }  # fmt: skip
    return spellings.get(plain, plain) or None


def quantity_of(facts: Mapping[str, object]) -> str | None:
    """The quantity of a map by the facts of its scan: of QUANTITIES, `unknown` for another map, None for an image.

    A contrast that names a quantity (ADC, as catalogued layouts say it) is a map even where nothing else says so. A
    unit that does not measure the quantity makes it unknown: `arbitrary` phase is not in radians.
    """
    named = facts.get("quantity") or facts.get("contrast")
    if named not in QUANTITIES:
        return "unknown" if facts.get("quantitative") else None
    unit = plain_unit(facts.get("quantity_unit"))
    measured = UNITS[QUANTITIES[str(named)].unit][0]
    return str(named) if unit is None or UNITS.get(unit, ("", 0.0))[0] == measured else "unknown"


def scaled_map(values: np.ndarray, facts: Mapping[str, object]) -> np.ndarray:
    """Values of a map as the model sees them: the same value, the same number, in every map of a quantity.

    Known quantities are divided by their reference. Of an unknown one, not even the order of magnitude is known, and
    `asinh` keeps its values apart (it has an inverse, and is the identity near zero) without flooding the model.

    Args:
        values: Of any shape, in the unit that `facts` state.
        facts: Of a scan that `quantity_of` takes for a map.

    Returns:
        Float32 of the same shape; what is not finite becomes zero.
    """
    quantity = quantity_of(facts)
    finite = np.where(np.isfinite(values), values, 0.0)
    if quantity is None or quantity not in QUANTITIES:
        return np.arcsinh(finite).astype(np.float32)
    held = QUANTITIES[quantity]
    unit = plain_unit(facts.get("quantity_unit")) or held.unit
    return (finite * (UNITS[unit][1] / (UNITS[held.unit][1] * held.reference))).astype(np.float32)

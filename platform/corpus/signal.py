"""Signal equations: what each tissue looks like in each contrast at each field strength."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Relaxation:
    """Relaxation times in ms and relative proton density."""

    t1_ms: float
    t2_ms: float
    density: float


@dataclass(frozen=True, kw_only=True)
class Sequence:
    """A pulse sequence by the numbers that its header states."""

    kind: str
    """`spin echo`, `inversion recovery` (spin-echo readout) or `gradient echo` (spoiled)."""
    tr_ms: float
    te_ms: float
    ti_ms: float | None = None
    flip_angle_deg: float = 90.0

    def __post_init__(self) -> None:
        if self.kind not in ("spin echo", "inversion recovery", "gradient echo"):
            raise ValueError(f"Sequence kind {self.kind!r}: expected spin echo, inversion recovery or gradient echo.")
        if (self.ti_ms is None) == (self.kind == "inversion recovery"):
            raise ValueError("ti_ms belongs to inversion recovery, and to nothing else.")


# Brain after Stanisz et al. (MRM 2005) and Wansapura et al. (JMRI 1999), other tissues after Bottomley et al. (Med Phys
# 1984), rounded. Fat keeps a long apparent T2 because echo trains leave it bright.
RELAXATION: dict[float, dict[str, Relaxation]] = {
    1.5: {
        "cerebrospinal fluid": Relaxation(4000, 1500, 1.0),
        "grey matter": Relaxation(1120, 95, 0.84),
        "white matter": Relaxation(620, 74, 0.70),
        "compact bone": Relaxation(250, 1.5, 0.08),
        "marrow": Relaxation(360, 60, 0.60),
        "fat": Relaxation(270, 85, 0.90),
        "muscle": Relaxation(900, 45, 0.75),
        "eye": Relaxation(3800, 1000, 1.0),
        "cavity": Relaxation(3700, 1200, 1.0),
        "gliosis": Relaxation(1500, 175, 0.87),
        "plaque": Relaxation(1350, 165, 0.87),
        "mass": Relaxation(1500, 125, 0.87),
        "oedema": Relaxation(1250, 155, 0.85),
        "blood core": Relaxation(420, 42, 0.80),
        "blood rim": Relaxation(700, 16, 0.72),
    },
    3.0: {
        "cerebrospinal fluid": Relaxation(4300, 1500, 1.0),
        "grey matter": Relaxation(1450, 88, 0.84),
        "white matter": Relaxation(860, 68, 0.70),
        "compact bone": Relaxation(300, 1.2, 0.08),
        "marrow": Relaxation(400, 52, 0.60),
        "fat": Relaxation(370, 75, 0.90),
        "muscle": Relaxation(1250, 38, 0.75),
        "eye": Relaxation(4100, 1000, 1.0),
        "cavity": Relaxation(4000, 1200, 1.0),
        "gliosis": Relaxation(1750, 165, 0.87),
        "plaque": Relaxation(1600, 155, 0.87),
        "mass": Relaxation(1750, 118, 0.87),
        "oedema": Relaxation(1500, 145, 0.85),
        "blood core": Relaxation(480, 38, 0.80),
        "blood rim": Relaxation(850, 13, 0.72),
    },
}
"""Field strength in tesla, then tissue or part of a lesion."""


def signal(tissue: Relaxation, sequence: Sequence) -> float:
    """Magnitude of a tissue (Haacke et al., Magnetic Resonance Imaging, chapters 8 and 18).

    Spin echo, inversion recovery with spin-echo readout, and spoiled gradient echo at the Ernst equation; a gradient
    echo's few milliseconds are let decay with T2.
    """
    decay = tissue.density * math.exp(-sequence.te_ms / tissue.t2_ms)
    rest = math.exp(-sequence.tr_ms / tissue.t1_ms)
    if sequence.ti_ms is not None:
        return decay * abs(1 - 2 * math.exp(-sequence.ti_ms / tissue.t1_ms) + rest)
    if sequence.kind == "gradient echo":
        angle = math.radians(sequence.flip_angle_deg)
        return decay * math.sin(angle) * (1 - rest) / (1 - math.cos(angle) * rest)
    return decay * (1 - rest)


def nulling_ti_ms(tissue: Relaxation, tr_ms: float) -> float:
    """Inversion time at which a tissue gives no signal."""
    return tissue.t1_ms * (math.log(2) - math.log1p(math.exp(-tr_ms / tissue.t1_ms)))

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


@dataclass(frozen=True)
class Protocol:
    """A pulse sequence with the settings that its header states."""

    contrast: str
    name: str
    scanning_sequence: str
    """DICOM (0018,0020): SE spin echo, IR inversion recovery."""
    tr_ms: float
    te_ms: float
    ti_ms: float | None = None
    flip_angle_deg: float = 90.0


# Typical values of the literature (Stanisz et al., MRM 2005; Wansapura et al., JMRI 1999), rounded.
TISSUES: dict[float, dict[str, Relaxation]] = {
    1.5: {
        "cerebrospinal fluid": Relaxation(4000, 1800, 1.0),
        "grey matter": Relaxation(1120, 95, 0.84),
        "white matter": Relaxation(620, 74, 0.70),
        "skull": Relaxation(250, 1.5, 0.10),
        "marrow": Relaxation(380, 60, 0.55),
        "scalp": Relaxation(330, 70, 0.85),
    },
    3.0: {
        "cerebrospinal fluid": Relaxation(4200, 1600, 1.0),
        "grey matter": Relaxation(1450, 85, 0.84),
        "white matter": Relaxation(850, 66, 0.70),
        "skull": Relaxation(300, 1.2, 0.10),
        "marrow": Relaxation(420, 55, 0.55),
        "scalp": Relaxation(390, 62, 0.85),
    },
}

# By part of a lesion; the same at both field strengths within what the corpus claims to show.
LESIONS: dict[str, Relaxation] = {
    "cavity": Relaxation(4000, 1400, 1.0),
    "gliosis": Relaxation(1600, 190, 0.88),
    "plaque": Relaxation(1650, 170, 0.88),
    "mass": Relaxation(1750, 135, 0.86),
    "oedema": Relaxation(1500, 160, 0.86),
    "blood core": Relaxation(290, 38, 0.80),
    "blood rim": Relaxation(700, 16, 0.70),
}

PROTOCOLS: dict[str, Protocol] = {
    "T1w": Protocol("T1w", "t1_se_tra", "SE", tr_ms=560, te_ms=12),
    "T2w": Protocol("T2w", "t2_tse_tra", "SE", tr_ms=4600, te_ms=100, flip_angle_deg=150),
    "FLAIR": Protocol("FLAIR", "t2_flair_tra", "IR", tr_ms=9000, te_ms=120, ti_ms=2500, flip_angle_deg=150),
    "PD": Protocol("PD", "pd_tse_tra", "SE", tr_ms=3400, te_ms=18, flip_angle_deg=150),
}


def signal(tissue: Relaxation, protocol: Protocol) -> float:
    """Magnitude of a spin echo or inversion-recovery spin echo (Haacke et al., MRI, 2nd ed., eqs. 8.37 and 8.50).

    An inversion-recovery protocol nulls cerebrospinal fluid: its stated inversion time is near that of T1 4000 ms.
    """
    decay = math.exp(-protocol.te_ms / tissue.t2_ms)
    recovered = math.exp(-protocol.tr_ms / tissue.t1_ms)
    if protocol.ti_ms is None:
        return tissue.density * (1 - recovered) * decay
    return tissue.density * abs(1 - 2 * math.exp(-protocol.ti_ms / tissue.t1_ms) + recovered) * decay

"""Sequence rules on descriptions, pulse sequence names and timing as scanners write them."""

from __future__ import annotations

import pytest

from omnimri.models.quantities import QUANTITIES
from omnimri.platform.data.formats.sequences import Header, classify


@pytest.mark.parametrize(
    ("header", "contrast", "tier"),
    [
        (Header(texts=("t1_mprage_sag",), b_value=1000.0), "DWI", "diffusion"),
        (Header(texts=("t1_mprage_sag", "t2")), "T1w", "description"),
        (Header(texts=("", "AX T2 FLAIR")), "FLAIR", "description"),
        (Header(texts=("Series 3",), sequence_name="*tfl3d1_16ns", tr_ms=2300.0, te_ms=3.0), "T1w", "sequence name"),
        (Header(texts=("Series 3",), tr_ms=4000.0, te_ms=100.0, scanning_sequence=("SE",)), "T2w", "timing"),
        (Header(texts=("Series 3",), tr_ms=4000.0, te_ms=100.0, scanning_sequence=("EP", "SE")), None, None),
        (Header(), None, None),
    ],
)
def test_the_first_tier_that_knows_decides(header: Header, contrast: str | None, tier: str | None) -> None:
    found = classify(header)
    assert (found.contrast, found.tier) == (contrast, tier)


@pytest.mark.parametrize(
    ("description", "stated", "agent"),
    [
        ("AX T1 +C", None, True), ("T1 POST GAD", None, True), ("t1_vibe_fs_tra post contrast", None, True),
        ("AX T1 PRE GAD", None, False), ("T1 W/O", None, False), ("T1 non-contrast", None, False),
        ("AX T1", None, None), ("AX T1", "Gadavist", True), ("AX T1", "NONE", None), ("AX T1 PRE", "", False),
    ],
)  # fmt: skip
def test_contrast_agent(description: str, stated: str | None, agent: bool | None) -> None:
    assert classify(Header(texts=(description,), contrast_agent=stated)).contrast_agent is agent


@pytest.mark.parametrize(
    ("description", "quantitative"),
    [
        ("Apparent Diffusion Coefficient (mm2/s) ADC", True), ("T1_MAP", True), ("T2 mapit", True), ("ktrans", True),
        ("AX T2 FLAIR", False), ("map of the room", True), ("Series 3", None),
        ("T1 image", False), ("p01_t2_image", False), ("DWI b0 image", False), ("pd-image", False), ("T1 fit", True),
        ("ADC image", True), ("md_image", True),
    ],
)  # fmt: skip
def test_quantitative(description: str, quantitative: bool | None) -> None:
    assert classify(Header(texts=(description,))).quantitative is quantitative


@pytest.mark.parametrize(
    ("description", "quantity"),
    [
        ("Apparent Diffusion Coefficient (mm2/s) ADC", "ADC"), ("eADC", None), ("T1_MAP", "T1"), ("T2 mapit", "T2"),
        ("T2star map", "T2*"), ("t2*_map", "T2*"), ("sub-01_R2starmap", "R2*"), ("T1rho map", "T1rho"),
        ("FA map", "FA"), ("fat fraction map", "PDFF"), ("QSM", "QSM"), ("sub-01_part-phase_GRE", "phase"),
        ("B0 map", "B0"), ("map of the room", None), ("ktrans", None), ("AX T1", None), ("ax t2 flair fat sat", None),
    ],
)  # fmt: skip
def test_a_map_is_of_the_quantity_that_names_it(description: str, quantity: str | None) -> None:
    found = classify(Header(texts=(description,)))
    assert found.quantity == quantity
    assert quantity is None or (found.quantitative and quantity in QUANTITIES)


@pytest.mark.parametrize(
    ("description", "stated", "dimensions"),
    [("t1_mprage_sag", None, "3D"), ("T2 TSE", None, "2D"), ("T2 SPACE 3D", "2D", "2D"), ("AX T1", None, None)],
)
def test_the_header_wins_over_words_for_2d_and_3d(description: str, stated: str | None, dimensions: str | None) -> None:
    assert classify(Header(texts=(description,), acquisition_type=stated)).acquisition_type == dimensions

"""Facts of headers as scanners really write them (spellings from the Imaging Data Commons index)."""

from __future__ import annotations

import numpy as np
import pytest

from omnimri.platform.data.formats import facts
from omnimri.platform.data.formats.sequences import Header, classify


@pytest.mark.parametrize(
    ("written", "vendor"),
    [
        ("SIEMENS", "Siemens"), ("Siemens HealthCare GmbH", "Siemens"), ("SIEMENS HEALTHINEERS", "Siemens"),
        ("GE MEDICAL SYSTEMS", "GE"), ("GE MEDICAL SYSTEMS / MIM Software", "GE"), ("GE", "GE"),
        ("Philips Medical Systems", "Philips"), ("TOSHIBA_MEC", "Canon"), ("Canon Medical", "Canon"),
        ("Confirma Inc.", "Other"), ("0000000", None), ("NA", None), ("", None), (None, None),
    ],
)  # fmt: skip
def test_vendor(written: object, vendor: str | None) -> None:
    assert facts.vendor(written) == vendor


@pytest.mark.parametrize(
    ("texts", "timing", "contrast"),
    [
        (("T1w",), {}, "T1w"), (("t2_space_dark-fluid_sag",), {}, "FLAIR"), (("AX T2 FLAIR",), {}, "FLAIR"),
        (("t1_mprage_sag",), {}, "T1w"), (("MPRAGE",), {}, "T1w"), (("PDw",), {}, "PD"), (("CORPD_FBK",), {}, "PD"),
        (("ep2d_diff_b1000",), {}, "DWI"), (("SWI_Images",), {}, "SWI"), (("tof_fl3d",), {}, "MRA"),
        (("AX T2* GRE",), {}, "T2*w"), (("Axial EPI-FMRI",), {}, "BOLD"), (("update",), {}, None),
        (("",), {"tr_ms": 500.0, "te_ms": 12.0}, "T1w"), (("",), {"tr_ms": 4000.0, "te_ms": 100.0}, "T2w"),
        (("",), {"tr_ms": 2500.0, "te_ms": 20.0}, "PD"),
        (("",), {"tr_ms": 9000.0, "te_ms": 120.0, "ti_ms": 2500.0}, "FLAIR"),
        (("",), {"tr_ms": 3000.0, "te_ms": 80.0, "scanning_sequence": ("EP",)}, None),
    ],
)  # fmt: skip
def test_contrast(texts: tuple[str, ...], timing: dict, contrast: str | None) -> None:
    assert classify(Header(texts=texts, **timing)).contrast == contrast


@pytest.mark.parametrize(
    ("written", "years"),
    [
        ("058Y", 58.0),
        ("006M", 0.5),
        ("000Y", None),
        ("", None),
        (None, None),
        (54, 54.0),
        ("097Y", 90.0),
        ("abc", None),
    ],
)
def test_age_is_in_years_and_capped(written: object, years: float | None) -> None:
    assert facts.age_years(written) == years


@pytest.mark.parametrize(
    ("written", "tesla"), [(1.4939999580383, 1.5), (2.89362, 3.0), (15000, 1.5), (3, 3.0), ("", None), (0.064, 0.064)]
)
def test_field_strength_is_nominal(written: object, tesla: float | None) -> None:
    assert facts.field_strength_t(written) == tesla


def test_sex_outside_the_three_letters_is_unknown() -> None:
    assert [facts.sex(value) for value in ("F", "male", "O", "6657", "", None)] == ["F", "M", "O", None, None, None]


def test_model_name_with_anything_unusual_is_dropped() -> None:
    assert facts.model_name("DISCOVERY MR750") == "DISCOVERY MR750"
    assert facts.model_name("Skyra^Doe") is None


def test_plane_is_that_of_the_slices() -> None:
    assert facts.plane(np.diag([1.0, 1, 5, 1])) == "axial"
    assert facts.plane(np.array([[0, 0, 5, 0], [1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 0, 1.0]])) == "sagittal"
    assert facts.plane(np.array([[1, 0, 0, 0], [0, 0, 5, 0], [0, 1, 0, 0], [0, 0, 0, 1.0]])) == "coronal"


@pytest.mark.parametrize(
    ("texts", "part"),
    [
        (("MRI ORBIT FACE NECK W WO",), None), (("AX T1 SINUSES",), None), (("TMJ_left",), None), (("sella",), None),
        (("AX T1 ORBITS", "MRI BRAIN AND ORBITS"), "brain"), (("HEAD", "pituitary dynamic"), "brain"),
        (("NECK", "larynx"), "neck"), (("interface cardiac",), "heart"), (("cardiac coronary sinus",), "heart"),
        (("ankle sinus tarsi",), "ankle"), (("", "KNEE"), "knee"), ((None,), None),
    ],
)  # fmt: skip
def test_a_part_of_the_face_is_no_other_body_part(texts: tuple, part: str | None) -> None:
    assert facts.body_part(*texts) == part

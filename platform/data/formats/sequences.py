"""What kind of picture a series is, by tiers of rules over its header; `None` where no rule decides.

The tiers follow the rule engine of MR-RATE: diffusion weighting, then words of the description, then the name that
the vendor gave the pulse sequence, then timing. Descriptions are read and dropped; only the answer leaves.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

_CONTRAST_WORDS = (
    ("localizer", r"localis|localiz|\bscout|survey|3.?plane|three.?plane|\bloc\b|\b3.?pl\b|locator|calibrat|prescan"),
    ("FLAIR", r"flair|dark.?fluid|\btirm?.?da?r?k?\b"),
    ("DWI", r"\bdwi|\bd[tk]i\b|diffusion|advdiff|2d.?diff|\btrace|\bdiff\b|\bb.?vals?\b|\bb.?\d{3,4}\b|noddi|\badc\b"),
    ("SWI", r"\bswi|swan|suscept|venbold|\bmip.?images|\bpha.?images"),
    ("PWI", r"perf|\bdsc\b|\bp?c?asl\b|\bpasl\b|\bcbf\b|\brcb[vf]\b"),
    ("MRA", r"\btof\b|angio|\bmr[av]\b|3di_(mc|sc)|inhance|\bcow\b|carotid"),
    ("MRS", r"\bmrs\b|spectro|\bsvs\b|\bcsi\b|\bpress\b"),
    ("BOLD", r"bold|fmri|resting|\brest\b|\btask\b|rs.?fmri"),
    ("T2*w", r"t2.?star|t2\*|t2.?gre|\bhemo\b|\bmedic\b|\bmerge\b|\bgre.?t2|\bffe.?t2"),
    ("STIR", r"\bstir|\btirm\b|\bspair.?ir"),
    ("T2w", r"t2(?!.?map)|ciss|fiesta|haste|ssfse|trufi|\bbffe|b-?tfe|\bmrcp\b|\bdrive\b|myelo"),
    ("PD", r"(?<![a-z])pdw?(?![a-z])|proton|corpd|dual.?echo"),
    ("T1w", r"t1(?!rho|.?map)|mp2?.?rage|spgr|bravo|vib(e|rant)|\btfl\b|lava|thrive|\bfl[23]d|flash|fgre|\bfame\b"),
    ("DCE", r"\bdce\b|\bdyn|multi.?phase|twist|\bph\d+/"),
    ("cine", r"\bcine|\bssfp|\bsax\b|\blax\b|\b[234].?ch(amber)?\b|retro"),
    ("MRE", r"elasto|\bmre\b"),
    ("Dixon", r"dixon|\bideal\b|\bmdixon|in.?phase|out.?of.?phase|opp.?phase|\bip/op\b|\bwater\b|\bfat\b(?!.?sat)"),
    ("fieldmap", r"field.?map|\bb0\b|\bb1\b|shim"),
)  # fmt: skip
"""Contrast and the words of a description that name it; the order matters (T2 FLAIR is FLAIR)."""

_SEQUENCE_NAMES = (
    ("DWI", r"epi?2?d?_?b\d"), ("FLAIR", r"tir2d|tir3d|spcir"), ("T1w", r"tfl3d|tfl_me3d|fl3d_?vibe|fl2d1|spgr"),
    ("T2w", r"tse2d|spc_|spcr|haste|h2d|tfi2d|fiesta"), ("MRA", r"fi3d|tof"), ("BOLD", r"epfid2d"), ("SWI", r"swi3d"),
)  # fmt: skip
"""Contrast and the vendor's name of the pulse sequence (Siemens `*tfl3d1_16ns`, GE `3DFSPGR`)."""

_QUANTITATIVE = (
    r"\b(t1|t2|t2star|t2\*|pd|b0|b1)[ _-]?(map|fit|calc)|"
    r"\b(r1|r2|r2star|r2\*|adc|eadc|fa|md|ff|pdff|fat.?fraction|velocity|cbf|cbv|mtt|ttp|ktrans|t1rho|qsm)[ _-]?"
    r"(map|fit|calc|image)|\b(e?adc|pdff|ktrans|qsm|ser)\b|mapit|\bmaps?\b|parametric|: ?pe\d|\bpart-phase\b"
)
"""An image is not called by a quantity that also names a weighting: "T2 image" is none of T2."""
_QUANTITIES = (
    ("T1rho", r"^t1rho"), ("T2*", r"^t2(star|\*)"), ("R2*", r"^r2(star|\*)"), ("T1", r"^t1"), ("T2", r"^t2"),
    ("R1", r"^r1"), ("R2", r"^r2"), ("ADC", r"^adc"), ("MD", r"^md"), ("FA", r"^fa[ _-]?(map|fit|calc|image)"),
    ("PDFF", r"^(pd)?ff|^fat"), ("CBF", r"^cbf"), ("QSM", r"^qsm"), ("B0", r"^b0"), ("B1", r"^b1"),
    ("velocity", r"^velocity"), ("phase", r"^part-phase"),
)  # fmt: skip
"""Quantity of `omnimri.models.quantities`, and the words found by `_QUANTITATIVE` that name it."""
_WITH_AGENT = (
    r"\+ ?c\b|\bc\+|\bpost\b|\bpost.?(con|gad|gd|inj)|\bgad|\bgd\b|t1.?ce\b|\bce\b|\bkm\b|\bw.?con|enhanced|"
    r"\bcontrast\b"
)
_WITHOUT_AGENT = (
    r"\b(pre|non|without|w/?o)\b[ .-]?(iv )?(con\w*|gad\w*|gd|inj\w*)?|\b(pre|non)con\w*|unenhanced|\bnativ\w*"
)
_THREE_D = r"\b3d|3d\b|mp2?.?rage|space|vibe|\bcube|bravo|fspgr|vista|thrive|\blava|\btof\b|brainview|isotropic"
_TWO_D = r"\b2d|2d\b|\btse\b|haste|ssfse|blade|propeller|\bfse\b"
_NO_AGENT = frozenset({"", "none", "no", "n", "n/a", "na", "0", "without", "unknown"})


@dataclass(frozen=True, kw_only=True)
class Header:
    """The header values that the rules read; times in ms."""

    texts: Sequence[object] = ()
    """Descriptions, the most telling one first."""
    sequence_name: object = None
    scanning_sequence: Sequence[str] = ()
    """DICOM Scanning Sequence: SE, GR, IR, EP, RM."""
    tr_ms: float | None = None
    te_ms: float | None = None
    ti_ms: float | None = None
    b_value: float | None = None
    contrast_agent: object = None
    """DICOM Contrast/Bolus Agent."""
    acquisition_type: object = None
    """DICOM MR Acquisition Type, 2D or 3D."""


@dataclass(frozen=True, kw_only=True)
class SequenceClass:
    """The answer; None means unknown."""

    contrast: str | None
    """`T1w`, `T2w`, `FLAIR`, `PD`, `DWI`..."""
    tier: str | None
    """Which rule named the contrast: diffusion, description, sequence name or timing."""
    quantitative: bool | None
    """A map of a physical quantity, as opposed to a weighted image."""
    quantity: str | None
    """Which one, of `omnimri.models.quantities`."""
    contrast_agent: bool | None
    acquisition_type: str | None
    """`2D` or `3D`."""


def classify(header: Header) -> SequenceClass:
    """Apply the rules, tier by tier."""
    texts = [_words(text) for text in header.texts]
    contrast, tier = _contrast(header, texts)
    named = [found[0] for text in texts if (found := re.search(_QUANTITATIVE, text))]
    return SequenceClass(
        contrast=contrast,
        tier=tier,
        quantitative=True if named else False if contrast else None,
        quantity=next(filter(None, (_first(_QUANTITIES, words) for words in named)), None),
        contrast_agent=_agent(header.contrast_agent, texts),
        acquisition_type=_acquisition_type(header.acquisition_type, texts),
    )


def contrast_of(*texts: object) -> str | None:
    """The contrast that one of the texts names, the first that does."""
    return classify(Header(texts=texts)).contrast


def _words(text: object) -> str:
    return str(text or "").lower().replace("_", " ")


def _contrast(header: Header, texts: list[str]) -> tuple[str | None, str | None]:
    if header.b_value is not None and header.b_value > 0:
        return "DWI", "diffusion"
    for text in texts:
        if found := _first(_CONTRAST_WORDS, text):
            return found, "description"
    if found := _first(_SEQUENCE_NAMES, str(header.sequence_name or "").lower()):
        return found, "sequence name"
    found = _contrast_from_timing(header)
    return found, "timing" if found else None


def _first(rules: Sequence[tuple[str, str]], text: str) -> str | None:
    return next((name for name, pattern in rules if re.search(pattern, text)), None)


def _contrast_from_timing(header: Header) -> str | None:
    """A spin echo with short TR and TE is T1-weighted, and so on; an echo-planar series may be anything."""
    tr, te, ti, sequence = header.tr_ms, header.te_ms, header.ti_ms, header.scanning_sequence
    if tr is None or te is None or "EP" in sequence:
        return None
    if ti is not None and ti > 1500 and te > 60:
        return "FLAIR"
    if "GR" in sequence and "SE" not in sequence:
        return "T1w" if te < 8 else None
    if te > 60 and tr > 1500:
        return "T2w"
    if te < 40:
        return "T1w" if tr < 1100 else "PD" if tr > 1500 else None
    return None


def _agent(stated: object, texts: list[str]) -> bool | None:
    """The header's own statement first: scanners fill the agent in only when there was one."""
    if stated is not None and str(stated).strip().lower() not in _NO_AGENT:
        return True
    for text in texts:
        rest = re.sub(_WITHOUT_AGENT, " ", text)
        found = bool(re.search(_WITH_AGENT, rest)), rest != text
        if found[0] != found[1]:  # a dynamic series holds images before and after
            return found[0]
    return None


def _acquisition_type(stated: object, texts: list[str]) -> str | None:
    if str(stated or "").strip().upper() in ("2D", "3D"):
        return str(stated).strip().upper()
    for text in texts:
        if re.search(_THREE_D, text):
            return "3D"
        if re.search(_TWO_D, text):
            return "2D"
    return None

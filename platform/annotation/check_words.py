"""The words by which checks read a generated text: planes, contrasts, agents, lesions, structures and where they lie.

Names that the project has elsewhere come from there: contrasts and structures from `language.words`, findings from
`evaluation.text`, planes from the vocabulary, body parts from the facts of headers. Here stands what prose adds.
Patterns read lower-case text with plain hyphens and American spelling (`plain_spelling`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from omnimri.models.vocabulary import FINDINGS, LESION, PLANES, TISSUES
from omnimri.platform.evaluation.text import PATTERNS
from omnimri.platform.language.words import CONTRASTS_IN_WORDS, FINDING_NOUNS

_SPELLINGS = (
    (r"haem", "hem"), (r"\boedem", "edem"), (r"oesoph", "esoph"), (r"tumour", "tumor"), (r"\bgrey", "gray"),
    (r"ischaem", "ischem"), (r"centre", "center"), (r"\bcsf\b", TISSUES[0]), (r"\bbrain stem\b", "brainstem"),
    (r"\bgall bladder", "gallbladder"), (r"\burinary bladder", "bladder"), (r"\bcaudate nucle(?:us|i)\b", "caudate"),
    (r"\bacl\b", "anterior cruciate ligament"), (r"\bpcl\b", "posterior cruciate ligament"),
    (r"\bsignal intensit(?:y|ies)", "signal"),
)  # fmt: skip
"""British to American, short to long, one of two names of the same structure."""


def plain_spelling(text: str) -> str:
    """Lower case, plain hyphens, one spelling and one name of each structure."""
    text = re.sub("[\u2010-\u2015\u2212]", "-", text.lower())
    for pattern, word in _SPELLINGS:
        text = re.sub(pattern, word, text)
    return text


def any_number(noun: str) -> str:
    """Pattern of a name in singular and plural: `vertebra`, `menisci`, `arteries`."""
    head, _, last = noun.rpartition(" ")
    endings = (("us", "(?:us|i|uses)"), ("a", "(?:a|ae|as)"), ("ey", "eys?"), ("y", "(?:y|ies)"), ("um", "(?:um|a)"),
               ("is", "(?:is|es)"), ("ix", "(?:ix|ices)"))  # fmt: skip
    for ending, either in endings:
        if last.endswith(ending) and len(last) > 3:
            last = re.escape(last.removesuffix(ending)) + either
            break
    else:
        last = re.escape(last) + "(?:e?s)?"
    return " ".join(filter(None, (re.escape(head).replace(r"\ ", " "), last)))


_VIEW = r"(?= (?:planes?|slices?|sections?|views?|images?|imaging|orientation|acquisition|mri|scans?|series))"
_NO_PLANE = (
    r"(?! (?:sinus|suture|process|ligament|colon|skeleton|spine|stratum|band|fissure|foramen|arch|diameter|"
    r"dimension|extent|groove|crest|spondyl|joint|carpal|abdominis|cervical artery))"
)
PLANE_WORDS: Mapping[str, str] = dict(
    zip(
        PLANES,
        (
            rf"\b(?:trans)?axial(?:ly)?\b{_NO_PLANE}|\btransverse{_VIEW}|\bhorizontal{_VIEW}",
            rf"\bcoronal(?:ly)?\b{_NO_PLANE}|\bfrontal{_VIEW}",
            rf"(?<!mid)(?<!mid-)\b(?:para)?sagittal(?:ly)?\b{_NO_PLANE}",
        ),
        strict=True,
    )
)
"""Plane to what names it; a sagittal sinus is none, nor is the midsagittal plane, about which a head is symmetric."""
NO_VIEWS = r"\b(?:mm|cm|extend\w*|extension|elongat\w*|oriented|measur\w*|compared with|unlike)\b[^;,.]*"
"""A lesion may be measured in a plane, or reach along one, that is not the image's."""

_WEIGHTED = r"(?:[- ]?(?:weighted|weighting)|[- ]?wi?\b)"
_OF_IMAGE = (
    r"(?=[- ](?:images?|imaging|sequences?|scans?|series|contrast|signal|hyper|hypo|iso|bright|dark|tse|fse|"
    r"spin|gradient|mp-?rage)|w\b)"
)
_CONTRAST_SYNONYMS = {
    "T1w": rf"\bt1(?:{_WEIGHTED}|{_OF_IMAGE})|(?<=\bon )t1\b|\bmp2?-?rage\b",
    "T2w": rf"\bt2(?:{_WEIGHTED}|{_OF_IMAGE})|(?<=\bon )t2\b(?!\*|[- ]?star)",
    "FLAIR": r"\bflair\b|fluid[- ]attenuat\w+ inversion|\bdark[- ]fluid\b",
    "PD": rf"\bpd(?:{_WEIGHTED}|{_OF_IMAGE}|[- ]?fs\b)|\bproton[- ]density\b",
    "T2*w": r"\bt2(?:\*|[- ]?star)",
    "DWI": r"\bdwi\b|\bdti\b|\bdiffusion tensor",
    "SWI": r"\bswi\b",
    "PWI": r"\bpwi\b|\barterial spin label",
    "MRA": r"\bmra\b|\bangiogra(?:m|phy)\b|\btime[- ]of[- ]flight\b",
    "MRS": r"\bspectroscop",
    "BOLD": r"\bbold imaging\b|\bfunctional mri\b",
    "DCE": r"\bdce\b",
    "fieldmap": r"\bfield ?maps?\b",
}
_PROSE_MEANS_ELSE = ("BOLD", "localizer", "fieldmap", "Dixon")
"""Contrasts whose name alone may be another word, or a way to suppress fat in other contrasts."""


def _contrast_pattern(name: str, words: str) -> str:
    plain = [] if name in _PROSE_MEANS_ELSE else [rf"\b{re.escape(words.lower())}\b".replace(r"\-", "[- ]")]
    if name == "T2*w":
        plain = []
    return "|".join([*plain, *filter(None, [_CONTRAST_SYNONYMS.get(name)])])


CONTRAST_WORDS = {
    name: pattern for name, words in CONTRASTS_IN_WORDS.items() if (pattern := _contrast_pattern(name, words))
}
"""Contrast, as the column of that name has it, to what names it in prose; a bare T1 may be a vertebra or a stage."""

ALSO_CALLED: Mapping[str, frozenset[str]] = {
    "STIR": frozenset({"T2w"}), "DCE": frozenset({"T1w"}), "BOLD": frozenset({"T2*w"}), "SWI": frozenset({"T2*w"}),
    "PWI": frozenset({"T2*w", "T2w"}), "DWI": frozenset({"T2w"}), "T2*w": frozenset({"SWI", "T2w"}),
    **dict.fromkeys(
        ("MRA", "MRS", "cine", "MRE", "Dixon", "localizer", "fieldmap"), frozenset({"T1w", "T2w", "PD", "T2*w"})
    ),
}  # fmt: skip
"""Contrast to others that an image of it may be called as well."""

AGENT_GIVEN = (
    r"(?<!non-)(?<!non )\benhanc(?:ing|ement|es)\b|\bcontrast[- ]enhanced\b|\bpost[- ]?(?:contrast|gadolinium)\b|"
    r"\bgadolinium\b|\b(?:after|with|following) (?:iv |intravenous )?contrast\b(?! (?:between|resolution|to|of))"
)
AGENT_NOT_GIVEN = (
    r"\b(?:without|no) (?:iv |intravenous )?(?:gadolinium|contrast)\b"
    r"(?![- ](?:enhanc|between|uptake|resolution|differ|difference))|\bnon[- ]?contrast\b|\bpre[- ]?contrast\b|"
    r"\bunenhanced (?:images?|mri|scans?|sequences?|t1|t2|study|series)\b"
)
NO_AGENT_MEANT = r"\b(?:edge|flow[- ]related|inflow|image|signal|visual|without|no) enhancement\b"

OTHER_MODALITIES = (
    r"\b(?-i:CT|PET)\b(?!/MR)|computed tomograph|x-ray|\bradiograph|ultraso|hounsfield|(?:hyper|hypo|iso)dens"
)
"""Read in the original case."""

NOT_SHOWN = (
    r"(?:(?:is|are|was|were|being|lies|lie)\s+)?(?:not (?:\w+ )?(?:visible|included|covered|imaged|shown|depicted|"
    r"captured|displayed|in (?:the )?(?:field of view|view))|invisible|"
    r"(?:lying )?(?:outside|out|beyond|excluded from)(?: of)? (?:the )?(?:field[- ]of[- ]view|view|image|slab|fov)|"
    r"not (?:with)?in (?:the )?(?:field[- ]of[- ]view|fov|view))"
    r"(?:\s+(?:in|within|on) (?:the )?(?:field of view|image|fov))?"
)
"""Of what is out of the picture; read as `is not seen`."""
NOTHING = r"\s*[:=-]?\s+(?:none|nil|absent)\b(?! of)"
"""`Lesions: none`; read as `is absent`."""
CLAUSE_STARTS = (
    r"(?:an?|the|there|with|left|right|bilateral|large|small|multiple|several|single|solitary|hyper-?intense|"
    r"hypo-?intense|isointense|bright|dark|mild|moderate|severe|\d+|one|two|three|four|five|six)\b"
)
"""Words that open a new statement after a comma, where a list of what is denied would go on without them."""
MAX_BARE_WORDS = 3
"""A longer item says where a lesion is, or how large, and so is no item of what is denied."""

NOT_LESIONS = (
    r"\bmass[- ]effect\b|\b(?:muscle|bone|body|lateral|fat) mass(?:es)?\b|\bstroke volume\b|\b[a-z]+[- ]free\b|"
    r"\b(?:lesion|mass|tumor|infarct|hemorrhage|hematoma)[- ](?:like|mimic\w*)\b|"
    r"\bshift(?:ed|s|ing)? (?:of [\w ]+ )?(?:to|towards?) (?:the )?(?:left|right)\b|"
    r"\bmidline shift\b|\bleft[- ]to[- ]right\b|"
    r"\b(?:normal|expected|physiologic(?:al)?|age-appropriate)\b[^,;]*"
)
"""Words that hold the name of a lesion, or a side, and mean none."""

_MORE_WORDS = {
    FINDINGS[0]: r"\bstrokes?\b|\bischemi\w+",
    FINDINGS[1]: r"\bms lesions?\b",
    FINDINGS[2]: (
        r"\bcancers?\b|carcinomas?\b|neuroblastomas?\b|meningiomas?\b|\bnodules?\b|lymphomas?\b|sarcomas?\b|"
        r"astrocytomas?\b|glioblastomas?\b|schwannomas?\b|\badenomas?\b|malignan(?:cy|cies)\b"
    ),
}
_ANY_LESION = (
    "hyperintensity", "hyperintensities", "defect", "loss/defect", "collection", "malformation", LESION,
    "white matter lesion",
)  # fmt: skip
_NO_FOCAL_LESION = ("atrophy", "stenosis")
"""Findings that a case called healthy may have to some degree."""


def _lesion_words() -> dict[str, str]:
    """Kind of lesion to its pattern: the findings of the vocabulary, other nouns by themselves, `lesion` for any."""
    words = {kind: "|".join([plain_spelling(PATTERNS[kind]), *filter(None, [_MORE_WORDS.get(kind)])])
             for kind in FINDINGS}  # fmt: skip
    nouns = {plain_spelling(noun) for nouns in FINDING_NOUNS.values() for noun in nouns}
    for noun in sorted(nouns - {*_ANY_LESION, *_NO_FOCAL_LESION}):
        if not any(re.search(pattern, noun) for pattern in words.values()):
            words[noun] = rf"\b{any_number(noun)}\b"
    words[LESION] = (
        r"\blesions?\b|\babnormalit(?:y|ies)\b|\bfoc(?:us|i)\b|\b(?:hyper|hypo)-?intensit(?:y|ies)\b|\bcollections?\b|"
        r"\bdefects?\b|\bmalformations?\b|\babnormal (?:signal|area|region)s?\b"
    )
    return words


LESION_WORDS = _lesion_words()
"""Kind of lesion to what names it; `lesion` is any kind."""

SIDE_ALONE = r",\s*(?=(?:left|right|bilateral)\b\s*(?:[,(]|$))"
"""A comma before nothing but a side, as in `infarct: 1 lesion, left`: the side belongs to what stands before."""
PARTS_OF_LESIONS = (
    r"\b(?:rim|core|center|central|cavity|periphery|peripheral|halo|wall|component|margin|necrosis|necrotic|border|"
    r"surround\w*|around|adjacent|perilesional|capsule|septa\w*|within|between|edges?)\b"
)
"""Where an item speaks of these, its signal word need not be that of the whole lesion."""
SIGNAL_WORDS = {
    "hyperintense": r"\bhyper-?intens\w+|\bbright\b|\b(?:high|higher|increased|elevated)[- ]signal\b",
    "hypointense": r"\bhypo-?intens\w+|\bdark\b|\b(?:low|lower|decreased|reduced)[- ]signal\b|\bsignal void\b",
}
NUMBERS = {
    word: number
    for number, words in enumerate(
        ("one single solitary", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"), start=1
    )
    for word in words.split()
}
NOT_COUNTED = r"(?:grade|stage|level|segment|score|type|category|b|of|-|x|\.|\d)\s*$"
"""Before a number that counts no lesions."""
UNITS_BETWEEN = r"\b(?:mm|cm|ml|x|by|of|in|on|to|t|weeks?|months?|years?|percent|degrees?|lobes?|slices?)\b"

NORMAL_STUDY = (
    r"(?:an? )?(?:normal|unremarkable|healthy)(?: (?:mri|mr|of|the|a|brain|head|knee|prostate|spine|study|scan|image|"
    r"exam|examination|findings|imaging|appearance|subject|control|anatomy|volunteer))*"
)
"""A diagnosis that leaves no room for a lesion."""
DENIALS_OF_MORE = (
    r"\b(?:no|without|any) (?:\w+ )?(?:new|other|further|additional|suspicious|significant|more|definite|acute)\b"
)
"""A denial of what is beyond what is known denies nothing that is."""

SEEN = r"(?: (?:(?:is|are) )?(?:seen|visible|identified|present|evident|detected|noted|found|demonstrated|shown))?"
"""May follow what is denied."""

_TRUNK = "spine chest heart breast liver abdomen pelvis prostate"
_SEEN_IN: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("brain neck", (
        "cerebrum", "cerebral hemisphere", "cerebral cortex", "cerebral white matter", "frontal lobe", "parietal lobe",
        "temporal lobe", "occipital lobe", "basal ganglia", "thalamus", "caudate", "putamen", "globus pallidus",
        "pallidum", "hippocampus", "amygdala", "corpus callosum", "lateral ventricle", "third ventricle",
        "internal capsule", "pituitary", "pituitary gland", "optic chiasm", "optic radiation", "centrum semiovale",
        "corona radiata", "sylvian fissure", "cerebral sulcus", "scalp", "eyeball", "optic nerve",
    )),
    ("brain neck spine", (
        "brain", "brainstem", "pons", "midbrain", "medulla oblongata", "cerebellum", "cerebellar hemisphere",
        "fourth ventricle", "skull", "gray matter", "white matter",
    )),
    ("brain neck spine shoulder", ("mandible", "maxilla", "parotid", "parotid gland", "submandibular gland")),
    (f"brain neck shoulder {_TRUNK} hip", ("spinal cord", "vertebra", "vertebral body", "intervertebral disc")),
    (f"neck shoulder {_TRUNK} hip", ("sacrum", "lumbar spine", "cauda equina", "conus medullaris")),
    ("neck spine chest heart breast shoulder", ("thyroid", "thyroid gland", "larynx", "trachea")),
    ("neck spine chest heart breast shoulder liver abdomen", (
        "heart", "lung", "myocardium", "pericardium", "mitral valve", "mediastinum", "sternum", "rib", "diaphragm",
        "pulmonary artery", "left ventricular myocardium", "left ventricular cavity", "left atrium", "esophagus",
    )),
    ("breast chest heart shoulder liver abdomen", ("breast", "fibroglandular tissue", "nipple")),
    ("liver abdomen chest heart breast spine pelvis prostate", (
        "liver", "spleen", "kidney", "pancreas", "gallbladder", "stomach", "duodenum", "adrenal gland", "portal vein",
        "hepatic vein", "bile duct",
    )),
    ("abdomen liver pelvis prostate hip spine", (
        "bladder", "rectum", "sigmoid colon", "colon", "small bowel", "iliac artery", "pubic symphysis",
    )),
    ("prostate pelvis hip abdomen", (
        "prostate", "prostate gland", "seminal vesicle", "uterus", "ovary", "cervix uteri", "vagina", "endometrium",
    )),
    ("hip pelvis prostate abdomen spine extremity", (
        "femoral head", "acetabulum", "hip joint", "iliac bone", "gluteus maximus", "gluteus medius",
    )),
    ("knee hip pelvis prostate extremity", ("femur", "femoral shaft")),
    ("knee extremity", (
        "knee", "knee joint", "meniscus", "medial meniscus", "lateral meniscus", "anterior cruciate ligament",
        "posterior cruciate ligament", "patella", "patellar tendon", "patellar cartilage", "femoral cartilage",
        "tibial cartilage", "tibial plateau", "femoral condyle", "medial collateral ligament", "popliteal fossa",
        "medial tibial cartilage", "lateral tibial cartilage", "hoffa fat pad",
    )),
    ("knee ankle extremity", ("tibia", "fibula", "tibial bone")),
    ("ankle extremity", ("ankle", "ankle joint", "talus", "calcaneus", "achilles tendon", "navicular bone")),
    ("shoulder extremity chest breast heart neck spine", (
        "humerus", "humeral head", "scapula", "clavicle", "clavicula", "deltoid", "shoulder", "shoulder joint",
    )),
    ("shoulder extremity chest", ("rotator cuff", "supraspinatus tendon", "glenoid", "acromion", "biceps tendon")),
    ("wrist extremity", (
        "wrist", "wrist joint", "ulna", "scaphoid bone", "lunate bone", "carpal bone", "carpal tunnel",
        "metacarpal bone",
    )),
)  # fmt: skip
SEEN_IN = {plain_spelling(name): frozenset(parts.split()) for parts, names in _SEEN_IN for name in names}
"""Structure to the body parts in whose pictures it can lie, generously: large fields of view show neighbours."""

SEX_OF = {
    **dict.fromkeys(("prostate", "prostate gland", "seminal vesicle"), "M"),
    **dict.fromkeys(("uterus", "ovary", "cervix uteri", "vagina", "endometrium"), "F"),
}
"""Structure to the only sex that has it."""
NO_STRUCTURE = r"(?![- ](?:suppress|saturat|sat\b|like|shaped|equivalent))"
"""Fat that is suppressed is not shown, and what is heart-shaped is no heart."""

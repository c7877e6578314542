"""Contradictions between a generated text and what is known of its volume: header, label map, boxes and classes.

Only what is affirmed counts: what is denied, doubted or recommended contradicts nothing, nor does anything contradict
what is unknown. Where words may be read in two ways, the reading that agrees is taken.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from omnimri.models.vocabulary import LESION, NORMAL, SIDES, TISSUES
from omnimri.platform.annotation import check_words as words
from omnimri.platform.evaluation.text import Mention, sides_of
from omnimri.platform.language.derive import Known, labelled_volume
from omnimri.platform.language.measure import LabelledVolume, Measured
from omnimri.platform.language.sections import Certainty, affirmed, sentences, statements
from omnimri.platform.language.words import (
    CONTRASTS_IN_WORDS,
    STRUCTURE_KINDS,
    finding_field,
    one_line,
    plain_name,
    without_side,
)

ContradictionKind = Literal[
    "modality", "plane", "contrast", "contrast agent", "anatomy", "absent structure", "lesion", "denied lesion", "side",
    "count", "signal",
]  # fmt: skip
"""What is wrong: a structure that cannot be seen there, or that the label map lacks; a lesion where none is, or none
where one is; side, number or brightness of a lesion."""

NOT_CHECKED = ("diagnostic_impression.recommendation",)
"""Fields that speak of other images than this one."""


@dataclass(frozen=True, kw_only=True)
class Contradiction:
    """One statement that cannot be true."""

    field: str
    """`level.key`."""
    kind: ContradictionKind
    said: str
    """The statement."""
    known: str
    """What it contradicts."""


def contradictions(fields: Mapping[str, str], known: Known) -> list[Contradiction]:
    """What of generated fields contradicts what is known, in the order of the fields.

    Args:
        fields: `level.key` to phrase; only those that a model wrote.
        known: Of the same volume.
    """
    truth = _Truth(known)
    found = (
        Contradiction(field=field, kind=kind, said=said, known=fact)
        for field, phrase in fields.items()
        if field not in NOT_CHECKED
        for kind, said, fact in _wrong(phrase, truth)
    )
    return list(dict.fromkeys(found))


Wrong = tuple[ContradictionKind, str, str]
"""Kind, what is said, what is known."""


def _wrong(phrase: str, truth: _Truth) -> Iterator[Wrong]:
    said = list(_said(phrase))
    stated = [text for text, certainty in said if certainty == "affirmed"]
    for check in _CHECKS:
        for text in stated:
            yield from check(text, truth)
    yield from _without_agent(phrase, truth)
    yield from _denied_lesion(phrase, [text for text, certainty in said if certainty == "negated"], truth)


def _said(phrase: str) -> Iterator[tuple[str, Certainty]]:
    """Statements with their certainty."""
    text = one_line(re.sub("[\u2010-\u2015\u2212]", "-", phrase))
    text = re.sub(words.NOT_SHOWN, "is not seen", text, flags=re.IGNORECASE)
    text = re.sub(words.NOTHING, " is absent", text, flags=re.IGNORECASE)
    text = re.sub(r"(?<=[a-z]{2})(?<!\bvs)(?<!\bcf)(?<!\bdr)\.\s+(?=[a-z])", "; ", text)
    for sentence in sentences(text):
        for statement in statements(_cut(sentence)):
            yield statement.text, statement.certainty


_JOINT = re.compile(r",\s*(?:and\s+)?|\s+and\s+(?=(?:an?|there)\b)", flags=re.IGNORECASE)


def _cut(sentence: str) -> str:
    """A sentence with semicolons where a comma ends a statement: `no shift, mass in the left lobe, cyst: on the right`.

    That is behind a negation, which does not reach on, and before a heading.
    """
    parts: list[str] = []
    start = last = 0
    is_doubtful = False
    for joint in _JOINT.finditer(sentence):
        before, after = sentence[start : joint.start()], sentence[joint.end() :]
        item = _JOINT.split(after, maxsplit=1)[0]
        is_doubtful = is_doubtful or _has_doubt(sentence[last : joint.start()])
        last = joint.end()
        if ":" in item or ((is_doubtful or _has_doubt(item)) and not _goes_on(before, after)):
            parts.append(before)
            start, is_doubtful = last, False
    return "; ".join([*parts, sentence[start:]])


def _has_doubt(text: str) -> bool:
    return any(statement.certainty != "affirmed" for statement in statements(text)) or not statements(text)


def _goes_on(before: str, after: str) -> bool:
    """Whether a list of what is denied goes on behind a comma: to an `or`, or with the bare name of a lesion."""
    if _search(words.AGENT_NOT_GIVEN, before.lower()):
        return False
    rest = re.split(r"[;.]|\b(?:no|without)\b", words.plain_spelling(after), maxsplit=1)[0]
    item = rest.split(",")[0].strip()
    is_bare = len(item.split()) <= words.MAX_BARE_WORDS and bool(_lesion_kinds_of(item)) and not _has_doubt(item)
    return _search(r"\b(?:or|nor)\b", rest) or (is_bare and not re.match(words.CLAUSE_STARTS, item))


class _Truth:
    """What is known, as far as checks ask."""

    def __init__(self, known: Known) -> None:
        self.known = known
        self.facts = known.facts

    @cached_property
    def volume(self) -> LabelledVolume | None:
        """The label map."""
        return labelled_volume(self.known)

    @cached_property
    def measured(self) -> list[Measured]:
        """Lesions of the label map."""
        return self.volume.lesions() if self.volume else []

    @cached_property
    def _values(self) -> dict[int, str]:
        """Values of the label map to plain names, also of those without voxels."""
        if self.known.label_map is None:
            return {}
        return {
            value: words.plain_spelling(plain_name(name)) for value, name in self.known.label_names.items() if value
        }

    @cached_property
    def seen(self) -> set[str]:
        """Plain names of all labels that have voxels."""
        if self.volume is None:
            return set()
        return {name for value, name in self._values.items() if 0 < value < 256 and self.volume.num_voxels[value]}

    @property
    def unseen(self) -> set[str]:
        """Plain names that the map has a value for, and no voxel."""
        return set(self._values.values()) - self.seen

    @cached_property
    def lesions(self) -> list[str]:
        """Plain names of what the label map, boxes or classes show and is called a lesion."""
        boxed = [plain_name(box["label"]) for box in self.known.boxes or ()]
        classes = [name for text in self.known.classes or () for name in affirmed(text)]  # `no tumour` is a class
        named = map(words.plain_spelling, [*self.seen, *filter(finding_field, boxed), *classes])
        return [name for name in dict.fromkeys(named) if _lesion_kinds_of(name)]

    @cached_property
    def lesion_kinds(self) -> set[str]:
        return {kind for name in self.lesions for kind in _lesion_kinds_of(name)}

    @property
    def is_healthy(self) -> bool:
        """Known to have no lesion: called normal, or read for boxes of which there are none."""
        is_called = [name.lower() for name in self.known.classes or ()] == [NORMAL]
        return not self.lesion_kinds and (is_called or (self.known.boxes is not None and not self.known.boxes))

    def excludes(self, kind: str) -> bool:
        """Whether there is no lesion of a kind: its label has no voxels, and nothing else that is there may be it."""
        if kind in self.lesion_kinds or (LESION in self.lesion_kinds and kind != LESION):
            return False
        if kind == LESION and self.lesion_kinds:
            return False
        empty = {other for name in self.unseen for other in _lesion_kinds_of(name)}
        return self.is_healthy or kind in empty or bool(empty and (kind == LESION or LESION in empty))

    def of_kind(self, kinds: set[str]) -> list[Measured]:
        """Measured lesions of some kinds; of all where any kind is meant."""
        if kinds <= {LESION}:
            return self.measured
        return [found for found in self.measured if kinds & _lesion_kinds_of(words.plain_spelling(found.name))]


def _lesion_kinds_of(name: str) -> set[str]:
    """Kinds of lesion that a label, box or class is; `lesion` only where no word tells more."""
    kinds = {kind for kind, pattern in words.LESION_WORDS.items() if re.search(pattern, name)}
    return kinds - {LESION} or kinds


def _search(pattern: str, text: str) -> bool:
    return re.search(pattern, text) is not None


def _modality(text: str, _: _Truth) -> Iterator[Wrong]:
    if re.search(words.OTHER_MODALITIES, text, flags=re.IGNORECASE):
        yield "modality", text, "MRI"


def _plane(text: str, truth: _Truth) -> Iterator[Wrong]:
    known = truth.facts.get("plane")
    plain = re.sub(words.NO_VIEWS, "", words.plain_spelling(text))
    if known in words.PLANE_WORDS and any(
        _search(pattern, plain) for plane, pattern in words.PLANE_WORDS.items() if plane != known
    ):
        yield "plane", text, f"{known} slices"


def _contrast(text: str, truth: _Truth) -> Iterator[Wrong]:
    known = truth.facts.get("contrast")
    if known not in CONTRASTS_IN_WORDS or truth.facts.get("quantitative"):
        return
    plain = words.plain_spelling(text)
    for name in truth.seen:
        plain = plain.replace(name, "")  # a label may be called by the contrast that it was drawn in
    said = {contrast for contrast, pattern in words.CONTRAST_WORDS.items() if _search(pattern, plain)}
    if "FLAIR" in said:
        said.discard("T2w")  # T2-weighted FLAIR
    if said - {known} - words.ALSO_CALLED.get(known, frozenset()):
        yield "contrast", text, f"{CONTRASTS_IN_WORDS[known]} image"


def _agent(text: str, truth: _Truth) -> Iterator[Wrong]:
    plain = re.sub(words.NO_AGENT_MEANT, "", words.plain_spelling(text))
    if truth.facts.get("contrast_agent") is False and _search(words.AGENT_GIVEN, plain):
        yield "contrast agent", text, "no contrast agent"


def _without_agent(phrase: str, truth: _Truth) -> Iterator[Wrong]:
    """`Without contrast agent` is a negation itself."""
    if truth.facts.get("contrast_agent") is True and _search(words.AGENT_NOT_GIVEN, words.plain_spelling(phrase)):
        yield "contrast agent", phrase, "contrast agent given"


def _names(text: str, vocabulary: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """Structures that a text names, each with `left`, `right` or nothing before it; the longest name wins.

    Args:
        text: In plain spelling.
        vocabulary: Name to the pattern of it and its plural.
    """
    ordered = sorted(vocabulary, key=len, reverse=True)
    any_name = "|".join(f"({vocabulary[name]})" for name in ordered)
    for match in re.finditer(rf"(?:\b(left|right) )?(?<![\w-])(?:{any_name})\b{words.NO_STRUCTURE}", text):
        yield ordered[(match.lastindex or 0) - 2], match[1] or ""


_STRUCTURES = {name: words.any_number(name) for name in {*map(words.plain_spelling, STRUCTURE_KINDS), *words.SEEN_IN}}


def _anatomy(text: str, truth: _Truth) -> Iterator[Wrong]:
    part, sex = truth.facts.get("body_part"), truth.facts.get("sex")
    labelled_here = {without_side(name) for name in truth.seen}
    for name, _ in _names(words.plain_spelling(text), _STRUCTURES):
        if name in labelled_here:
            continue
        if part and name in words.SEEN_IN and part not in words.SEEN_IN[name]:
            yield "anatomy", text, f"body part {part}"
        elif sex in ("F", "M") and words.SEX_OF.get(name, sex) != sex:
            yield "anatomy", text, f"sex {sex}"


def _absent_structure(text: str, truth: _Truth) -> Iterator[Wrong]:
    absent = {name for name in truth.unseen if not finding_field(name)}
    if not absent:
        return
    own = {without_side(name) for name in (*truth.seen, *absent)}
    vocabulary = {**_STRUCTURES, **{name: words.any_number(name) for name in own}}
    for name, side in _names(words.plain_spelling(text), vocabulary):
        called = {f"{side} {name}", f"{name} {side}"} if side else set()
        of_name = {label for label in truth.seen if without_side(label) == name}
        if called & absent or (not of_name and any(without_side(label) == name for label in absent)):
            yield "absent structure", text, f"{name} has a label and no voxel"


def _items(text: str) -> list[str]:
    """Parts of a statement between commas, in plain spelling, without words that only look like lesions."""
    return re.sub(words.NOT_LESIONS, "", words.plain_spelling(text)).split(",")


def _lesion(text: str, truth: _Truth) -> Iterator[Wrong]:
    for item in _items(text):
        excluded = [kind for kind in sorted(_lesion_kinds_of(item)) if truth.excludes(kind)]
        if excluded:
            yield "lesion", text, "healthy" if truth.is_healthy else f"no {excluded[0]} is labelled"


def _denied_lesion(phrase: str, denied: Sequence[str], truth: _Truth) -> Iterator[Wrong]:
    """A lesion of the label map or of a box is denied as such; what is denied of a place or a kind may be true."""
    if not truth.lesion_kinds:
        return
    present = ", ".join(sorted(truth.lesion_kinds))
    plain = words.plain_spelling(phrase)
    if re.fullmatch(words.NORMAL_STUDY, plain.strip(" .")):
        yield "denied lesion", phrase, present
    if _search(words.DENIALS_OF_MORE, plain):
        return
    for text in denied:
        parts = re.split(r",|\b(?:and|or|nor)\b", re.sub(words.NOT_LESIONS, "", words.plain_spelling(text)))
        if any(_denies(part.strip(), truth) for part in parts):
            yield "denied lesion", text, present


def _denies(part: str, truth: _Truth) -> bool:
    patterns = [words.LESION_WORDS[kind] for kind in {*truth.lesion_kinds, LESION}]
    denied = "|".join([*patterns, *map(words.any_number, truth.lesions)])
    return re.fullmatch(rf"(?:(?:focal|discrete|visible|any) )*(?:{denied}){words.SEEN}", part) is not None


def _side(text: str, truth: _Truth) -> Iterator[Wrong]:
    """A side counts where it stands in one item with the lesion."""
    items = _items(re.sub(words.SIDE_ALONE, " ", text, flags=re.IGNORECASE))
    for kind, said in (pair for item in items for pair in _lesions_with_sides(item)):
        lesions = truth.of_kind({kind})
        known = _known_sides(lesions, truth)
        if not known or "midline" in known:
            continue
        is_both = said == {"left", "right"} and len(known) == 1 and sum(found.count for found in lesions) > 1
        if is_both or not said & known:
            yield "side", text, " and ".join(sorted(known))


def _lesions_with_sides(text: str) -> list[tuple[str, set[str]]]:
    """Kinds of lesion that a text names, each with `left`, `right` or both."""
    kinds = _lesion_kinds_of(text)  # `haemorrhage: 1 lesion` names one thing
    matches = [(kind, match) for kind in kinds for match in re.finditer(words.LESION_WORDS[kind], text)]
    mentions = sorted((Mention(kind, *match.span()) for kind, match in matches), key=lambda mention: mention.start)
    said = [(mention.finding, sides_of(text, mention, mentions) & {"left", "right"}) for mention in mentions]
    return [(kind, sides) for kind, sides in said if sides]


def _known_sides(lesions: Sequence[Measured], truth: _Truth) -> set[str]:
    """Of lesions in the label map; where it tells none, of boxes."""
    sides = {side for found in lesions for side in found.sides}
    if not truth.measured:
        boxes = [box for box in truth.known.boxes or () if finding_field(plain_name(box["label"]))]
        sides = {box.get("side") or "" for box in boxes}
    return sides if sides <= set(SIDES) else set()


def _count(text: str, truth: _Truth) -> Iterator[Wrong]:
    """A number that is out by two or more and by a factor of two: where lesions touch, counts may differ."""
    for item in _items(text):
        lesions = truth.of_kind(_lesion_kinds_of(item))
        said = _number_of_lesions(item)
        if said is None or len(lesions) != 1:
            continue
        known = lesions[0].count
        if abs(said - known) >= 2 and max(said, known) >= 2 * min(said, known):
            yield "count", text, f"{known} in the label map"


def _number_of_lesions(item: str) -> int | None:
    """The number before a lesion, with up to four words between that are no units."""
    number = rf"\b(\d+|{'|'.join(words.NUMBERS)})((?: [a-z-]+){{0,4}}?) $"
    for pattern in words.LESION_WORDS.values():
        for mention in re.finditer(pattern, item):
            found = re.search(number, item[: mention.start()])
            if (
                found
                and not _search(words.UNITS_BETWEEN, found[2])
                and not _search(words.NOT_COUNTED, item[: found.start()])
            ):
                return words.NUMBERS.get(found[1]) or int(found[1])
    return None


_OPPOSITE = {"hyperintense": "hypointense", "hypointense": "hyperintense"}


def _signal(text: str, truth: _Truth) -> Iterator[Wrong]:
    """The opposite of what was measured is said; `isointense` is near to either."""
    for item in _items(text):
        said = {word for word, pattern in words.SIGNAL_WORDS.items() if _search(pattern, item)}
        if len(said) != 1 or _search(words.PARTS_OF_LESIONS, item):
            continue
        (word,) = said
        kinds = _lesion_kinds_of(item)
        for name, signal in _measured_signals(kinds, item, truth):
            if signal == _OPPOSITE[word]:
                yield "signal", text, f"{name} {signal}"


def _measured_signals(kinds: set[str], item: str, truth: _Truth) -> Iterator[tuple[str, str]]:
    """Names and signals of what an item speaks of: lesions, else fluid of the brain, else grey beside white matter."""
    lesions = truth.of_kind(kinds) if kinds else []
    if lesions and all(found.signal == lesions[0].signal for found in lesions):
        yield lesions[0].name, lesions[0].signal
    if truth.volume is None or kinds:
        return
    fluid, grey, white = TISSUES
    if fluid in item:
        yield from truth.volume.signals(white, [fluid]).items()
    first = {name: item.find(words.plain_spelling(name)) for name in (grey, white)}
    signal = truth.volume.signals(white, [grey]).get(grey, "") if min(first.values()) >= 0 else ""
    if signal:
        subject = min(first, key=lambda name: first[name])
        yield subject, signal if subject == grey else _OPPOSITE.get(signal, signal)


_CHECKS: tuple[Callable[[str, _Truth], Iterator[Wrong]], ...] = (
    _modality, _plane, _contrast, _agent, _anatomy, _absent_structure, _lesion, _side, _count, _signal,
)  # fmt: skip

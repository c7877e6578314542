"""Paths with named fields, as the catalogue writes them: matched against files, and filled to find others."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from functools import cache

FIELD = re.compile(r"\{(\w+)(?::([^{}]*))?\}")


class Pattern:
    r"""A path with fields: `{patient}/{patient}_{contrast:T1|T2}.nii.gz`.

    A field is a part of one folder or file name, or what its own expression says (`{patient:\d+}`); the same field
    twice holds the same text, and `{_}` is not kept. `**/` stands for any folders. A pattern describes the end of a
    path, from a folder's name on: it does not matter how many folders lie above.
    """

    def __init__(self, template: str, words: Mapping[str, Iterable[str]] | None = None) -> None:
        self.template = template
        self._regex = re.compile(f"(?:.*/)?{_expression(template, words or {})}")

    def match(self, path: str) -> dict[str, str] | None:
        """The fields of a path; None if it is not of this pattern."""
        found = self._regex.fullmatch(path)
        return found.groupdict() if found else None


def _expression(template: str, words: Mapping[str, Iterable[str]]) -> str:
    parts, end, seen = [], 0, set()
    for field in FIELD.finditer(template):
        parts.append(re.escape(template[end : field.start()]))
        end = field.end()
        name, expression = field[1], field[2]
        if name in words and expression is None:
            expression = "|".join(re.escape(word) for word in sorted(words[name], key=len, reverse=True))
        if name in seen:
            parts.append(f"(?P={name})")
        elif name == "_":
            parts.append(f"(?:{expression or '[^/]+?'})")
        else:
            parts.append(f"(?P<{name}>{expression or '[^/]+?'})")
            seen.add(name)
    return "".join([*parts, re.escape(template[end:])]).replace(r"\*\*/", "(?:.*/)?")


def filled(template: str, fields: Mapping[str, str]) -> str | None:
    """A template with its fields put in; None if one is missing."""
    names = [field[1] for field in FIELD.finditer(template)]
    if any(name not in fields for name in names):
        return None
    return FIELD.sub(lambda field: fields[field[1]], template)


@cache
def image_pattern(template: str, contrasts: tuple[str, ...]) -> Pattern:
    """The pattern of a template in which `{contrast}` is one of some words."""
    return Pattern(template, {"contrast": contrasts} if contrasts else {})


@cache
def pattern_of(template: str) -> Pattern:
    """The pattern of a template, compiled once."""
    return Pattern(template)

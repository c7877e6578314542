"""`--set part.field=value`: change single fields of a nested frozen dataclass by name, with types checked."""

import dataclasses
import difflib
import json
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

Config = TypeVar("Config")

_BOOLEANS = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}


def apply_overrides(config: Config, assignments: Sequence[str]) -> Config:
    """Return a copy of a config with some fields replaced.

    Args:
        config: A frozen dataclass instance, whose fields may be dataclasses or mappings in turn.
        assignments: `key=value` each, where the key is a dotted path as `known_keys` lists them. Values are written
            as on a command line: `1e-4`, `true`, `none`, `a,b,c` or JSON for sequences, JSON for mappings.

    Returns:
        The config with every assignment applied at once, so that checks which compare two fields see both new values.

    Raises:
        ValueError: An assignment has no `=`, names an unknown key, or has a value of another type; or the config
            refuses the new value.
    """
    changes: dict[str, str] = {}
    for assignment in assignments:
        key, separator, text = assignment.partition("=")
        if not separator:
            raise ValueError(f"--set {assignment}: expected key=value, for example --set {known_keys(config)[0]}=...")
        changes[key.strip()] = text.strip()
    known = known_keys(config)
    # An entry may be named as if it lay inside another: the sources `paired` and `paired.interleaved`.
    branches = {key for key, value in _walk(config, type(config), key="") if _is_branch(value)}
    for key in changes:
        if key not in known:
            raise ValueError(f"--set {key}: unknown key.{_suggestion(key, known)} Known keys: {', '.join(known)}.")
        if inside := [other for other in changes if key in branches and other.startswith(f"{key}.")]:
            raise ValueError(f"--set {key} and --set {inside[0]} say different things of one value: give one of them.")
    return _rebuild(config, type(config), changes, key="")


def known_keys(config: object) -> list[str]:
    """Dotted names of everything that `apply_overrides` can change, in the order of declaration."""
    return [key for key, value in _walk(config, type(config), key="") if not dataclasses.is_dataclass(value)]


def flatten(config: object) -> dict[str, Any]:
    """Dotted name of every single value of a config or a mapping, for a run's parameters."""
    return {key: value for key, value in _walk(config, type(config), key="") if not _is_branch(value)}


def _is_branch(value: object) -> bool:
    return dataclasses.is_dataclass(value) or (isinstance(value, Mapping) and len(value) > 0)


def _children(node: Any, hint: Any) -> list[tuple[str, Any, Any]]:
    """Name, value and type hint of every field of a dataclass or entry of a mapping."""
    if dataclasses.is_dataclass(node):
        hints = typing.get_type_hints(type(node))
        return [(f.name, getattr(node, f.name), hints[f.name]) for f in dataclasses.fields(node) if f.init]
    value_hint = (*typing.get_args(hint), Any, Any)[1]
    return [(str(name), value, value_hint) for name, value in node.items()]


def _walk(node: Any, hint: Any, key: str) -> Iterator[tuple[str, Any]]:
    """Every value below a node with its dotted name, parents before children."""
    for name, value, value_hint in _children(node, hint):
        path = f"{key}.{name}" if key else name
        yield path, value
        if _is_branch(value):
            yield from _walk(value, value_hint, path)


def _rebuild(node: Any, hint: Any, changes: Mapping[str, str], key: str) -> Any:
    """Build a node anew from the inside out, so that each part checks itself once, with all its changes."""
    if key in changes:
        return parse_value(changes[key], hint, key)
    if not _is_branch(node) or not any(name.startswith(f"{key}.") or not key for name in changes):
        return node
    values = {
        name: _rebuild(value, value_hint, changes, f"{key}.{name}" if key else name)
        for name, value, value_hint in _children(node, hint)
    }
    return {**node, **values} if isinstance(node, Mapping) else dataclasses.replace(node, **values)


def parse_value(text: str, hint: Any, key: str) -> Any:
    """Read one value of the command line as the type that a field declares.

    Args:
        text: The value as written.
        hint: Type hint: bool, int, float, str, Path, Any, Literal, Optional or a union of these, tuple, list, dict.
        key: Name of the field, for the message.

    Raises:
        ValueError: The text does not read as that type.
    """
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return _parse_union(text, arguments, key)
    if origin is typing.Literal:
        return _parse_literal(text, arguments, key)
    if origin in (tuple, list) or hint in (tuple, list):
        return _parse_sequence(text, hint, key)
    if hint is bool:
        if text.lower() not in _BOOLEANS:
            raise _wrong(key, text, "true or false")
        return _BOOLEANS[text.lower()]
    if hint in (int, float):
        return _parse_number(text, hint, key)
    if hint in (str, Path):
        return hint(text)
    if origin in (dict, Mapping) or hint is dict:
        return _parse_mapping(text, hint, key)
    return _parse_json(text, Any, key)


def _parse_union(text: str, members: tuple[Any, ...], key: str) -> Any:
    """The narrowest member that reads the text wins; `none` means None where that is allowed."""
    if type(None) in members and text.lower() in ("none", "null"):
        return None
    order = {bool: 0, int: 1, float: 2, str: 4}
    candidates = sorted((member for member in members if member is not type(None)), key=lambda m: order.get(m, 3))
    for member in candidates[:-1]:
        try:
            return parse_value(text, member, key)
        except ValueError:
            continue
    return parse_value(text, candidates[-1], key)


def _parse_literal(text: str, choices: tuple[Any, ...], key: str) -> Any:
    for choice in choices:
        if str(choice).lower() == text.lower():
            return choice
    raise _wrong(key, text, "one of " + ", ".join(map(str, choices)))


def _parse_sequence(text: str, hint: Any, key: str) -> Any:
    """`a,b` or `[a, b]`; a tuple of fixed length must have that length."""
    kind, hints = typing.get_origin(hint) or hint, typing.get_args(hint)
    items = _parse_json(text, list, key) if text.startswith("[") else text.strip("()").split(",")
    texts = [item for item in map(_as_text, items) if item]
    if not hints:
        return kind(texts)
    if kind is list or hints[-1] is Ellipsis:
        hints = (hints[0],) * len(texts)
    if len(hints) != len(texts):
        raise _wrong(key, text, f"{len(hints)} values separated by commas")
    return kind(parse_value(item, member, key) for item, member in zip(texts, hints, strict=True))


def _parse_mapping(text: str, hint: Any, key: str) -> dict[str, Any]:
    """A JSON object, whose values are read as the type that the mapping declares."""
    value_hint = (*typing.get_args(hint), Any, Any)[1]
    items = _parse_json(text, dict, key)
    return {name: parse_value(_as_text(value), value_hint, f"{key}.{name}") for name, value in items.items()}


def _as_text(value: Any) -> str:
    return value.strip() if isinstance(value, str) else json.dumps(value)


def _parse_number(text: str, kind: type, key: str) -> int | float:
    try:
        if kind is float:
            return float(text)
        number = float(text) if "e" in text.lower() else int(text)  # 1e4 is a count that people write
        if number != int(number):
            raise ValueError(text)
        return int(number)
    except (ValueError, OverflowError):
        raise _wrong(key, text, "a whole number" if kind is int else "a number") from None


def _parse_json(text: str, kind: Any, key: str) -> Any:
    """Any JSON value; text that is not JSON is a plain string where the type allows anything."""
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        if kind is Any:
            return text
        value = None
    if kind is not Any and not isinstance(value, kind):
        raise _wrong(key, text, "a JSON object" if kind is dict else "a JSON list")
    return value


def _wrong(key: str, text: str, expected: str) -> ValueError:
    return ValueError(f"--set {key}={text}: expected {expected}.")


def _suggestion(key: str, known: Sequence[str]) -> str:
    """Name the key that was probably meant: a typing error, or the right field without its part."""
    same_field = [name for name in known if name.rpartition(".")[2] == key.rpartition(".")[2]]
    close = same_field or difflib.get_close_matches(key, known, n=1)
    return f" Did you mean {close[0]}?" if close else ""

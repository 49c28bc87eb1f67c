"""Error messages for a configuration: the key, the value given, the values allowed, where it was set, and the nearest
existing key."""

from __future__ import annotations

import types
import typing
from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from actors.errors import ConfigError, did_you_mean, nearest
from orchestrator.config.overrides import Keys, dotted

SHOWN = 8  # errors; another program's file would otherwise fill the screen


def unknown(what: str, given: str, allowed: Sequence[str]) -> str:
    """`no method 'grop'; did you mean grpo? There are: dpo, grpo, sft`."""
    hint = did_you_mean(given, allowed) or "."
    return f"no {what} {given!r}{hint} There are: {', '.join(sorted(allowed)) or 'none'}"


def explain(
    error: ValidationError,
    tree: dict[str, Any],
    schema: type[BaseModel],
    where: Callable[[Keys], str],
    shown_as: Callable[[Keys], str] = dotted,
    top_level: Sequence[Keys] = (),
) -> ConfigError:
    """The ConfigError for a pydantic error. `where` maps a path to the place where it was set, `shown_as` to the user's
    notation. `top_level`: keys that may be written at the top level, although the schema has them elsewhere."""
    lines: list[str] = []
    problems = _by_path(error.errors(include_url=False), tree)
    for path, details in list(problems.items())[:SHOWN]:
        lines.append(f"{shown_as(path)}: {_reason(path, details, schema, shown_as, top_level)}")
        lines.append(f"  set in {where(path)}")
    if len(problems) > SHOWN:
        lines.append(f"and {len(problems) - SHOWN} more")
    return ConfigError("\n".join(lines))


def schema_keys(schema: type[BaseModel], below: Keys = ()) -> Iterator[Keys]:
    """Every key of a configuration, as paths; `NAME` stands for names that the user chooses."""
    for name, field in schema.model_fields.items():
        yield (*below, name)
        for section, step in sections(field.annotation):
            yield from schema_keys(section, (*below, name, *step))


def _by_path(errors: Sequence[ErrorDetails], tree: dict[str, Any]) -> dict[Keys, list[ErrorDetails]]:
    """Groups errors by path: pydantic reports a wrong value of a union once per member."""
    found: dict[Keys, list[ErrorDetails]] = {}
    for details in errors:
        found.setdefault(_real_path(details, tree), []).append(details)
    return found


def _real_path(details: ErrorDetails, tree: dict[str, Any]) -> Keys:
    """The location without pydantic's own additions (names of union members)."""
    node: Any = tree
    path: list[str | int] = []
    for key in details["loc"]:
        try:
            node = node[key]
        except (KeyError, IndexError, TypeError):
            if details["type"] == "missing":
                path.append(key)
            break
        path.append(key)
    return tuple(path)


def _reason(
    path: Keys,
    errors: Sequence[ErrorDetails],
    schema: type[BaseModel],
    shown_as: Callable[[Keys], str],
    top_level: Sequence[Keys],
) -> str:
    first = errors[0]
    if first["type"] == "extra_forbidden":
        return _unknown_key(path, schema, shown_as, top_level)
    if first["type"] == "missing":
        return "is required and missing"
    if first["type"] == "role_kind":
        return first["msg"]
    if first["type"] == "value_error":
        return f"{_short(first['input'])} is not allowed: {first['msg'].removeprefix('Value error, ')}"
    demands = " or ".join(dict.fromkeys(details["msg"].removeprefix("Input should be ") for details in errors))
    return f"{_short(first['input'])} is not allowed: it must be {demands}"


def _unknown_key(
    path: Keys, schema: type[BaseModel], shown_as: Callable[[Keys], str], top_level: Sequence[Keys]
) -> str:
    given = str(path[-1])
    section = _section_at(schema, path[:-1])
    siblings = {name: (*path[:-1], name) for name in section.model_fields} if section else {}
    if len(path) == 1:
        siblings |= {str(keys[-1]): keys for keys in top_level}
    meant = nearest(given, siblings)
    if meant:
        return f"no such key; did you mean {shown_as(siblings[meant])}?"
    elsewhere = [keys for keys in schema_keys(schema) if keys[-1] == given]
    if elsewhere:
        places = ", ".join(shown_as(keys) for keys in elsewhere)
        return f"no such key here; there is {places}"
    return f"no such key; allowed here: {', '.join(siblings) or 'none'}"


def _section_at(schema: type[BaseModel] | None, path: Keys) -> type[BaseModel] | None:
    """The section at a path, or None if there is another value."""
    while schema is not None and path:
        field = schema.model_fields.get(str(path[0]))
        found = next(sections(field.annotation), None) if field else None
        if found is None:
            return None
        schema, step = found
        path = path[1 + len(step) :]
    return schema


def sections(annotation: Any) -> Iterator[tuple[type[BaseModel], Keys]]:
    """The sections inside an annotation, with the keys between: `dict[str, Phase]` holds (Phase, ("NAME",))."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation, ()
        return
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (typing.Union, types.UnionType, typing.Annotated):
        for member in arguments:
            yield from sections(member)
    elif origin in (dict, tuple, list) and arguments:
        inner = arguments[1] if origin is dict else arguments[0]
        step = "NAME" if origin is dict else "N"
        for section, keys in sections(inner):
            yield section, (step, *keys)


def _short(value: Any) -> str:
    text = repr(cast(object, value))
    return text if len(text) <= 80 else f"{text[:77]}..."

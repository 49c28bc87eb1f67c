"""Why a configuration is refused, in lines that the user can act on: the key, what was given, what is allowed, where it
was set, and the key that was probably meant."""

from __future__ import annotations

import difflib
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, cast

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from actors.errors import ConfigError
from orchestrator.overrides import Keys, dotted

SHOWN = 8  # errors; a file of another program would otherwise fill the screen


def nearest(given: str, allowed: Iterable[str]) -> str | None:
    """The allowed word most like the given one, if any is like it at all."""
    found = difflib.get_close_matches(given, list(allowed), n=1, cutoff=0.6)
    return found[0] if found else None


def unknown(what: str, given: str, allowed: Sequence[str]) -> str:
    """`no method 'grop'; did you mean grpo? There are: dpo, grpo, sft`."""
    meant = nearest(given, allowed)
    hint = f"; did you mean {meant}?" if meant else "."
    return f"no {what} {given!r}{hint} There are: {', '.join(sorted(allowed)) or 'none'}"


def explain(
    error: ValidationError,
    tree: dict[str, Any],
    schema: type[BaseModel],
    where: Callable[[Keys], str],
    shown_as: Callable[[Keys], str] = dotted,
    top_level: Sequence[Keys] = (),
) -> ConfigError:
    """The ConfigError for a pydantic error. `where` says where a path was set, `shown_as` how its author writes it.
    `top_level`: keys that its author may write at the top level, although the schema has them elsewhere."""
    lines: list[str] = []
    problems = _by_path(error.errors(include_url=False), tree)
    for path, details in list(problems.items())[:SHOWN]:
        lines.append(f"{shown_as(path)}: {_reason(path, details, schema, shown_as, top_level)}")
        lines.append(f"  set in {where(path)}")
    if len(problems) > SHOWN:
        lines.append(f"and {len(problems) - SHOWN} more")
    return ConfigError("\n".join(lines))


def schema_keys(schema: type[BaseModel], below: Keys = ()) -> Iterator[Keys]:
    """Every key of a configuration, as paths; names that the user chooses stand as `NAME`."""
    for name, field in schema.model_fields.items():
        yield (*below, name)
        for section, step in sections(field.annotation):
            yield from schema_keys(section, (*below, name, *step))


def _by_path(errors: Sequence[ErrorDetails], tree: dict[str, Any]) -> dict[Keys, list[ErrorDetails]]:
    """A union reports once per member: all of them stand for one wrong value."""
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
        return "is required, and is not there"
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
    """The section that a path leads to, or None where it leads to something else."""
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

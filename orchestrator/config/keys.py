"""A reference of all configuration keys: type, default and one line of help. All of it comes from `schema.py` and
`roles.py`."""

from __future__ import annotations

import re
import types
import typing
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from actors.errors import ConfigError, nearest
from orchestrator.config.error_messages import sections
from orchestrator.config.overrides import Keys, dotted
from orchestrator.config.schema import RunConfig

FOLDED = ("phases", "NAME")  # omitted before a phase's keys, as in a file with one phase


@dataclass(frozen=True)
class Key:
    """`default` is None for a required key, and for a key that holds a section."""

    path: Keys
    type: str
    default: str | None
    help: str

    @property
    def name(self) -> str:
        """The key's notation in a file with one phase."""
        return dotted(self.path[2:] if self.path[:2] == FOLDED and len(self.path) > 2 else self.path)


def every_key(schema: type[BaseModel] = RunConfig, below: Keys = ()) -> Iterator[Key]:
    """A section's own key comes before the keys in it."""
    hints = typing.get_type_hints(schema, include_extras=True)
    for name, field in schema.model_fields.items():
        path = (*below, name)
        found = next(sections(field.annotation), None)
        yield Key(path, type_name(hints[name]), _default(field), _help(field, found[0] if found else None))
        if found:
            yield from every_key(found[0], (*path, *found[1]))


def keys_below(prefix: str) -> list[Key]:
    """The key `prefix` and those below it; a phase's keys are found with and without `phases.NAME`. Raises ConfigError
    if there is none."""
    everything = list(every_key())
    asked = re.sub(r"^phases\.[^.]+\.", "", prefix.removesuffix("."))
    below = [key for key in everything if key.name == asked or key.name.startswith(f"{asked}.")]
    found = below or [key for key in everything if key.name.startswith(asked)]
    if found:
        return found
    raise ConfigError(_unknown(prefix, asked, [key.name for key in everything]))


def _unknown(prefix: str, asked: str, names: Sequence[str]) -> str:
    last = asked.rpartition(".")[2]
    elsewhere = [name for name in names if name.rpartition(".")[2] == last]
    meant = nearest(asked, names)
    hint = f"there is {', '.join(elsewhere)}" if elsewhere else f"did you mean {meant}?" if meant else ""
    return f"no key {prefix!r}; {hint or '`troupe keys` shows the sections, `troupe keys --all` every key'}"


def type_name(annotation: Any) -> str:
    """A type as a user writes values of it: `float > 0 | none`, `token | sequence`, `[str, ...]`, `{str: int}`."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Literal:
        return " | ".join(map(str, arguments))
    if origin is Annotated:
        return " ".join([type_name(arguments[0]), " and ".join(_limits(arguments[1:]))]).strip()
    if origin in (typing.Union, types.UnionType):
        return " | ".join(map(type_name, arguments))
    if origin is dict:
        return f"{{{type_name(arguments[0])}: {type_name(arguments[1])}}}"
    if origin in (tuple, list):
        return f"[{', '.join('...' if each is Ellipsis else type_name(each) for each in arguments)}]"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "section"
    names = {types.NoneType: "none", Path: "path", Any: "any"}
    return names.get(annotation) or getattr(annotation, "__name__", str(annotation))


def as_yaml(value: Any) -> str:
    """A plain value in YAML."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return f"[{', '.join(map(as_yaml, typing.cast(tuple[Any, ...], value)))}]"
    return str(value)


def _limits(constraints: tuple[Any, ...]) -> Iterator[str]:
    """`> 0`, `<= 1` from pydantic's fields."""
    for field in constraints:
        for limit in getattr(field, "metadata", ()):
            for name, sign in (("gt", ">"), ("ge", ">="), ("lt", "<"), ("le", "<=")):
                if hasattr(limit, name):
                    yield f"{sign} {getattr(limit, name):g}"


def _default(field: FieldInfo) -> str | None:
    if field.is_required():
        return None
    value: Any = field.get_default(call_default_factory=True, validated_data={})
    return None if isinstance(value, BaseModel) else as_yaml(value)


def _help(field: FieldInfo, section: type[BaseModel] | None) -> str:
    """Of a key without a description, the first sentence about the section that it holds."""
    text = " ".join((field.description or (section and section.__doc__) or "").split())
    return text if field.description else re.split(r"(?<=\.)\s", text, maxsplit=1)[0]

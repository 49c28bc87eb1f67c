"""The methods as data: what each does, needs and takes. `troupe methods` prints it, the service serves it."""

from __future__ import annotations

import inspect
import re
import typing
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from orchestrator.config.keys import as_yaml, type_name
from orchestrator.pipeline import Pipeline


@dataclass(frozen=True)
class Option:
    name: str
    type: str
    default: str | None  # as YAML; None for one that must be given


@dataclass(frozen=True)
class Described:
    """`pipeline`: with every option at its default; None for a method that has options without one."""

    name: str
    summary: str  # the first sentence of its docstring
    source: str
    text: str  # the whole docstring
    pipeline: Pipeline | None
    options: tuple[Option, ...]


def as_data(method: Described) -> dict[str, Any]:
    """For programs. `data` is None where an option without a default decides it."""
    pipeline = method.pipeline
    return {
        "name": method.name,
        "summary": method.summary,
        "source": method.source,
        "data": pipeline.data.name if pipeline else None,
        "roles": list(pipeline.roles) if pipeline else [],
        "stages": [stage.name for stage in pipeline] if pipeline else [],
        "options": [asdict(option) for option in method.options],
    }


def described(name: str) -> Described:
    """Raises ConfigError for a name that is no method's."""
    from orchestrator.methods import find_method

    method = find_method(name)
    text = " ".join((method.__doc__ or "").split())
    source = re.search(r"Sources?: (.+?)\.?$", text)
    first = re.split(r"(?<=\.)\s", text, maxsplit=1)[0].rstrip(".")
    options = tuple(_options(method))
    pipeline = None if any(option.default is None for option in options) else method()
    return Described(
        name, first, source[1] if source else "", inspect.cleandoc(method.__doc__ or ""), pipeline, options
    )


def _options(method: Callable[..., Pipeline]) -> typing.Iterator[Option]:
    hints = typing.get_type_hints(method, include_extras=True)
    for name, parameter in inspect.signature(method).parameters.items():
        default = None if parameter.default is parameter.empty else as_yaml(parameter.default)
        yield Option(name, type_name(hints[name]), default)

"""A method's name and options to its pipeline, validated against the method's own signature."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from difflib import get_close_matches
from functools import cache
from typing import Any

from pydantic import ValidationError, validate_call

from actors.errors import ConfigError
from orchestrator.methods.table import METHODS
from orchestrator.pipeline import Pipeline


def build(name: str, options: Mapping[str, Any], facts: Mapping[str, Any] | None = None) -> Pipeline:
    """The pipeline of a method.

    `facts` are values that the run's configuration knows already (`max_completion_length`, say): a method that takes an
    option of that name gets it, unless `options` says otherwise. Raises ConfigError that says what was given, what is
    allowed and what is near it.
    """
    if name not in METHODS:
        raise ConfigError(f"method {name!r} does not exist{_nearest(name, METHODS)}; there are {', '.join(METHODS)}")
    method = METHODS[name]
    known = inspect.signature(method).parameters
    for option in options:
        if option not in known:
            near = _nearest(option, known)
            raise ConfigError(f"method {name} has no option {option!r}{near}; it has {', '.join(known)}")
    offered = {fact: value for fact, value in (facts or {}).items() if fact in known}
    return _call(name, method, {**offered, **options})


def _call(name: str, method: Callable[..., Pipeline], options: Mapping[str, Any]) -> Pipeline:
    try:
        return _validated(method)(**options)
    except ValidationError as error:
        # A union reports each of its alternatives: the last one, the most general, says it all.
        found = {
            line["loc"][0]: f"options.{line['loc'][0]}={line['input']!r}: {line['msg']}" for line in error.errors()
        }
        raise ConfigError(f"method {name}: {'; '.join(found.values())}") from None


@cache
def _validated(method: Callable[..., Pipeline]) -> Callable[..., Pipeline]:
    return validate_call(method)


def _nearest(name: str, known: Mapping[str, Any]) -> str:
    near = get_close_matches(name, known, n=1)
    return f" (did you mean {near[0]!r}?)" if near else ""

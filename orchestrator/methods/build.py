"""A method's name and options to its pipeline, validated against the method's own signature.

No option is ever ignored: one that changes nothing under the others is refused (`orchestrator/methods/idle.py`).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from difflib import get_close_matches
from functools import cache
from typing import Any

from pydantic import ConfigDict, ValidationError, validate_call

from actors.errors import ConfigError
from orchestrator.config import is_word_for_number
from orchestrator.methods.idle import refuse_idle, types_of
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

    def made(changed: Mapping[str, Any]) -> Pipeline:
        return _call(name, method, {**offered, **changed})

    pipeline = made(options)
    refuse_idle(method, options, pipeline, made)
    return pipeline


def _call(name: str, method: Callable[..., Pipeline], options: Mapping[str, Any]) -> Pipeline:
    found: dict[Any, str] = {}
    for option, annotation in types_of(method).items():
        if option in options and is_word_for_number(options[option], annotation):
            found[option] = f"options.{option}={options[option]!r}: a number is needed, and true, yes and on are none"
    try:
        if not found:
            return _validated(method)(**options)
    except ValidationError as error:
        # A union reports each of its alternatives: the last one, the most general, says it all.
        found = {
            line["loc"][0]: f"options.{line['loc'][0]}={line['input']!r}: {line['msg']}" for line in error.errors()
        }
    raise ConfigError(f"method {name}: {'; '.join(found.values())}") from None


@cache
def _validated(method: Callable[..., Pipeline]) -> Callable[..., Pipeline]:
    return validate_call(config=ConfigDict(allow_inf_nan=False))(method)


def _nearest(name: str, known: Mapping[str, Any]) -> str:
    near = get_close_matches(name, known, n=1)
    return f" (did you mean {near[0]!r}?)" if near else ""

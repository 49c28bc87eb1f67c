"""A method's name and options to its pipeline, validated against the method's own signature.

No option is ever ignored: one that changes nothing under the others is refused
(`orchestrator/methods/ineffective_options.py`)."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

from pydantic import ConfigDict, ValidationError, validate_call

from actors.errors import ConfigError, did_you_mean
from orchestrator.config.error_messages import unknown
from orchestrator.config.section import is_word_for_number
from orchestrator.methods.ineffective_options import refuse_ineffective, types_of
from orchestrator.methods.table import METHODS
from orchestrator.pipeline import Pipeline
from orchestrator.plugins import is_plugin, load


def build(name: str, options: Mapping[str, Any], facts: Mapping[str, Any] | None = None) -> Pipeline:
    """The pipeline of a method.

    `facts` are values that the run's configuration knows already (`max_completion_length`, say): a method that takes an
    option of that name gets it, unless `options` says otherwise. Raises ConfigError that says what was given, what is
    allowed and what is near it.
    """
    method = find_method(name)
    known = inspect.signature(method).parameters
    for option in options:
        if option not in known:
            hint = did_you_mean(option, known) or "."
            raise ConfigError(f"method {name} has no option {option!r}{hint} It has {', '.join(known)}")
    offered = {fact: value for fact, value in (facts or {}).items() if fact in known}

    def made(changed: Mapping[str, Any]) -> Pipeline:
        return _call(name, method, {**offered, **changed})

    pipeline = made(options)
    refuse_ineffective(method, options, pipeline, made)
    return pipeline


def find_method(name: str) -> Callable[..., Pipeline]:
    """One of ours, or a user's own, `path/to/file.py:name`. Raises ConfigError."""
    if is_plugin(name):
        method = load(name, "method")
        _refuse_unnamed(name, method)
        return method
    if name not in METHODS:
        raise ConfigError(f"{unknown('method', name, list(METHODS))}. Or give your own as path/to/file.py:name")
    return METHODS[name]


def _refuse_unnamed(name: str, method: Callable[..., Pipeline]) -> None:
    """Raises ConfigError for a method whose options cannot be told apart and checked one by one."""
    try:
        parameters, types = inspect.signature(method).parameters, types_of(method)
    except (TypeError, ValueError, NameError) as error:
        raise ConfigError(f"method {name}: its signature cannot be read: {error}") from None
    for option, parameter in parameters.items():
        if parameter.kind not in (parameter.KEYWORD_ONLY, parameter.POSITIONAL_OR_KEYWORD) or option not in types:
            raise ConfigError(f"method {name}: its parameter {parameter} is no option: give each a name and a type")


def _call(name: str, method: Callable[..., Pipeline], options: Mapping[str, Any]) -> Pipeline:
    found: dict[Any, str] = {}
    for option, annotation in types_of(method).items():
        if option in options and is_word_for_number(options[option], annotation):
            found[option] = (
                f"options.{option}={options[option]!r}: a number is needed; true, yes and on are not numbers"
            )
    try:
        if not found:
            made: Any = _validated(method)(**options)  # what a user's function returns, whatever it says
            if not isinstance(made, Pipeline):
                raise ConfigError(f"method {name} returned a {type(made).__name__}; it must return a Pipeline")
            return made
    except ConfigError:
        raise
    except ValidationError as error:
        # A union reports each of its alternatives: the last one, the most general, says it all.
        found = {
            line["loc"][0]: f"options.{line['loc'][0]}={line['input']!r}: {line['msg']}" for line in error.errors()
        }
    except Exception as error:
        if not is_plugin(name):
            raise
        raise ConfigError(f"method {name} failed: {type(error).__name__}: {error}") from error
    raise ConfigError(f"method {name}: {'; '.join(found.values())}") from None


@cache
def _validated(method: Callable[..., Pipeline]) -> Callable[..., Pipeline]:
    return validate_call(config=ConfigDict(allow_inf_nan=False))(method)

"""A reward's signature: which names it takes, which of them are columns, and whether its options fit."""

from __future__ import annotations

import inspect
import json
import typing
from collections.abc import Callable, Mapping
from typing import Any

from pydantic import PydanticSchemaGenerationError, PydanticUserError, TypeAdapter, ValidationError

from actors.errors import ConfigError, did_you_mean

# What every reward may ask for; other parameters are columns of the data set or options.
OFFERED = ("prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric")
SENT = ("prompts", "completions")  # those of them that a reward outside our processes gets
VARIADIC = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)


def signature_of(target: Callable[..., Any], fn: str) -> inspect.Signature:
    """Raises ConfigError unless everything can be passed by name."""
    try:
        signature = inspect.signature(target)
    except (TypeError, ValueError):
        raise ConfigError(f"reward {fn}: its signature cannot be read; wrap it in a Python function") from None
    if any(p.kind is p.POSITIONAL_ONLY for p in signature.parameters.values()):
        raise ConfigError(f"reward {fn} takes positional-only parameters; everything is passed by name")
    return signature


def accepted(signature: inspect.Signature) -> frozenset[str] | None:
    """The names that may be passed; None for any."""
    parameters = signature.parameters.values()
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return None
    return frozenset(p.name for p in parameters if p.kind is not p.VAR_POSITIONAL)


def required(signature: inspect.Signature) -> frozenset[str]:
    parameters = signature.parameters.values()
    return frozenset(p.name for p in parameters if p.default is p.empty and p.kind not in VARIADIC)


def fitted(
    options: Mapping[str, Any], target: Callable[..., Any], signature: inspect.Signature, fn: str
) -> dict[str, Any]:
    """The options as the types of the parameters have them (a list for a tuple, say). Raises ConfigError for a name or
    a value that the target does not take."""
    refuse_offered(options, fn)
    names = accepted(signature)
    unknown = sorted(set(options) - names) if names is not None else []
    if unknown:
        there = sorted(set(signature.parameters) - set(OFFERED))
        raise ConfigError(f"reward {fn} has no option {unknown[0]!r}{hint(unknown[0], there)}")
    types = _types(target)
    return {name: _typed(name, value, types[name], fn) if name in types else value for name, value in options.items()}


def sent(columns: tuple[str, ...] | None) -> frozenset[str] | None:
    """The names of the arguments that are sent to a reward outside our processes; None: any name."""
    return None if columns is None else frozenset((*SENT, *columns))


def not_sent() -> frozenset[str]:
    """Arguments that are never sent: functions and objects of this process, and token ids."""
    return frozenset(OFFERED) - frozenset(SENT)


def refuse_offered(options: Mapping[str, Any], where: str) -> None:
    """Raises ConfigError for an option with the name of an argument that every call has."""
    clash = sorted(set(options) & set(OFFERED))
    if clash:
        raise ConfigError(f"reward {where}: {clash[0]!r} is passed with every call and cannot be an option")


def _types(target: Callable[..., Any]) -> dict[str, Any]:
    """Of parameters whose annotation can be resolved."""
    function: Any = target.__init__ if inspect.isclass(target) else target
    if not inspect.isroutine(function):
        function = type(function).__call__
    try:
        return {name: kind for name, kind in typing.get_type_hints(function).items() if name != "return"}
    except Exception:  # an annotation names something that is imported only for the type checker
        return {}


def _typed(name: str, value: Any, kind: Any, fn: str) -> Any:
    try:
        adapter: TypeAdapter[Any] = TypeAdapter(kind)
    except (
        PydanticSchemaGenerationError,
        PydanticUserError,
    ):  # a class of the user's own, whose values cannot be checked
        return value
    try:
        # Strict as JSON is: no text for a number, no `true` for 1, but a list for a tuple and 1 for a float.
        return adapter.validate_json(json.dumps(value), strict=True)
    except TypeError:  # not JSON, a date for example
        return _strictly(adapter, name, value, fn)
    except ValidationError as error:
        raise _misfit(name, value, error, fn) from None


def _strictly(adapter: TypeAdapter[Any], name: str, value: Any, fn: str) -> Any:
    try:
        return adapter.validate_python(value, strict=True)
    except ValidationError as error:
        raise _misfit(name, value, error, fn) from None


def _misfit(name: str, value: Any, error: ValidationError, fn: str) -> ConfigError:
    said = dict.fromkeys(line["msg"] for line in error.errors())
    return ConfigError(f"reward {fn}: options.{name}={value!r}: {'; or: '.join(said)}")


def hint(given: str, there: list[str]) -> str:
    """The end of an error about an unknown name: the nearest existing one, or all of them."""
    return did_you_mean(given, there) or f". There are: {', '.join(sorted(there)) or 'none'}"

"""Options that change nothing are refused, for every method alike.

An option acts if the pipeline that it makes is another one without it. So a method passes an option on to its stages
only where it acts; no list of ineffective combinations is kept.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from functools import cache, partial
from typing import Any, Literal, cast, get_args, get_origin, get_type_hints

from actors.errors import ConfigError
from orchestrator.losses.declare import Sum
from orchestrator.pipeline import Pipeline

Options = Mapping[str, Any]
Make = Callable[[Options], Pipeline]  # the pipeline of a method under these options
HINTS = 6  # values that a refusal names


def refuse_ineffective(method: Callable[..., Pipeline], options: Options, pipeline: Pipeline, make: Make) -> None:
    """Raises ConfigError for an option that is set to something else than its default, and acts in no way."""
    parameters, hints = inspect.signature(method).parameters, types_of(method)
    changed = [name for name, value in options.items() if content(value) != content(parameters[name].default)]
    whole = content(pipeline) if changed else None
    for name in changed:
        if not _acts(name, hints[name], options, whole, make):
            raise ConfigError(f"options.{name}={options[name]!r} {_where_it_acts(method, name, options, make)}")


@cache
def types_of(method: Callable[..., Pipeline]) -> dict[str, Any]:
    """The types of a method's options."""
    return get_type_hints(method)


def content(value: Any) -> Any:
    """What a pipeline, or a part of one, consists of: equal for two of them that do the same."""
    if value is None or isinstance(value, bool | int | float | str):  # most of them
        return value
    if isinstance(value, partial):
        return (content(value.func), content(value.args), content(value.keywords))
    if isinstance(value, Sum):
        return content(value.terms)
    if is_dataclass(value) and not isinstance(value, type):
        return (
            type(value),
            {field.name: content(getattr(value, field.name)) for field in fields(value) if field.compare},
        )
    if isinstance(value, Mapping):
        return {key: content(each) for key, each in cast(Mapping[Any, Any], value).items()}
    if isinstance(value, tuple | list):
        return [content(each) for each in cast(tuple[Any, ...], value)]
    return value


def _acts(name: str, annotation: Any, options: Options, whole: Any, make: Make) -> bool:
    """Whether the pipeline, of which `whole` is the content, differs without the option, or with another value of it:
    what is given may happen to be what holds anyway."""
    others = ({**options, name: value} for value in _other_values(annotation, options[name]))
    return _differs(whole, _without(name, options), make, if_refused=True) or any(
        _differs(whole, changed, make, if_refused=False) for changed in others
    )


def _differs(whole: Any, changed: Options, make: Make, *, if_refused: bool) -> bool:
    try:
        return content(make(changed)) != whole
    except ConfigError:
        return if_refused


def _without(name: str, options: Options) -> Options:
    return {key: value for key, value in options.items() if key != name}


def _where_it_acts(method: Callable[..., Pipeline], name: str, options: Options, make: Make) -> str:
    """`does nothing with options.loss_type=dapo: leave it out; it acts with options.loss_type=dppo`."""
    hints = types_of(method)

    def acts_with(other: str, value: Any) -> bool:
        changed = {**options, other: value}
        try:
            return _differs(content(make(changed)), _without(name, changed), make, if_refused=True)
        except ConfigError:
            return False

    for other, parameter in inspect.signature(method).parameters.items():
        now = options.get(other, parameter.default)
        is_switch = isinstance(now, bool | str) or now == 0  # other numbers only say how much
        values = _other_values(hints[other], now) if is_switch and other != name else []
        if found := [value for value in values if acts_with(other, value)]:
            listed = ", ".join(_shown(value) for value in found[:HINTS]) + (" ..." if len(found) > HINTS else "")
            return (
                f"does nothing with options.{other}={_shown(now)}: leave it out; it acts with options.{other}={listed}"
            )
    return "does nothing beside these options: leave it out"


def _other_values(annotation: Any, now: Any) -> list[Any]:
    """What an option might be instead: the other names, the other boolean, numbers near it."""
    if isinstance(now, bool):
        return [not now]
    if isinstance(now, int | float):
        return [now + 1] if isinstance(now, int) and now else [now + 0.1, now / 2]
    if isinstance(now, str):
        return [name for name in _names(annotation) if name != now]
    if isinstance(now, list | tuple):
        others = [_other_values(annotation, each) for each in cast(list[Any], now)]
        return [[each[0] for each in others]] if all(others) else []  # a name that users choose has none
    return []


def _names(annotation: Any) -> Iterator[str]:
    """Of all literals in an annotation, each once."""
    if get_origin(annotation) is Literal:
        yield from get_args(annotation)
        return
    yield from dict.fromkeys(name for part in get_args(annotation) for name in _names(part))


def _shown(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)

"""A method's keyword arguments are its options: its signature, as a pydantic model, is what they are checked against."""

from __future__ import annotations

import inspect
import typing
from collections.abc import Callable
from typing import Any

from pydantic import BaseModel, ConfigDict, create_model


def options_model(method: Callable[..., Any]) -> type[BaseModel]:
    """A model with a field per keyword argument of `method`; an option that the method does not have is refused."""
    hints = typing.get_type_hints(method, include_extras=True)
    fields: dict[str, Any] = {
        name: (hints.get(name, Any), ... if parameter.default is parameter.empty else parameter.default)
        for name, parameter in inspect.signature(method).parameters.items()
    }
    config = ConfigDict(extra="forbid", protected_namespaces=(), arbitrary_types_allowed=True)
    return create_model(method.__name__, __config__=config, **fields)


def checked_options(method: Callable[..., Any], given: dict[str, Any]) -> dict[str, Any]:
    """The options that were given, converted to the types of the signature. Raises pydantic's ValidationError."""
    model = options_model(method).model_validate(given)
    return {name: getattr(model, name) for name in given}

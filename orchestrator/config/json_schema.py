"""The JSON schema of a recipe, for editors: `troupe schema > recipe.schema.json`, and in the recipe

    # yaml-language-server: $schema=recipe.schema.json

It is made of the configuration's own declarations and of the signatures of the methods. It accepts whatever
`troupe run` accepts; what depends on several keys is for `troupe plan` to refuse.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, get_type_hints

from pydantic import PydanticSchemaGenerationError, TypeAdapter
from pydantic.errors import PydanticInvalidForJsonSchema

from orchestrator.config.schema import PhaseConfig, RunConfig
from orchestrator.methods import METHODS
from orchestrator.pipeline import Pipeline

DIALECT = "https://json-schema.org/draft/2020-12/schema"

Schema = dict[str, Any]


def recipe_schema() -> Schema:
    """Of a file with `phases`, or with the keys of its one phase at the top level."""
    run, phase = RunConfig.model_json_schema(), PhaseConfig.model_json_schema()
    definitions: Schema = {**run.pop("$defs"), **phase.pop("$defs")}
    phase = _with_methods(phase)
    definitions["PhaseConfig"] = phase
    several = {"required": ["phases"], "properties": dict.fromkeys(phase["properties"], False)}
    single = {"properties": {"phases": False}, "allOf": phase["allOf"]}
    return {
        "$schema": DIALECT,
        "title": "A recipe of Troupe",
        "type": "object",
        "properties": {**phase["properties"], **run["properties"]},
        "additionalProperties": False,
        "if": {"required": ["phases"]},
        "then": several,
        "else": single,
        "$defs": definitions,
    }


def _with_methods(phase: Schema) -> Schema:
    """The schema of a phase, whose `options` are those of its method. A user's own method is a file, whose options
    are not known here."""
    properties: Schema = dict(phase["properties"])
    default = properties["method"]["default"]
    described = [{"const": name, "description": _first_sentence(method)} for name, method in METHODS.items()]
    own = {"type": "string", "pattern": r"\.py:\w+$", "description": "Your own: path/to/file.py:name"}
    properties["method"] = {**properties["method"], "anyOf": [*described, own]}
    properties["method"].pop("type")
    cases = [
        {
            # Without a key `method` it is the default that has the options.
            "if": {"properties": {"method": {"const": name}}, **({} if name == default else {"required": ["method"]})},
            "then": {"properties": {"options": options_schema(method)}},
        }
        for name, method in METHODS.items()
    ]
    return {**phase, "properties": properties, "allOf": cases}


def options_schema(method: Callable[..., Pipeline]) -> Schema:
    """Of a method's options, from its signature."""
    parameters = inspect.signature(method).parameters
    properties: Schema = {}
    for name, annotation in get_type_hints(method, include_extras=True).items():
        if name not in parameters:
            continue
        default = parameters[name].default
        shown = {} if default is inspect.Parameter.empty or not _is_plain(default) else {"default": default}
        properties[name] = {**_of_type(annotation), **shown}
    return {"type": "object", "properties": properties, "additionalProperties": False}


def _of_type(annotation: Any) -> Schema:
    """Anything, of a type that JSON has no schema of."""
    try:
        return TypeAdapter(annotation).json_schema()
    except (PydanticSchemaGenerationError, PydanticInvalidForJsonSchema):
        return {}


def _is_plain(value: Any) -> bool:
    return value is None or isinstance(value, bool | int | float | str)


def _first_sentence(method: Callable[..., Pipeline]) -> str:
    return " ".join((method.__doc__ or "").split()).partition(". ")[0]

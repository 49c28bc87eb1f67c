"""The base of every section of the configuration, and the types that several sections share."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Annotated, Any, Literal, cast, get_args

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

from orchestrator.planning import node_selectors as labels

# The name of a run's folder: that of the run (below), with time and process. ASCII, so that its length in bytes, which
# file systems limit, is that in characters, and it is the same text in URLs, Ray's job ids and Unicode's several forms.
RUN_ID = r"[A-Za-z0-9_][A-Za-z0-9_.+-]{0,139}"


def refuse_run_id(text: str) -> str:
    """Raises ValueError for a text that is no run's id."""
    if not re.fullmatch(RUN_ID, text):
        raise PydanticCustomError(
            "run_id",
            "a run's id is the name of its folder: at most 140 of the letters a to z and A to Z, digits and _ . + -, "
            "the first a letter, a digit or _; given: {given}",
            {"given": repr(text[:200])},
        )
    return text


def _names_a_folder(text: str) -> str:
    """Raises ValueError for a text that is not a valid folder name on every system."""
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.+-]{0,99}", text):
        raise ValueError(
            "it must be a valid folder name: at most 100 of the letters a to z and A to Z, digits and _ . + -, "
            "the first a letter, a digit or _"
        )
    return text


Positive = Annotated[int, Field(ge=1)]
Seconds = Annotated[float, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
BelowOne = Annotated[float, Field(ge=0, lt=1)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]  # the range that every seeded library accepts
LabelSelector = Annotated[dict[str, str], AfterValidator(labels.check)]  # see orchestrator/planning/node_selectors.py
FolderName = Annotated[str, AfterValidator(_names_a_folder)]
DType = Literal["float32", "bfloat16", "float16"]


def is_word_for_number(value: Any, annotation: Any) -> bool:
    """Whether a boolean (in YAML also yes, no, on, off), alone or in a list, is given where only a number is allowed:
    pydantic would read it as 1.0 or 0.0."""
    parts: list[Any] = list(cast(list[Any], value)) if isinstance(value, list | tuple) else [value]
    return any(isinstance(part, bool) for part in parts) and not {bool, Any} & set(types_in(annotation))


def types_in(annotation: Any) -> Iterator[Any]:
    yield annotation
    for part in get_args(annotation):
        yield from types_in(part)


class Section(BaseModel):
    """Frozen; unknown keys are refused, and so are NaN, infinities and booleans in place of numbers. The string below a
    key is its description."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", protected_namespaces=(), use_attribute_docstrings=True, allow_inf_nan=False
    )

    @field_validator("*", mode="before")
    @classmethod
    def _no_word_for_a_number(cls, value: Any, info: ValidationInfo) -> Any:
        annotation = cls.model_fields[str(info.field_name)].annotation
        if {int, float} & set(types_in(annotation)) and is_word_for_number(value, annotation):
            raise PydanticCustomError("word_for_number", "a number; true, yes and on are not numbers")
        return value

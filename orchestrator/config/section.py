"""The base of every section of the configuration, and the types that several sections share."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Annotated, Any, Literal, cast, get_args

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

from orchestrator.planning import node_selectors as labels


def _names_a_folder(text: str) -> str:
    """The text, or ValueError for one that is no name of a folder everywhere."""
    if not re.fullmatch(r"\w[\w.+-]{0,99}", text):
        raise ValueError("it names a folder: at most 100 letters, digits and _ . + -, the first a letter or a digit")
    return text


Positive = Annotated[int, Field(ge=1)]
Seconds = Annotated[float, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
BelowOne = Annotated[float, Field(ge=0, lt=1)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]  # what every library that is seeded takes
LabelSelector = Annotated[dict[str, str], AfterValidator(labels.check)]  # see orchestrator/planning/node_selectors.py
FolderName = Annotated[str, AfterValidator(_names_a_folder)]
DType = Literal["float32", "bfloat16", "float16"]


def is_word_for_number(value: Any, annotation: Any) -> bool:
    """Whether true or false (in YAML also yes, no, on, off) stands, alone or in a list, where only a number may:
    pydantic would read 1.0 or 0.0."""
    parts: list[Any] = list(cast(list[Any], value)) if isinstance(value, list | tuple) else [value]
    return any(isinstance(part, bool) for part in parts) and not {bool, Any} & set(types_in(annotation))


def types_in(annotation: Any) -> Iterator[Any]:
    yield annotation
    for part in get_args(annotation):
        yield from types_in(part)


class Section(BaseModel):
    """Frozen; unknown keys are refused, and so are numbers that are none; the string below a key is its description."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", protected_namespaces=(), use_attribute_docstrings=True, allow_inf_nan=False
    )

    @field_validator("*", mode="before")
    @classmethod
    def _no_word_for_a_number(cls, value: Any, info: ValidationInfo) -> Any:
        annotation = cls.model_fields[str(info.field_name)].annotation
        if {int, float} & set(types_in(annotation)) and is_word_for_number(value, annotation):
            raise PydanticCustomError("word_for_number", "a number: true, yes and on are none")
        return value

"""Rewards for the form of a text: a regular expression, a JSON schema. Both may be given for all rows, as an option, or
for each, as a column of the data set."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, Literal

import regex as _regex

from rewards.functions import Completion, Scores, text_of
from rewards.unit_tests import fenced_blocks

REGEX_LIMIT_S = 1.0  # for one text; a pattern that backtracks without end would take years


def regex(
    completions: Sequence[Completion], pattern: str | Sequence[str], *, match: Literal["whole", "anywhere"] = "whole"
) -> Scores:
    """1 where the text matches `pattern`, as a whole or `anywhere`, else 0. `.` matches line breaks, too.

    Raises `regex.error` for a pattern that is none, and TimeoutError for one that takes longer than `REGEX_LIMIT_S`."""

    def matches(text: str, expression: str) -> float:
        compiled = _regex.compile(expression, _regex.DOTALL)
        test = compiled.fullmatch if match == "whole" else compiled.search
        try:
            return float(test(text, timeout=REGEX_LIMIT_S) is not None)
        except TimeoutError:
            raise TimeoutError(
                f"the pattern {expression!r} takes more than {REGEX_LIMIT_S:g} s on a text of {len(text)} characters: "
                "it backtracks without end"
            ) from None

    patterns = [pattern] * len(completions) if isinstance(pattern, str) else pattern
    return [matches(text_of(each), wanted) for each, wanted in zip(completions, patterns, strict=True)]


def json_schema(
    completions: Sequence[Completion], schema: Mapping[str, Any] | str | Sequence[Mapping[str, Any] | str]
) -> Scores:
    """1 where the text, or the last fenced block in it that is marked `json` or as nothing, is JSON that fits `schema`,
    else 0. A schema is a mapping or a text of JSON: a column of mappings is the latter, because a table gives each of
    its mappings the keys of all. None of a schema is loaded from elsewhere: a `$ref` to another document is an error.

    Raises `jsonschema.SchemaError` for a schema that is none."""
    schemas = [schema] * len(completions) if isinstance(schema, str | Mapping) else schema
    texts = [each if isinstance(each, str) else json.dumps(each) for each in schemas]
    return [float(_fits(text_of(each), _validator(text))) for each, text in zip(completions, texts, strict=True)]


def _fits(text: str, validator: Any) -> bool:
    blocks = fenced_blocks(text, ("", "json"))
    try:
        found = json.loads(blocks[-1] if blocks else text, parse_constant=_refuse)
        return validator.is_valid(found)
    except (ValueError, RecursionError):  # no JSON, or nested deeper than anybody reads
        return False


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON")


@lru_cache(maxsize=256)
def _validator(schema: str) -> Any:
    """Raises ValueError if it is no JSON."""
    import jsonschema  # here, because it takes a quarter of a second that runs without it need not spend
    import referencing
    from jsonschema.validators import validator_for

    parsed = json.loads(schema)
    kind = validator_for(parsed, default=jsonschema.Draft202012Validator)
    kind.check_schema(parsed)
    return kind(parsed, registry=referencing.Registry())

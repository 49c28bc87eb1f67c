"""JSON lines. A broken line or broken UTF-8 is a bad row with its line number and does not end the run."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, cast

from actors.errors import DataError
from orchestrator.data.report import BadRows

JSON_SUFFIXES = (".jsonl", ".json")
BOM = b"\xef\xbb\xbf"  # some editors write it at the start of a file
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")  # half of a pair, or one of two halves


class JsonRow(NamedTuple):
    """`number`: its line, or its place in the list that a file holds; `text`: the JSON of `row` alone."""

    number: int
    row: dict[str, Any]
    text: bytes


class _TwiceError(ValueError):
    """A duplicate key of a JSON object: one of its two values would be lost."""


def json_rows(file: Path, bad: BadRows) -> Iterator[JsonRow]:
    """Every line that holds a valid JSON object; the other lines go to `bad`."""
    if file.suffix == ".json" and (rows := _json_list(file)) is not None:
        for number, row in enumerate(rows, start=1):
            text = json.dumps(row).encode()
            if reason := _broken_text(row, text):
                bad.add(str(file), number, reason)
            else:
                yield JsonRow(number, row, text)
        return
    with file.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            text = line.removeprefix(BOM).strip()
            if not text:
                continue
            row = _parsed(text)
            if isinstance(row, str):
                bad.add(str(file), number, row)
            else:
                yield JsonRow(number, row, text)


def _parsed(text: bytes) -> dict[str, Any] | str:
    """The row, or the reason why it is refused."""
    try:
        row = json.loads(text.decode(), object_pairs_hook=_once)
    except UnicodeDecodeError as error:
        return f"not UTF-8: byte {text[error.start]:#04x} at position {error.start}"
    except json.JSONDecodeError as error:
        return f"not JSON: {error.msg} (character {error.pos + 1})"
    except _TwiceError as error:
        return str(error)
    except ValueError as error:  # of an integer with thousands of digits
        return f"not JSON: {error}"
    except RecursionError:
        return "its lists or objects are nested too deeply"
    if not isinstance(row, dict):
        return f"a JSON {type(row).__name__}, not an object"
    return _broken_text(row, text) or cast(dict[str, Any], row)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) < len(pairs):
        names = [name for name, _ in pairs]
        raise _TwiceError(f"the key {next(name for name in names if names.count(name) > 1)!r} is given twice")
    return row


def _broken_text(row: Any, text: bytes) -> str | None:
    """JSON can encode half of a surrogate pair, which no tokenizer, file or message can represent."""
    if not _SURROGATE.search(text):
        return None
    where = _surrogate_in(row, "")
    return where and f"{where} holds half of a surrogate pair (\\ud800 to \\udfff), which is no character"


def _surrogate_in(value: Any, path: str) -> str | None:
    """The path of the first string, or key, with half of a surrogate pair."""
    if isinstance(value, str):
        return None if _encodes(value) else path
    items: list[tuple[str, Any]] = []
    if isinstance(value, dict):
        items = list(cast(dict[str, Any], value).items())
        if not all(_encodes(key) for key, _ in items):
            return f"a key of {path}" if path else "a key"
    elif isinstance(value, list):
        items = [(str(index), each) for index, each in enumerate(cast(list[Any], value))]
    found = (_surrogate_in(each, f"{path}.{key}" if path else key) for key, each in items)
    return next((where for where in found if where), None)


def _encodes(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _json_list(file: Path) -> list[dict[str, Any]] | None:
    """The rows of a file that is one JSON list; None if it is not (then it may be JSON lines)."""
    with file.open("rb") as opened:
        if opened.read(64).removeprefix(BOM).lstrip()[:1] != b"[":
            return None
    try:
        rows = json.loads(file.read_bytes(), object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{file} is not JSON: {error} (data.path)") from None
    if not all(isinstance(row, dict) for row in rows):
        raise DataError(f"{file} must hold a list of objects (data.path)")
    return rows

"""JSON lines, read so that a broken line or broken UTF-8 is a bad row with its line number, not the end of the run."""

# pyright: basic
# (pyarrow is typed in part only)

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from actors.errors import DataError
from orchestrator.data.report import BadRows

if TYPE_CHECKING:
    import pyarrow as pa

JSON_SUFFIXES = (".jsonl", ".json")
LINES_AT_ONCE = 10_000


def json_rows(file: Path, bad: BadRows) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number, row) of every line that holds a JSON object; the other lines go to `bad`."""
    if file.suffix == ".json" and (rows := _json_list(file)) is not None:
        yield from enumerate(rows, start=1)
        return
    with file.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line.decode("utf-8-sig").strip())
            except UnicodeDecodeError as error:
                bad.add(str(file), number, f"not UTF-8: byte {line[error.start]:#04x} at position {error.start}")
            except json.JSONDecodeError as error:
                bad.add(str(file), number, f"not JSON: {error.msg} (character {error.pos + 1})")
            else:
                if isinstance(row, dict):
                    yield number, row
                else:
                    bad.add(str(file), number, f"a JSON {type(row).__name__}, not an object")


def _json_list(file: Path) -> list[dict[str, Any]] | None:
    """The rows of a file that is one JSON list; None if it is not (then it may be JSON lines)."""
    with file.open("rb") as opened:
        if opened.read(64).lstrip()[:1] != b"[":
            return None
    try:
        rows = json.loads(file.read_bytes())
    except ValueError as error:
        raise DataError(f"{file} is not JSON: {error} (data.path)") from None
    if not all(isinstance(row, dict) for row in rows):
        raise DataError(f"{file} must hold a list of objects (data.path)")
    return rows


class JsonTable:
    """Rows as they come, as an Arrow table in chunks; a row whose types do not go with those before it is a bad row."""

    def __init__(self, bad: BadRows) -> None:
        self.source_of: list[int] = []
        self.numbers: list[int] = []
        self._bad = bad
        self._chunks: list[pa.Table] = []
        self._pending: list[tuple[dict[str, Any], int, int, str]] = []
        self._schema: pa.Schema | None = None

    def add(self, row: dict[str, Any], source: int, number: int, name: str) -> None:
        self._pending.append((row, source, number, name))
        if len(self._pending) == LINES_AT_ONCE:
            self._flush()

    def table(self) -> pa.Table:
        import pyarrow as pa

        self._flush()
        return pa.concat_tables(self._chunks, promote_options="permissive") if self._chunks else pa.table({})

    def _flush(self) -> None:
        import pyarrow as pa

        if not self._pending:
            return
        try:
            self._take(self._pending)
        except (pa.ArrowInvalid, pa.ArrowTypeError):
            for entry in self._pending:
                try:
                    self._take([entry])
                except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
                    self._bad.add(entry[3], entry[2], f"its types differ from those of the rows before: {error}")
        self._pending = []

    def _take(self, entries: list[tuple[dict[str, Any], int, int, str]]) -> None:
        import pyarrow as pa

        names = dict.fromkeys(name for row, *_ in entries for name in row)
        chunk = pa.table({name: [row.get(name) for row, *_ in entries] for name in names})
        schemas = [chunk.schema] if self._schema is None else [self._schema, chunk.schema]
        self._schema = pa.unify_schemas(schemas, promote_options="permissive")
        self._chunks.append(chunk)
        self.source_of += [source for _, source, _, _ in entries]
        self.numbers += [number for _, _, number, _ in entries]

"""A data set that a phase makes: one Parquet file per step, which `datasets.load_dataset(FOLDER)` reads.

    RUN/data/PHASE/part-000001.parquet   written under another name, synced, renamed: whole or absent
    RUN/data/PHASE/_SUCCESS              the phase has ended: all parts are there, with the same columns and types

Types are those of the values. Where a column has different ones in two parts (a list that was empty in all rows of the
first, say), they are made one at the end; a column that no type can hold becomes JSON text.
"""

# pyright: basic
# (pyarrow has incomplete types)

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
from pyarrow import parquet

from actors.errors import DataError

COMPLETE = "_SUCCESS"  # readers of data sets pass over names that begin so
NUMBER = "part-{:06d}.parquet"


def is_complete(folder: Path) -> bool:
    """Whether the phase that makes the data set in this folder has ended."""
    return (folder / COMPLETE).is_file()


class Parts:
    """The parts of one data set. Used by one thread at a time."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def begin(self, done: int) -> None:
        """Go on after the step `done` of the phase: later parts are made again."""
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / COMPLETE).unlink(missing_ok=True)
        for left in self.folder.glob(".*.tmp"):
            left.unlink()
        for file in self._files():
            if int(file.stem.removeprefix("part-")) > done:
                file.unlink()

    def write(self, step: int, records: Sequence[Mapping[str, Any]]) -> None:
        """The records of a step, counted from 1, in the place of what was there. Without a record there is no file.
        Raises OSError if the disk does not take them."""
        if not records:
            return
        names = dict.fromkeys(name for record in records for name in record)
        columns = {name: _array([record.get(name) for record in records]) for name in names}
        self._replace(self.folder / NUMBER.format(step), pa.table(columns))

    def finish(self) -> int:
        """Give all parts the same columns and types; returns how many records there are. Raises DataError if there is
        none."""
        files = self._files()
        if not files:
            raise DataError(
                f"{self.folder}: no completion of any prompt was kept, so there is no data set to go on with"
            )
        schema = _common([parquet.read_schema(file) for file in files])
        for file in files:
            if not parquet.read_schema(file).equals(schema):
                self._replace(file, _cast(parquet.read_table(file), schema))
        (self.folder / COMPLETE).touch()
        _sync(self.folder)
        return sum(parquet.read_metadata(file).num_rows for file in files)

    def _files(self) -> list[Path]:
        return sorted(self.folder.glob("part-*.parquet"))

    def _replace(self, file: Path, table: pa.Table) -> None:
        temporary = file.with_name(f".{file.name}.tmp")
        parquet.write_table(table, temporary)
        _sync(temporary)
        os.replace(temporary, file)
        _sync(self.folder)


def _array(values: list[Any]) -> pa.Array:
    try:
        return pa.array(values)
    except (pa.ArrowException, OverflowError, UnicodeError):  # values of several types, or half a character
        return _as_json(values)


def _as_json(values: Sequence[Any]) -> pa.Array:
    return pa.array([None if value is None else json.dumps(value, default=str) for value in values])


def _common(schemas: Sequence[pa.Schema]) -> pa.Schema:
    """One type for each column: that of all parts, else one that holds all of theirs, else text."""
    fields: dict[str, pa.Field] = {}
    for field in (field for schema in schemas for field in schema):
        known = fields.setdefault(field.name, field)
        if not known.equals(field):
            fields[field.name] = _held_by_both(known, field)
    return pa.schema(list(fields.values()))


def _held_by_both(one: pa.Field, other: pa.Field) -> pa.Field:
    try:
        return pa.unify_schemas([pa.schema([one]), pa.schema([other])], promote_options="permissive").field(0)
    except pa.ArrowException:
        return pa.field(one.name, pa.string())


def _cast(table: pa.Table, schema: pa.Schema) -> pa.Table:
    def column(field: pa.Field) -> Any:
        if field.name not in table.column_names:
            return pa.nulls(len(table), field.type)
        found = table.column(field.name)
        if found.type.equals(field.type):
            return found
        if pa.types.is_string(field.type) and not pa.types.is_null(found.type):
            return _as_json(found.to_pylist())
        return pa.array(found.to_pylist(), field.type)

    return pa.table([column(field) for field in schema], schema=schema)


def _sync(path: Path) -> None:
    """On the disk, not only in its cache: a checkpoint will say that it is there."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

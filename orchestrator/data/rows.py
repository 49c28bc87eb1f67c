"""The rows of a data set or of a mixture, under our column names, each with where it came from."""

# pyright: basic
# (datasets and pyarrow are typed in part only)

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import xxhash

from actors.errors import DataError
from orchestrator.config import DataConfig, MixtureEntry
from orchestrator.data.files import json_files, table
from orchestrator.data.formats import renamed
from orchestrator.data.json_lines import JsonTable, json_rows
from orchestrator.data.report import BadRows

if TYPE_CHECKING:
    from datasets import Dataset

Origin = tuple[str, int, dict[str, Any]]  # (source, number in it from 1, row)
ROWS_AT_ONCE = 1_000


@dataclass(frozen=True, eq=False)
class Rows:
    """A table with our column names. `numbers[i]`: row i's number in its source, from 1 (in JSON lines: the line);
    `sources[source_of[i]]`: that source's name."""

    table: Dataset
    sources: tuple[str, ...]
    source_of: np.ndarray
    numbers: np.ndarray

    def __len__(self) -> int:
        return len(self.table)

    @property
    def name(self) -> str:
        return ", ".join(self.sources)

    def origin(self, row: int) -> tuple[str, int]:
        """(source, number) of a row, for messages."""
        return self.sources[self.source_of[row]], int(self.numbers[row])

    @cached_property
    def fingerprint(self) -> str:
        """Equal where the same rows were read in the same order, whatever file they were in."""
        digest = xxhash.xxh3_128()
        for start in range(0, len(self), ROWS_AT_ONCE):
            digest.update(printed(self.table[start : start + ROWS_AT_ONCE]))
        return digest.hexdigest()

    def select(self, rows: np.ndarray) -> Rows:
        return Rows(self.table.select(rows), self.sources, self.source_of[rows], self.numbers[rows])


def printed(values: Any) -> bytes:
    """Bytes that differ where values, their types or the order of keys do; half of a surrogate pair included."""
    return repr(values).encode("utf-8", "surrogatepass")


def load(data: DataConfig, seed: int, bad: BadRows) -> Rows:
    """All rows of a data set, or the first `data.limit` of them. Raises DataError."""
    if data.mixture:
        rows = _mix(data, seed, bad)
    elif data.path is None:
        raise DataError("no data: set data.path to a file, a folder, a hub name or example:NAME, or set data.mixture")
    else:
        rows = _load_one(data, data.path, data.split, seed, bad)
    if not len(rows):
        raise DataError(f"{rows.name} has no rows (data.path, data.split)")
    return rows.select(np.arange(min(data.limit, len(rows)))) if data.limit else rows


def _load_one(data: DataConfig, path: str, split: str, seed: int, bad: BadRows) -> Rows:
    if files := json_files(path, split):
        rows = _read_json(files, bad)
    else:
        found = table(data, path, split, seed)
        rows = Rows(found, (path,), np.zeros(len(found), dtype=np.int64), np.arange(1, len(found) + 1))
    return _named(rows, data.columns)


def stream(data: DataConfig, seed: int, bad: BadRows) -> Iterator[Origin]:
    """(source, number, row) one by one, under our column names; of a mixture, drawn by fraction until one part ends."""
    if not data.mixture:
        if data.path is None:
            raise DataError(
                "no data: set data.path to a file, a folder, a hub name or example:NAME, or set data.mixture"
            )
        yield from islice(_stream_one(data, data.path, data.split, seed, bad), data.limit)
        return
    parts = [_stream_one(data, entry.path, entry.split, seed, bad) for entry in data.mixture]
    yield from islice(_interleaved(parts, [entry.fraction for entry in data.mixture], seed), data.limit)


def _interleaved(parts: list[Iterator[Any]], fractions: list[float], seed: int) -> Iterator[Any]:
    shares = np.array(fractions) / sum(fractions)
    rng = np.random.default_rng(seed)
    while True:
        try:
            yield next(parts[rng.choice(len(parts), p=shares)])
        except StopIteration:
            return


def _stream_one(data: DataConfig, path: str, split: str, seed: int, bad: BadRows) -> Iterator[Origin]:
    ours = {theirs: ours for ours, theirs in data.columns.items()}
    checked = False
    for source, number, row in _unnamed_stream(data, path, split, seed, bad):
        if not checked:
            renamed(list(row), data.columns, source)
            checked = True
        kept = {name: value for name, value in row.items() if name in ours or name not in data.columns}
        yield source, number, {ours.get(name, name): value for name, value in kept.items()}


def _unnamed_stream(data: DataConfig, path: str, split: str, seed: int, bad: BadRows) -> Iterator[Origin]:
    if files := json_files(path, split):
        for file in files:
            yield from ((str(file), number, row) for number, row in json_rows(file, bad))
    else:
        rows = table(data, path, split, seed, streaming=True)
        yield from ((path, number, row) for number, row in enumerate(rows, start=1))


def _named(rows: Rows, columns: dict[str, str]) -> Rows:
    """Columns under our names; a column that `data.columns` replaces is left out."""
    if not columns:
        return rows
    names = renamed(rows.table.column_names, columns, rows.name)
    changed = {theirs: ours for theirs, ours in names.items() if theirs != ours}
    table = rows.table.select_columns(list(names)).rename_columns(changed)
    return Rows(table, rows.sources, rows.source_of, rows.numbers)


def _mix(data: DataConfig, seed: int, bad: BadRows) -> Rows:
    """Rows of all entries in the shares of their fractions: as many as can be had without using a row twice."""
    from datasets import concatenate_datasets

    parts = [_load_one(data, entry.path, entry.split, seed, bad) for entry in data.mixture]
    counts = mixture_counts([len(part) for part in parts], data.mixture)
    chosen = [
        part.select(np.sort(np.random.default_rng([seed, index]).permutation(len(part))[:count]))
        for index, (part, count) in enumerate(zip(parts, counts, strict=True))
    ]
    try:
        table = concatenate_datasets([part.table for part in chosen])
    except Exception as error:
        columns = "; ".join(f"{part.name}: {', '.join(part.table.column_names)}" for part in parts)
        raise DataError(f"the parts of data.mixture do not fit together: {error}\n  columns of {columns}") from None
    shifts = np.cumsum([0, *(len(part.sources) for part in chosen)])
    return Rows(
        table,
        tuple(source for part in chosen for source in part.sources),
        np.concatenate([part.source_of + shift for part, shift in zip(chosen, shifts, strict=False)]),
        np.concatenate([part.numbers for part in chosen]),
    )


def mixture_counts(lengths: list[int], entries: tuple[MixtureEntry, ...]) -> list[int]:
    """Rows to take of each part: the largest total in which every part has its share of the fractions."""
    shares = np.array([entry.fraction for entry in entries]) / sum(entry.fraction for entry in entries)
    total = min(length / share for length, share in zip(lengths, shares, strict=True))
    return [min(length, round(total * share)) for length, share in zip(lengths, shares, strict=True)]


def _read_json(files: list[Path], bad: BadRows) -> Rows:
    """JSON-lines files, or JSON files that hold one list of rows."""
    from datasets import Dataset

    reader = JsonTable(bad)
    for index, file in enumerate(files):
        for number, row in json_rows(file, bad):
            reader.add(row, index, number, str(file))
    bad.check()
    table = Dataset(reader.table())
    sources = tuple(map(str, files))
    return Rows(table, sources, np.array(reader.source_of, dtype=np.int64), np.array(reader.numbers, dtype=np.int64))

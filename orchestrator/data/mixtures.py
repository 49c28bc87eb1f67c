"""The rows of a data set or of a mixture, with our column names, each with its origin."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from actors.errors import DataError
from orchestrator.config.schema import DataConfig, MixtureEntry
from orchestrator.data.files import json_files, streamed, table
from orchestrator.data.formats import renamed
from orchestrator.data.json_lines import json_rows
from orchestrator.data.report import BadRows
from orchestrator.data.tables import ROWS_AT_ONCE, JsonTable, Row, Table

Origin = tuple[str, int, Row]  # (source, number in it from 1, row)
Indices = NDArray[np.int64]
NO_DATA = "no data: set data.path to a file, a folder, a hub name or example:NAME, or set data.mixture"


@dataclass(frozen=True, eq=False)
class Part:
    """The rows of one path. `names`: the table's names -> ours, of the columns that count. `numbers[i]`: row i's number
    in its source, from 1 (in JSON lines: the line); `sources[source_of[i]]`: that source's name."""

    table: Table
    names: dict[str, str]
    sources: tuple[str, ...]
    source_of: Indices
    numbers: Indices

    def __len__(self) -> int:
        return len(self.table)

    @property
    def name(self) -> str:
        return ", ".join(self.sources)

    def rows(self, start: int, stop: int, wanted: Collection[str]) -> list[Row]:
        """Rows [start, stop) with the columns `wanted`, our names, of which a row may lack some."""
        names = {theirs: ours for theirs, ours in self.names.items() if ours in wanted}
        return [
            {names[name]: value for name, value in row.items() if name in names}
            for row in self.table.rows(start, stop, names)
        ]

    def select(self, rows: Indices) -> Part:
        return Part(self.table.select(rows), self.names, self.sources, self.source_of[rows], self.numbers[rows])


@dataclass(frozen=True, eq=False)
class Rows:
    """All rows of a data set, part after part. Parts keep their own types. `notes`: how many rows were left out, and
    why."""

    parts: tuple[Part, ...]
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return self._starts[-1]

    @cached_property
    def _starts(self) -> list[int]:
        """[P+1]"""
        return list(accumulate(map(len, self.parts), initial=0))

    @property
    def name(self) -> str:
        return ", ".join(part.name for part in self.parts)

    @cached_property
    def columns(self) -> tuple[str, ...]:
        """Our names of all columns that any row has."""
        return tuple(dict.fromkeys(name for part in self.parts for name in part.names.values()))

    @cached_property
    def fingerprint(self) -> str:
        """Equal where the same rows were read in the same order, whatever the file that they were in is called."""
        digest = xxhash.xxh3_128()
        for part in self.parts:
            digest.update(repr(part.names).encode())
            part.table.write_to(digest)
        return digest.hexdigest()

    def origin(self, row: int) -> tuple[str, int]:
        """(source, number) of a row, for messages."""
        part, local = self._at(row)
        return part.sources[part.source_of[local]], int(part.numbers[local])

    def row(self, row: int) -> Row:
        """A row with all columns; those that it lacks are None."""
        part, local = self._at(row)
        (found,) = part.rows(local, local + 1, self.columns)
        return {name: found.get(name) for name in self.columns}

    def chunks(self, columns: Collection[str]) -> Iterator[list[tuple[int, Row]]]:
        """Chunks of all rows with their numbers from 0 and the given columns; None where a row lacks one."""
        for part, first in zip(self.parts, self._starts, strict=False):
            for start in range(0, len(part), ROWS_AT_ONCE):
                rows = part.rows(start, start + ROWS_AT_ONCE, columns)
                yield [
                    (first + start + index, {name: row.get(name) for name in columns}) for index, row in enumerate(rows)
                ]

    def _at(self, row: int) -> tuple[Part, int]:
        part = bisect_right(self._starts, row) - 1
        return self.parts[part], row - self._starts[part]


def load(data: DataConfig, seed: int, bad: BadRows) -> Rows:
    """All rows of a data set, or the first `data.limit` of them; of a mixture, in proportion to its fractions. Raises
    DataError."""
    if data.mixture:
        rows = _mix(data, seed, bad)
    elif data.path is None:
        raise DataError(NO_DATA)
    else:
        rows = _limited(_load_one(data, data.path, data.split, seed, bad), data.limit)
    if not len(rows):
        raise DataError(f"{rows.name} has no rows (data.path, data.split)")
    return rows


def _limited(part: Part, limit: int | None) -> Rows:
    if limit is None or limit >= len(part):
        return Rows((part,))
    note = f"left out {len(part) - limit:,} of {len(part):,} rows of {part.name}: data.limit={limit}"
    return Rows((part.select(np.arange(limit)),), (note,))


def _load_one(data: DataConfig, path: str, split: str, seed: int, bad: BadRows) -> Part:
    if files := json_files(data, path, split):
        return _read_json(files, data.columns, bad)
    found = table(data, path, split, seed)
    rows = np.arange(len(found), dtype=np.int64)
    return Part(found, renamed(found.columns, data.columns, path), (path,), np.zeros_like(rows), rows + 1)


def _read_json(files: list[Path], columns: dict[str, str], bad: BadRows) -> Part:
    """JSON-lines files, or JSON files that hold one list of rows."""
    texts: list[bytes] = []
    names: dict[str, None] = {}
    source_of: list[int] = []
    numbers: list[int] = []
    for index, file in enumerate(files):
        for number, row, text in json_rows(file, bad):
            texts.append(text)
            names.update(dict.fromkeys(row))
            source_of.append(index)
            numbers.append(number)
    bad.check()
    sources = tuple(map(str, files))
    ours = renamed(list(names), columns, ", ".join(sources)) if texts else {}
    return Part(
        JsonTable(texts, list(names)), ours, sources, np.array(source_of, np.int64), np.array(numbers, np.int64)
    )


def stream(data: DataConfig, seed: int, bad: BadRows) -> Iterator[Origin]:
    """(source, number, row) one by one, with our column names; of a mixture, drawn by fraction until one part ends."""
    if not data.mixture:
        if data.path is None:
            raise DataError(NO_DATA)
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
    """A column that `data.columns` names must be in one of the first rows, because the others are not read yet."""
    rows = _unnamed_stream(data, path, split, seed, bad)
    if data.columns:
        first = list(islice(rows, ROWS_AT_ONCE))
        renamed(list(dict.fromkeys(name for *_, row in first for name in row)), data.columns, path)
        rows = chain(first, rows)
    ours = {theirs: ours for ours, theirs in data.columns.items()}
    for source, number, row in rows:
        kept = {name: value for name, value in row.items() if name in ours or name not in data.columns}
        yield source, number, {ours.get(name, name): value for name, value in kept.items()}


def _unnamed_stream(data: DataConfig, path: str, split: str, seed: int, bad: BadRows) -> Iterator[Origin]:
    if files := json_files(data, path, split):
        for file in files:
            yield from ((str(file), number, row) for number, row, _ in json_rows(file, bad))
    else:
        rows = streamed(data, path, split, seed)
        yield from ((path, number, row) for number, row in enumerate(rows, start=1))


def _mix(data: DataConfig, seed: int, bad: BadRows) -> Rows:
    """Rows of all entries in proportion to their fractions: as many as possible without using a row twice."""
    parts = [_load_one(data, entry.path, entry.split, seed, bad) for entry in data.mixture]
    counts = mixture_counts([len(part) for part in parts], data.mixture, data.limit)
    chosen = tuple(
        part.select(np.sort(np.random.default_rng([seed, index]).permutation(len(part))[:count]))
        for index, (part, count) in enumerate(zip(parts, counts, strict=True))
    )
    limited = f" and data.limit={data.limit}" if data.limit is not None else ""
    notes = tuple(
        f"left out {len(part) - count:,} of {len(part):,} rows of {part.name}: the fractions of data.mixture{limited}"
        for part, count in zip(parts, counts, strict=True)
        if count < len(part)
    )
    return Rows(chosen, notes)


def mixture_counts(lengths: list[int], entries: tuple[MixtureEntry, ...], limit: int | None) -> list[int]:
    """Rows to take of each part: the largest total, up to `limit`, in which every part has its share of the
    fractions. The rounding remainder goes to the parts that lost most by rounding."""
    shares = np.array([entry.fraction for entry in entries]) / sum(entry.fraction for entry in entries)
    total = min(length / share for length, share in zip(lengths, shares, strict=True))
    total = min(int(total + 1e-9), limit if limit is not None else sum(lengths))
    exact = total * shares
    counts = np.floor(exact + 1e-9).astype(int)
    for part in np.argsort(counts - exact, kind="stable")[: total - counts.sum()]:
        counts[part] += 1
    return counts.tolist()

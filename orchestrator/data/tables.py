"""Rows as they were written: values, types, key order and nulls are unchanged, whatever other rows hold.

Rows of JSON are kept as their text and parsed at each access. In an Arrow table all rows of a column would share one
type: 5 beside 2.5 would become 5.0, and a dict would get every key of the others. Arrow files are read as Arrow,
without the nulls that were added to dicts for keys of other rows."""

# pyright: basic
# (datasets has incomplete types)

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import xxhash

if TYPE_CHECKING:
    from datasets import Dataset

ROWS_AT_ONCE = 1_000
Row = dict[str, Any]
Read = Callable[[Row], Row]


class Table(Protocol):
    """Rows of one data set, with its own column names."""

    @property
    def columns(self) -> Sequence[str]:
        """All columns that any row has."""
        ...

    def __len__(self) -> int: ...

    def rows(self, start: int, stop: int, names: Collection[str] | None = None) -> list[Row]:
        """Rows [start, stop), of which only the columns `names` are needed. A row may lack columns that others have."""
        ...

    def select(self, rows: np.ndarray) -> Table: ...

    def write_to(self, digest: xxhash.xxh3_128) -> None:
        """Feeds all rows, in order, to a hash."""
        ...


@dataclass(frozen=True, eq=False)
class JsonTable:
    """Rows of JSON files; `texts`: the JSON object of each."""

    texts: Sequence[bytes]
    columns: Sequence[str]

    def __len__(self) -> int:
        return len(self.texts)

    def rows(self, start: int, stop: int, names: Collection[str] | None = None) -> list[Row]:
        return [json.loads(text) for text in self.texts[start:stop]]

    def select(self, rows: np.ndarray) -> JsonTable:
        return JsonTable([self.texts[row] for row in rows], self.columns)

    def write_to(self, digest: xxhash.xxh3_128) -> None:
        for text in self.texts:
            digest.update(text + b"\n")


@dataclass(frozen=True, eq=False)
class ArrowTable:
    """A data set of `datasets`; `read` restores a row as it was written."""

    table: Dataset
    read: Read
    _selected: dict[tuple[str, ...], Dataset] = field(default_factory=dict, init=False, repr=False)

    @property
    def columns(self) -> Sequence[str]:
        return self.table.column_names

    def __len__(self) -> int:
        return len(self.table)

    def rows(self, start: int, stop: int, names: Collection[str] | None = None) -> list[Row]:
        wanted = tuple(name for name in self.columns if names is None or name in names)
        if wanted not in self._selected:  # `datasets` takes longer to select columns than to read a row of them
            self._selected[wanted] = self.table.select_columns(list(wanted))
        values = self._selected[wanted][start:stop]
        return [self.read(dict(zip(wanted, cells, strict=True))) for cells in zip(*values.values(), strict=True)]

    def select(self, rows: np.ndarray) -> ArrowTable:
        return ArrowTable(self.table.select(rows), self.read)

    def write_to(self, digest: xxhash.xxh3_128) -> None:
        for start in range(0, len(self), ROWS_AT_ONCE):
            digest.update(printed(self.rows(start, start + ROWS_AT_ONCE)))


def printed(values: Any) -> bytes:
    """Bytes that are equal only if values, types and key order are."""
    return repr(values).encode("utf-8", "surrogatepass")


def without_added_nulls(features: Mapping[str, Any] | None) -> Read:
    """Arrow gives every dict of a column all keys that any of them has: those that a row did not have are null there.
    `features`: the data set's types, None if unknown; nulls of a JSON feature are the row's own."""

    def read(row: Row) -> Row:
        return {name: _trimmed(value, None if features is None else features.get(name)) for name, value in row.items()}

    return read


def _trimmed(value: Any, feature: Any) -> Any:
    if type(feature).__name__ == "Json":
        return value
    if isinstance(value, dict):
        inner = feature if isinstance(feature, Mapping) else {}
        return {key: _trimmed(each, inner.get(key)) for key, each in value.items() if each is not None}
    if isinstance(value, list):
        inner = feature[0] if isinstance(feature, list) else getattr(feature, "feature", None)
        return [_trimmed(each, inner) for each in value]
    return value

"""One batch for every method: frozen, columnar, ragged.

No padding on the wire or in the object store: a per-token column is flat over all rows, and `lengths` says where rows
end. A preference pair is two rows of a `group` that differ in `preferred`; a trajectory with tool calls is one row
whose `mask` skips the tool's tokens. Columns are numpy arrays, because Ray transfers those without a copy; arrays from
the object store are read-only."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from actors.columns import COLUMNS, Axis

Array = np.ndarray


@dataclass(frozen=True, eq=False)
class Batch:
    """`lengths` [B] int64, tokens per row; `columns` name -> [T] or [B] array, as `actors.columns` defines them."""

    lengths: Array
    columns: Mapping[str, Array]

    @classmethod
    def build(cls, lengths: Sequence[int] | Array, **columns: Sequence | Array) -> Batch:
        """A checked batch. Raises ValueError for an unknown column, a wrong size or a lossy dtype."""
        lengths = np.asarray(lengths, dtype=np.int64)
        checked = {name: _checked(name, values, lengths) for name, values in columns.items()}
        return cls(lengths, checked)

    @classmethod
    def empty(cls) -> Batch:
        return cls.build([])

    @classmethod
    def concat(cls, batches: Iterable[Batch]) -> Batch:
        """Rows of all batches in order. All must have the same columns (empty batches are skipped)."""
        parts = [batch for batch in batches if len(batch)]
        if not parts:
            return cls.empty()
        names = set(parts[0].columns)
        for part in parts:
            if set(part.columns) != names:
                raise ValueError(f"cannot concatenate batches with columns {sorted(names)} and {sorted(part.columns)}")
        columns = {name: np.concatenate([part.columns[name] for part in parts]) for name in parts[0].columns}
        return cls(np.concatenate([part.lengths for part in parts]), columns)

    def __len__(self) -> int:
        return len(self.lengths)

    def __contains__(self, name: str) -> bool:
        return name in self.columns

    def __getitem__(self, name: str) -> Array:
        try:
            return self.columns[name]
        except KeyError:
            raise KeyError(f"the batch has no column {name!r}; it has {sorted(self.columns)}") from None

    @property
    def num_tokens(self) -> int:
        return int(self.lengths.sum())

    @cached_property
    def offsets(self) -> Array:
        """[B+1] int64: row i is `[offsets[i], offsets[i+1])` of every per-token column."""
        return np.concatenate([[0], np.cumsum(self.lengths)]).astype(np.int64)

    @cached_property
    def row_of_token(self) -> Array:
        """[T] int64: the row of each token."""
        return np.repeat(np.arange(len(self)), self.lengths)

    def row(self, name: str, index: int) -> Array:
        """The slice of a per-token column that belongs to one row."""
        return self[name][self.offsets[index] : self.offsets[index + 1]]

    def select(self, rows: Sequence[int] | Array) -> Batch:
        """A batch of the given rows, in the given order."""
        rows = np.asarray(rows, dtype=np.int64)
        tokens = self.token_index(rows)
        columns = {
            name: values[tokens] if COLUMNS[name].axis is Axis.TOKEN else values[rows]
            for name, values in self.columns.items()
        }
        return Batch(self.lengths[rows], columns)

    def token_index(self, rows: Array) -> Array:
        """[T'] int64: the positions of the tokens of `rows`, in that order, in this batch's per-token columns."""
        if len(rows) == 0:
            return np.zeros(0, dtype=np.int64)
        lengths = self.lengths[rows]
        starts = np.repeat(self.offsets[rows] - np.concatenate([[0], np.cumsum(lengths)[:-1]]), lengths)
        return starts + np.arange(lengths.sum())

    def with_columns(self, **columns: Sequence | Array) -> Batch:
        """The same rows with columns added or replaced; the new ones are checked."""
        checked = {name: _checked(name, values, self.lengths) for name, values in columns.items()}
        return Batch(self.lengths, {**self.columns, **checked})

    def only(self, names: Iterable[str]) -> Batch:
        """The same rows with just these columns. Raises KeyError for one that is missing."""
        return Batch(self.lengths, {name: self[name] for name in names})

    def sum_by_row(self, values: Array) -> Array:
        """[T] -> [B]: sums of a per-token array over each row (0 for an empty row)."""
        return np.bincount(self.row_of_token, weights=values, minlength=len(self))

    def nbytes(self) -> int:
        return int(self.lengths.nbytes + sum(values.nbytes for values in self.columns.values()))


def _checked(name: str, values: Sequence | Array, lengths: Array) -> Array:
    if name not in COLUMNS:
        raise ValueError(f"unknown column {name!r}; the vocabulary is {sorted(COLUMNS)}")
    column = COLUMNS[name]
    array = np.asarray(values)
    if array.size and not np.can_cast(array.dtype, column.dtype, casting="same_kind"):
        raise ValueError(f"column {name!r} holds {column.dtype}, got {array.dtype}")
    expected = int(lengths.sum()) if column.axis is Axis.TOKEN else len(lengths)
    if array.shape[:1] != (expected,) or array.ndim != 1 + column.wide:
        wanted = f"({expected}, k)" if column.wide else f"({expected},)"
        raise ValueError(f"column {name!r} is per {column.axis} and needs shape {wanted}, got {array.shape}")
    return array.astype(column.dtype, copy=False)

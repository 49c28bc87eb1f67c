"""How many rows of a data set are used, truncated, dropped or bad, for `troupe check`, `troupe plan` and the log of a
run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from actors.errors import DataError

LEARNED = ("⟦", "⟧")  # around trained tokens, in a row that is shown as text
SHOWN = 3  # bad rows that an error quotes


@dataclass(frozen=True)
class BadRow:
    """A row that cannot be used: `where` is a file or a data set, `row` counts from 1 (in a text file: its line)."""

    where: str
    row: int
    reason: str

    def __str__(self) -> str:
        return f"{self.where}, row {self.row}: {self.reason}"


@dataclass(frozen=True)
class Counts:
    """Counts of the items of a data set, or of a part of one; they can be summed. `longest`: of a row, in tokens. Of
    packing: `split_rows` became several pieces; `unused` is the number of those all of whose pieces had no trained
    token. `true_labels` and `false_labels`: of items, or of steps."""

    items: int = 0
    tokens: int = 0
    learned_tokens: int = 0
    longest: int = 0
    split_rows: int = 0
    unused_rows: int = 0
    unused_tokens: int = 0
    true_labels: int = 0
    false_labels: int = 0

    def __add__(self, other: Counts) -> Counts:
        return Counts(
            self.items + other.items,
            self.tokens + other.tokens,
            self.learned_tokens + other.learned_tokens,
            max(self.longest, other.longest),
            self.split_rows + other.split_rows,
            self.unused_rows + other.unused_rows,
            self.unused_tokens + other.unused_tokens,
            self.true_labels + other.true_labels,
            self.false_labels + other.false_labels,
        )

    @property
    def dropped(self) -> dict[str, int]:
        """A reason with its number of rows, as in a report."""
        return {"nothing to learn from in any piece of it (data.packing)": self.unused_rows} if self.unused_rows else {}

    def notes(self, remarks: Mapping[str, int], cut_labels: int = 0) -> tuple[str, ...]:
        """Lines for a report. `remarks`: what rows have, and how many of them. `cut_labels`: of steps that lost theirs,
        because their end was cut off."""
        notes = [f"{count:,} rows have {remark}" for remark, count in remarks.items()]
        if self.split_rows:
            notes.append(f"{self.split_rows:,} rows are split into pieces, which do not see one another (data.packing)")
        if self.unused_tokens:
            notes.append(
                f"{self.unused_tokens:,} tokens are left out, in pieces with nothing to learn from (data.packing)"
            )
        if cut_labels:
            notes.append(f"{cut_labels:,} steps have no label, because their end was cut off")
        if bool(self.true_labels) != bool(self.false_labels):
            labels, only = (self.true_labels, "true") if self.true_labels else (self.false_labels, "false")
            notes.append(f"one class only: {labels:,} of {labels:,} labels are {only}")
        return tuple(notes)


@dataclass(frozen=True)
class DataReport:
    """Counts of one data set. `rows` = used + dropped + bad; `items` differs from the used rows where rows are paired,
    unpaired or packed. `dropped` and `truncated` map a reason to its number of rows. Lengths are in tokens."""

    source: str
    format: str
    columns: tuple[str, ...]
    rows: int
    items: int
    tokens: int = 0
    learned_tokens: int = 0
    longest: int = 0
    dropped: dict[str, int] = field(default_factory=dict[str, int])
    truncated: dict[str, int] = field(default_factory=dict[str, int])
    bad: tuple[BadRow, ...] = ()
    notes: tuple[str, ...] = ()

    def metrics(self) -> dict[str, float]:
        """Rows that are not used, or not completely, so that no data set shrinks silently."""
        counts = {
            "dropped": sum(self.dropped.values()),
            "truncated": sum(self.truncated.values()),
            "bad": len(self.bad),
        }
        return {f"data/{what}": float(count) for what, count in counts.items()}

    def lines(self) -> list[str]:
        """For the console: one fact per line."""
        size = f"{self.tokens:,} tokens, longest {self.longest:,}" if self.tokens else "not tokenised"
        lines = [f"{self.source}: {self.rows:,} rows read as {self.format}; {self.items:,} items, {size}"]
        lines += [f"dropped {count:,} rows: {reason}" for reason, count in self.dropped.items()]
        lines += [f"truncated {count:,} rows: {reason}" for reason, count in self.truncated.items()]
        lines += [f"skipped {bad}" for bad in self.bad]
        return lines + list(self.notes)


class BadRows:
    """Collects bad rows up to a bound; one more is a DataError that names the first few."""

    def __init__(self, allowed: int) -> None:
        self._allowed = allowed
        self._rows: list[BadRow] = []

    def __len__(self) -> int:
        return len(self._rows)

    def add(self, where: str, row: int, reason: str) -> None:
        self._rows.append(BadRow(where, row, reason))

    def check(self) -> tuple[BadRow, ...]:
        """Those found so far. Raises DataError if they are more than `data.max_bad_rows`."""
        if len(self._rows) > self._allowed:
            raise DataError(self._refusal())
        return tuple(self._rows)

    def _refusal(self) -> str:
        shown = [f"  {row}" for row in self._rows[:SHOWN]]
        more = [f"  ... and {len(self._rows) - SHOWN} more"] if len(self._rows) > SHOWN else []
        rows = "1 row" if len(self._rows) == 1 else f"{len(self._rows)} rows"
        head = f"{rows} cannot be used, more than data.max_bad_rows={self._allowed} allows:"
        mend = f"  mend them, or set data.max_bad_rows={len(self._rows)} to skip them"
        return "\n".join([head, *shown, *more, mend])

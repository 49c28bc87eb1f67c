"""Data that is read during training: its length is unknown.

    rows ──buffered shuffle──► chunks ──prepare, pack──► items from 0 ──► a window of the latest

Position p is the p-th item of the stream, epoch after epoch, so positions mean the same after a resume: the items
before the first one requested are read and skipped."""

# pyright: basic
# (datasets has incomplete types)

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, count, islice
from threading import Lock
from typing import TypeVar

import numpy as np
import xxhash

from actors.batch import Batch
from actors.errors import DataError
from orchestrator.config.schema import DataConfig
from orchestrator.data import mixtures as raw
from orchestrator.data import store as stored
from orchestrator.data.formats import Format, choose
from orchestrator.data.items import Item, Items, Longest, Prompt, counted, drawn_together, packed, render
from orchestrator.data.prepare import Preparer, wanted_columns
from orchestrator.data.report import BadRows, Counts, DataReport
from orchestrator.data.store import Record
from orchestrator.data.tables import Row, printed
from orchestrator.data.tokenise import Tokeniser
from orchestrator.data.truncation import Limits
from orchestrator.pipeline import DataKind

SHUFFLE_BUFFER = 10_000  # rows
ROWS_AT_ONCE = 500
WINDOW = 20_000  # items that stay readable behind the newest one

T = TypeVar("T")


@dataclass(frozen=True)
class InStreamOrder:
    """Item p is drawn at position p: the stream itself is shuffled."""

    def at(self, position: int) -> tuple[int, int]:
        return 0, position


class StreamSource:
    """Items of a stream. Safe to call from several threads; only the latest `WINDOW` items can be read again."""

    def __init__(
        self,
        data: DataConfig,
        kind: DataKind,
        tokeniser: Tokeniser,
        limits: Limits,
        *,
        seed: int,
        model_max_length: int,
    ) -> None:
        self.order = InStreamOrder()
        self._data, self._kind, self._tokeniser, self._limits = data, kind, tokeniser, limits
        self._seed, self._max_length = seed, data.max_length or model_max_length
        self._bad = BadRows(data.max_bad_rows)
        self._counts, self._record = Counts(), Record()
        self._format: Format | None = None
        self._columns: tuple[str, ...] = ()
        self._first_rows = ""  # their fingerprint
        self._lock = Lock()
        self._upcoming = enumerate(chain.from_iterable(map(self._epoch, count())))
        self._window: dict[int, tuple[Items, int, Row]] = {}
        self._find(0)  # so that data without a usable row is refused at once

    def __len__(self) -> int:
        raise DataError("data.streaming is on, so the length of the data is unknown: set train.steps")

    @property
    def report(self) -> DataReport:
        """How many of the rows read so far were used or dropped."""
        return DataReport(
            source=f"{self._data.path or 'mixture'} (stream, so far)",
            format=str(self._format),
            columns=self._columns,
            rows=self._record.rows + len(self._bad) - len(self._record.bad),
            items=self._counts.items,
            tokens=self._counts.tokens,
            learned_tokens=self._counts.learned_tokens,
            longest=self._counts.longest,
            dropped=dict(self._record.dropped.most_common()) | self._counts.dropped,
            truncated=dict(self._record.truncated.most_common()),
            bad=self._bad.check(),
            notes=self._counts.notes(self._record.remarks, self._record.cut_labels),
        )

    @property
    def longest(self) -> Longest:
        """The longest that the limits allow, because the rows are unknown."""
        row = self._limits.max_prompt_length if self._kind.prompts_only else self._max_length
        assert row is not None  # `limits_of` bounds prompts by the model's length
        return Longest(row, row * self._kind.rows_per_item, self._limits.max_prompt_length or row)

    @property
    def rows_fingerprint(self) -> str:
        """A hash of the first rows, because the others are read later."""
        return self._first_rows

    def item(self, index: int) -> Item | Prompt:
        items, local, row = self._find(index)
        if not (self._kind.prompts_only or self._kind.answered):
            return Item(index, items.rows(local, group=index))
        tokens = items.prompt_tokens(local)
        columns = {name: row.get(name) for name in self._columns}
        prompt = columns.pop("prompt", None)
        asked = prompt or str(self._tokeniser.tokenizer.decode(list(tokens)))
        return Prompt(index, tokens, asked, columns, items.answer(local), *items.of_prompt(local))

    def batch(self, positions: Sequence[int]) -> Batch:
        return drawn_together(self._kind, map(self._rows, positions), self._max_length)

    def preview(self, index: int = 0) -> str:
        return render(self._rows(index), self._tokeniser.tokenizer)

    def _rows(self, position: int) -> Batch:
        items, local, _ = self._find(position)
        return items.rows(local, group=position)

    def _find(self, index: int) -> tuple[Items, int, Row]:
        with self._lock:
            while index not in self._window:
                number, found = next(self._upcoming)
                if number > index:
                    raise DataError(f"item {index} of a stream was requested after item {number}: it is no longer kept")
                self._window[number] = found
                self._window.pop(number - WINDOW, None)
            return self._window[index]

    def _epoch(self, epoch: int) -> Iterator[tuple[Items, int, Row]]:
        """All items of one pass over the data, which is shuffled differently in each. Only the first one is counted."""
        first = epoch == 0
        bad = self._bad if first else BadRows(sys.maxsize)
        rows: Iterator[raw.Origin] = raw.stream(self._data, self._seed, bad)
        if self._data.shuffle:
            rows = shuffled(rows, SHUFFLE_BUFFER, np.random.default_rng([self._seed, epoch]))
        empty = True
        while chunk := list(islice(rows, ROWS_AT_ONCE)):
            items = self._prepare(chunk, bad, first=first)
            for local in range(len(items)):
                empty = False
                yield items, local, chunk[int(items.store.source_row[local])][2] if items.bins is None else {}
        bad.check()
        if empty:
            raise DataError(
                f"{self.report.source}: no row of it can be used ({dict(self._record.dropped) or 'it is empty'})"
            )

    def _prepare(self, chunk: list[raw.Origin], bad: BadRows, *, first: bool) -> Items:
        form = self._format_of(chunk)
        self._first_rows = self._first_rows or xxhash.xxh3_128(printed([row for _, _, row in chunk])).hexdigest()
        kind = self._kind
        of_kind = kind.prompts_only, self._data.assistant_only, kind.teachers, kind.teacher_template
        preparer = Preparer(form, self._limits, self._tokeniser, *of_kind)
        wanted = wanted_columns(form, kind, self._data, self._columns)
        rows = [(index, {name: row.get(name) for name in wanted}) for index, (_, _, row) in enumerate(chunk)]
        record = self._record if first else Record()

        def origin(index: int) -> tuple[str, int]:
            return chunk[index][:2]

        def refuse(index: int, reason: str) -> None:
            record.bad.append((index, reason))
            bad.add(*origin(index), reason)

        prepared = preparer.prepare(rows, refuse, origin)
        bad.check()
        items = packed(stored.build(prepared, record), self._data, self._kind, self._max_length)
        if first:
            record.rows += len(chunk)
            self._counts += counted(items)
        return items

    def _format_of(self, chunk: Iterable[raw.Origin]) -> Format:
        """Chosen from the first chunk; a later row that lacks one of its columns is a bad row."""
        if self._format is None:
            self._columns = tuple(dict.fromkeys(name for _, _, row in chunk for name in row))
            self._format = choose(self._kind, self._columns, self._data, self._data.path or "the mixture")
        return self._format


def shuffled(items: Iterator[T], size: int, rng: np.random.Generator) -> Iterator[T]:
    """Every item once, in an order random within a buffer of `size`: the n-th comes out after the (n - size)-th is read
    at the earliest."""
    buffer = list(islice(items, size))
    for item in items:
        place = int(rng.integers(len(buffer)))
        yield buffer[place]
        buffer[place] = item
    yield from (buffer[place] for place in rng.permutation(len(buffer)))

"""A phase's data set: items by index, the order in which they are drawn, batches of rows, and a report of dropped rows.

    path ─load─► rows ─format─► examples ──tokenise──► tokens ──fit, pack─► items ─► batches

A position counts draws over all epochs. `order.at(position)` is a pure function of the seed, so a resumed run that
knows its position draws exactly what the uninterrupted one would have drawn.
"""

# pyright: basic
# (datasets and transformers have incomplete types)

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from datetime import date
from hashlib import blake2b
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import transformers
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from actors.batch import Batch
from actors.errors import DataError
from actors.pretrained import load_tokenizer
from orchestrator.config.schema import DataConfig
from orchestrator.data import mixtures as raw
from orchestrator.data import store as stored
from orchestrator.data.density_weights import refuse_weights_of_stream, weighted
from orchestrator.data.formats import choose
from orchestrator.data.items import Item, Items, Longest, Prompt, counted, drawn_together, packed, render
from orchestrator.data.order import Order
from orchestrator.data.prepare import Preparer, limits_of, wanted_columns
from orchestrator.data.report import BadRows, Counts, DataReport
from orchestrator.data.store import Record, Store
from orchestrator.data.stream import InStreamOrder, StreamSource
from orchestrator.data.synthetic_examples import default_cache_dir
from orchestrator.data.tables import printed
from orchestrator.data.tokenise import Tokeniser
from orchestrator.pipeline import DataKind

WORTH_CACHING = 20_000  # rows; fewer are tokenised within a second or two
UNBOUNDED = 2**31  # the maximum length if the model is unknown
VERSION = 8  # of the cached data: raise it when the same rows give other tokens


class Source(Protocol):
    """The interface of a phase's data."""

    @property
    def order(self) -> Order | InStreamOrder:
        """The item that is drawn at a position."""
        ...

    @property
    def report(self) -> DataReport:
        """How many rows were used or dropped; of a stream, so far."""
        ...

    def __len__(self) -> int:
        """Items of one epoch. Raises DataError for a stream, whose length is unknown."""
        ...

    @property
    def longest(self) -> Longest:
        """The longest row and item, which must fit into a micro-batch; for a stream, the longest that its limits
        allow."""
        ...

    @property
    def rows_fingerprint(self) -> str:
        """Equal where the same rows were read in the same order: of a stream, the first rows that it gave. How rows are
        tokenised does not change it."""
        ...

    def item(self, index: int) -> Item | Prompt:
        """An item of the data set, `0 <= index < len`."""
        ...

    def batch(self, positions: Sequence[int]) -> Batch:
        """The rows of the items drawn at `positions`, in order; `group` is the position."""
        ...

    def preview(self, index: int = 0) -> str:
        """An item as text, with trained tokens between ⟦ and ⟧."""
        ...


def open_source(
    data: DataConfig, kind: DataKind, tokenizer: PreTrainedTokenizerBase, *, seed: int, model_max_length: int
) -> Source:
    """The data of a phase, read, checked and tokenised. Raises DataError for everything that a user can correct."""
    bad = BadRows(data.max_bad_rows)
    of_data = (data.completion_only, data.assistant_only, data.append_eos)
    tokeniser = Tokeniser(tokenizer, *of_data, kind.step_separator, kind.last_step_only)
    limits = limits_of(data, kind, model_max_length)
    if data.streaming:
        refuse_weights_of_stream(data, kind)
        if kind.teacher_template is not None:
            raise DataError("data.streaming: how long teachers' prompts are must be known beforehand; leave it out")
        return StreamSource(data, kind, tokeniser, limits, seed=seed, model_max_length=model_max_length)
    rows = raw.load(data, seed, bad)
    unread = len(bad)
    form = choose(kind, rows.columns, data, rows.name)
    preparer = Preparer(
        form, limits, tokeniser, kind.prompts_only, data.assistant_only, kind.teachers, kind.teacher_template
    )
    if kind.teacher_tokenizer is not None:
        preparer = replace(preparer, teacher_tokeniser=Tokeniser(load_tokenizer(*kind.teacher_tokenizer)))
    store, record = _tokenised(data, kind, rows, preparer)
    for row, reason in record.bad:
        bad.add(*rows.origin(row), reason)
    bad.check()
    max_length = data.max_length or model_max_length
    if "weight" in kind.columns and not len(store.weight):
        store = weighted(store)
    items = packed(store, data, kind, max_length)
    if not len(items):
        raise DataError(_nothing_left(rows.name, record))
    report = _report(rows, unread, preparer, record, items, bad)
    order = Order(seed, len(items), data.shuffle)
    if kind.prompts_only or kind.answered:
        return PromptSource(items, rows, report, order, tokenizer)
    return RowSource(items, rows.fingerprint, report, order, tokenizer, max_length)


def validate(data: DataConfig, kind: DataKind, *, seed: int = 0) -> DataReport:
    """Read and check every row without a tokenizer. Raises DataError for rows that `open_source` would refuse."""
    bad = BadRows(data.max_bad_rows)
    if data.streaming:
        raise DataError("a stream is checked while it is read: leave data.streaming out, or set data.limit with it off")
    rows = raw.load(data, seed, bad)
    read = len(rows) + len(bad)
    form = choose(kind, rows.columns, data, rows.name)
    of_kind = kind.prompts_only, data.assistant_only, kind.teachers, kind.teacher_template
    preparer = Preparer(form, limits_of(data, kind, UNBOUNDED), None, *of_kind)
    refused: list[tuple[int, str]] = []
    counts = Counts()
    for chunk in rows.chunks(wanted_columns(form, kind, data, rows.columns)):
        read_now = preparer.read(chunk, lambda row, reason: refused.append((row, reason)))
        labels = [label for _, example in read_now for label in example.step_labels or (example.label,)]
        counts += Counts(len(read_now), true_labels=labels.count(True), false_labels=labels.count(False))
    for row, reason in refused:
        bad.add(*rows.origin(row), reason)
    return DataReport(
        rows.name, str(form), rows.columns, read, counts.items, bad=bad.check(), notes=(*rows.notes, *counts.notes({}))
    )


class RowSource:
    """Offline data: completions, pairs, labelled or stepwise rows."""

    def __init__(
        self,
        items: Items,
        rows_fingerprint: str,
        report: DataReport,
        order: Order,
        tokenizer: PreTrainedTokenizerBase,
        max_length: int,
    ) -> None:
        self.rows_fingerprint = rows_fingerprint  # the rows themselves need not stay in memory
        self.report = report
        self.order = order
        self._items, self._tokenizer, self._max_length = items, tokenizer, max_length

    def __len__(self) -> int:
        return len(self._items)

    @property
    def longest(self) -> Longest:
        return self._items.longest(self._max_length)

    def item(self, index: int) -> Item:
        return Item(index, self._items.rows(index, group=index))

    def batch(self, positions: Sequence[int]) -> Batch:
        items = (self._items.rows(self.order.at(position)[1], position) for position in positions)
        return drawn_together(self._items.kind, items, self._max_length)

    def preview(self, index: int = 0) -> str:
        return render(self.item(index).batch, self._tokenizer)

    @property
    def fingerprint(self) -> str:
        """Equal if the same tokens are trained on, in the same rows and items."""
        return self._items.store.fingerprint

    @property
    def num_tokens(self) -> int:
        """Tokens of the whole data set."""
        return len(self._items.store.tokens)

    def parts(self, tokens: int) -> Iterator[tuple[slice, Batch]]:
        """Every row once, in parts of whole items with at most `tokens` tokens (or a single longer item), each with the
        position of its tokens in the whole data set. For data without packing."""
        store = self._items.store
        starts = store.offsets[store.first_row]  # [I+1] of items into tokens
        first = 0
        while first < len(store):
            last = max(first + 1, int(np.searchsorted(starts, starts[first] + tokens, side="right")) - 1)
            rows = store.offsets[store.first_row[first] : store.first_row[last] + 1]
            span = slice(int(rows[0]), int(rows[-1]))
            yield span, Batch.build(np.diff(rows), tokens=store.tokens[span], mask=store.mask[span])
            first = last

    def with_column(self, name: str, values: NDArray[Any], note: str) -> RowSource:
        """The same data with a new column; `values` has one entry for each token of the data set."""
        items = replace(self._items, beside={**self._items.beside, name: values})
        report = replace(self.report, notes=(*self.report.notes, note))
        return RowSource(items, self.rows_fingerprint, report, self.order, self._tokenizer, self._max_length)


class PromptSource:
    """Prompts to be completed, with the columns that rewards read."""

    def __init__(
        self, items: Items, rows: raw.Rows, report: DataReport, order: Order, tokenizer: PreTrainedTokenizerBase
    ) -> None:
        self.report = report
        self.order = order
        self._items, self._rows, self._tokenizer = items, rows, tokenizer

    def __len__(self) -> int:
        return len(self._items)

    @property
    def longest(self) -> Longest:
        return self._items.longest(UNBOUNDED)

    @property
    def rows_fingerprint(self) -> str:
        return self._rows.fingerprint

    def item(self, index: int) -> Prompt:
        tokens = self._items.prompt_tokens(index)
        columns = self._rows.row(int(self._items.store.source_row[index]))
        prompt = columns.pop("prompt", None)
        asked = prompt if prompt is not None else self._decode(tokens)
        return Prompt(index, tokens, asked, columns, self._items.answer(index), *self._items.of_prompt(index))

    def batch(self, positions: Sequence[int]) -> Batch:
        raise TypeError("prompts have no rows to learn from until they are answered: use item()")

    def preview(self, index: int = 0) -> str:
        prompt = self.item(index)
        return self._decode(prompt.tokens) if prompt.answer is None else render(prompt.answer, self._tokenizer)

    def _decode(self, tokens: Sequence[int]) -> str:
        return str(self._tokenizer.decode(list(tokens)))


def _tokenised(data: DataConfig, kind: DataKind, rows: raw.Rows, preparer: Preparer) -> tuple[Store, Record]:
    """Read from the cache if they are there. Small data is cached only if `data.cache_dir` is set."""
    columns = wanted_columns(preparer.format, kind, data, rows.columns)
    if data.cache_dir is None and len(rows) < WORTH_CACHING:
        return _tokenise(rows, columns, preparer)
    folder = cache_root(data) / "tokenised" / _cache_key(kind, rows, columns, preparer)
    found = stored.load(folder)
    if found is None:
        found = _tokenise(rows, columns, preparer)
        stored.save(folder, *found)
    return found


def cache_root(data: DataConfig) -> Path:
    """The folder of everything that is computed from data sets and can be computed again."""
    return data.cache_dir or default_cache_dir().parent


def _tokenise(rows: raw.Rows, columns: list[str], preparer: Preparer) -> tuple[Store, Record]:
    record = Record(len(rows))

    def refuse(row: int, reason: str) -> None:
        record.bad.append((row, reason))

    items = (item for chunk in rows.chunks(columns) for item in preparer.prepare(chunk, refuse, rows.origin))
    return stored.build(items, record), record


def _cache_key(kind: DataKind, rows: raw.Rows, columns: list[str], preparer: Preparer) -> str:
    """A hash of everything that the stored tokens depend on: the rows and how they are read, the settings, the
    tokenizer.

    The same columns are read in several ways (a pair is one item of two rows, or two labelled items of one)."""
    tokeniser = preparer.tokeniser
    assert tokeniser is not None
    parts = [
        VERSION,
        rows.fingerprint,
        kind.name,
        (columns, str(preparer.format), preparer.format.read.__qualname__),
        preparer.limits,
        preparer.prompts_only,
        (preparer.teachers, preparer.teacher_template, kind.teacher_tokenizer),
        (tokeniser.completion_only, tokeniser.assistant_only, tokeniser.append_eos),
        (tokeniser.step_separator, tokeniser.last_step_only) if kind.name == "step_labels" else (),
        *tokenizer_parts(tokeniser.tokenizer, date.today()),
    ]
    return blake2b(printed(parts), digest_size=16).hexdigest()


def tokenizer_parts(tokenizer: Any, today: date) -> list[Any]:
    """Everything besides the row that its tokens depend on. A template that inserts the date gives other tokens
    tomorrow."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    template = tokenizer.chat_template
    return [
        type(tokenizer).__name__,
        backend.to_str() if backend is not None else sorted(tokenizer.get_vocab().items()),
        template,
        today.isoformat() if "strftime_now" in str(template) else None,
        tokenizer.special_tokens_map,
        transformers.__version__,
    ]


def _report(rows: raw.Rows, unread: int, preparer: Preparer, record: Record, items: Items, bad: BadRows) -> DataReport:
    """`unread`: rows that could not be read."""
    counts = counted(items)
    return DataReport(
        source=rows.name,
        format=str(preparer.format),
        columns=rows.columns,
        rows=record.rows + unread,
        items=counts.items,
        tokens=counts.tokens,
        learned_tokens=counts.learned_tokens,
        longest=counts.longest,
        dropped=dict(record.dropped.most_common()) | counts.dropped,
        truncated=dict(record.truncated.most_common()),
        bad=bad.check(),
        notes=(*rows.notes, *counts.notes(record.remarks, record.cut_labels)),
    )


def _nothing_left(name: str, record: Record) -> str:
    reasons = "; ".join(f"{count} rows: {reason}" for reason, count in record.dropped.most_common())
    return f"{name}: none of {record.rows} rows is left ({reasons or 'all of them were bad'})"

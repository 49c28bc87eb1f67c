"""Items of a store: the rows of one example, or the pieces of one pack."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from actors.batch import Batch
from actors.other_prompts import FILL
from orchestrator.config.schema import DataConfig
from orchestrator.data.conversation import Content
from orchestrator.data.document_packing import Bin, Piece, best_fit_decreasing, wrapped
from orchestrator.data.mismatched_rows import with_mismatches
from orchestrator.data.report import LEARNED, Counts
from orchestrator.data.store import Store
from orchestrator.pipeline import DataKind


@dataclass(frozen=True)
class Item:
    """One item of an offline data set: the rows that belong together, `group` being its index."""

    id: int
    batch: Batch


@dataclass(frozen=True)
class Longest:
    """Tokens of the longest row, and of the longest item with all of its rows, that a batch may hold; and of the
    longest prompt, if prompts are to be answered."""

    row: int
    item: int
    prompt: int = 0
    teacher_prompt: int = 0  # of the prompts that a teacher reads in the places of those


@dataclass(frozen=True)
class Prompt:
    """A prompt to be completed. `prompt` is the data set's own value; `columns` are all its other columns, for
    rewards."""

    id: int
    tokens: tuple[int, ...]
    prompt: Content
    columns: dict[str, Any]
    answer: Batch | None = None  # the row that the data set makes of it, where the kind of data has one
    row_values: Mapping[str, int] = field(default_factory=dict[str, int])  # of columns per row, of whatever answers it
    teacher_prompt: NDArray[np.int32] | None = None  # as in the column, filled up to the longest of the data set


@dataclass(frozen=True, eq=False)
class Items:
    """`bins`: how packing groups the store's items (each of one row); None without packing. `beside`: [T]
    columns that were computed later for the store's tokens."""

    store: Store
    kind: DataKind
    bins: list[Bin] | None = None
    beside: Mapping[str, NDArray[Any]] = field(default_factory=dict[str, NDArray[Any]])

    def __len__(self) -> int:
        return len(self.store) if self.bins is None else len(self.bins)

    def rows(self, index: int, group: int) -> Batch:
        """The rows of one item, with `group` in that column."""
        return self._packed(self.bins[index], group) if self.bins is not None else self._whole(index, group)

    def longest(self, max_length: int) -> Longest:
        """A mismatched row is a prompt with another row's completion, so it may be longer than any row of the data."""
        store, item = self.store, int(np.diff(self.store.offsets[self.store.first_row]).max())
        row = int(store.lengths.max())
        if self.bins is not None:
            row = item = max(max(map(len, pieces)) for pieces in self.bins)
        if "mismatched" in self.kind.columns:
            prompts = store.prompt_lengths
            row = max(row, min(max_length, int(prompts.max() + (store.lengths - prompts).max())))
        if self.kind.prompts_only or self.kind.answered:
            prompt = int((store.lengths if self.kind.prompts_only else store.prompt_lengths).max())
            return Longest(row, item, prompt, store.longest_teacher_prompt)
        return Longest(row, item)

    def prompt_tokens(self, index: int) -> tuple[int, ...]:
        """All tokens of a prompt; or those before the first that is learned from, if the prompt is answered."""
        start, stop = self.store.offsets[index : index + 2]
        if self.kind.answered:
            stop = start + self.store.prompt_lengths[index]
        return tuple(self.store.tokens[start:stop].tolist())

    def answer(self, index: int) -> Batch | None:
        """The row of a prompt with its completion, if the kind of data has it."""
        return self.rows(index, group=index) if self.kind.answered else None

    def of_prompt(self, index: int) -> tuple[dict[str, int], NDArray[np.int32] | None]:
        """(what its rows have in columns per row, what their teacher reads in its place)."""
        if self.kind.teacher_template is None:
            return self.row_values(index), None
        start, stop = self.store.teacher_offsets[index : index + 2]
        filled = np.full(self.store.longest_teacher_prompt, FILL, np.int32)
        filled[: stop - start] = self.store.teacher_tokens[start:stop]
        return self.row_values(index), filled

    def row_values(self, index: int) -> dict[str, int]:
        """What each row that answers a prompt has in columns per row, by column."""
        return {"teacher": int(self.store.teacher[index])} if self.kind.teachers else {}

    def _whole(self, index: int, group: int) -> Batch:
        store = self.store
        first, last = (int(row) for row in store.first_row[index : index + 2])
        start, stop = store.offsets[first], store.offsets[last]
        columns: dict[str, Any] = {"tokens": store.tokens[start:stop], "mask": store.mask[start:stop]}
        if "step_label" in self.kind.columns:
            columns["step_label"] = store.step_label[start:stop]
        columns |= {name: values[start:stop] for name, values in self.beside.items()}
        return _batch(np.diff(store.offsets[first : last + 1]), group, columns | self._row_columns(index, last - first))

    def _row_columns(self, index: int, rows: int) -> dict[str, Any]:
        columns: dict[str, Any] = {}
        if "preferred" in self.kind.columns:
            columns["preferred"] = np.arange(rows) == 0
        if "imitated" in self.kind.columns:
            columns["imitated"] = np.arange(rows) == 2
        if "label" in self.kind.columns:
            columns["label"] = np.full(rows, self.store.label[index] == 1)
        for name, values in (("margin", self.store.margin), ("weight", self.store.weight)):
            if len(values) or name in self.kind.columns:  # a column may exist and be null in every row
                columns[name] = np.full(rows, values[index] if len(values) else 0.0, np.float32)
        return columns | {name: np.full(rows, value) for name, value in self.row_values(index).items()}

    def _packed(self, pieces: Bin, group: int) -> Batch:
        store = self.store
        spans = [(store.offsets[p.document] + p.start, store.offsets[p.document] + p.stop) for p in pieces]
        lengths = np.array([stop - start for start, stop in spans])
        mask = np.concatenate([store.mask[start:stop] for start, stop in spans])
        mask[np.cumsum(lengths) - lengths] = False  # the first token of a row has nothing before it
        columns: dict[str, Any] = {"tokens": np.concatenate([store.tokens[start:stop] for start, stop in spans])}
        columns["mask"] = mask
        if len(store.weight):
            columns["weight"] = store.weight[[piece.document for piece in pieces]]
        if self.kind.teachers:
            columns["teacher"] = store.teacher[[piece.document for piece in pieces]]
        return _batch(lengths, group, columns)


def packed(store: Store, data: DataConfig, kind: DataKind, max_length: int) -> Items:
    """Items according to `data.packing`. Pieces without a trained token are left out."""
    lengths = store.lengths.tolist()
    match data.packing:
        case "none":
            return Items(store, kind)
        case "wrapped":
            bins = wrapped(lengths, max_length)
        case "bfd_split":
            bins = best_fit_decreasing(lengths, max_length, split=True)
        case "bfd":
            bins = best_fit_decreasing(lengths, max_length)  # no row is longer, because of `Limits`
    learned = _learned_before(store)
    kept = ([piece for piece in pieces if _learned_in(piece, store, learned)] for pieces in bins)
    return Items(store, kind, [pieces for pieces in kept if pieces])


def counted(items: Items) -> Counts:
    """Counts of the items, which after packing may lack a part of their store."""
    store = items.store
    if items.bins is None:
        labels = store.step_label if "step_label" in items.kind.columns else store.label
        return Counts(
            len(items),
            sum(store.lengths.tolist()),
            int(store.mask.sum()),
            int(store.lengths.max(initial=0)),
            true_labels=int((labels == 1).sum()),
            false_labels=int((labels == 0).sum()),
        )
    learned = _learned_before(store)
    pieces = [piece for pieces in items.bins for piece in pieces]
    whole = store.lengths.tolist()
    tokens = sum(map(len, pieces))
    return Counts(
        len(items),
        tokens,
        sum(_learned_in(piece, store, learned) for piece in pieces),
        max(map(len, pieces), default=0),
        split_rows=len({piece.document for piece in pieces if len(piece) < whole[piece.document]}),
        unused_rows=len(store) - len({piece.document for piece in pieces}),
        unused_tokens=sum(whole) - tokens,
    )


def _learned_before(store: Store) -> NDArray[np.int64]:
    """[T+1]: how many of the tokens before each one are trained on."""
    return np.concatenate([[0], np.cumsum(store.mask)])


def _learned_in(piece: Piece, store: Store, learned_before: NDArray[np.int64]) -> int:
    """Trained tokens of a piece; its first token is never one, because nothing precedes it."""
    start = store.offsets[piece.document]
    return int(learned_before[start + piece.stop] - learned_before[start + piece.start + 1])


def drawn_together(kind: DataKind, items: Iterable[Batch], max_length: int) -> Batch:
    """The rows of one batch. Mismatched rows need the others of their batch, so they are made here."""
    batch = Batch.concat(items)
    return with_mismatches(batch, max_length) if "mismatched" in kind.columns else batch


def render(batch: Batch, tokenizer: PreTrainedTokenizerBase) -> str:
    """Rows as text, one per line, with trained tokens between ⟦ and ⟧."""
    return "\n".join(
        _render_row(batch.row("tokens", row), batch.row("mask", row), tokenizer) for row in range(len(batch))
    )


def _render_row(tokens: NDArray[np.int32], mask: NDArray[np.bool_], tokenizer: PreTrainedTokenizerBase) -> str:
    edges = [0, *(np.flatnonzero(np.diff(mask)) + 1).tolist(), len(tokens)]
    parts = [(str(tokenizer.decode(tokens[a:b].tolist())), bool(mask[a])) for a, b in pairwise(edges)]
    return "".join(f"{LEARNED[0]}{text}{LEARNED[1]}" if learned else text for text, learned in parts)


def _batch(lengths: NDArray[np.int64], group: int, columns: dict[str, Any]) -> Batch:
    return Batch.build(lengths, group=np.full(len(lengths), group, dtype=np.int64), **columns)

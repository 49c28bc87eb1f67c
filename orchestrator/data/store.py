"""Tokenised rows as flat arrays, from which batches are sliced quickly, cached on disk for later runs.

A folder of `.npy` files and one JSON file, written completely or not at all, opened memory-mapped. Its name is a hash
of all that it depends on: the rows, the tokenizer with its chat template, the settings, and the version of this code.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from orchestrator.data.prepare import Prepared
from orchestrator.data.truncation import Fit

NO_LABEL = -1


@dataclass
class Record:
    """Outcomes of the raw rows, for `DataReport`: reasons with their counts, remarks with the number of items to which
    they apply, bad rows as (row, reason), and how many step labels were cut off with the end of their step."""

    rows: int = 0
    dropped: Counter[str] = field(default_factory=Counter[str])
    truncated: Counter[str] = field(default_factory=Counter[str])
    remarks: Counter[str] = field(default_factory=Counter[str])
    bad: list[tuple[int, str]] = field(default_factory=list[tuple[int, str]])
    cut_labels: int = 0

    def add(self, fit: Fit) -> None:
        """Note the outcome of one item."""
        if fit.dropped:
            self.dropped[fit.dropped] += 1
        elif fit.truncated:
            self.truncated[fit.truncated] += 1
        if not fit.dropped:
            self.remarks.update(fit.encoded.remarks)
            self.cut_labels += fit.cut_labels


@dataclass(frozen=True, eq=False)
class Store:
    """`I` items of `R` rows of `T` tokens. Optional values are neutral where a raw row has none."""

    tokens: NDArray[np.int32]  # [T]
    mask: NDArray[np.bool_]  # [T]
    step_label: NDArray[np.int8]  # [T], or [0] if the data has no process labels
    offsets: NDArray[np.int64]  # [R+1] of rows into tokens
    first_row: NDArray[np.int64]  # [I+1] of items into rows
    source_row: NDArray[np.int64]  # [I]
    label: NDArray[np.int8]  # [I], -1 where there is none
    margin: NDArray[np.float32]  # [I], or [0] if no row has one
    weight: NDArray[np.float32]  # [I], or [0] if no row has one
    teacher: NDArray[np.int8]  # [I], 0 where rows name none
    teacher_tokens: NDArray[np.int32]  # flat, of the items' teacher prompts
    teacher_offsets: NDArray[np.int64]  # [I+1] of items into them

    def __len__(self) -> int:
        return len(self.source_row)

    @cached_property
    def fingerprint(self) -> str:
        """A hash of all tokens, of the mask, and of the boundaries of rows and items."""
        digest = xxhash.xxh3_128()
        for values in (self.tokens, self.mask, self.offsets, self.first_row):
            digest.update(f"{values.dtype} {values.size}\n".encode())
            digest.update(np.ascontiguousarray(values).view(np.uint8).data)
        return digest.hexdigest()

    @property
    def lengths(self) -> NDArray[np.int64]:
        """[R] tokens per row."""
        return np.diff(self.offsets)

    @cached_property
    def longest_teacher_prompt(self) -> int:
        return int(np.diff(self.teacher_offsets).max(initial=0))

    @property
    def prompt_lengths(self) -> NDArray[np.int64]:
        """[R] tokens before the first trained one."""
        learned = np.append(np.flatnonzero(self.mask), len(self.mask))
        first = learned[np.searchsorted(learned, self.offsets[:-1])]
        return np.minimum(first, self.offsets[1:]) - self.offsets[:-1]


def build(items: Iterable[Prepared], record: Record) -> Store:
    """A store of the items that were kept; `record` has the outcome of each row."""
    writer = _Writer()
    for item in items:
        record.add(item.fit)
        if not item.fit.dropped:
            writer.add(item)
    return writer.store()


class _Writer:
    """Tokens become arrays at once: as Python integers they would take ten times the memory."""

    def __init__(self) -> None:
        self._flat: dict[str, list[NDArray[Any]]] = {"tokens": [], "mask": [], "step_label": [], "teacher": []}
        self._lengths: list[int] = []
        self._rows_of_item: list[int] = []
        self._source_row: list[int] = []
        self._label: list[int] = []
        self._margin: list[float | None] = []
        self._weight: list[float | None] = []
        self._teacher: list[int] = []
        self._teacher_lengths: list[int] = []

    def add(self, item: Prepared) -> None:
        fit, example = item.fit, item.example
        for row, mask in zip(fit.encoded.rows, fit.encoded.masks, strict=True):
            self._flat["tokens"].append(np.array(row, dtype=np.int32))
            self._flat["mask"].append(np.array(mask, dtype=np.bool_))
            self._lengths.append(len(row))
        self._flat["step_label"] += [np.array(row, dtype=np.int8) for row in fit.encoded.step_labels or ()]
        self._rows_of_item.append(len(fit.encoded.rows))
        self._source_row.append(item.row)
        self._label.append(NO_LABEL if example.label is None else int(example.label))
        self._margin.append(example.margin)
        self._weight.append(example.weight)
        self._teacher.append(example.teacher or 0)
        self._teacher_lengths.append(len(item.teacher_prompt))
        self._flat["teacher"].append(np.array(item.teacher_prompt, dtype=np.int32))

    def store(self) -> Store:
        return Store(
            tokens=_joined(self._flat["tokens"], np.int32),
            mask=_joined(self._flat["mask"], np.bool_),
            step_label=_joined(self._flat["step_label"], np.int8),
            offsets=np.cumsum([0, *self._lengths], dtype=np.int64),
            first_row=np.cumsum([0, *self._rows_of_item], dtype=np.int64),
            source_row=np.array(self._source_row, dtype=np.int64),
            label=np.array(self._label, dtype=np.int8),
            margin=_filled(self._margin, 0.0),
            weight=_filled(self._weight, 1.0),
            teacher=np.array(self._teacher, dtype=np.int8),
            teacher_tokens=_joined(self._flat["teacher"], np.int32),
            teacher_offsets=np.cumsum([0, *self._teacher_lengths], dtype=np.int64),
        )


def save(folder: Path, store: Store, record: Record) -> None:
    """Writes both. If two processes write at the same time, either result is kept: they are equal."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        for entry in fields(store):
            np.save(staging / f"{entry.name}.npy", getattr(store, entry.name))
        (staging / "record.json").write_text(json.dumps(vars(record)))
        os.replace(staging, folder)
    except OSError:
        if not (folder / "record.json").exists():
            raise
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def load(folder: Path) -> tuple[Store, Record] | None:
    """The store that `save` wrote, memory-mapped; None if there is none."""
    if not (folder / "record.json").exists():
        return None
    kept = json.loads((folder / "record.json").read_text())
    bad = [(row, reason) for row, reason in kept["bad"]]
    dropped, truncated, remarks = (Counter[str](kept[name]) for name in ("dropped", "truncated", "remarks"))
    record = Record(kept["rows"], dropped, truncated, remarks, bad, kept["cut_labels"])
    return Store(**{entry.name: _mapped(folder / f"{entry.name}.npy") for entry in fields(Store)}), record


def _mapped(file: Path) -> NDArray[Any]:
    return np.load(file, mmap_mode="r")


def _joined(parts: list[NDArray[Any]], dtype: type) -> NDArray[Any]:
    return np.concatenate(parts) if parts else np.zeros(0, dtype)


def _filled(values: list[float | None], neutral: float) -> NDArray[np.float32]:
    if all(value is None for value in values):
        return np.zeros(0, np.float32)
    return np.array([neutral if value is None else value for value in values], dtype=np.float32)

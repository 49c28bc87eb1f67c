"""How rows are dealt to data-parallel ranks and cut into micro-batches. Pure functions."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np

from actors.batch import Array, Batch

MicroBatches = tuple[tuple[int, ...], ...]
UNEVEN = 1.1  # how much larger the largest micro-batch may be so that groups stay together


@dataclass(frozen=True)
class Chunk:
    """What one data-parallel rank works on: its rows, and which of them form each micro-batch.

    `aside`: micro-batches of rows that no gradient is taken of."""

    batch: Batch
    micro_batches: MicroBatches
    aside: MicroBatches = ()


def pack(lengths: Sequence[int], ranks: int, token_budget: int) -> list[MicroBatches]:
    """Deal items to ranks and micro-batches so that work is balanced. One entry per rank.

    Every item is dealt exactly once; no micro-batch exceeds `token_budget` unless a single item does; every rank gets
    the same number of micro-batches (some may be empty, where there are fewer items than that); the result is a
    function of the arguments alone. `lengths` are tokens per item; an item is a row, or a group of rows that must stay
    together. Raises ValueError if an item is longer than the budget.
    """
    if ranks < 1 or token_budget < 1:
        raise ValueError(f"ranks and token_budget must be positive, got {ranks} and {token_budget}")
    if len(lengths) and max(lengths) > token_budget:
        raise ValueError(f"an item of {max(lengths)} tokens does not fit into token_budget={token_budget}")
    fewest = max(1, -(-sum(lengths) // (ranks * token_budget))) if len(lengths) else 0
    for count in range(fewest, len(lengths) + 1):
        bins = _balance(lengths, ranks * count, token_budget)
        if bins is not None:
            return [tuple(tuple(sorted(b)) for b in bins[rank::ranks]) for rank in range(ranks)]
    return [() for _ in range(ranks)]


def _balance(lengths: Sequence[int], bins: int, budget: int) -> list[list[int]] | None:
    """Longest item first into the emptiest bin; None if that exceeds the budget."""
    filled: list[list[int]] = [[] for _ in range(bins)]
    heap = [(0, index) for index in range(bins)]
    for item in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        total, index = heapq.heappop(heap)
        if total + lengths[item] > budget:
            return None
        filled[index].append(item)
        heapq.heappush(heap, (total + lengths[item], index))
    return filled


def deal(
    batch: Batch, ranks: int, token_budget: int, *, keep_groups: bool = False, aside: str | None = None
) -> list[tuple[list[int], Chunk]]:
    """One (rows, chunk) per rank: which rows of `batch` it got, in the chunk's order, and the chunk itself.

    With `keep_groups`, rows of one `group` stay in one micro-batch, adjacent and in the batch's order. Without, they do
    where that costs nothing: samples of a prompt begin alike, and what begins alike in a micro-batch is computed once.
    `aside` names a boolean column: rows where it is true are balanced by themselves, and share no micro-batch with the
    others.
    """
    marked = np.zeros(len(batch), np.bool_) if aside is None else batch[aside]
    learned, others = (
        _micro_batches(batch, np.flatnonzero(rows), ranks, token_budget, keep_groups) for rows in (~marked, marked)
    )
    return [_chunk(batch, *both) for both in zip(learned, others, strict=True)]


def _micro_batches(
    batch: Batch, rows: Array, ranks: int, token_budget: int, keep_groups: bool
) -> list[list[list[int]]]:
    """Of each rank, of each of its micro-batches: which of `rows`."""
    items = _groups(batch, rows) if keep_groups else _grouped_if_free(batch, rows, ranks, token_budget)
    return [
        [[row for item in members for row in items[item]] for members in micro_batches]
        for micro_batches in pack(_sizes(batch, items), ranks, token_budget)
    ]


def _grouped_if_free(batch: Batch, rows: Array, ranks: int, token_budget: int) -> list[list[int]]:
    """Whole groups as items, unless rows by themselves make fewer or clearly smaller micro-batches."""
    single = [[row] for row in rows.tolist()]
    groups = _groups(batch, rows) if "group" in batch else single
    if len(groups) == len(single) or max(_sizes(batch, groups)) > token_budget:
        return single
    (count, largest), (least, smallest) = (
        _extent(_sizes(batch, items), ranks, token_budget) for items in (groups, single)
    )
    return groups if count == least and largest <= UNEVEN * smallest else single


def _extent(lengths: Sequence[int], ranks: int, token_budget: int) -> tuple[int, int]:
    """Micro-batches per rank, and tokens of the largest one."""
    dealt = pack(lengths, ranks, token_budget)
    return len(dealt[0]), max(sum(lengths[item] for item in micro) for rank in dealt for micro in rank)


def _sizes(batch: Batch, items: Sequence[Sequence[int]]) -> list[int]:
    """Tokens of each item."""
    return [int(batch.lengths[list(rows)].sum()) for rows in items]


def _chunk(batch: Batch, learned: list[list[int]], aside: list[list[int]]) -> tuple[list[int], Chunk]:
    """Rows of `batch` in the order of their micro-batches, which name them by their places in the chunk."""
    rows = [row for micro_batch in (*learned, *aside) for row in micro_batch]
    places = iter(range(len(rows)))
    local = [tuple(islice(places, len(micro_batch))) for micro_batch in (*learned, *aside)]
    return rows, Chunk(batch.select(rows), tuple(local[: len(learned)]), tuple(local[len(learned) :]))


def _groups(batch: Batch, rows: Array) -> list[list[int]]:
    groups: dict[int, list[int]] = {}
    for row, group in zip(rows.tolist(), batch["group"][rows].tolist(), strict=True):
        groups.setdefault(group, []).append(row)
    return list(groups.values())

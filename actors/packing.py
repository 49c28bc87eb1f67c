"""How rows are dealt to data-parallel ranks and cut into micro-batches. Pure functions."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

from actors.batch import Batch

MicroBatches = tuple[tuple[int, ...], ...]
UNEVEN = 1.1  # how much larger the largest micro-batch may be so that groups stay together


@dataclass(frozen=True)
class Chunk:
    """What one data-parallel rank works on: its rows, and which of them form each micro-batch."""

    batch: Batch
    micro_batches: MicroBatches


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


def deal(batch: Batch, ranks: int, token_budget: int, *, keep_groups: bool = False) -> list[tuple[list[int], Chunk]]:
    """One (rows, chunk) per rank: which rows of `batch` it got, in the chunk's order, and the chunk itself.

    With `keep_groups`, rows of one `group` stay in one micro-batch, adjacent and in the batch's order. Without, they do
    where that costs nothing: samples of a prompt begin alike, and what begins alike in a micro-batch is computed once.
    """
    items = _groups(batch) if keep_groups else _grouped_if_free(batch, ranks, token_budget)
    dealt = []
    for micro_batches in pack(_sizes(batch, items), ranks, token_budget):
        rows: list[int] = []
        local: list[tuple[int, ...]] = []
        for members in micro_batches:
            chosen = [row for item in members for row in items[item]]
            local.append(tuple(range(len(rows), len(rows) + len(chosen))))
            rows.extend(chosen)
        dealt.append((rows, Chunk(batch.select(rows), tuple(local))))
    return dealt


def _grouped_if_free(batch: Batch, ranks: int, token_budget: int) -> list[list[int]]:
    """Whole groups as items, unless rows by themselves make fewer or clearly smaller micro-batches."""
    rows = [[row] for row in range(len(batch))]
    groups = _groups(batch) if "group" in batch else rows
    if len(groups) == len(rows) or max(_sizes(batch, groups)) > token_budget:
        return rows
    (count, largest), (least, smallest) = (
        _extent(_sizes(batch, items), ranks, token_budget) for items in (groups, rows)
    )
    return groups if count == least and largest <= UNEVEN * smallest else rows


def _extent(lengths: Sequence[int], ranks: int, token_budget: int) -> tuple[int, int]:
    """Micro-batches per rank, and tokens of the largest one."""
    dealt = pack(lengths, ranks, token_budget)
    return len(dealt[0]), max(sum(lengths[item] for item in micro) for rank in dealt for micro in rank)


def _sizes(batch: Batch, items: Sequence[Sequence[int]]) -> list[int]:
    """Tokens of each item."""
    lengths = batch.lengths.tolist()
    return [sum(lengths[row] for row in rows) for rows in items]


def _groups(batch: Batch) -> list[list[int]]:
    groups: dict[int, list[int]] = {}
    for row, group in enumerate(batch["group"].tolist()):
        groups.setdefault(group, []).append(row)
    return list(groups.values())

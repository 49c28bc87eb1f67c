"""How rows are dealt to data-parallel ranks and cut into micro-batches. Pure.

A shard need not hold the values of its rows: a block is a batch that lies in the object store (the samples of a prompt,
what a rank computed of its rows), and a shard may say in which block, and in which row of it, a column's values are.
The rank fetches the blocks from where they were made, so that they do not pass through the driver:

    driver ── shard: lengths, values per row, where the values per token are ──► rank ◄── blocks ── object store
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice

import numpy as np

from actors.batch import Array, Batch
from actors.columns import COLUMNS

MicroBatches = tuple[tuple[int, ...], ...]
UNEVEN = 1.1  # how much larger the largest micro-batch may be so that groups stay together


@dataclass(frozen=True, eq=False)
class Stored:
    """Where columns of rows lie: row i's values are those of row `rows[i]` in block `blocks[i]`. Both are [B] int64."""

    names: frozenset[str]
    blocks: Array
    rows: Array

    def select(self, chosen: Array) -> Stored:
        return Stored(self.names, self.blocks[chosen], self.rows[chosen])

    def read(self, names: Iterable[str], blocks: Sequence[Batch]) -> dict[str, Array]:
        """The values of the columns, rows in order."""
        if not len(self.rows):
            return {name: np.zeros((0, 1) if COLUMNS[name].wide else 0, COLUMNS[name].dtype) for name in names}
        starts = np.flatnonzero(np.diff(self.blocks, prepend=-1))
        runs = zip(starts, [*starts[1:], len(self.blocks)], strict=True)
        parts = [blocks[int(self.blocks[start])].only(names).select(self.rows[start:stop]) for start, stop in runs]
        return dict(Batch.concat(parts).columns)


@dataclass(frozen=True, eq=False)
class Shard:
    """What one data-parallel rank works on: its rows, and which of them form each micro-batch.

    `statistics_rows`: micro-batches of rows that no gradient is taken of. `batch` has the columns that travel with the
    shard; `spread` has values per row [B] of columns per token, the same at each of a row's tokens; `stored` says where
    the other columns lie."""

    batch: Batch
    micro_batches: MicroBatches
    statistics_rows: MicroBatches = ()
    spread: Mapping[str, Array] = field(default_factory=dict[str, Array])
    stored: tuple[Stored, ...] = ()

    def fetched(self, blocks: Sequence[Batch]) -> Shard:
        """The shard with all of its columns in `batch`. Rows that `learned` excludes have an empty mask."""
        columns: dict[str, Array] = {}
        for each in self.stored:
            columns |= each.read(each.names, blocks)
        columns |= {name: np.repeat(values, self.batch.lengths) for name, values in self.spread.items()}
        columns |= self.batch.columns
        learned = columns.pop("learned", None)
        if learned is not None and "mask" in columns:
            columns["mask"] = columns["mask"] & np.repeat(learned, self.batch.lengths)
        return replace(self, batch=Batch(self.batch.lengths, columns), spread={}, stored=())


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


def shard(
    batch: Batch, ranks: int, token_budget: int, *, keep_groups: bool = False, statistics_rows: str | None = None
) -> list[tuple[list[int], Shard]]:
    """One (rows, shard) per rank: which rows of `batch` it got, in the shard's order, and the shard itself.

    With `keep_groups`, rows of one `group` stay in one micro-batch, adjacent and in the batch's order. Without, they do
    where that costs nothing: samples of a prompt begin alike, and what begins alike in a micro-batch is computed once.
    `statistics_rows` names a boolean column: rows where it is true are balanced by themselves, and share no micro-batch
    with the others.
    """
    marked = np.zeros(len(batch), np.bool_) if statistics_rows is None else batch[statistics_rows]
    learned, others = (
        _micro_batches(batch, np.flatnonzero(rows), ranks, token_budget, keep_groups) for rows in (~marked, marked)
    )
    return [_shard(batch, *both) for both in zip(learned, others, strict=True)]


def shard_groups(batch: Batch, ranks: int, token_budget: int) -> list[tuple[list[int], Shard]]:
    """As `shard`, but a micro-batch has rows of one group only, and which rows those are depends on that group alone.
    A forward pass then says the same of a row, to the bit, whatever other groups are in the batch: with other rows
    beside it, a matrix product may add up in another order. The price: small groups make small passes."""
    micro_batches = [
        micro_batch
        for group in _groups(batch, np.arange(len(batch)))
        for micro_batch in _micro_batches(batch, np.asarray(group), 1, token_budget, keep_groups=False)[0]
    ]
    micro_batches.sort(key=lambda rows: -int(batch.lengths[rows].sum()))  # dealt in turn, ranks get about as much work
    micro_batches += [[] for _ in range(-len(micro_batches) % ranks)]
    return [_shard(batch, micro_batches[rank::ranks], []) for rank in range(ranks)]


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


def _shard(batch: Batch, learned: list[list[int]], statistics_rows: list[list[int]]) -> tuple[list[int], Shard]:
    """Rows of `batch` in the order of their micro-batches, which name them by their places in the shard."""
    rows = [row for micro_batch in (*learned, *statistics_rows) for row in micro_batch]
    places = iter(range(len(rows)))
    local = [tuple(islice(places, len(micro_batch))) for micro_batch in (*learned, *statistics_rows)]
    return rows, Shard(batch.select(rows), tuple(local[: len(learned)]), tuple(local[len(learned) :]))


def _groups(batch: Batch, rows: Array) -> list[list[int]]:
    groups: dict[int, list[int]] = {}
    for row, group in zip(rows.tolist(), batch["group"][rows].tolist(), strict=True):
        groups.setdefault(group, []).append(row)
    return list(groups.values())

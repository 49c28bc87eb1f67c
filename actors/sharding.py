"""How rows are divided among data-parallel ranks and into micro-batches. Pure.

A shard need not hold the values of its rows. A block is a batch in the object store (the samples of a prompt, or
columns that a rank computed); a shard refers to values by block and row. The rank fetches the blocks from the nodes
that made them, so that they do not pass through the driver:

    driver ── shard: lengths, values per row, references to blocks ──► rank ◄── blocks ── object store
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
# Of a pass of one shape. 256 groups of one short row took 0.39 CPU-seconds (a model of 256 hidden units) with passes of
# 256 tokens, 0.49 with 128, 1.47 with a pass for each; one group alone 0.028, 0.018, 0.008.
PASS_TOKENS = 256
SHORTEST = 8  # to how many tokens rows are padded, at least
UNEVEN = 1.1  # factor by which the largest micro-batch may grow so that groups stay together


@dataclass(frozen=True, eq=False)
class Stored:
    """References to columns in blocks: row i has the values of row `rows[i]` of block `blocks[i]`, or none yet where
    that is -1. Both are [B] int64."""

    names: frozenset[str]
    blocks: Array
    rows: Array

    def select(self, chosen: Array) -> Stored:
        return Stored(self.names, self.blocks[chosen], self.rows[chosen])

    def shifted(self, by: int) -> Array:
        """[B] int64: `blocks`, numbered from there on."""
        return np.where(self.blocks < 0, -1, self.blocks + by)

    def read(self, names: Iterable[str], blocks: Sequence[Batch]) -> dict[str, Array]:
        """The values of the columns, rows in order."""
        if not len(self.rows):
            return {name: np.zeros((0, 1) if COLUMNS[name].wide else 0, COLUMNS[name].dtype) for name in names}
        if (self.blocks < 0).any():
            raise ValueError(f"{(self.blocks < 0).sum()} rows have no {', '.join(sorted(names))}: no stage wrote it")
        starts = np.flatnonzero(np.diff(self.blocks, prepend=-1))
        runs = zip(starts, [*starts[1:], len(self.blocks)], strict=True)
        parts = [blocks[int(self.blocks[start])].only(names).select(self.rows[start:stop]) for start, stop in runs]
        return dict(Batch.concat(parts).columns)


@dataclass(frozen=True, eq=False)
class Shard:
    """The work of one data-parallel rank: its rows, divided into micro-batches.

    `statistics_rows`: micro-batches of rows without gradient. `padded`: those of passes of one shape, which only
    inference has (`shard_groups`). `batch` has the columns that are sent with the shard;
    `spread` has values per row [B] of columns per token that are equal for all tokens of a row; `stored` refers to the
    other columns. Of a wide column that is there several times, the values are put side by side."""

    batch: Batch
    micro_batches: MicroBatches
    statistics_rows: MicroBatches = ()
    padded: MicroBatches = ()
    spread: Mapping[str, Array] = field(default_factory=dict[str, Array])
    stored: tuple[Stored, ...] = ()

    def nbytes(self) -> int:
        """Of what is sent with the shard; what it refers to is not counted."""
        places = sum(each.blocks.nbytes + each.rows.nbytes for each in self.stored)
        return self.batch.nbytes() + sum(values.nbytes for values in self.spread.values()) + places

    def fetched(self, blocks: Sequence[Batch]) -> Shard:
        """The shard with all of its columns in `batch`. Rows that `learned` excludes have an empty mask."""
        columns: dict[str, Array] = {}
        for each in self.stored:
            for name, values in each.read(each.names, blocks).items():
                beside = [columns[name], values] if name in columns else [values]
                columns[name] = np.concatenate(beside, axis=1) if len(beside) > 1 else values
        columns |= {name: np.repeat(values, self.batch.lengths) for name, values in self.spread.items()}
        columns |= self.batch.columns
        learned = columns.pop("learned", None)
        if learned is not None and "mask" in columns:
            columns["mask"] = columns["mask"] & np.repeat(learned, self.batch.lengths)
        return replace(self, batch=Batch(self.batch.lengths, columns), spread={}, stored=())


def pack(lengths: Sequence[int], ranks: int, token_budget: int) -> list[MicroBatches]:
    """Divides items among ranks and micro-batches so that work is balanced. One entry per rank.

    Every item is dealt exactly once; no micro-batch exceeds `token_budget` unless a single item does; every rank gets
    the same number of micro-batches (some may be empty if there are fewer items); the result is a
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
    """One (rows, shard) per rank: its rows of `batch` in the shard's order, and the shard itself.

    With `keep_groups`, rows of one `group` stay in one micro-batch, adjacent and in the batch's order. Without it, they
    do if that costs nothing: samples of a prompt have a shared prefix, which a micro-batch computes once.
    `statistics_rows` names a boolean column: rows where it is true are balanced by themselves, and share no micro-batch
    with the others."""
    marked = np.zeros(len(batch), np.bool_) if statistics_rows is None else batch[statistics_rows]
    learned, others = (
        _micro_batches(batch, np.flatnonzero(rows), ranks, token_budget, keep_groups) for rows in (~marked, marked)
    )
    return [_shard(batch, *both) for both in zip(learned, others, strict=True)]


def shard_groups(batch: Batch, ranks: int, token_budget: int) -> list[tuple[list[int], Shard]]:
    """As `shard`, but a row's result is the same, bit for bit, whatever other groups are in the batch. With other rows
    in the same pass, a matrix product may sum in another order if that changes its shape. So

        a large group   has micro-batches of its own, which depend on it alone, and in which common prefixes are shared
        small groups    share passes of one shape: rows of about one length, padded to the same one, and as many in
                        every pass, of which some may be empty (`padded`)

    Which of the two a group is depends on it alone."""
    own: list[list[int]] = []
    by_length: dict[int, list[int]] = {}
    for group in _groups(batch, np.arange(len(batch))):
        if batch.lengths[group].sum() > PASS_TOKENS // 2:
            own += _micro_batches(batch, np.asarray(group), 1, token_budget, keep_groups=False)[0]
        else:
            for row in group:
                by_length.setdefault(padded_length(int(batch.lengths[row])), []).append(row)
    padded = [
        rows[start : start + rows_of_a_pass(length)]
        for length, rows in sorted(by_length.items())
        for start in range(0, len(rows), rows_of_a_pass(length))
    ]
    own.sort(key=lambda rows: -int(batch.lengths[rows].sum()))  # dealt in turn, ranks get about as much work
    for micro_batches in (own, padded):
        micro_batches += [[] for _ in range(-len(micro_batches) % ranks)]
    return [_shard(batch, own[rank::ranks], [], padded[rank::ranks]) for rank in range(ranks)]


def padded_length(tokens: int) -> int:
    """To which a row of so many tokens is padded: a power of two."""
    return max(SHORTEST, 1 << (tokens - 1).bit_length())


def rows_of_a_pass(length: int) -> int:
    """Of a pass of one shape, whose rows are padded to so many tokens."""
    return max(1, PASS_TOKENS // length)


def _micro_batches(
    batch: Batch, rows: Array, ranks: int, token_budget: int, keep_groups: bool
) -> list[list[list[int]]]:
    """For each rank, the rows of each of its micro-batches. Groups stay whole with `keep_groups`; otherwise only if
    that makes neither more nor clearly larger micro-batches than single rows."""

    def deal(items: list[list[int]]) -> list[list[list[int]]]:
        tokens = [int(batch.lengths[item].sum()) for item in items]
        return [
            [[row for item in members for row in items[item]] for members in micro_batches]
            for micro_batches in pack(tokens, ranks, token_budget)
        ]

    def largest(dealt: list[list[list[int]]]) -> int:
        return max(int(batch.lengths[micro_batch].sum()) for mine in dealt for micro_batch in mine)

    if keep_groups:
        return deal(_groups(batch, rows))
    single = deal([[row] for row in rows.tolist()])
    groups = _groups(batch, rows) if "group" in batch else []
    if len(groups) in (0, len(rows)) or max(int(batch.lengths[group].sum()) for group in groups) > token_budget:
        return single
    whole = deal(groups)
    return whole if len(whole[0]) == len(single[0]) and largest(whole) <= UNEVEN * largest(single) else single


def _shard(
    batch: Batch, learned: list[list[int]], statistics_rows: list[list[int]], padded: Sequence[list[int]] = ()
) -> tuple[list[int], Shard]:
    """The rows of these micro-batches, in their order, and their shard, in which micro-batches hold positions."""
    parts = (learned, statistics_rows, padded)
    rows = [row for part in parts for micro_batch in part for row in micro_batch]
    places = iter(range(len(rows)))
    mine, statistics, one_shape = (
        tuple(tuple(islice(places, len(micro_batch))) for micro_batch in part) for part in parts
    )
    return rows, Shard(batch.select(rows), mine, statistics, one_shape)


def _groups(batch: Batch, rows: Array) -> list[list[int]]:
    """The rows of each group."""
    groups: dict[int, list[int]] = {}
    for row, group in zip(rows.tolist(), batch["group"][rows].tolist(), strict=True):
        groups.setdefault(group, []).append(row)
    return list(groups.values())

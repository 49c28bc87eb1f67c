"""What the driver knows of a batch: a table of rows. The values per token stay where they were made.

    values per row (length, group, reward, truncated ...)    in the table
    values per token (tokens, mask, log-probabilities ...)   in blocks: batches in the object store, of which the table
                                                             holds references, and for each row its place in them

A block is what one call made: the samples of a prompt, or what one rank computed of its rows. So what passes through
the driver grows with the number of rows, and not with their lengths. Rows that the driver reads itself (data sets) may
come with all of their columns in the table; a stage cannot tell the difference.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from actors.batch import Array, Batch
from actors.columns import COLUMNS, Axis
from actors.other_prompts import DEMONSTRATION
from actors.sharding import Shard, Stored, shard, shard_groups
from actors.worker import Ref


@dataclass(frozen=True, eq=False)
class Share:
    """A rank's part of a table: which rows it got, in its order; the shard; and the blocks that the shard refers to."""

    rows: Array
    shard: Shard
    blocks: tuple[Ref, ...]


@dataclass(frozen=True, eq=False)
class RowTable:
    """`rows` has the lengths and every column that is in the driver. `spread`: columns per token that have one value a
    row. `stored`: columns that lie in blocks, the `blocks` being numbered as they stand here."""

    rows: Batch
    spread: Mapping[str, Array] = field(default_factory=dict[str, Array])
    stored: tuple[Stored, ...] = ()
    blocks: tuple[Ref, ...] = ()

    @classmethod
    def of_block(cls, rows: Batch, block: Ref, names: Iterable[str]) -> RowTable:
        """Rows whose columns `names` lie in one block, in the same order."""
        count = len(rows)
        return cls(rows, {}, (Stored(frozenset(names), np.zeros(count, np.int64), np.arange(count)),), (block,))

    @classmethod
    def concat(cls, tables: Sequence[RowTable]) -> RowTable:
        """Rows of all tables in order. All must have the same columns, kept in the same way."""
        tables = [table for table in tables if len(table)]
        if not tables:
            return cls(Batch.empty())
        first = tables[0]
        for table in tables:
            if table._layout != first._layout:
                raise ValueError(f"tables with columns {sorted(first.columns)} and {sorted(table.columns)} do not join")
        starts = np.cumsum([0, *(len(table.blocks) for table in tables)])
        stored = tuple(
            Stored(
                each.names,
                np.concatenate([t.stored[i].shifted(start) for t, start in zip(tables, starts[:-1], strict=True)]),
                np.concatenate([t.stored[i].rows for t in tables]),
            )
            for i, each in enumerate(first.stored)
        )
        spread = {name: np.concatenate([table.spread[name] for table in tables]) for name in first.spread}
        return cls(
            Batch.concat(table.rows for table in tables),
            spread,
            stored,
            tuple(b for table in tables for b in table.blocks),
        )

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, name: str) -> Array:
        """[B]: the values of a column per row."""
        if name in self.spread:
            return self.spread[name]
        return self.rows[name]

    def __contains__(self, name: str) -> bool:
        return name in self.columns

    @property
    def columns(self) -> frozenset[str]:
        return frozenset(self.rows.columns).union(self.spread, *(each.names for each in self.stored))

    @property
    def lengths(self) -> Array:
        """[B] int64: tokens of each row, prompt included."""
        return self.rows.lengths

    @property
    def num_tokens(self) -> int:
        return self.rows.num_tokens

    def select(self, chosen: Sequence[int] | Array) -> RowTable:
        """Those rows in that order; blocks that none of them needs are dropped."""
        chosen = np.asarray(chosen, np.int64)
        stored = tuple(each.select(chosen) for each in self.stored)
        used = np.unique(np.concatenate([np.zeros(0, np.int64), *(each.blocks for each in stored)]))
        used = used[used >= 0]
        renumbered = np.full(len(self.blocks) + 1, -1, np.int64)  # the last entry is that of -1: no block
        renumbered[used] = np.arange(len(used))
        return RowTable(
            self.rows.select(chosen),
            {name: values[chosen] for name, values in self.spread.items()},
            tuple(replace(each, blocks=renumbered[each.blocks]) for each in stored),
            tuple(self.blocks[index] for index in used.tolist()),
        )

    def with_values(self, **columns: Array | Sequence[float]) -> RowTable:
        """The table with columns added or replaced, one value a row each. A value of a column per token holds at each
        token of its row."""
        table = self.without(columns)
        spread = dict(table.spread)
        per_row: dict[str, Array | Sequence[float]] = {}
        for name, values in columns.items():
            if COLUMNS[name].axis is Axis.TOKEN:
                spread[name] = np.asarray(values, COLUMNS[name].dtype)
                if spread[name].shape != self.lengths.shape:
                    raise ValueError(f"{name} needs one value for each of {len(self)} rows, got {spread[name].shape}")
            else:
                per_row[name] = values
        return replace(table, rows=table.rows.with_columns(**per_row), spread=spread)

    def with_blocks(
        self, names: Iterable[str], parts: Sequence[tuple[Array, Ref]], *, beside: bool = False
    ) -> RowTable:
        """The table with columns that lie in new blocks: of each part, which rows of the table its block holds, in the
        block's order. Rows that no part holds keep what they have, if anything. `beside`: of wide columns, the values
        are added to those that each row has already."""
        names = frozenset(names)
        before = None if beside else next((each for each in self.stored if each.names == names), None)
        table = self if beside else self.without(names)
        absent = Stored(names, np.full(len(self), -1, np.int64), np.zeros(len(self), np.int64))
        blocks, rows = (before or absent).blocks.copy(), (before or absent).rows.copy()
        for number, (held, _) in enumerate(parts, len(table.blocks)):
            blocks[held], rows[held] = number, np.arange(len(held))
        refs = (*table.blocks, *(ref for _, ref in parts))
        return replace(table, stored=(*table.stored, Stored(names, blocks, rows)), blocks=refs)

    def with_columns_of(self, other: RowTable, names: Iterable[str]) -> RowTable:
        """The table with columns of another one's blocks, whose rows are the same."""
        names = frozenset(names)
        if len(other) != len(self):
            raise ValueError(f"columns of {len(other)} rows do not belong to {len(self)} rows")
        table, found = self.without(names), other.only(names)
        stored = (replace(each, blocks=each.blocks + len(table.blocks)) for each in found.stored)
        return replace(table, stored=(*table.stored, *stored), blocks=(*table.blocks, *found.blocks))

    def without(self, names: Iterable[str]) -> RowTable:
        """The table without those columns, as far as it has them."""
        gone = frozenset(names)
        return replace(
            self,
            rows=self.rows.only(self.rows.columns.keys() - gone),
            spread={name: values for name, values in self.spread.items() if name not in gone},
            stored=tuple(replace(each, names=each.names - gone) for each in self.stored if each.names - gone),
        )

    def only(self, names: Iterable[str]) -> RowTable:
        """The table with just these columns, as far as it has them."""
        return self.without(self.columns - frozenset(names))

    def whole(self) -> Share:
        """All rows as one rank's share."""
        rows = np.arange(len(self))
        part = Shard(self.rows, (tuple(rows.tolist()),), spread=self.spread, stored=self.stored)
        return Share(rows, part, self.blocks)

    def shard(
        self, ranks: int, token_budget: int, *, keep_groups: bool = False, statistics_rows: str | None = None
    ) -> list[Share]:
        """One share per rank: see `actors.sharding.shard`, which decides by lengths and groups alone."""
        return self._shares(
            shard(self.rows, ranks, token_budget, keep_groups=keep_groups, statistics_rows=statistics_rows)
        )

    def shard_groups(self, ranks: int, token_budget: int) -> list[Share]:
        """One share per rank, in which what a row gives depends on its group alone: `actors.sharding.shard_groups`."""
        return self._shares(shard_groups(self.rows, ranks, token_budget))

    def shard_behind_teacher_prompts(self, ranks: int, token_budget: int) -> list[Share]:
        """One share per rank, of rows as their teachers read them: `teacher_row_tokens` decides. After its own rows, in
        no micro-batch, a rank has those that they need as demonstrations."""
        columns = {"group": self["group"]} if "group" in self else {}
        dealt = shard(Batch(self["teacher_row_tokens"].astype(np.int64), columns), ranks, token_budget)
        shares: list[Share] = []
        for rows, mine in dealt:
            shown = self[DEMONSTRATION][rows] if DEMONSTRATION in self else np.zeros(0, np.int64)
            held = [*rows, *sorted({*shown[shown >= 0].tolist()} - {*rows})]
            part = self.select(held)
            if DEMONSTRATION in self:
                place = {row: at for at, row in enumerate(held)}
                part = part.with_values(**{DEMONSTRATION: [place.get(row, -1) for row in self[DEMONSTRATION][held]]})
            whole = part.whole()
            of_rank = replace(whole.shard, micro_batches=mine.micro_batches)
            shares.append(replace(whole, rows=np.asarray(rows, np.int64), shard=of_rank))
        return shares

    def _shares(self, dealt: Sequence[tuple[list[int], Shard]]) -> list[Share]:
        shares: list[Share] = []
        for rows, mine in dealt:
            chosen = np.asarray(rows, np.int64)
            part = replace(self, rows=Batch(self.lengths, {})).select(chosen)
            shares.append(Share(chosen, replace(mine, spread=part.spread, stored=part.stored), part.blocks))
        return shares

    @property
    def _layout(self) -> tuple[frozenset[str], frozenset[str], tuple[frozenset[str], ...]]:
        return frozenset(self.rows.columns), frozenset(self.spread), tuple(each.names for each in self.stored)

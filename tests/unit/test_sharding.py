from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from actors.batch import Batch
from actors.sharding import PASS_TOKENS, Shard, pack, padded_length, rows_of_a_pass, shard, shard_groups

BUDGET = 50
item_lengths = st.lists(st.integers(0, BUDGET), max_size=40)
rank_counts = st.integers(1, 5)


@given(item_lengths, rank_counts)
def test_every_item_is_assigned_exactly_once(lengths: list[int], ranks: int) -> None:
    dealt = [item for micros in pack(lengths, ranks, BUDGET) for micro in micros for item in micro]
    assert sorted(dealt) == list(range(len(lengths)))


@given(item_lengths, rank_counts)
def test_no_micro_batch_exceeds_the_budget(lengths: list[int], ranks: int) -> None:
    totals = [sum(lengths[i] for i in micro) for micros in pack(lengths, ranks, BUDGET) for micro in micros]
    assert all(total <= BUDGET for total in totals)


@given(item_lengths, rank_counts)
def test_every_rank_has_the_same_number_of_micro_batches(lengths: list[int], ranks: int) -> None:
    packed = pack(lengths, ranks, BUDGET)
    assert len(packed) == ranks
    assert len({len(micros) for micros in packed}) == 1


@given(item_lengths, rank_counts)
def test_packing_is_a_function_of_its_arguments(lengths: list[int], ranks: int) -> None:
    assert pack(lengths, ranks, BUDGET) == pack(np.asarray(lengths, np.int64), ranks, BUDGET)


@given(st.lists(st.integers(1, BUDGET), min_size=1, max_size=40), rank_counts)
def test_micro_batches_differ_by_at_most_one_item_s_length(lengths: list[int], ranks: int) -> None:
    totals = [sum(lengths[i] for i in micro) for micros in pack(lengths, ranks, BUDGET) for micro in micros]
    assert max(totals) - min(totals) <= max(lengths)


def test_no_more_micro_batches_than_are_needed() -> None:
    assert [len(micros) for micros in pack([10] * 10, 1, 100)] == [1]
    assert [len(micros) for micros in pack([10] * 11, 1, 100)] == [2]


def test_without_items_every_rank_gets_none() -> None:
    assert pack([], 3, 10) == [(), (), ()]


@pytest.mark.parametrize(
    ("lengths", "ranks", "budget", "message"),
    [([11], 1, 10, "11 tokens does not fit into token_budget=10"), ([1], 0, 10, "positive"), ([1], 1, 0, "positive")],
)
def test_what_cannot_be_packed_is_refused(lengths: list[int], ranks: int, budget: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pack(lengths, ranks, budget)


@given(st.lists(st.integers(1, 10), min_size=1, max_size=20), rank_counts)
def test_the_shards_together_are_the_batch(lengths: list[int], ranks: int) -> None:
    batch = Batch.build(lengths, tokens=np.arange(sum(lengths)))
    tokens = np.full(batch.num_tokens, -1)
    for rows, part in shard(batch, ranks, BUDGET):
        assert sorted(row for micro in part.micro_batches for row in micro) == list(range(len(rows)))
        tokens[batch.token_index(np.asarray(rows, np.int64))] = part.batch["tokens"]
    assert tokens.tolist() == batch["tokens"].tolist()


def micro_batches(groups: list[int], ranks: int, length: int = 10) -> list[list[int]]:
    """Which group each row of each micro-batch belongs to."""
    batch = Batch.build([length] * len(groups), tokens=np.zeros(length * len(groups), int), group=groups)
    dealt = shard(batch, ranks, BUDGET)
    return [[groups[rows[local]] for local in micro] for rows, part in dealt for micro in part.micro_batches]


def test_rows_of_a_group_stay_together_if_that_costs_nothing() -> None:
    assert micro_batches([0, 1, 0, 1, 2, 3, 2, 3], ranks=2) == [[0, 0, 2, 2], [1, 1, 3, 3]]


@pytest.mark.parametrize("groups", [[0, 0, 0, 1], [0, 0, 1, 1, 2, 2], [0] * 6 + [1, 2]])
def test_rows_of_a_group_are_separated_if_ranks_would_be_uneven_or_a_micro_batch_too_large(groups: list[int]) -> None:
    sizes = [len(micro) for micro in micro_batches(groups, ranks=2)]
    assert max(sizes) - min(sizes) <= 1


@given(st.lists(st.tuples(st.integers(1, 10), st.booleans()), min_size=1, max_size=20), rank_counts, st.booleans())
def test_statistics_rows_are_assigned_once_and_to_micro_batches_of_their_own(
    rows: list[tuple[int, bool]], ranks: int, keep_groups: bool
) -> None:
    lengths, marked = zip(*rows, strict=True)
    group = np.arange(len(rows)) // 2
    batch = Batch.build(lengths, tokens=np.arange(sum(lengths)), group=group, mismatched=np.array(marked))
    dealt = shard(batch, ranks, BUDGET, keep_groups=keep_groups, statistics_rows="mismatched")
    assert sorted(row for mine, _ in dealt for row in mine) == list(range(len(batch)))
    for kind, wanted in (("micro_batches", False), ("statistics_rows", True)):
        assert len({len(getattr(part, kind)) for _, part in dealt}) == 1, "the ranks move in step"
        for mine, part in dealt:
            named = [mine[local] for micro in getattr(part, kind) for local in micro]
            assert sorted(named) == [row for row in sorted(mine) if marked[row] is wanted]
            assert all(part.batch.lengths[list(micro)].sum() <= BUDGET for micro in getattr(part, kind))


@given(st.lists(st.tuples(st.integers(1, 10), st.integers(1, 4)), min_size=1, max_size=10), rank_counts)
def test_rows_of_a_group_stay_together_and_in_order(groups: list[tuple[int, int]], ranks: int) -> None:
    lengths = [length for length, count in groups for _ in range(count)]
    group = [index for index, (_, count) in enumerate(groups) for _ in range(count)]
    batch = Batch.build(lengths, tokens=np.arange(sum(lengths)), group=group)
    seen: dict[int, tuple[int, int]] = {}
    for rank, (rows, part) in enumerate(shard(batch, ranks, BUDGET, keep_groups=True)):
        for number, micro in enumerate(part.micro_batches):
            names = [group[rows[local]] for local in micro]
            assert [rows[local] for local in micro] == sorted(
                (rows[local] for local in micro), key=lambda r: (names.index(group[r]), r)
            )
            for name in set(names):
                assert seen.setdefault(name, (rank, number)) == (rank, number)
    assert len(seen) == len(groups)


def tokens_of_micro_batches(dealt: list[tuple[list[int], Shard]]) -> list[list[int]]:
    """Of each micro-batch that is not empty, its rows in order, each by its only token."""
    micro_batches = [part.batch.select(micro)["tokens"].tolist() for _, part in dealt for micro in part.micro_batches]
    return sorted(micro for micro in micro_batches if micro)


@given(
    st.lists(st.tuples(st.integers(1, 5), st.integers(1, BUDGET)), min_size=1, max_size=8),
    rank_counts,
    st.sampled_from([1, 40]),
)
def test_with_groups_apart_which_rows_share_a_micro_batch_depends_on_their_group_alone(
    groups: list[tuple[int, int]], ranks: int, times: int
) -> None:
    """Large groups have their own; small ones fill passes of one shape, each with rows that are padded to one length.
    `times`: so that there are large ones."""
    made = [
        Batch.build(
            [times * length] * rows,
            tokens=[100 * number + row for row in range(rows) for _ in range(times * length)],
            group=[number] * rows,
        )
        for number, (rows, length) in enumerate(groups)
    ]
    budget = times * BUDGET
    whole = shard_groups(Batch.concat(made), ranks, budget)
    assert sorted(row for rows, _ in whole for row in rows) == list(range(sum(rows for rows, _ in groups)))
    assert len({(len(part.micro_batches), len(part.padded)) for _, part in whole}) == 1, "ranks move in step"
    assert all(part.batch.select(micro).num_tokens <= budget for _, part in whole for micro in part.micro_batches)
    alone = [micro for each in made for micro in tokens_of_micro_batches(shard_groups(each, ranks, budget))]
    assert tokens_of_micro_batches(whole) == sorted(alone)
    for _, part in whole:
        for micro in part.padded:
            lengths = {padded_length(int(part.batch.lengths[row])) for row in micro}
            assert len(lengths) <= 1 and all(len(micro) <= rows_of_a_pass(length) for length in lengths)
    small = sum(rows for rows, length in groups if rows * length * times <= PASS_TOKENS // 2)
    assert sum(len(micro) for _, part in whole for micro in part.padded) == small


def test_small_groups_fill_passes_of_one_shape() -> None:
    """Of 100 rows of 9 tokens, padded to 16: six passes of 16, and one of four rows."""
    batch = Batch.build([9] * 100, tokens=np.zeros(900, np.int32), group=np.arange(100) // 2)
    (_, part), *_ = shard_groups(batch, 1, 4096)
    assert [len(micro) for micro in part.padded] == [*[16] * 6, 4] and part.micro_batches == ()
    assert [padded_length(length) for length in (1, 8, 9, 16, 17, 128)] == [8, 8, 16, 16, 32, 128]

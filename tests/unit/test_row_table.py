"""A table of rows whose values lie in blocks holds what a plain batch would, whatever is done to it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from actors.batch import Batch
from actors.worker import Ref
from orchestrator.batches.row_table import RowTable, Share

STORED = ("tokens", "mask", "sample_logps")
Draw = np.random.Generator


def sampled(random: Draw, rows: int, group: int, *, longest: int = 6) -> Batch:
    """What a call made: samples of one prompt, say."""
    lengths = random.integers(1, longest + 1, rows)
    total = int(lengths.sum())
    return Batch.build(
        lengths,
        tokens=random.integers(0, 90, total),
        mask=random.random(total) < 0.7,
        sample_logps=random.normal(size=total).astype(np.float32),
        group=[group] * rows,
        reward=random.normal(size=rows).astype(np.float32),
    )


def in_a_block(batch: Batch) -> RowTable:
    """The same rows with their values per token out of the driver's sight."""
    return RowTable.of_block(batch.only({"group", "reward"}), Ref(batch.only(STORED)), STORED)


def fetched(share: Share) -> Batch:
    """What a rank makes of its share."""
    return share.shard.fetched([block.target for block in share.blocks]).batch


def whole(table: RowTable) -> Batch:
    return fetched(table.whole())


def assert_equal(found: Batch, wanted: Batch) -> None:
    np.testing.assert_array_equal(found.lengths, wanted.lengths)
    assert set(found.columns) == set(wanted.columns)
    for name, values in wanted.columns.items():
        np.testing.assert_array_equal(found[name], values, err_msg=name)
        assert found[name].dtype == values.dtype


@st.composite
def tables(draw: Any) -> tuple[RowTable, Batch, Draw]:
    """Some groups in blocks, rows of them in any order, and the plain batch of the same rows."""
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    groups = [
        sampled(random, rows, number) for number, rows in enumerate(draw(st.lists(st.integers(1, 4), min_size=1)))
    ]
    table, plain = RowTable.concat([in_a_block(group) for group in groups]), Batch.concat(groups)
    chosen = draw(st.lists(st.integers(0, len(plain) - 1), min_size=1, max_size=12))
    return table.select(chosen), plain.select(chosen), random


def computed(random: Draw, table: RowTable, plain: Batch, name: str, ranks: int) -> tuple[RowTable, Batch]:
    """A column that ranks computed of their shares: both with it."""
    values = random.normal(size=plain.num_tokens).astype(np.float32)
    shares = table.only({"tokens", "mask", "group"}).shard(ranks, 64)
    parts = [(s.rows, Ref(plain.with_columns(**{name: values}).select(s.rows).only({name}))) for s in shares]
    return table.with_blocks({name}, parts), plain.with_columns(**{name: values})


@settings(max_examples=60, deadline=None)
@given(tables(), st.integers(1, 3), st.booleans())
def test_what_the_ranks_fetch_of_their_shares_is_the_plain_batch(
    drawn: tuple[RowTable, Batch, Draw], ranks: int, keep_groups: bool
) -> None:
    table, plain, random = drawn
    table, plain = computed(random, table, plain, "ref_logps", ranks)
    spread = random.normal(size=len(plain)).astype(np.float32)
    table = table.with_values(advantages=spread, label=spread > 0)
    plain = plain.with_columns(advantages=np.repeat(spread, plain.lengths), label=spread > 0)
    shares = table.shard(ranks, plain.num_tokens, keep_groups=keep_groups)
    assert sorted(row for share in shares for row in share.rows.tolist()) == list(range(len(plain)))
    for share in shares:
        assert_equal(fetched(share), plain.select(share.rows))
    assert_equal(whole(table), plain)


@settings(max_examples=40, deadline=None)
@given(tables(), tables(), st.data())
def test_tables_join_and_are_cut_as_batches_are(
    one: tuple[RowTable, Batch, Draw], other: tuple[RowTable, Batch, Draw], data: Any
) -> None:
    (table, plain, _), (further, more, _) = one, other
    table, plain = RowTable.concat([table, further]), Batch.concat([plain, more])
    chosen = data.draw(st.lists(st.integers(0, len(plain) - 1), max_size=8))
    assert_equal(whole(table), plain)
    cut = table.select(chosen)
    assert len(cut.blocks) == len({table.stored[0].blocks[row] for row in chosen}), "blocks of no row are let go of"
    if chosen:
        assert_equal(whole(cut), plain.select(chosen))
    np.testing.assert_array_equal(cut["reward"], plain["reward"][chosen])


@settings(max_examples=30, deadline=None)
@given(tables())
def test_columns_are_replaced_wherever_they_were_kept(drawn: tuple[RowTable, Batch, Draw]) -> None:
    table, plain, random = drawn
    values = np.arange(len(plain), dtype=np.float32)
    table = table.with_values(sample_logps=values, reward=values)  # one of them lay in blocks
    plain = plain.with_columns(sample_logps=np.repeat(values, plain.lengths), reward=values)
    assert_equal(whole(table), plain)
    table, plain = computed(random, table, plain, "sample_logps", 2)  # and there again
    assert_equal(whole(table), plain)
    assert_equal(whole(table.only({"tokens", "reward"})), plain.only({"tokens", "reward"}))
    assert_equal(whole(table.without({"tokens"})), plain.only(set(plain.columns) - {"tokens"}))


@settings(max_examples=30, deadline=None)
@given(tables())
def test_a_column_may_be_written_for_some_rows_first_and_is_not_read_before_all_have_it(
    drawn: tuple[RowTable, Batch, Draw],
) -> None:
    table, plain, random = drawn
    values = random.normal(size=plain.num_tokens).astype(np.float32)
    expected = plain.with_columns(ref_logps=values)
    for some in (np.arange(0, len(plain), 2), np.arange(1, len(plain), 2)):
        if len(plain) > 1 and "ref_logps" in table:
            with pytest.raises(ValueError, match=r"rows have no ref_logps: no stage wrote it"):
                whole(table.select(np.arange(len(plain))[::-1]))
        if len(some):
            table = table.with_blocks({"ref_logps"}, [(some, Ref(expected.select(some).only({"ref_logps"})))])
    assert_equal(whole(table), expected)
    backwards = np.arange(len(plain))[::-1]
    assert_equal(whole(RowTable.concat([table, table.select(backwards)])).select(backwards + len(plain)), expected)


def test_values_of_a_wide_column_may_lie_in_several_blocks_side_by_side() -> None:
    batch = sampled(np.random.default_rng(1), 3, group=0)
    one, other = (np.random.default_rng(seed).normal(size=(batch.num_tokens, 2)).astype(np.float32) for seed in (2, 3))
    name, everything = "teacher_topk_logps", np.arange(3)
    table = in_a_block(batch)
    for values, beside in ((other, False), (one, False), (other, True)):  # the first is replaced
        block = Batch.build(batch.lengths, **{name: values})
        table = table.with_blocks({name}, [(everything, Ref(block))], beside=beside)
    expected = batch.with_columns(**{name: np.concatenate([one, other], axis=1)})
    assert_equal(whole(table), expected)
    assert_equal(whole(table.select([2, 0])), expected.select([2, 0]))
    assert name not in table.without({name})


def test_rows_that_are_not_learned_from_have_an_empty_mask() -> None:
    batch = Batch.build([2, 3], tokens=[1, 2, 3, 4, 5], mask=[False, True, False, True, True], group=[0, 0])
    table = RowTable.of_block(batch.only({"group"}), Ref(batch.only({"tokens", "mask"})), {"tokens", "mask"})
    found = whole(table.with_values(learned=[True, False]))
    assert found["mask"].tolist() == [False, True, False, False, False]
    assert "learned" not in found


def test_what_the_driver_holds_does_not_grow_with_the_length_of_the_rows() -> None:
    def held(longest: int) -> int:
        random = np.random.default_rng(0)
        lengths = [longest] * 8
        batch = Batch.build(lengths, tokens=random.integers(0, 9, 8 * longest), group=[0] * 8)
        table = RowTable.of_block(batch.only({"group"}), Ref(batch.only({"tokens"})), {"tokens"})
        table = table.with_values(advantages=np.zeros(8, np.float32))
        (share,) = table.shard(1, 8 * longest)
        return sum(array.nbytes for array in arrays(table)) + sum(array.nbytes for array in arrays(share.shard))

    assert held(10) == held(10_000) < 2_000


def arrays(of: Any) -> list[np.ndarray]:
    """Of a table or a shard: everything that travels with it, its blocks aside."""
    rows = of.rows if isinstance(of, RowTable) else of.batch
    places = [array for stored in of.stored for array in (stored.blocks, stored.rows)]
    return [rows.lengths, *rows.columns.values(), *of.spread.values(), *places]


def test_tables_with_other_columns_or_kept_otherwise_do_not_join() -> None:
    batch = sampled(np.random.default_rng(0), 2, 0)
    with pytest.raises(ValueError, match="do not join"):
        RowTable.concat([in_a_block(batch), RowTable(batch)])
    with pytest.raises(ValueError, match=r"'label'.*do not join"):
        RowTable.concat([in_a_block(batch).with_values(label=[True, False]), in_a_block(batch)])


def test_a_value_for_each_row_is_wanted_also_of_a_column_per_token() -> None:
    table = in_a_block(sampled(np.random.default_rng(0), 3, 0))
    with pytest.raises(ValueError, match="advantages needs one value for each of 3 rows"):
        table.with_values(advantages=np.zeros(table.num_tokens + 1, np.float32))


def test_an_empty_table_joins_any_other_and_stays_empty_by_itself() -> None:
    batch = sampled(np.random.default_rng(0), 2, 0)
    assert_equal(whole(RowTable.concat([RowTable(Batch.empty()), in_a_block(batch)])), batch)
    assert len(RowTable.concat([RowTable(Batch.empty())])) == 0

from __future__ import annotations

import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from actors.batch import Batch
from actors.objective import MicroBatch


def numbered(lengths: list[int], start: int = 0) -> Batch:
    """Every token a number of its own, every row a reward of its own."""
    tokens = np.arange(start, start + sum(lengths))
    return Batch.build(lengths, tokens=tokens, reward=np.arange(len(lengths)) + start)


lengths_and_rows = st.lists(st.integers(0, 6), min_size=1, max_size=12).flatmap(
    lambda lengths: st.tuples(st.just(lengths), st.lists(st.integers(0, len(lengths) - 1), max_size=20))
)


@given(lengths_and_rows)
def test_selected_rows_keep_their_own_tokens_in_the_given_order(drawn: tuple[list[int], list[int]]) -> None:
    lengths, rows = drawn
    batch = numbered(lengths)
    selected = batch.select(rows)
    assert [selected.row("tokens", i).tolist() for i in range(len(rows))] == [
        batch.row("tokens", r).tolist() for r in rows
    ]
    assert selected["reward"].tolist() == [float(r) for r in rows]
    assert batch["tokens"][batch.token_index(np.asarray(rows, np.int64))].tolist() == selected["tokens"].tolist()


@given(st.lists(st.lists(st.integers(0, 5), max_size=5), max_size=4))
def test_concatenation_keeps_all_rows_in_order(parts: list[list[int]]) -> None:
    batches = [numbered(lengths, start=100 * i) for i, lengths in enumerate(parts)]
    whole = Batch.concat(batches)
    assert whole.lengths.tolist() == [length for lengths in parts for length in lengths]
    if len(whole):
        assert whole["tokens"].tolist() == [token for batch in batches for token in batch["tokens"].tolist()]


@given(st.lists(st.integers(0, 6), max_size=10))
def test_sums_by_row_and_their_spreading_agree_between_numpy_and_torch(lengths: list[int]) -> None:
    batch = numbered(lengths)
    micro = MicroBatch.of(batch)
    expected = [int(batch.row("tokens", i).sum()) for i in range(len(lengths))]
    assert batch.sum_by_row(batch["tokens"]).tolist() == expected
    assert micro.sum_by_row(micro["tokens"]).tolist() == expected
    assert micro.per_token(micro["reward"]).tolist() == [float(i) for i, n in enumerate(lengths) for _ in range(n)]
    assert micro.offsets.tolist() == batch.offsets.tolist()
    assert micro.row_of_token.tolist() == batch.row_of_token.tolist()


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"token": [1, 2, 3]}, "unknown column 'token'"),
        ({"tokens": [1, 2]}, r"per token and needs shape \(3,\), got \(2,\)"),
        ({"reward": [1.0, 2.0, 3.0]}, r"per row and needs shape \(2,\), got \(3,\)"),
        ({"tokens": [1.5, 2.0, 3.0]}, "holds int32, got float64"),
        ({"tokens": [[1], [2], [3]]}, r"got \(3, 1\)"),
    ],
)
def test_a_column_that_does_not_fit_is_refused(columns: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Batch.build([2, 1], **columns)
    with pytest.raises(ValueError, match=message):
        Batch.build([2, 1]).with_columns(**columns)


def test_columns_take_the_dtype_of_the_vocabulary() -> None:
    batch = Batch.build([2], tokens=[1, 2], mask=[True, False], reward=[1])
    assert (batch["tokens"].dtype, batch["mask"].dtype, batch["reward"].dtype) == (np.int32, np.bool_, np.float32)


def test_batches_with_different_columns_do_not_concatenate() -> None:
    with pytest.raises(ValueError, match="cannot concatenate"):
        Batch.concat([Batch.build([1], tokens=[1]), Batch.build([1], tokens=[1], reward=[0.0])])


def test_a_missing_column_is_an_error_that_names_those_there_are() -> None:
    with pytest.raises(KeyError, match=r"no column 'mask'.*tokens"):
        Batch.build([1], tokens=[1])["mask"]
    with pytest.raises(KeyError, match="no column 'mask'"):
        Batch.build([1], tokens=[1]).only(["mask"])


def test_new_columns_do_not_change_the_original_batch() -> None:
    batch = numbered([2, 1])
    wider = batch.with_columns(mask=[True, True, False])
    assert "mask" in wider and "mask" not in batch
    assert wider.only(["mask"]).columns.keys() == {"mask"}


def test_a_batch_survives_pickling() -> None:
    batch = numbered([3, 2])
    copy = pickle.loads(pickle.dumps(batch))
    assert copy.lengths.tolist() == [3, 2]
    assert copy["tokens"].tolist() == batch["tokens"].tolist()


def test_a_micro_batch_does_not_write_into_the_batch_it_came_from() -> None:
    batch = numbered([3])
    for values in (batch.lengths, *batch.columns.values()):
        values.flags.writeable = False  # as arrays from the object store are
    micro = MicroBatch.of(batch)
    micro["tokens"][0] = 7
    assert batch["tokens"].tolist() == [0, 1, 2]


def test_size_in_bytes_counts_lengths_and_columns() -> None:
    assert Batch.build([2, 1], tokens=[1, 2, 3]).nbytes() == 2 * 8 + 3 * 4

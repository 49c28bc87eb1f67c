"""Rows that join a prompt to another prompt's completion."""

from __future__ import annotations

import pytest

from actors.batch import Batch
from orchestrator.data.mismatched_rows import with_mismatches


def labelled() -> Batch:
    return Batch.build(
        [3, 2, 5],
        tokens=[1, 11, 12, 2, 21, 3, 3, 31, 32, 33],
        mask=[False, True, True, False, True, False, False, True, False, True],
        group=[7, 8, 9],
        label=[True, False, True],
    )


def test_each_row_is_kept_and_followed_by_its_prompt_with_the_completion_before_it() -> None:
    doubled = with_mismatches(labelled())
    rows = [doubled.row("tokens", row).tolist() for row in range(len(doubled))]
    assert rows[::2] == [[1, 11, 12], [2, 21], [3, 3, 31, 32, 33]]
    assert rows[1::2] == [[1, 31, 32, 33], [2, 11, 12], [3, 3, 21]]
    assert doubled["mismatched"].tolist() == [False, True] * 3
    assert doubled["group"].tolist() == [7, 7, 8, 8, 9, 9]
    assert doubled["label"].tolist() == [True, True, False, False, True, True]


def test_the_mask_of_a_completion_goes_with_it() -> None:
    doubled = with_mismatches(labelled())
    assert doubled.row("mask", 1).tolist() == [False, True, False, True]  # a tool's token stays masked


def test_a_single_row_cannot_be_mismatched() -> None:
    with pytest.raises(ValueError, match="at least two examples in a batch, got 1"):
        with_mismatches(labelled().select([0]))


def test_a_completion_of_the_same_prompt_is_no_mismatch() -> None:
    """As where a pair was taken apart into its two answers."""
    rows = Batch.build([2, 2, 2], tokens=[1, 11, 1, 12, 2, 21], mask=[False, True] * 3, group=[0, 1, 2])
    doubled = with_mismatches(rows)
    assert [doubled.row("tokens", row).tolist() for row in (1, 3, 5)] == [[1, 21], [1, 21], [2, 12]]


def test_a_mismatched_row_is_cut_to_the_limit_and_the_given_rows_are_not() -> None:
    doubled = with_mismatches(labelled(), max_length=3)
    assert doubled.lengths.tolist() == [3, 3, 2, 3, 5, 3]
    assert doubled.row("tokens", 1).tolist() == [1, 31, 32]

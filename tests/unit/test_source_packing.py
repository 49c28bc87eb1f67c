"""Packing and order are pure functions of lengths, seed and position."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from actors.forward import forward
from actors.model import ModelSpec, load_model
from actors.objective import MicroBatch
from orchestrator.data.document_packing import Bin, best_fit_decreasing, wrapped
from orchestrator.data.order import Order
from orchestrator.pipeline import Completions
from tests.unit.source_stub import opened, tokenizer, write_rows
from tests.unit.tiny import tiny_model_folder

GOLDEN = json.loads((Path(__file__).parent.parent / "golden" / "packing.json").read_text())
LENGTHS = st.lists(st.integers(0, 30), max_size=60)


def tokens_of(bins: list[Bin], documents: list[list[int]]) -> list[list[int]]:
    return [[token for piece in bin_ for token in documents[piece.document][piece.start : piece.stop]] for bin_ in bins]


@pytest.mark.parametrize("case", GOLDEN["cases"], ids=lambda case: case["id"])
def test_packs_equal_those_of_trl(case: dict) -> None:
    documents, max_length = case["inputs"]["input_ids"], case["inputs"]["seq_length"]
    bins = best_fit_decreasing([len(d) for d in documents], max_length, split=case["id"].endswith("split"))
    assert tokens_of(bins, documents) == case["outputs"]["input_ids"]
    assert [[len(piece) for piece in bin_] for bin_ in bins] == case["outputs"]["seq_lengths"]


def logps_by_letter(tmp_path: Path, documents: list[str], packing: str) -> dict[str, list[float]]:
    """What a model makes of each document, all of them in the same micro-batch; a document is one letter repeated."""
    file = write_rows(tmp_path / "d.jsonl", [{"text": text} for text in documents])
    source = opened(file, Completions, max_length=16, packing=packing, append_eos=False)
    batch = source.batch(range(len(source)))
    micro = MicroBatch.of(batch)
    model = load_model(ModelSpec(str(tiny_model_folder(tmp_path, vocab=258))), trainable=False)
    with torch.no_grad():
        logps = forward(model, micro).logps.tolist()
    words, found = tokenizer(), dict[str, list[float]]()
    for token, value in zip(batch["tokens"].tolist(), logps, strict=True):
        found.setdefault(words.decode([token]), []).append(value)
    return found


@pytest.mark.parametrize("packing", ["none", "bfd", "bfd_split", "wrapped"])
def test_packed_documents_never_attend_to_one_another(tmp_path: Path, packing: str) -> None:
    before = logps_by_letter(tmp_path, ["a" * 9, "b" * 20, "c" * 5, "d" * 2], packing)
    after = logps_by_letter(tmp_path, ["e" * 9, "b" * 20, "c" * 5, "f" * 2], packing)
    assert {letter: after[letter] for letter in "bc"} == {letter: before[letter] for letter in "bc"}
    assert after["e"] != before["a"]


def test_wrapped_cuts_the_concatenation_of_all_documents_every_max_length_tokens() -> None:
    documents = [[1, 2, 3, 4, 5], [6, 7], [8, 9, 10]]
    assert tokens_of(wrapped([5, 2, 3], 4), documents) == [[1, 2, 3, 4], [5, 6, 7, 8], [9, 10]]


@given(LENGTHS, st.integers(1, 20), st.booleans())
def test_no_pack_is_over_its_length_and_every_token_that_may_be_kept_is_in_exactly_one(
    lengths: list[int], max_length: int, split: bool
) -> None:
    bins = best_fit_decreasing(lengths, max_length, split=split)
    assert all(0 < sum(map(len, bin_)) <= max_length for bin_ in bins)
    packed = sorted((p.document, position) for bin_ in bins for p in bin_ for position in range(p.start, p.stop))
    kept = [(d, t) for d, length in enumerate(lengths) for t in range(length if split else min(length, max_length))]
    assert packed == kept


@given(LENGTHS, st.integers(1, 20))
def test_best_fit_leaves_no_two_packs_that_fit_into_one(lengths: list[int], max_length: int) -> None:
    sizes = sorted(sum(map(len, bin_)) for bin_ in best_fit_decreasing(lengths, max_length))
    assert len(sizes) < 2 or sizes[0] + sizes[1] > max_length


@given(LENGTHS, st.integers(1, 20))
def test_wrapped_keeps_every_token_once_and_fills_every_pack_but_the_last(lengths: list[int], max_length: int) -> None:
    bins = wrapped(lengths, max_length)
    kept = [(p.document, position) for bin_ in bins for p in bin_ for position in range(p.start, p.stop)]
    assert kept == [(d, t) for d, length in enumerate(lengths) for t in range(length)]
    assert all(sum(map(len, bin_)) == max_length for bin_ in bins[:-1])


@given(st.integers(0, 5), st.integers(1, 40), st.booleans())
def test_every_epoch_draws_every_item_once(seed: int, length: int, shuffle: bool) -> None:
    order = Order(seed, length, shuffle)
    for epoch in range(3):
        draws = [order.at(position) for position in range(epoch * length, (epoch + 1) * length)]
        assert {e for e, _ in draws} == {epoch}
        assert sorted(index for _, index in draws) == list(range(length))


def test_shuffled_epochs_differ_from_each_other_and_between_seeds() -> None:
    def epoch(seed: int, number: int) -> list[int]:
        return [Order(seed, 50, shuffle=True).at(number * 50 + rank)[1] for rank in range(50)]

    assert epoch(0, 0) == epoch(0, 0)
    assert len({tuple(epoch(0, 0)), tuple(epoch(0, 1)), tuple(epoch(1, 0)), tuple(range(50))}) == 4


def test_without_shuffling_the_data_sets_own_order_is_kept() -> None:
    assert [Order(3, 4, shuffle=False).at(position) for position in (0, 3, 4, 9)] == [(0, 0), (0, 3), (1, 0), (2, 1)]

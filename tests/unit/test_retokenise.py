"""A completion in the tokens of another tokenizer: which tokens of both begin at the same character, and what a model
with that tokenizer says there."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from actors.batch import Batch
from actors.columns import Head
from actors.distributions import TopK
from actors.model import ModelSpec
from actors.model_worker import ModelWorker
from actors.other_prompts import FILL, OtherPrompts
from actors.retokenise import Retokeniser, pieces_of, retokeniser_of
from actors.sharding import shard
from actors.specs import BackendSpec
from orchestrator.losses.cross_tokenizer import across_vocabularies, sorted_distance
from orchestrator.losses.distillation import TEACHER_TOP_K, jensen_shannon
from tests.unit.source_stub import merging_tokenizer, tokenizer
from tests.unit.tiny import tiny_model_folder


def ids_of(words: Any, text: str) -> list[int]:
    return list(words(text, add_special_tokens=False)["input_ids"])


@pytest.fixture
def pairs() -> Retokeniser:
    """From one token a byte to one with some pairs."""
    return Retokeniser(tokenizer(), merging_tokenizer("ab", "cd"))


def test_tokens_that_begin_at_the_same_character_are_aligned(pairs: Retokeniser) -> None:
    ids, places = pairs.aligned(ids_of(pairs.ours, "xabcda"))
    assert ids == ids_of(pairs.theirs, "xabcda") and len(ids) == 4
    assert places.tolist() == [0, 1, -1, 2, -1, 3]
    back = Retokeniser(pairs.theirs, pairs.ours)
    ids, places = back.aligned(ids_of(back.ours, "xabcda"))
    assert places.tolist() == [0, 1, 3, 5] and len(ids) == 6


def test_the_end_of_a_completion_is_aligned_with_the_other_s_end_and_a_cut_one_has_none(pairs: Retokeniser) -> None:
    ids, places = pairs.aligned([*ids_of(pairs.ours, "ab"), pairs.ours.eos_token_id])
    assert ids == [*ids_of(pairs.theirs, "ab"), pairs.theirs.eos_token_id]
    assert places.tolist() == [0, -1, 1]
    assert pairs.aligned([])[0] == []
    ids, places = pairs.aligned([pairs.ours.eos_token_id])
    assert (ids, places.tolist()) == ([pairs.theirs.eos_token_id], [0])


def test_a_token_within_a_character_is_aligned_with_nothing(pairs: Retokeniser) -> None:
    text = "é€a"
    assert pieces_of(pairs.ours, ids_of(pairs.ours, text)) == ["", "é", "", "", "€", "a"]
    ids, places = pairs.aligned(ids_of(pairs.ours, text))
    assert places[0] == 0 and places[2] == 2 and places[5] == len(ids) - 1
    assert places[[1, 3, 4]].tolist() == [-1, -1, -1]


def test_tokens_with_the_same_string_are_the_same_and_others_are_nobody_s(pairs: Retokeniser) -> None:
    ours, theirs = pairs.ours.get_vocab(), pairs.theirs.get_vocab()
    assert pairs.in_ours[theirs["a"]] == ours["a"] and pairs.in_ours[theirs["ab"]] == -1
    assert pairs.in_ours[pairs.theirs.eos_token_id] == pairs.ours.eos_token_id


def test_a_model_with_another_tokenizer_says_at_aligned_tokens_what_it_says_in_its_own(tmp_path: Path) -> None:
    ours, theirs = tokenizer(), merging_tokenizer("ab", "cd")
    own = tmp_path / "ours"
    ours.save_pretrained(own)
    vocab = len(theirs.get_vocab())
    folder = tiny_model_folder(tmp_path, hidden=32, vocab=vocab, tied=False)
    theirs.save_pretrained(folder)
    answer = [*ids_of(ours, "abcd1"), ours.eos_token_id]
    prompt, read = ids_of(ours, "12+34="), ids_of(theirs, "cd")
    batch = Batch.build(
        [len(prompt) + len(answer)],
        tokens=[*prompt, *answer],
        mask=[False] * len(prompt) + [True] * len(answer),
        teacher_prompt=[[*read, FILL]],
        completion_tokens=[len(answer)],
    )
    worker = ModelWorker("teacher", ModelSpec(str(folder)), BackendSpec("single", None), threads=1)
    worker.ready()
    ((_, part),) = shard(batch, 1, 64)
    other = OtherPrompts(str(own), str(folder))
    found = worker.infer(part, TEACHER_TOP_K, Head.VOCABULARY, 1.0, True, TopK(4), other)[1]
    whole = [*read, *ids_of(theirs, "abcd1"), theirs.eos_token_id]
    assert worker._backend is not None
    mine = Batch.build([len(whole)], tokens=whole, mask=np.arange(len(whole)) >= len(read))
    ((_, plain),) = shard(mine, 1, 64)
    expected = worker.infer(plain, TEACHER_TOP_K, Head.VOCABULARY, 1.0, True, TopK(4))[1]
    at = {6: 1, 8: 2, 10: 3, 11: 4}  # "ab", "cd", "1" and the end: our place, and theirs
    in_ours = retokeniser_of(str(own), str(folder), False).in_ours
    for here, there in at.items():
        np.testing.assert_array_equal(found["teacher_topk_logps"][here], expected["teacher_topk_logps"][there])
        np.testing.assert_array_equal(found["teacher_tail_logps"][here], expected["teacher_tail_logps"][there])
        ids = in_ours[expected["teacher_topk_ids"][there]]
        np.testing.assert_array_equal(found["teacher_topk_ids"][here], ids)
    assert np.isnan(found["teacher_tail_logps"][[7, 9]]).all() and not found["teacher_tail_logps"][:6].any()


def test_with_fewer_tokens_the_distance_is_at_most_the_whole_one_and_with_all_it_is_that() -> None:
    torch.manual_seed(0)
    student, teacher = torch.randn(50, 9), 2 * torch.randn(50, 12)
    logps = teacher.log_softmax(-1).sort(-1, descending=True).values
    padded = torch.nn.functional.pad(student.softmax(-1).sort(-1, descending=True).values, (0, 3))
    whole = (padded - logps.exp()).abs().sum(-1)
    found = []
    for k in (1, 3, 6, 12):
        left = (1 - logps[:, :k].exp().sum(-1, keepdim=True)).clamp(min=0).log()
        found.append(sorted_distance(student, logps[:, :k], left))
    assert all((less <= more + 1e-5).all() for less, more in pairwise(found))
    torch.testing.assert_close(found[-1], whole, atol=1e-5, rtol=1e-4)
    assert (found[0] < whole - 0.1).any()


def test_of_one_vocabulary_the_shared_part_is_the_divergence_of_the_whole_distributions() -> None:
    torch.manual_seed(1)
    student, teacher = torch.randn(2, 40, 9).unbind()
    logps, ids = teacher.log_softmax(-1).sort(-1, descending=True)
    nothing = torch.full((40, 1), -torch.inf)
    found = across_vocabularies(student, ids.int(), logps, nothing, beta=0.3, shared_weight=1.0)
    torch.testing.assert_close(found, jensen_shannon(student, teacher, beta=0.3))


def test_a_token_that_we_lack_counts_as_one_of_the_others_and_what_is_not_known_has_no_gradient() -> None:
    student = torch.tensor([[2.0, 0.0, 1.0]] * 2).requires_grad_()
    logps = torch.tensor([[0.5, 0.3]]).log().expand(2, 2)
    tail = torch.tensor([[0.2], [torch.nan]]).log()
    found = across_vocabularies(student, torch.tensor([[1, -1]] * 2).int(), logps, tail, beta=0.0, shared_weight=1.0)
    own = student[0].detach().softmax(-1)
    expected = 0.5 * (0.5 / own[1]).log() + 0.5 * (0.5 / (own[0] + own[2])).log()
    assert float(found[0].detach()) == pytest.approx(float(expected), abs=1e-6)
    torch.where(torch.tensor([True, False]), found, 0).sum().backward()
    assert student.grad is not None and student.grad[0].all() and not student.grad[1].any()

"""Requests, seeds and the batch that completions become; what ends a completion; how the hf engine draws."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import GenerationConfig

from actors.errors import ConfigError, DataFailure
from rollout.hf_engine import draw, truncate
from rollout.sampling import Completion, Finish, Request, Sampling, sample_seed, to_batch
from rollout.stopping import StopRule, end_token_ids, resolved_stops, token_budget
from tests.unit.tiny import tiny_model_folder, tiny_tokenizer

REQUEST = Request("step 3, prompt 7", (4, 5, 6), n=2, sampling=Sampling(max_tokens=8), seed=11, group=42)


def completion(index: int, tokens: list[int], version: int = 0, finish: Finish = Finish.STOP) -> Completion:
    logps = -np.arange(1, len(tokens) + 1, dtype=np.float32)
    return Completion(index, np.array(tokens, np.int32), logps, np.full(len(tokens), version, np.int32), finish)


def test_a_batch_has_a_row_per_sample_in_order_of_index_whatever_finished_first() -> None:
    batch = to_batch(REQUEST, [completion(1, [9], version=4, finish=Finish.LENGTH), completion(0, [7, 8], version=3)])
    assert batch.lengths.tolist() == [5, 4]
    assert batch["tokens"].tolist() == [4, 5, 6, 7, 8, 4, 5, 6, 9]
    assert batch["mask"].tolist() == [False] * 3 + [True] * 2 + [False] * 3 + [True]
    assert batch["sample_logps"].tolist() == [0, 0, 0, -1, -2, 0, 0, 0, -1]
    assert batch["version"].tolist() == [-1, -1, -1, 3, 3, -1, -1, -1, 4]
    assert batch["group"].tolist() == [42, 42]
    assert batch["truncated"].tolist() == [False, True]


def test_a_request_without_surviving_samples_becomes_an_empty_batch() -> None:
    assert len(to_batch(REQUEST, [])) == 0


@given(st.integers(min_value=0), st.integers(0, 10_000))
def test_sample_seeds_fit_a_signed_64_bit_integer(seed: int, index: int) -> None:
    assert 0 <= sample_seed(seed, index) < 2**63


def test_sample_seeds_are_the_same_in_every_process_and_differ_between_samples() -> None:
    code = "from rollout.sampling import sample_seed; print([sample_seed(5, i) for i in range(4)])"
    elsewhere = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    seeds = [sample_seed(5, index) for index in range(4)]
    assert elsewhere.stdout.strip() == str(seeds)
    assert len({*seeds, sample_seed(6, 0)}) == 5


@pytest.mark.parametrize(
    ("sampling", "truncates"),
    [
        (Sampling(8), False),
        (Sampling(8, temperature=0.5), False),
        (Sampling(8, top_p=0.9), True),
        (Sampling(8, top_k=3), True),
        (Sampling(8, min_p=0.1), True),
        (Sampling(8, temperature=0, top_k=3), False),
    ],
)
def test_only_a_sampler_that_leaves_tokens_out_truncates_the_distribution(sampling: Sampling, truncates: bool) -> None:
    assert sampling.truncates_distribution is truncates


def test_the_budget_is_max_tokens_or_what_the_context_leaves() -> None:
    assert token_budget(REQUEST, 100) == 8
    assert token_budget(REQUEST, 5) == 2
    with pytest.raises(DataFailure, match=r"3 tokens.*max_model_len = 3.*1 to 2"):
        token_budget(REQUEST, 3)


def test_the_generation_configuration_says_what_ends_a_sequence_before_the_model_does(tmp_path: Path) -> None:
    folder = tiny_model_folder(tmp_path)
    assert end_token_ids(str(folder)) == (1,)
    GenerationConfig(eos_token_id=[1, 17]).save_pretrained(folder)
    assert end_token_ids(str(folder)) == (1, 17)
    (folder / "generation_config.json").unlink()
    assert end_token_ids(str(folder)) == (1,)


def test_a_stop_string_is_found_across_tokens_and_only_at_the_end(tmp_path: Path) -> None:
    rule = StopRule(str(tiny_model_folder(tmp_path)), end_ids=(1,))
    tokens: list[int] = tiny_tokenizer().encode("12+34=46")
    sampling = Sampling(50, stop=("=4",))
    finishes = [rule.finish(tokens[:count], sampling, budget=50) for count in range(1, len(tokens))]
    assert finishes == [None] * 6 + [Finish.STOP]


def test_a_stop_string_that_is_a_special_token_is_that_tokens_id_and_the_others_stay_strings() -> None:
    sampling = Sampling(8, stop=("<eos>", "=4"), stop_token_ids=(7,))
    found = resolved_stops(sampling, tiny_tokenizer(), 64)
    assert (found.stop, found.stop_token_ids) == (("=4",), (7, 1))


@pytest.mark.parametrize(
    ("sampling", "said"),
    [
        (Sampling(8, stop=("",)), "phases.a.sampling.stop holds an empty text"),
        (Sampling(8, stop=("4<eos>",)), "holds the special token '<eos>' beside other text"),
        (Sampling(8, stop_token_ids=(64,)), "64 is no token of the model, whose ids are 0 to 63"),
        (Sampling(8, stop_token_ids=(-1,)), "-1 is no token of the model"),
    ],
    ids=["empty", "beside text", "beyond the vocabulary", "negative"],
)
def test_a_stop_condition_that_cannot_be_met_is_refused(sampling: Sampling, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        resolved_stops(sampling, tiny_tokenizer(), 64, "phases.a.sampling")


def test_a_stop_token_at_the_limit_is_a_stop_and_not_a_cut(tmp_path: Path) -> None:
    rule = StopRule("unused", end_ids=(1,))
    assert rule.finish([5, 1], Sampling(2), budget=2) is Finish.STOP
    assert rule.finish([5, 9], Sampling(2, stop_token_ids=(9,)), budget=2) is Finish.STOP
    assert rule.finish([5, 8], Sampling(2), budget=2) is Finish.LENGTH


def test_drawn_tokens_have_the_frequencies_of_the_distribution_and_its_log_probabilities() -> None:
    logits = torch.tensor([0.0, 1.0, 2.0, -1.0])
    expected = (logits / 0.5).softmax(-1)
    generators = [torch.Generator().manual_seed(seed) for seed in range(20_000)]
    tokens, logps = draw(logits.expand(len(generators), -1), Sampling(1, temperature=0.5), generators)
    frequencies = torch.bincount(tokens, minlength=4) / len(generators)
    assert torch.allclose(frequencies, expected, atol=0.01)
    assert torch.allclose(logps, expected.log()[tokens], atol=1e-5)


def test_truncation_keeps_the_fewest_tokens_that_reach_top_p_and_always_the_likeliest() -> None:
    logits = torch.tensor([[0.1, 0.6, 0.2, 0.1]]).log()
    assert truncate(logits, Sampling(1, top_p=0.7)).isfinite().tolist() == [[False, True, True, False]]
    assert truncate(logits, Sampling(1, top_p=1e-6)).isfinite().tolist() == [[False, True, False, False]]
    assert truncate(logits, Sampling(1, top_k=2)).isfinite().tolist() == [[False, True, True, False]]
    assert truncate(logits, Sampling(1, min_p=0.3)).isfinite().tolist() == [[False, True, True, False]]

"""The values of the reward functions that are there."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rewards.functions import (
    cosine_between,
    cosine_scaled,
    exact_match,
    reasoning_accuracy_reward,
    repetition_penalty,
    soft_overlong_punishment,
    think_format_reward,
)

GOLDEN_FILE = Path(__file__).parents[1] / "golden/rewards.json"
GOLDEN = {case["id"]: case for case in json.loads(GOLDEN_FILE.read_text())["cases"]}


def test_soft_overlong_punishment_gives_the_reference_values() -> None:
    case = GOLDEN["reward_fn/soft_overlong"]
    ids = [[0] * length for length in case["inputs"]["lengths"]]
    given_rewards = soft_overlong_punishment(ids, max_completion_len=100, soft_punish_cache=20)
    assert given_rewards == pytest.approx(case["outputs"]["rewards"], abs=case["tol"])


def test_repetition_penalty_gives_the_reference_values() -> None:
    case = GOLDEN["reward_fn/repetition"]
    given_rewards = repetition_penalty(case["inputs"]["ids"], ngram_size=3, max_penalty=-1.0)
    assert given_rewards == pytest.approx(case["outputs"]["rewards"], abs=case["tol"])


def test_cosine_scaled_gives_the_reference_values() -> None:
    case = GOLDEN["reward_fn/cosine"]
    ids = [[0] * length for length in case["inputs"]["lengths"]]
    solutions = ["1", "1", "1", "1", "words that mean nothing"]
    answers = ["1", "2", "1", "2", "1"]  # right, wrong, right, wrong, cannot be known
    given_rewards = cosine_scaled(answers, ids, solutions, max_len=100)
    expected = case["outputs"]["rewards"]
    assert given_rewards[-1] is None and expected[-1] is None
    assert given_rewards[:-1] == pytest.approx(expected[:-1], abs=case["tol"])


@given(st.floats(-2, 2), st.floats(-2, 2), st.floats(0, 3))
def test_cosine_scaling_stays_between_its_two_ends(short: float, long: float, progress: float) -> None:
    value = cosine_between(short, long, progress)
    assert min(short, long) - 1e-9 <= value <= max(short, long) + 1e-9


def test_exact_match_reads_plain_and_conversational_completions_alike() -> None:
    texts, answers = [" 42", "41"], ["42", 42]
    plain = exact_match(texts, answer=answers)
    conversational = exact_match([[{"role": "assistant", "content": text}] for text in texts], answer=answers)
    assert plain == conversational == [1.0, 0.0]
    assert exact_match([" 42"], answer=["42"], strip=False) == [0.0]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<think>a</think>b", 1.0),
        ("a<think>b</think>", 0.0),
        ("<think>a<think>b</think>", 0.0),
        ("<think>a", 0.0),
        ("a</think>", 0.0),
    ],
)
def test_think_format_wants_one_thought_at_the_start_that_ends(text: str, expected: float) -> None:
    assert think_format_reward([text]) == [expected]


def test_reasoning_accuracy_looks_only_at_what_follows_the_last_thought() -> None:
    texts = ["<think>5</think>4", "<think>4</think>5", "4", "<think></think>5</think>4"]
    assert reasoning_accuracy_reward(texts, ["4"] * 4) == [1.0, 0.0, 0.0, 1.0]

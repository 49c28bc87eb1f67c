"""Reward functions, how they are found, and how a worker calls and combines them. No Ray."""

from __future__ import annotations

import asyncio
import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from actors.batch import Batch
from actors.errors import ConfigError, DataFailure, InfraFailure
from actors.sharding import Shard
from actors.worker import LocalWorker
from orchestrator.config.schema import RewardConfig
from rewards.combine import weighted_sum
from rewards.functions import (
    cosine_between,
    cosine_scaled,
    exact_match,
    reasoning_accuracy_reward,
    repetition_penalty,
    soft_overlong_punishment,
    think_format_reward,
)
from rewards.loading import RewardSpec, check_columns, check_reward, load_reward
from rewards.mathematics import accuracy
from rewards.worker import RewardWorker, ScoreResult
from tests.unit.tiny import tiny_tokenizer

GOLDEN_FILE = Path(__file__).parents[1] / "golden/rewards.json"
GOLDEN = {case["id"]: case for case in json.loads(GOLDEN_FILE.read_text())["cases"]}

SCORING = """
import asyncio

def length(completions, **kwargs):
    return [float(len(text)) for text in completions]

async def half(completions, factor=0.5):
    await asyncio.sleep(0)
    return [factor * len(text) for text in completions]

def moody(completions, mood, log_extra, log_metric):
    log_extra("mood", mood)
    log_metric("moods", len(set(mood)))
    return [None if text.startswith("x") else 1.0 for text in completions]

def broken(completions):
    raise RuntimeError("no such theorem")

def unreachable(completions):
    from actors.errors import InfraFailure
    raise InfraFailure("the judge's server is down")

def short(completions):
    return [1.0]

def words(completions):
    return ["good"] * len(completions)

def step(trainer_state, completion_ids):
    return [float(trainer_state.global_step)] * len(completion_ids)

def role_of(completions, prompts):
    return [float(c[0]["role"] == "assistant" and p[0]["role"] == "user") for c, p in zip(completions, prompts)]

class Threshold:
    def __init__(self, at): self.at = at
    def __call__(self, completion_ids): return [float(len(ids) > self.at) for ids in completion_ids]

NOT_CALLABLE = 3
"""


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("user") / "rewards.py"  # our own package's name, on purpose
    path.write_text(SCORING)
    return path


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("tokenizer")
    tiny_tokenizer().save_pretrained(folder)
    return str(folder)


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


@pytest.mark.parametrize(
    ("text", "solution", "expected"),
    [
        (r"so it is \boxed{\frac{1}{2}}", "0.5", 1.0),
        (r"$\frac12$", "1/2", 1.0),
        ("The answer is 42.", "$42$", 1.0),
        ("1,000", "1000", 1.0),
        ("x=5", "5", 1.0),
        (r"\boxed{(x+1)^2}", "x^2+2x+1", 1.0),
        (r"\boxed{(x+1)^2}", "y^2+2y+1", 0.0),
        (r"\boxed{\{1,2\}}", r"\{2,1\}", 1.0),
        (r"\boxed{(1,2)}", "(2,1)", 0.0),
        ("$(1,2]$", "(1,2]", 1.0),
        ("$(1,2)$", "(1,2]", 0.0),
        (r"\boxed{\sqrt{8}}", r"2\sqrt2", 1.0),
        (r"$50\%$", "0.5", 1.0),
        ("0.333333", "1/3", 1.0),
        ("0.3333", "1/3", 0.0),
        ("1000001", "1000000", 0.0),
        (r"\boxed{12\text{ cm}}", "12", 1.0),
        (r"2\sin(\pi/6)", "1", 1.0),
        ("$|x-1|$", "|1-x|", 1.0),
        ("1/0", "1", 0.0),
        ("3", "no idea", None),
        ("no idea", "3", 0.0),
    ],
)
def test_accuracy_compares_values_and_not_spellings(text: str, solution: str, expected: float | None) -> None:
    assert accuracy(text, solution) == expected


@pytest.mark.parametrize("text", ["9^9^9^9^9", "(" * 900, "__import__('os').abort()", "99999999!", "^", "\\frac", ""])
def test_hostile_answers_are_wrong_and_cost_nothing(text: str) -> None:
    assert accuracy(text, "1") == 0.0


@given(st.text(max_size=60))
def test_no_text_makes_accuracy_raise(text: str) -> None:
    assert accuracy(text, "7") in (0.0, 1.0)
    assert accuracy("7", text) in (0.0, 1.0, None)


def test_an_absent_opinion_is_left_out_and_no_opinion_at_all_is_not_zero() -> None:
    rewards = np.array([[1.0, 2.0], [np.nan, 2.0], [np.nan, np.nan]], np.float32)
    total = weighted_sum(rewards, np.array([1.0, 0.5], np.float32))
    assert total[:2].tolist() == [2.0, 1.0]
    assert math.isnan(total[2])


def test_a_function_of_a_file_named_like_our_own_package_is_found(file: Path) -> None:
    before = list(sys.path)
    reward = load_reward(f"{file}:length")
    assert reward.call(completions=["abc"]) == [3.0]
    assert sys.path == before
    assert sys.modules["rewards"].__file__ != str(file)


def test_a_located_reward_needs_neither_its_file_nor_its_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "mine.py"
    path.write_text(SCORING)
    monkeypatch.chdir(tmp_path)
    spec = RewardSpec("mine.py:length").located()
    path.unlink()
    monkeypatch.chdir("/")
    assert spec.load().call(completions=["ab"]) == [2.0]


def test_a_class_is_made_once_with_its_options(file: Path) -> None:
    reward = load_reward(f"{file}:Threshold", {"at": 2})
    assert reward.call(completion_ids=[[1, 2], [1, 2, 3]]) == [0.0, 1.0]


def test_the_configuration_of_a_reward_becomes_its_spec(file: Path) -> None:
    spec = check_reward(RewardConfig(fn=f"{file}:half", weight=0.5, name="mine", options={"factor": 3}))
    reward = spec.load()
    assert (reward.name, reward.weight, reward.is_async) == ("mine", 0.5, True)
    with pytest.raises(ConfigError, match="did you mean exact_match"):
        check_reward(RewardConfig(fn="exact_mach"))


def test_an_importable_module_is_found() -> None:
    assert load_reward("rewards.functions:exact_match").call(completions=["1"], answer=["1"]) == [1.0]


@pytest.mark.parametrize(
    ("fn", "options", "named"),
    [
        ("exact_mach", {}, "did you mean exact_match"),
        ("{file}:lenght", {}, "did you mean length"),
        ("{file}", {}, "no function"),
        ("{file}:", {}, "no function"),
        ("{file}:NOT_CALLABLE", {}, "not callable, but a int"),
        ("{file}:half", {"facto": 1}, "did you mean factor"),
        ("{file}:half", {"completions": 1}, "cannot be an option"),
        ("{file}:Threshold", {"above": 1}, "Threshold(above=1) failed"),
        ("nowhere.to.be.found:f", {}, "importing nowhere.to.be.found failed"),
        ("missing.py:f", {}, "relative paths start at"),
    ],
)
def test_a_reward_that_cannot_be_used_says_what_is_there_instead(
    file: Path, fn: str, options: dict[str, Any], named: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        load_reward(fn.format(file=file), options)
    assert named in str(caught.value)
    assert len(str(caught.value).splitlines()) <= 4


def test_a_file_that_fails_is_named_with_its_error(tmp_path: Path) -> None:
    (tmp_path / "bad.py").write_text("1/0")
    with pytest.raises(ConfigError, match=r"bad\.py failed: ZeroDivisionError"):
        load_reward(f"{tmp_path}/bad.py:f")


def test_a_column_that_a_reward_needs_and_the_data_lacks_is_named_with_those_found(file: Path) -> None:
    specs = [RewardSpec("exact_match"), RewardSpec(f"{file}:length").located()]
    check_columns(specs, ["answer"], "the data set")
    with pytest.raises(ConfigError, match="needs the column 'answer', which the data set does not have; it has gold"):
        check_columns(specs, ["gold"], "the data set")


def samples(*texts: str) -> Shard:
    """Completions of the prompt `q`, one token per character, sampled by weights of version 3."""
    tokenizer = tiny_tokenizer()
    ids = [tokenizer.encode("q" + text) for text in texts]
    flat = np.concatenate(ids).astype(np.int32)
    starts = np.cumsum([0, *(len(row) for row in ids)])[:-1]
    mask = np.ones(len(flat), bool)
    mask[starts] = False
    version = np.where(mask, 3, -1).astype(np.int32)
    batch = Batch.build([len(row) for row in ids], tokens=flat, mask=mask, version=version)
    return Shard(batch, (tuple(range(len(ids))),))


async def scored(tokenizer: str, *specs: RewardSpec, prompt: Any = "q", **columns: Any) -> ScoreResult:
    worker = LocalWorker("reward/0", RewardWorker("reward/0", specs, tokenizer))
    await worker.call("ready", timeout_s=10)
    return await worker.call("score", samples("abc", "xy"), prompt, columns, timeout_s=10)


async def test_rewards_are_weighted_and_those_without_an_opinion_left_out(file: Path, tokenizer: str) -> None:
    specs = [RewardSpec(f"{file}:length").located(), RewardSpec(f"{file}:moody", weight=10.0, name="mood").located()]
    result = await scored(tokenizer, *specs, mood="calm")
    assert result.names == ("length", "mood")
    assert result.texts == ("abc", "xy")
    assert result.rewards.dtype == np.float32
    np.testing.assert_array_equal(result.rewards, [[3.0, 1.0], [2.0, np.nan]])
    assert result.total.tolist() == [13.0, 2.0]
    assert result.extra == {"mood": ("calm", "calm")}
    assert result.metrics == {"moods": 1.0}


async def test_an_async_function_is_awaited_and_gets_its_options(file: Path, tokenizer: str) -> None:
    result = await scored(tokenizer, RewardSpec(f"{file}:half", options={"factor": 2}).located())
    assert result.total.tolist() == [6.0, 4.0]


async def test_the_version_that_sampled_is_the_trainer_state(file: Path, tokenizer: str) -> None:
    assert (await scored(tokenizer, RewardSpec(f"{file}:step").located())).total.tolist() == [3.0, 3.0]


async def test_a_conversation_gets_conversational_completions(file: Path, tokenizer: str) -> None:
    spec = RewardSpec(f"{file}:role_of").located()
    assert (await scored(tokenizer, spec, prompt=[{"role": "user", "content": "q"}])).total.tolist() == [1.0, 1.0]


@pytest.mark.parametrize(
    ("function", "said"),
    [
        ("broken", "reward broken raised RuntimeError: no such theorem"),
        ("short", "returned 1 rewards for 2 completions"),
        ("words", "must return a list of 2 numbers or None"),
    ],
)
async def test_a_function_that_fails_is_a_data_failure_and_never_a_reward(
    file: Path, tokenizer: str, function: str, said: str
) -> None:
    with pytest.raises(DataFailure, match=said):
        await scored(tokenizer, RewardSpec(f"{file}:length").located(), RewardSpec(f"{file}:{function}").located())


async def test_a_function_may_say_that_the_machinery_failed(file: Path, tokenizer: str) -> None:
    with pytest.raises(InfraFailure, match="server is down"):
        await scored(tokenizer, RewardSpec(f"{file}:unreachable").located())


async def test_ping_tells_how_long_the_oldest_call_runs(tokenizer: str, tmp_path: Path) -> None:
    (tmp_path / "slow.py").write_text("import time\ndef slow(completions):\n    time.sleep(0.5)\n    return [0.0]\n")
    spec = RewardSpec(f"{tmp_path}/slow.py:slow").located()
    worker = LocalWorker("reward/0", RewardWorker("reward/0", [spec], tokenizer))
    await worker.call("ready", timeout_s=10)
    call = asyncio.ensure_future(worker.call("score", samples("a"), "q", {}, timeout_s=10))
    await asyncio.sleep(0.2)
    health = await worker.call("ping", timeout_s=1)
    assert health["running"] == 1 and 0.1 < health["oldest_s"] < 0.5
    await call
    assert (await worker.call("ping", timeout_s=1))["running"] == 0

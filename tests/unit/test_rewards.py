"""Reward functions, how they are found, and how a worker calls and combines them. No Ray."""

from __future__ import annotations

import asyncio
import json
import math
import pickle
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

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
from rewards.loading import RewardSpec
from rewards.mathematics import accuracy
from rewards.specs import check_columns, check_names, check_reward
from rewards.worker import RewardWorker, ScoredTexts, ScoreResult
from tests.unit.tiny import tiny_tokenizer

GOLDEN_FILE = Path(__file__).parents[1] / "golden/rewards.json"
GOLDEN = {case["id"]: case for case in json.loads(GOLDEN_FILE.read_text())["cases"]}


def load_reward(fn: str, options: Mapping[str, Any] | None = None) -> Any:
    """A reward as its workers have it, in this process."""
    return RewardSpec(fn, options=options or {}).located().load()


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

class Silent:
    pass

def leaves(completions):
    import sys
    sys.exit(3)

async def leaves_later(completions):
    raise SystemExit("no more")

def stops(completions):
    return [next(iter(()))]

def cancels(completions):
    raise asyncio.CancelledError

async def cancels_later(completions):
    raise asyncio.CancelledError

def by_name(completions):
    return {"1": 0.0, "2": 0.0}

def unordered(completions):
    return {1.0, 2.0}

def digits(completions):
    return "12"

def digit_texts(completions):
    return ["1", "2"]

def undefined(completions):
    return [0.0, float("nan")]

def endless(completions):
    while True:
        yield 1.0

def huge(completions):
    return [1e39] * len(completions)

def large(completions):
    return [3e38] * len(completions)

def judge(completions):
    class Special(Exception):
        def __init__(self, *, detail): super().__init__(detail)
    raise Special(detail="no verdict")

def vandal(prompts, completions, completion_ids, facts):
    prompts[0].append("x")
    completions[0][0]["content"] = "changed"
    completions.clear()
    completion_ids[0].clear()
    facts[0].clear()
    return [0.0, 0.0]

def witness(prompts, completions, completion_ids, facts):
    same = completions[0][0]["content"] == "abc" and facts[0] == {"a": 1}
    return [float(same and len(prompts[0]) == len(facts[0]) == 1 and len(completion_ids[0]) == 3)] * len(completions)

def logs(completions, log_extra, log_metric):
    import numpy as np
    log_extra("length", np.array([len(text) for text in completions]))
    log_extra("parts", [{"first": text[0], "of": Ellipsis} for text in completions])
    log_metric("seen", 2)
    return [0.0] * len(completions)

def logs_too(completions, log_extra, log_metric):
    log_extra("length", ["long", "short"])
    log_metric("seen", 4)
    return [0.0] * len(completions)

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
        (r"\boxed{\sqrt[3]{8}}", "2", 1.0),
        (r"\boxed{\sqrt[n]{x}}", "x^{1/n}", 1.0),
        (r"\boxed{\sqrt[2.5]{8}}", r"\sqrt{8}", 0.0),
        (r"\boxed{2^{1000}}", r"4^{500}", 1.0),
        (r"\boxed{1000!}", r"1000 \cdot 999!", 1.0),
        (r"either $4$ or \(5\)", "5", 1.0),
        (r"\( never closed, but $5$", "5", 1.0),
        (r"first \[4\] then \[5", "4", 1.0),
        ("$$5$$", "5", 1.0),
        ("1/0", "1", 0.0),
        ("3", "no idea", None),
        ("no idea", "3", 0.0),
    ],
)
def test_accuracy_compares_values_and_not_spellings(text: str, solution: str, expected: float | None) -> None:
    assert accuracy(text, solution) == expected


HOSTILE = [
    r"\boxed{\cos{9^{9^{9}}}}",
    r"\boxed{\sin(10^{10^{7}})}",
    r"\boxed{\tan(10^{10^{7}})}",
    r"\boxed{\exp(10^{10^{8}})}",
    r"\boxed{\sqrt[10^{10^{9}}]{2}}",
    r"\boxed{\sqrt[i]{2}}",
    r"\boxed{(((10^{10^{15}})^{10^{15}})^{10^{15}})^{10^{15}}}",
    r"\boxed{\arcsin(10^{-10^{9}}) + 1.5}",
    r"\boxed{" + "1+" * 480 + "1}",
    r"\boxed{9999" + "!" * 900 + "}",
    "\\(" * 100_000,
    "\\[" * 100_000,
    "$" * 100_001,
    "\\boxed{" * 30_000,
    "9" * 100_000,
    "1/" * 50_000,
]


@pytest.mark.parametrize("text", HOSTILE)
def test_what_would_compute_for_ever_is_a_wrong_answer(text: str) -> None:
    assert accuracy(text, "2") == 0.0


@pytest.mark.parametrize("solution", [text for text in HOSTILE if "exp" in text or "sqrt[10" in text])
def test_a_solution_out_of_reach_is_no_solution(solution: str) -> None:
    assert accuracy("2", solution) is None


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


def test_a_class_is_not_built_to_be_checked_and_once_to_be_used(tmp_path: Path) -> None:
    built = tmp_path / "built"
    (tmp_path / "judge.py").write_text(
        "class Judge:\n"
        "    def __init__(self, into):\n"
        "        open(into, 'a').write('x')\n"
        "    def __call__(self, completions, answer):\n"
        "        return [1.0]\n"
    )
    spec = check_reward(RewardConfig(fn=f"{tmp_path}/judge.py:Judge", options={"into": str(built)}))
    check_columns([spec], ["answer"], "the data set")
    with pytest.raises(ConfigError, match="needs the column 'answer'"):
        check_columns([spec], ["gold"], "the data set")
    assert not built.exists()
    assert spec.load().call(completions=["a"], answer=["b"]) == [1.0]
    assert built.read_text() == "x"


def test_a_class_that_cannot_be_built_is_named_with_its_options_when_a_worker_starts(tmp_path: Path) -> None:
    (tmp_path / "judge.py").write_text(
        "class Judge:\n    def __init__(self, at): raise OSError('no such model')\n    def __call__(self): ...\n"
    )
    spec = RewardSpec(f"{tmp_path}/judge.py:Judge", options={"at": 3}).located()
    with pytest.raises(ConfigError, match=r"Judge\(at=3\) failed: OSError: no such model"):
        spec.load()


TYPED = """
from __future__ import annotations
from collections.abc import Mapping, Sequence
from typing import Literal

class Ours: ...

def typed(completions, *, count: int = 1, share: float = 0.5, strict: bool = True, words: tuple[str, ...] = (),
          mode: Literal["a", "b"] = "a", ours: Ours | None = None, plain=3):
    return [(count, share, strict, words, mode, plain)]
"""


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"count": "three"}, "options.count='three': Input should be a valid integer"),
        ({"count": "3"}, "options.count='3'"),
        ({"count": True}, "options.count=True"),
        ({"count": 2.5}, "options.count=2.5"),
        ({"share": "half"}, "options.share='half': Input should be a valid number"),
        ({"share": True}, "options.share=True"),
        ({"strict": "no"}, "options.strict='no': Input should be a valid boolean"),
        ({"strict": 1}, "options.strict=1"),
        ({"words": "abc"}, "options.words='abc': Input should be a valid array"),
        ({"words": [1]}, r"options.words=\[1\]: Input should be a valid string"),
        ({"mode": "c"}, "options.mode='c': Input should be 'a' or 'b'"),
    ],
)
def test_an_option_of_the_wrong_type_is_refused_with_its_value(
    tmp_path: Path, options: dict[str, Any], said: str
) -> None:
    (tmp_path / "mine.py").write_text(TYPED)
    with pytest.raises(ConfigError, match=said):
        RewardSpec(f"{tmp_path}/mine.py:typed", options=options).located()


def test_an_option_arrives_as_its_parameter_has_it(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(TYPED)
    options = {"count": 2, "share": 1, "strict": False, "words": ["x", "y"], "mode": "b", "plain": "free"}
    reward = load_reward(f"{tmp_path}/mine.py:typed", options)
    assert reward.call(completions=[]) == [(2, 1.0, False, ("x", "y"), "b", "free")]


def test_options_of_our_own_rewards_are_tried_with_their_types() -> None:
    with pytest.raises(ConfigError, match=r"options\.correct=\['high', 'low'\]"):
        RewardSpec("cosine_scaled", options={"max_len": 8, "correct": ["high", "low"]}).located()
    with pytest.raises(ConfigError, match=r"options\.per_token='-1'"):
        RewardSpec("completion_length", options={"per_token": "-1"}).located()


def test_two_rewards_of_one_name_are_refused() -> None:
    with pytest.raises(ConfigError, match="exact_match is the name of two rewards"):
        check_names(["exact_match", "exact_match"])
    check_names([RewardSpec("exact_match").label, RewardSpec("exact_match", name="strict").label])


def test_a_file_imports_what_lies_beside_it_wherever_it_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, text in {
        "scoring.py": "import helper\nfrom parts.deep import one\nimport parts.deep\nfrom parts import deep\n"
        "def score(completions):\n    import late\n"
        "    return [helper.TWO + one() + parts.deep.one() + deep.one() + late.five()] * len(completions)\n",
        "helper.py": "import random\nTWO = 2\nassert hasattr(random, 'shuffle')\n",
        "late.py": "from helper import TWO\ndef five(): return TWO + 3\n",
        "random.py": "raise RuntimeError('the standard library keeps its names')\n",
        "parts/__init__.py": "",
        "parts/deep.py": "from . import number\ndef one(): return number.ONE\n",
        "parts/number.py": "ONE = 1\n",
        "unused.py": "raise RuntimeError('nobody imports this')\n",
    }.items():
        (tmp_path / "user" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "user" / name).write_text(text)
    monkeypatch.chdir(tmp_path)
    spec = RewardSpec("user/scoring.py:score").located()
    assert spec.code is not None and "unused" not in {file.name for file in spec.code.files}
    shutil.rmtree(tmp_path / "user")
    alone = (
        "import pickle, sys; spec = pickle.load(open(sys.argv[1], 'rb')); print(spec.load().call(completions=['a']))"
    )
    (tmp_path / "spec").write_bytes(pickle.dumps(spec))
    command = [sys.executable, "-c", alone, str(tmp_path / "spec")]
    there = subprocess.run(command, cwd="/", capture_output=True, text=True, timeout=60)
    assert (there.stdout, there.stderr) == ("[10]\n", "")


def test_two_files_may_each_have_a_helper_of_the_same_name(tmp_path: Path) -> None:
    found = []
    for number in (1, 2):
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / "helper.py").write_text(f"NUMBER = {number}\n")
        (folder / "mine.py").write_text("import helper\ndef score(completions): return [helper.NUMBER]\n")
        found.append(load_reward(f"{folder}/mine.py:score").call(completions=["a"]))
    assert found == [[1], [2]]
    assert "helper" not in sys.modules


def test_a_file_that_ends_the_process_is_a_few_lines(tmp_path: Path) -> None:
    (tmp_path / "bad.py").write_text("raise SystemExit(4)")
    with pytest.raises(ConfigError, match=r"bad\.py failed: SystemExit: 4"):
        load_reward(f"{tmp_path}/bad.py:f")


def test_the_configuration_of_a_reward_becomes_its_spec(file: Path) -> None:
    spec = check_reward(RewardConfig(fn=f"{file}:half", weight=0.5, name="mine", options={"factor": 3}))
    reward = spec.load()
    assert (reward.name, reward.weight, reward.is_async) == ("mine", 0.5, True)
    with pytest.raises(ConfigError, match="did you mean exact_match"):
        check_reward(RewardConfig(fn="exact_mach"))


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"role": ["a", "b", "a"]}, "role names a twice"),
        ({"role": "a", "combine": "min"}, "role names a alone"),
        ({"role": ["a", "b"], "combine": "min", "deviations": 2.0}, "deviations=2 is for combine=mean_minus_std"),
        ({"fn": "exact_match", "combine": "min"}, "combine is for a model's score"),
        ({"role": ["a", "b"], "steps": "each"}, "steps=each takes the steps of one model"),
        ({"role": "a", "steps": "each", "on_failure": 0.5}, "on_failure=0.5 would be the reward of an answer"),
        ({"role": []}, "at least 1 item"),
    ],
)
def test_settings_of_an_ensemble_that_say_nothing_are_refused(given: dict[str, Any], said: str) -> None:
    RewardConfig.model_validate({"role": ["a", "b"], "combine": "mean_minus_std", "deviations": 2.0})
    with pytest.raises(ValidationError) as caught:
        RewardConfig.model_validate(given)
    assert said in str(caught.value)


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
        ("{file}:Threshold", {"above": 1}, "no option 'above'. There are: at"),
        ("{file}:Threshold", {}, "Threshold needs the option 'at'"),
        ("{file}:Silent", {}, "instances of Silent cannot be called"),
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
    return (await scored_with_texts(tokenizer, *specs, prompt=prompt, **columns))[0]


async def scored_with_texts(
    tokenizer: str, *specs: RewardSpec, prompt: Any = "q", **columns: Any
) -> tuple[ScoredTexts, ScoreResult, ScoredTexts]:
    worker = LocalWorker("reward/0", RewardWorker("reward/0", specs, tokenizer))
    await worker.call("ready", timeout_s=60)
    return await worker.call("score", samples("abc", "xy"), prompt, columns, timeout_s=60)


async def test_rewards_are_weighted_and_those_without_an_opinion_left_out(file: Path, tokenizer: str) -> None:
    specs = [RewardSpec(f"{file}:length").located(), RewardSpec(f"{file}:moody", weight=10.0, name="mood").located()]
    result, texts = await scored_with_texts(tokenizer, *specs, mood="calm")
    assert result.names == ("length", "mood")
    assert texts.texts == ("abc", "xy")
    assert result.rewards.dtype == np.float32
    np.testing.assert_array_equal(result.rewards, [[3.0, 1.0], [2.0, np.nan]])
    assert result.total.tolist() == [13.0, 2.0]
    assert texts.extra == {"mood": ("calm", "calm")}
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
        ("short", "short: returned 1 rewards for 2 completions"),
        ("endless", "endless: returned more rewards for 2 completions"),
        ("leaves", "reward leaves raised SystemExit: 3"),
        ("leaves_later", "reward leaves_later raised SystemExit: no more"),
        ("stops", "reward stops raised StopIteration"),
        ("cancels", "reward cancels raised CancelledError"),
        ("cancels_later", "reward cancels_later raised CancelledError"),
        ("by_name", "by_name: must return a list of 2 numbers or None, in the order .* it returned a dict"),
        ("unordered", "it returned a set"),
        ("digits", "it returned a str"),
        ("digit_texts", "'1' is text"),
        ("undefined", "undefined: returned NaN for completion 1; None says that it has no opinion"),
        ("huge", "huge: returned an infinite reward"),
        ("judge", "reward judge raised Special: no verdict"),
        ("words", "must return a list of 2 numbers or None"),
    ],
)
async def test_a_function_that_fails_is_a_data_failure_and_never_a_reward(
    file: Path, tokenizer: str, function: str, said: str
) -> None:
    with pytest.raises(DataFailure, match=said):
        await scored(tokenizer, RewardSpec(f"{file}:length").located(), RewardSpec(f"{file}:{function}").located())


async def test_a_sum_of_rewards_that_is_infinite_is_a_data_failure(file: Path, tokenizer: str) -> None:
    with pytest.raises(DataFailure, match=r"weighted sum .* is infinite"):
        await scored(tokenizer, RewardSpec(f"{file}:large", weight=10.0).located())


async def test_what_a_function_does_to_its_arguments_reaches_no_other(file: Path, tokenizer: str) -> None:
    prompt, facts = [{"role": "user", "content": "q"}], {"a": 1}
    specs = [RewardSpec(f"{file}:{name}").located() for name in ("vandal", "witness")]
    result, texts = await scored_with_texts(tokenizer, *specs, prompt=prompt, facts=facts)
    assert result.rewards[:, 1].tolist() == [1.0, 1.0]
    assert texts.texts == ("abc", "xy")
    assert (prompt, facts) == ([{"role": "user", "content": "q"}], {"a": 1})


async def test_what_two_functions_log_under_one_name_is_kept_as_plain_values(file: Path, tokenizer: str) -> None:
    result, texts = await scored_with_texts(
        tokenizer, RewardSpec(f"{file}:logs").located(), RewardSpec(f"{file}:logs_too").located()
    )
    assert texts.extra == {
        "length": (3, 2),
        "parts": ({"first": "a", "of": "Ellipsis"}, {"first": "x", "of": "Ellipsis"}),
        "logs_too/length": ("long", "short"),
    }
    assert [type(value) for value in texts.extra["length"]] == [int, int]
    assert result.metrics == {"seen": 2.0, "logs_too/seen": 4.0}


async def test_a_function_may_say_that_the_machinery_failed(file: Path, tokenizer: str) -> None:
    with pytest.raises(InfraFailure, match="server is down"):
        await scored(tokenizer, RewardSpec(f"{file}:unreachable").located())


async def test_ping_tells_how_long_the_oldest_call_runs(tokenizer: str, tmp_path: Path) -> None:
    may_end = tmp_path / "may_end"
    (tmp_path / "slow.py").write_text(
        f"import os, time\ndef slow(completions):\n    while not os.path.exists({str(may_end)!r}): time.sleep(0.01)\n"
        "    return [0.0]\n"
    )
    spec = RewardSpec(f"{tmp_path}/slow.py:slow").located()
    worker = LocalWorker("reward/0", RewardWorker("reward/0", [spec], tokenizer))
    await worker.call("ready", timeout_s=60)
    began = time.monotonic()
    call = asyncio.ensure_future(worker.call("score", samples("a"), "q", {}, timeout_s=60))
    await asyncio.sleep(0.2)
    first, second = [await worker.call("ping", timeout_s=60) for _ in range(2)]
    assert first["running"] == 1 and 0 < first["oldest_s"] < second["oldest_s"] < time.monotonic() - began
    may_end.touch()
    await call
    assert (await worker.call("ping", timeout_s=60))["running"] == 0

"""Judges behind an OpenAI-compatible server in a process of its own that has every fault there is: no fault is ever a
score, and what cannot be read is no opinion."""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml
from typer.testing import CliRunner

from actors.errors import BudgetExhausted, ConfigError, DataFailure, Dropped, InfraFailure
from actors.worker import LocalWorker
from orchestrator.cli import app
from orchestrator.config.loading import load_config
from orchestrator.config.schema import RewardConfig
from orchestrator.reporting.metrics import METRICS_FILE, read
from orchestrator.run import run
from rewards.specs import check_reward, with_deadlines
from rewards.worker import RewardWorker, ScoredTexts, ScoreResult
from tests.judge_server import judge_server
from tests.reward_server import RewardServer
from tests.runs import ARITHMETIC, merged
from tests.unit.reward_stage import samples

PATIENCE_S = 120.0  # of answers that come, on a busy machine, too


@pytest.fixture(scope="module")
def server() -> Iterator[RewardServer]:
    with judge_server() as started:
        yield started


def settings(judge: Any, **keys: Any) -> RewardConfig:
    given = {"name": "judge", "allow_private": True, "retries": 0, "timeout_s": PATIENCE_S, "judge": judge, **keys}
    return RewardConfig.model_validate(given)


class Asked:
    """A reward worker in this process, with one judge."""

    def __init__(self, tokenizer: str, judge: Any, **keys: Any) -> None:
        spec = check_reward(settings(judge, **keys))
        self.worker = LocalWorker("reward/0", RewardWorker("reward/0", with_deadlines([spec], PATIENCE_S), tokenizer))

    async def __aenter__(self) -> Asked:
        await self.worker.call("ready", timeout_s=PATIENCE_S)
        return self

    async def __aexit__(self, *_: Any) -> None:
        await self.worker.kill()

    async def score(self, *texts: str, **columns: Any) -> tuple[ScoreResult, ScoredTexts]:
        return await self.worker.call("score", samples(*texts), "q", columns, timeout_s=250)


async def judged(
    tokenizer: str, server: RewardServer, *texts: str, path: str = "score", keys: Any = None, **judge: Any
) -> ScoreResult:
    given = {"url": server.url(f"{path}/v1"), "model": "fair", **judge}
    async with Asked(tokenizer, given, **(keys or {})) as asked:
        return (await asked.score(*texts))[0]


def deadline_s(fault: str) -> float:
    """Of each attempt: short for a server that never answers, yet long enough for the attempt after it."""
    return 1.5 if fault in ("hangs", "trickles") else PATIENCE_S


def same(result: ScoreResult, *expected: float) -> bool:
    return np.array_equal(result.rewards[:, 0], np.array(expected, np.float32), equal_nan=True)


async def test_a_server_is_asked_as_openai_clients_do_and_the_completions_table_shows_what_it_said(
    server: RewardServer, tokenizer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JUDGE_KEY", "secret-key")
    judge = {"url": server.url("score?sent/v1"), "model": "fair", "kind": "rubric", "api_key_env": "JUDGE_KEY"}
    judge |= {"max_tokens": 9, "request": {"seed": 7, "temperature": None}}
    async with Asked(tokenizer, judge, weight=0.5) as asked:
        result, texts = await asked.score("abc", "a")
    assert (
        result.names == ("judge",)
        and same(result, 3.0, 1.0)
        and not result.preferring
        and result.total.tolist() == [1.5, 0.5]
    )
    assert texts.extra == {"judge/said": (["A fair attempt.\nScore: 3"], ["A fair attempt.\nScore: 1"])}
    call = next(c for c in server.calls("score?sent") if "[answer]\nabc\n" in c["body"]["messages"][0]["content"])
    assert call["headers"]["Authorization"] == "Bearer secret-key"
    message = call["body"].pop("messages")
    assert call["body"] == {"model": "fair", "max_tokens": 9, "seed": 7}, "without what is set to none"
    assert len(message) == 1 and message[0]["role"] == "user" and "[answer]\nabc\n" in message[0]["content"]


@pytest.mark.parametrize(
    ("model", "values", "unparsable", "order_decides"),
    [
        ("fair", (1.0, 0.0, 0.5), 0.0, 0.0),
        ("first", (0.5, 0.5, 0.5), 0.0, 1.0),
        ("mumbles", (np.nan, np.nan, np.nan), 1.0, 0.0),
        ("moody", (1.0, 0.0, np.nan), 4 / 6, 0.0),
    ],
)
async def test_win_rates_are_what_a_judge_says_in_both_orders_and_nothing_where_it_cannot_be_read(
    server: RewardServer, tokenizer: str, model: str, values: tuple[float, ...], unparsable: float, order_decides: float
) -> None:
    third = "xx" if model == "moody" else "bb"
    result = await judged(tokenizer, server, "ccc", "a", third, model=model)
    assert same(result, *values) and result.preferring == {"judge"}
    assert result.metrics["rewards/judge/frac_unparsable"] == pytest.approx(unparsable)
    assert result.metrics["rewards/judge/frac_order_decides"] == pytest.approx(order_decides)


async def test_a_mixture_is_one_reward_of_several_judges(server: RewardServer, tokenizer: str) -> None:
    members = [
        {"url": server.url("score/v1"), "model": model, "kind": "binary", "pattern": pattern}
        for model, pattern in (("fair", None), ("moody", r"(?P<yes>yes)|(?P<no>no)$"))
    ]
    async with Asked(tokenizer, members) as asked:
        result, texts = await asked.score("ab", "xb")
    assert same(result, 1.0, np.nan) and result.metrics["rewards/judge/frac_unparsable"] == 1 / 4
    assert [len(said) for said in texts.extra["judge/said"]] == [2, 2]


async def test_a_prompt_of_ones_own_names_columns_and_digits_are_read_by_a_pattern(
    server: RewardServer, tokenizer: str, tmp_path: Path
) -> None:
    mine = tmp_path / "mine.txt"
    mine.write_text("[request]\n{question}\n[end of request]\n[answer]\n{completion}\n[end of answer]\nScore: NUMBER")
    judge = {"kind": "rubric", "template": str(mine), "pattern": r"attempt\.\s+Score: (?P<score>\d)"}
    async with Asked(tokenizer, {"url": server.url("score/v1"), "model": "fair", **judge}) as asked:
        result, _ = await asked.score("46", "5", question="12+34=")
    assert same(result, 1.0, 0.0), "as the column's request has it, not the prompt"


@pytest.mark.parametrize(
    ("fault", "error", "said"),
    [
        ("garbage", DataFailure, "the answer is no JSON"),
        ("empty", DataFailure, "no JSON"),
        ("nothing", DataFailure, "no chat completion: null"),
        ("list", DataFailure, "no chat completion"),
        ("choiceless", DataFailure, "no chat completion"),
        ("number", DataFailure, "the message's content is a int"),
        ("large", DataFailure, "more than 4194304 bytes"),
        ("400", DataFailure, "HTTP 400"),
        ("redirects", DataFailure, "it redirects to /score"),
        ("500", InfraFailure, "HTTP 500 .*the model is being loaded"),
        ("429", InfraFailure, "HTTP 429"),
        ("breaks", InfraFailure, "ClientPayloadError"),
        ("hangs", InfraFailure, r"no answer within 1\.5 s"),
        ("trickles", InfraFailure, r"no answer within 1\.5 s"),
    ],
)
async def test_what_is_no_answer_is_a_failure_of_its_kind_and_never_a_score(
    server: RewardServer, tokenizer: str, fault: str, error: type[Exception], said: str
) -> None:
    began = time.monotonic()
    with pytest.raises(error, match=f"reward judge: .*{said}"):
        await judged(tokenizer, server, "abc", "a", path=fault, keys={"timeout_s": deadline_s(fault)})
    assert time.monotonic() - began < 20, "the server would hang for 30 s"


async def test_an_answer_without_words_is_no_opinion(server: RewardServer, tokenizer: str) -> None:
    result = await judged(tokenizer, server, "abc", "a", path="wordless", kind="binary")
    assert same(result, np.nan, np.nan) and result.metrics == {"rewards/judge/frac_unparsable": 1.0}


async def test_a_server_that_dies_fails_the_call_and_one_in_its_place_is_asked(tokenizer: str) -> None:
    with judge_server() as first:
        judge = {"url": first.url("score/v1"), "model": "fair"}
        async with Asked(tokenizer, judge) as asked:
            assert same((await asked.score("abc", "a"))[0], 1.0, 0.0)
            first.kill()
            for _ in range(2):  # over a connection that was kept, and over a new one
                with pytest.raises(InfraFailure, match="reward judge: "):
                    await asked.score("abc", "a")
            with judge_server(first.port):
                assert same((await asked.score("abc", "a"))[0], 1.0, 0.0)


@pytest.mark.parametrize("fault", ["500", "hangs", "garbage", "breaks"])
async def test_only_the_question_that_failed_is_asked_again(server: RewardServer, tokenizer: str, fault: str) -> None:
    path = f"first/{fault}/1/again"
    keys = {"retries": 1, "timeout_s": deadline_s(fault)}
    result = await judged(tokenizer, server, "ccc", "a", "bb", path=path, keys=keys)
    assert same(result, 1.0, 0.0, 0.5) and len(server.calls(path)) == 6 + 1
    kind = {"hangs": "timeout", "garbage": "invalid"}.get(fault, "unreachable")
    assert result.calls[0].failures == {kind: 1} and result.calls[0].seconds > 0


@pytest.mark.parametrize(("fault", "kind"), [("500", "unreachable"), ("hangs", "timeout"), ("garbage", "invalid")])
async def test_on_failure_decides_what_follows(server: RewardServer, tokenizer: str, fault: str, kind: str) -> None:
    keys: dict[str, Any] = {"timeout_s": deadline_s(fault)}
    with pytest.raises(Dropped) as dropped:
        await judged(tokenizer, server, "a", "bb", path=fault, keys={**keys, "on_failure": "drop"})
    assert dropped.value.reason == f"reward judge: {kind}"
    with pytest.raises(BudgetExhausted, match="on_failure=fail ends the run"):
        await judged(tokenizer, server, "a", "bb", path=fault, keys={**keys, "on_failure": "fail"})
    result = await judged(tokenizer, server, "a", "bb", path=fault, keys={**keys, "on_failure": -0.25})
    assert same(result, -0.25, -0.25) and result.calls[0].stood_in is True


async def test_replicas_share_the_questions_and_a_limit_of_questions_holds(
    server: RewardServer, tokenizer: str
) -> None:
    paths = [f"score?part{n}" for n in range(3)]
    judge = {"url": [server.url(f"{path}/v1") for path in paths], "model": "fair"}
    async with Asked(tokenizer, judge, concurrency=3) as asked:
        assert same((await asked.score("a", "bb", "ccc", "dddd"))[0], 0.0, 1 / 3, 2 / 3, 1.0)
    assert [len(server.calls(path)) for path in paths] == [4, 4, 4]
    slow = {"url": server.url("first/hangs/2/one/v1"), "model": "fair", "kind": "binary"}
    async with Asked(tokenizer, slow, concurrency=1, timeout_s=deadline_s("hangs"), on_failure=-1.0) as asked:
        results = await asyncio.gather(*(asked.score("ab") for _ in range(4)))
    assert [result.calls[0].stood_in for result, _ in results] == [True] * 2 + [False] * 2


async def test_a_key_that_a_server_repeats_is_blotted_out_and_stands_in_no_text(
    server: RewardServer, tokenizer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    judge = {"url": server.url("401/v1"), "model": "fair", "api_key_env": "TROUPE_TEST_KEY"}
    with pytest.raises(ConfigError, match="TROUPE_TEST_KEY, which is not set"):
        check_reward(settings(judge))
    monkeypatch.setenv("TROUPE_TEST_KEY", "sk-very-secret")
    assert "very-secret" not in repr(check_reward(settings(judge)))
    async with Asked(tokenizer, judge) as asked:
        with pytest.raises(DataFailure, match=r"HTTP 401.*Incorrect API key provided: .*\*\*\*") as caught:
            await asked.score("a", "bb")
    assert "very-secret" not in str(caught.value)


def test_a_private_address_is_refused_unless_it_is_allowed() -> None:
    judge = {"url": "http://127.0.0.1:8000/v1", "model": "m"}
    with pytest.raises(ConfigError, match=r"127\.0\.0\.1 is not an address of the public Internet.*allow_private"):
        check_reward(settings(judge, allow_private=False))
    assert check_reward(settings(judge)).label == "judge"


def test_check_reward_asks_a_judge_and_says_what_of_its_answers_could_not_be_read(server: RewardServer) -> None:
    keys = [f"judge.url={server.url('score/v1')}", "judge.kind=binary", "allow_private=true"]
    shown = CliRunner().invoke(app, ["check-reward", "judge", "judge.model=fair", *keys])
    assert shown.exit_code == 0 and re.search(r"12\+34=\s+46\s+1\n.*7\+8=\s+16\s+0\n", shown.output)
    assert "logged: rewards/fair/frac_unparsable 0, fair/said" in shown.output
    mumbles = CliRunner().invoke(app, ["check-reward", "judge", "judge.model=mumbles", *keys])
    assert "no opinion on any of them" in mumbles.output and "frac_unparsable 1" in mumbles.output
    broken = CliRunner().invoke(
        app, ["check-reward", "judge", "judge.model=fair", *keys[1:], "judge.url=" + server.url("404/v1")]
    )
    assert broken.exit_code == 1 and "no rewards: reward fair" in broken.output and "HTTP 404" in broken.output


def test_the_recipe_of_online_dpo_with_a_judge_learns_from_its_pairs_and_drops_ties(
    server: RewardServer, tmp_path: Path
) -> None:
    """A few steps of it. Half of the server's answers are faults, and overcome; a longer answer is the better one."""
    overrides = [
        f"output={tmp_path}",
        f"rewards.0.judge.url={server.url('every/run/v1')}",
        "rewards.0.judge.model=long",
        "rewards.0.retries=9",
        "phases.sft.train.steps=1",
        "phases.online_dpo.train.steps=2",
        "phases.online_dpo.train.batch_size=4",
        *(f"phases.{phase}.evaluation.data.limit=1" for phase in ("sft", "online_dpo")),
        "roles.rollout.engine=scripted",
        "weights.transport=disk",
        "logging.completions_every=1",
        "logging.trackers=[]",
        "logging.curves=false",
    ]
    folder = run(load_config("online_dpo_judge", overrides), local=True).folder
    rows = [row for file in (folder / "completions").glob("*.parquet") for row in pq.read_table(file).to_pylist()]
    assert len(rows) == 2 * 4 * 2
    groups: dict[int, list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(row["position"], []).append(row)
    for group in groups.values():
        mine, other = (len(row["completion"]) for row in group)
        assert [row["reward"] for row in group] == [float(mine > other), float(other > mine)], "the judge's choice"
        assert mine != other, "two answers of the same length are a tie, and no pair"
    lines = [line for line in read(folder / METRICS_FILE) if "rewards/judge/mean" in line]
    assert lines[-1]["rewards/judge/frac_unparsable"] == 0.0
    assert sum(value for line in lines for name, value in line.items() if "rewards/judge/failed/" in name) > 0
    assert lines[-1]["groups/filtered"] > 0, "and they are counted"


def test_an_engine_role_of_the_run_judges_and_what_it_says_is_in_the_table(tmp_path: Path) -> None:
    """The judge is a frozen role with an engine of its own, which prefers the longer answer."""
    engine = f"{Path(__file__).parents[1] / 'judge_engine.py'}:RuleEngine"
    judge = {"kind": "pairwise", "role": "judge_rollout", "max_tokens": 90}
    changes = {
        "output": str(tmp_path),
        "rewards": [{"judge": judge}, {"fn": "exact_match", "weight": 0.5}],
        "options": {"num_generations": 3},
        "roles": {
            "rollout": {"engine": "scripted"},
            "judge": {"kind": "frozen"},
            "judge_rollout": {
                "kind": "engine",
                "follows": "judge",
                "engine": engine,
                "engine_options": {"model": "long"},
                "max_model_len": 4096,
            },
        },
        "train": {**ARITHMETIC["train"], "steps": 2, "batch_size": 4},
        "logging": {"completions_every": 1, "trackers": [], "curves": False},
        "weights": {"transport": "disk"},
    }
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(merged(ARITHMETIC, changes)))
    folder = run(load_config(recipe), local=True).folder
    rows = [row for file in (folder / "completions").glob("*.parquet") for row in pq.read_table(file).to_pylist()]
    assert len(rows) == 2 * 4 * 3
    for row in rows:
        others = [other for other in rows if other["position"] == row["position"] and other is not row]
        lengths = [(len(row["completion"]), len(other["completion"])) for other in others]
        won = [(mine > theirs) + (mine == theirs) / 2 for mine, theirs in lengths]
        assert row["rewards/judge_rollout"] == pytest.approx(np.mean(won))
        assert all("Verdict:" in said for said in json.loads(row["judge_rollout/said"]))
    assert sum(len(json.loads(row["judge_rollout/said"])) for row in rows) > 30, "six a group, but of equal texts"
    line = [line for line in read(folder / METRICS_FILE) if "loss" in line][-1]
    assert line["rewards/judge_rollout/frac_unparsable"] == 0.0 and line["rewards/judge_rollout/seconds"] > 0

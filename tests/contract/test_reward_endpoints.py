"""Rewards over HTTP, from a server in a process of its own that has every fault there is: each is a failure of the
right kind, or is overcome; none is ever a score."""

from __future__ import annotations

import asyncio
import re
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml

from actors.errors import BudgetExhausted, ConfigError, DataFailure, Dropped, InfraFailure
from actors.worker import LocalWorker
from orchestrator.config.loading import load_config
from orchestrator.config.schema import RewardConfig
from orchestrator.reporting.metrics import METRICS_FILE, read
from orchestrator.run import run
from rewards.http_client import PrivateAddress, PublicResolver, is_public
from rewards.http_endpoint import EndpointSpec
from rewards.reward import Handling
from rewards.specs import check_reward, with_deadlines
from rewards.worker import RewardWorker, ScoreResult
from tests.reward_server import RewardServer, reward_server
from tests.runs import ARITHMETIC, merged
from tests.unit.reward_stage import samples

PATIENCE_S = 120.0  # of answers that come, on a busy machine, too


@pytest.fixture(scope="module")
def server() -> Iterator[RewardServer]:
    with reward_server() as started:
        yield started


class Scorer:
    """A reward worker in this process, with one endpoint."""

    def __init__(self, tokenizer: str, *urls: str, **keys: Any) -> None:
        settings = {"url": urls, "allow_private": True, "retries": 0, "timeout_s": PATIENCE_S, **keys}
        spec = check_reward(RewardConfig.model_validate({"name": "judge", **settings}))
        self.worker = LocalWorker("reward/0", RewardWorker("reward/0", with_deadlines([spec], PATIENCE_S), tokenizer))

    async def __aenter__(self) -> Scorer:
        await self.worker.call("ready", timeout_s=PATIENCE_S)
        return self

    async def __aexit__(self, *_: Any) -> None:
        await self.worker.kill()

    async def score(self, *texts: str, prompt: Any = "q", **columns: Any) -> ScoreResult:
        given = samples(*(texts or ("abc", "xy")))
        return (await self.worker.call("score", given, prompt, columns, timeout_s=250))[0]


async def scored(tokenizer: str, *urls: str, **keys: Any) -> ScoreResult:
    async with Scorer(tokenizer, *urls, **keys) as scorer:
        return await scorer.score()


def deadline_s(fault: str) -> float:
    """Of each attempt: short for a server that never answers, yet long enough for the attempt after it."""
    return 1.5 if fault in ("hangs", "trickles") else PATIENCE_S


def same(result: ScoreResult, *expected: float) -> bool:
    return np.array_equal(result.rewards[:, 0], np.array(expected, np.float32), equal_nan=True)


async def test_what_a_server_answers_are_the_rewards_and_null_is_no_opinion(
    server: RewardServer, tokenizer: str
) -> None:
    async with Scorer(tokenizer, server.url(), weight=0.5) as scorer:
        result = await scorer.score("abc", "xy", "a")
    assert result.names == ("judge",) and same(result, 5.0, np.nan, 3.0)
    np.testing.assert_array_equal(result.total, np.array([2.5, np.nan, 1.5], np.float32))
    assert result.calls[0].failures == {} and 0 < result.calls[0].seconds < PATIENCE_S


async def test_a_server_is_sent_prompts_completions_columns_and_options_as_the_page_says(
    server: RewardServer, tokenizer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JUDGE", "Bearer secret")
    keys = {"options": {"rubric": "short"}, "headers_from_env": {"Authorization": "JUDGE"}, "columns": ["answer"]}
    url = f"{server.url()}?sent"
    async with Scorer(tokenizer, url, **keys) as scorer:
        message = {"role": "user", "content": "q"}
        assert same(await scorer.score("abc", prompt=[message], answer=np.int64(7), other=1), 5.0)
    (call,) = server.calls("score?sent")
    assert call["body"] == {
        "version": 1,
        "prompts": [[message]],
        "completions": [[{"role": "assistant", "content": "abc"}]],
        "columns": {"answer": [7]},
        "options": {"rubric": "short"},
    }
    assert call["headers"]["Authorization"] == "Bearer secret"
    assert call["headers"]["Content-Type"] == "application/json"


async def test_without_columns_all_of_the_data_set_are_sent(server: RewardServer, tokenizer: str) -> None:
    async with Scorer(tokenizer, f"{server.url()}?all") as scorer:
        await scorer.score("a", answer="7", other=[1, 2])
    (call,) = server.calls("score?all")
    assert call["body"]["columns"] == {"answer": ["7"], "other": [[1, 2]]}


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("garbage", "the answer is no JSON .*Bad gateway"),
        ("binary", "no JSON"),
        ("empty", "no JSON"),
        ("deep", "no JSON"),
        ("nothing", "no `scores`: null"),
        ("bare", "no `scores`"),
        ("nan", "returned NaN for completion 0; None says"),
        ("infinite", "returned an infinite reward"),
        ("short", "returned 1 rewards for 2 completions"),
        ("long", "returned more rewards for 2 completions"),
        ("words", "list of 2 numbers or None: 'good' is text"),
        ("digits", "'1' is text"),
        ("one", "`scores` is no list"),
        ("named", "`scores` is no list"),
        ("nested", "list of 2 numbers or None"),
        ("future", "an answer of version 2; this Troupe reads 1"),
        ("large", "more than 4194304 bytes"),
        ("400", "HTTP 400"),
        ("404", "HTTP 404"),
        ("redirects", "it redirects to /score, which is not followed"),
    ],
)
async def test_an_answer_that_is_none_is_a_data_failure_and_never_a_reward(
    server: RewardServer, tokenizer: str, fault: str, said: str
) -> None:
    with pytest.raises(DataFailure, match=f"reward judge: .*{said}"):
        await scored(tokenizer, server.url(fault))


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("500", "HTTP 500 .*the model is being loaded"),
        ("503", "HTTP 503"),
        ("429", "HTTP 429"),
        ("breaks", "ClientPayloadError"),
        ("hangs", "no answer within 1.5 s"),
        ("trickles", "no answer within 1.5 s"),
    ],
)
async def test_a_server_that_is_down_slow_or_overloaded_is_an_infra_failure(
    server: RewardServer, tokenizer: str, fault: str, said: str
) -> None:
    began = time.monotonic()
    with pytest.raises(InfraFailure, match=f"reward judge: .*{said}"):
        await scored(tokenizer, server.url(fault), timeout_s=deadline_s(fault))
    assert time.monotonic() - began < 20, "the server would hang for 30 s"


async def test_a_server_that_dies_during_a_call_is_an_infra_failure(tokenizer: str) -> None:
    with reward_server() as dying:
        with pytest.raises(InfraFailure, match=r"reward judge: .*ServerDisconnectedError"):
            await scored(tokenizer, dying.url("dies"))
        assert dying.process.wait(timeout=PATIENCE_S) == 9


async def test_a_server_that_was_killed_is_an_infra_failure_until_another_is_in_its_place(tokenizer: str) -> None:
    with reward_server() as first:
        async with Scorer(tokenizer, first.url()) as scorer:
            assert same(await scorer.score(), 5.0, np.nan)  # over a connection that is kept
            first.kill()
            with pytest.raises(InfraFailure, match="reward judge: "):
                await scorer.score()
            with pytest.raises(InfraFailure, match="ClientConnectorError"):
                await scorer.score()
            with reward_server(first.port):
                assert same(await scorer.score(), 5.0, np.nan)


@pytest.mark.parametrize("fault", ["500", "429", "breaks", "hangs", "garbage", "nan", "short"])
async def test_a_server_that_recovers_within_the_retries_is_scored_and_its_failures_counted(
    server: RewardServer, tokenizer: str, fault: str
) -> None:
    path = f"first/{fault}/2/recovers"
    result = await scored(tokenizer, server.url(path), retries=2, timeout_s=deadline_s(fault))
    assert same(result, 5.0, np.nan) and len(server.calls(path)) == 3
    kind = {"hangs": "timeout", "garbage": "invalid", "nan": "invalid", "short": "invalid"}.get(fault, "unreachable")
    assert result.calls[0].failures == {kind: 2}


async def test_attempts_are_bounded_with_longer_pauses_and_the_last_failure_is_told(
    server: RewardServer, tokenizer: str
) -> None:
    began = time.monotonic()
    with pytest.raises(InfraFailure, match=r"HTTP 500 .* \(attempt 3 of 3\)"):
        await scored(tokenizer, server.url("first/500/9/bounded"), retries=2)
    assert len(server.calls("first/500/9/bounded")) == 3
    assert time.monotonic() - began > 0.125 + 0.25, "the pauses, at their shortest"


async def test_what_would_be_refused_again_is_not_asked_again(server: RewardServer, tokenizer: str) -> None:
    with pytest.raises(DataFailure, match="HTTP 404"):
        await scored(tokenizer, server.url("first/404/9/once"), retries=5)
    assert len(server.calls("first/404/9/once")) == 1


async def test_a_replica_that_fails_is_left_for_another_and_rests(server: RewardServer, tokenizer: str) -> None:
    bad, good = "first/500/99/replica", "score?replica"
    async with Scorer(tokenizer, server.url(bad), server.url(good), retries=1) as scorer:
        for _ in range(4):
            assert same(await scorer.score(), 5.0, np.nan)
    assert (len(server.calls(bad)), len(server.calls(good))) == (1, 4)


async def test_replicas_share_the_calls(server: RewardServer, tokenizer: str) -> None:
    paths = [f"score?share{n}" for n in range(3)]
    async with Scorer(tokenizer, *map(server.url, paths)) as scorer:
        await asyncio.gather(*(scorer.score() for _ in range(9)))
    assert [len(server.calls(path)) for path in paths] == [3, 3, 3]


async def test_a_limit_of_calls_at_the_same_time_holds_and_waiting_for_it_is_no_failure(
    server: RewardServer, tokenizer: str
) -> None:
    keys = {"concurrency": 1, "timeout_s": deadline_s("hangs"), "on_failure": -1.0}
    async with Scorer(tokenizer, server.url("first/hangs/2/limit"), **keys) as scorer:
        results = await asyncio.gather(*(scorer.score() for _ in range(4)))
    assert [result.calls[0].stood_in for result in results] == [True] * 2 + [False] * 2
    assert all(same(result, 5.0, np.nan) for result in results[2:]), "queued for 3 s, with a deadline of 1.5 s"


@pytest.mark.parametrize("fault", ["500", "hangs", "garbage", "nan", "404"])
async def test_on_failure_decides_what_follows_whatever_the_failure(
    server: RewardServer, tokenizer: str, fault: str
) -> None:
    keys: dict[str, Any] = {"timeout_s": deadline_s(fault)}
    with pytest.raises(Dropped) as dropped:
        await scored(tokenizer, server.url(fault), on_failure="drop", **keys)
    kinds = {"500": "unreachable", "hangs": "timeout", "404": "refused"}
    assert dropped.value.reason == f"reward judge: {kinds.get(fault, 'invalid')}"
    with pytest.raises(BudgetExhausted, match="on_failure=fail ends the run"):
        await scored(tokenizer, server.url(fault), on_failure="fail", **keys)
    result = await scored(tokenizer, server.url(fault), on_failure=-0.25, weight=2.0, **keys)
    assert same(result, -0.25, -0.25) and result.total.tolist() == [-0.5, -0.5]
    assert result.calls[0].stood_in is True


async def test_a_column_that_is_no_json_is_named_and_nothing_is_sent(server: RewardServer, tokenizer: str) -> None:
    async with Scorer(tokenizer, f"{server.url()}?json") as scorer:
        with pytest.raises(DataFailure, match=r"cannot be JSON: .*columns=\[\.\.\.\]"):
            await scorer.score("a", measured=float("nan"))
    assert server.calls("score?json") == []


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("http://127.0.0.1:8000/score", "127.0.0.1 is not an address of the public Internet.*allow_private=true"),
        ("http://localhost:8000/score", "localhost is 127.0.0.1"),
        ("http://10.0.0.5/score", "10.0.0.5"),
        ("http://169.254.169.254/latest/meta-data", "not an address of the public Internet"),
        ("http://[::1]/score", "::1"),
        ("http://[::ffff:192.168.0.1]/score", "not an address of the public Internet"),
        ("ftp://example.org/score", "no address of an HTTP server"),
        ("example.org/score", "no address of an HTTP server"),
        ("https://me:secret@example.org/score", "headers_from_env"),
    ],
)
def test_an_address_that_is_private_or_none_is_refused_before_a_launch(url: str, said: str) -> None:
    with pytest.raises(ConfigError, match=f"(?s){said}") as caught:
        check_reward(RewardConfig(url=(url,)))
    assert "secret" not in str(caught.value)
    assert check_reward(RewardConfig(url=("https://93.184.216.34/score",))).label == "93.184.216.34"


@pytest.mark.parametrize(
    ("host", "said"),
    [
        ("0x7f000001", "not an address of the public Internet"),
        ("127.1", "not a canonical IPv4 address"),
        ("2130706433", "not a canonical IPv4 address"),
        ("0", "not a canonical IPv4 address"),
    ],
)
async def test_another_spelling_of_a_private_address_is_refused_when_it_is_called(
    server: RewardServer, tokenizer: str, host: str, said: str
) -> None:
    spec = EndpointSpec((f"http://{host}:{server.port}/score?ssrf",), name="judge", handling=Handling(5.0))
    worker = LocalWorker("reward/0", RewardWorker("reward/0", [spec], tokenizer))
    await worker.call("ready", timeout_s=PATIENCE_S)
    with pytest.raises(DataFailure, match=said):
        await worker.call("score", samples("a"), "q", {}, timeout_s=PATIENCE_S)
    await worker.kill()
    assert server.calls("score?ssrf") == []


async def test_an_address_that_may_be_called_is_resolved() -> None:
    resolver = PublicResolver()
    assert (await resolver.resolve("93.184.216.34", 80, socket.AF_INET))[0]["host"] == "93.184.216.34"
    with pytest.raises(PrivateAddress):
        await resolver.resolve("localhost", 80, socket.AF_INET)


@pytest.mark.parametrize("address", ["64:ff9b::7f00:1", "2002:7f00:1::", "100.64.0.1", "224.0.0.1", "fe80::1%eth0"])
def test_what_a_gateway_or_a_carrier_hides_is_not_public(address: str) -> None:
    assert not is_public(address) and is_public("2606:4700::1111")


def test_a_header_whose_variable_is_not_set_is_refused_and_values_are_in_no_text(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = RewardConfig(url=("https://example.org",), headers_from_env={"Authorization": "TROUPE_TEST_JUDGE"})
    with pytest.raises(ConfigError, match="TROUPE_TEST_JUDGE, which is not set"):
        check_reward(config)
    monkeypatch.setenv("TROUPE_TEST_JUDGE", "secret")
    spec = check_reward(config)
    assert isinstance(spec, EndpointSpec) and spec.headers == {"Authorization": "secret"}
    assert "secret" not in repr(spec)


async def test_the_server_of_the_documentation_is_one(tokenizer: str, tmp_path: Path) -> None:
    text = (Path(__file__).parents[2] / "docs/rewards.md").read_text()
    (server,) = [block for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "server:app" in block]
    (tmp_path / "server.py").write_text(server)
    with socket.socket() as bound:  # by us, so that no port is guessed; calls wait in it until the server accepts
        bound.bind(("127.0.0.1", 0))
        bound.listen()
        url, descriptor = f"http://127.0.0.1:{bound.getsockname()[1]}/score", bound.fileno()
        command = [sys.executable, "-m", "uvicorn", "server:app", "--fd", str(descriptor), "--log-level", "warning"]
        process = subprocess.Popen(command, cwd=tmp_path, pass_fds=[descriptor])
    try:
        async with Scorer(tokenizer, url, timeout_s=PATIENCE_S) as scorer:
            assert same(await scorer.score("abc", "xy", answer="xy"), 0.0, 1.0)
    finally:
        process.kill()
        process.wait(timeout=PATIENCE_S)


def test_a_run_is_trained_on_what_the_server_said_and_on_nothing_else(server: RewardServer, tmp_path: Path) -> None:
    """Half of the server's answers are none, of every kind."""
    url = server.url("every/run")
    changes = {
        "output": str(tmp_path),
        "rewards": [{"url": url, "name": "judge", "allow_private": True, "retries": 0, "on_failure": "drop"}],
        "roles": {"rollout": {"engine": "scripted"}},
        "train": {**ARITHMETIC["train"], "steps": 3, "batch_size": 4},
        "logging": {"completions_every": 1, "trackers": [], "curves": False},
        "weights": {"transport": "disk"},
    }
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(merged(ARITHMETIC, changes)))
    folder = run(load_config(recipe), local=True).folder
    said = {
        (call["body"]["prompts"][0], text): score
        for call in server.calls("every/run")
        for text, score in zip(call["body"]["completions"], call["scores"] or [], strict=False)
    }
    rows = [row for file in (folder / "completions").glob("*.parquet") for row in pq.read_table(file).to_pylist()]
    assert len(rows) == 3 * 4 * 4
    assert all(row["reward"] == said[row["prompt"], row["completion"]] for row in rows)
    lines = [line for line in read(folder / METRICS_FILE) if "loss" in line]
    dropped = {name: value for name, value in lines[-1].items() if name.startswith("dropped/")}
    assert dropped == {f"dropped/reward judge: {kind}": count for kind, count in dropped_kinds(server).items()}
    assert all(line["rewards/judge/seconds"] > 0 for line in lines)


def dropped_kinds(server: RewardServer) -> Counter[str]:
    """Of the calls that the run made, those that were no rewards, by kind."""
    faults = [call["fault"] for call in server.calls("every/run") if call["scores"] is None]
    return Counter("unreachable" if fault in ("500", "breaks") else "invalid" for fault in faults)

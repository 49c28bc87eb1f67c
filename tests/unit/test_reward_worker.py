"""How a worker calls rewards and combines them. No Ray."""

from __future__ import annotations

import asyncio
import math
import time
from pathlib import Path

import numpy as np
import pytest

from actors.errors import DataFailure, InfraFailure
from actors.worker import LocalWorker
from rewards.combine import weighted_sum
from rewards.loading import RewardSpec
from rewards.worker import RewardWorker
from tests.unit.reward_stage import file, samples, scored, scored_with_texts, tokenizer

__all__ = ["file", "tokenizer"]  # fixtures


def test_an_absent_opinion_is_left_out_and_no_opinion_at_all_is_not_zero() -> None:
    rewards = np.array([[1.0, 2.0], [np.nan, 2.0], [np.nan, np.nan]], np.float32)
    total = weighted_sum(rewards, np.array([1.0, 0.5], np.float32))
    assert total[:2].tolist() == [2.0, 1.0]
    assert math.isnan(total[2])


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

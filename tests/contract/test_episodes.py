"""Episodes between a rollout worker and environment workers in processes of their own: what users' code may do to them,
and what becomes of the samples."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from actors.batch import Batch
from actors.errors import DataFailure, InfraFailure
from actors.worker import LocalObjects, LocalWorker
from orchestrator.cluster.failures import Watchdog
from orchestrator.cluster.pool import Pool, PoolPolicy
from orchestrator.collection.group_stages import GroupStages, PromptGroup
from orchestrator.data.items import Prompt
from orchestrator.pipeline import Pipeline, Prompts, generate
from orchestrator.planning.episode_settings import EpisodeSettings
from rewards.environment_specs import EnvironmentSpec
from rewards.environment_worker import EnvironmentWorker
from rollout.conversation import ConversationSpec
from rollout.engine import EngineSpec
from rollout.episode import Limits
from rollout.sampling import Request, Sampling
from rollout.worker import RolloutWorker
from tests.conversations import EOS, TEMPLATE, byte_tokenizer, ids
from tests.process_worker import ProcessWorker
from tests.waiting import until_true

PATIENCE_S = 200.0  # of waits that end by themselves, on a busy machine, too
LIMITS = Limits(turns=3, tokens=400, prompt_tokens=2000, timeout_s=PATIENCE_S, call_timeout_s=PATIENCE_S)
POLICY = PoolPolicy(slots=8, max_attempts=2, call_timeout_s=250.0, start_timeout_s=PATIENCE_S, max_restarts=20)
CODE = '''
import os
import time
from pathlib import Path

HERE = Path(__file__).parent


def {name}(how: str) -> str:
    """Do something.

    Args:
        how: What.
    """
    if how == "raise":
        raise ValueError("that went wrong")
    if how == "megabytes":
        return "x" * 5_000_000
    if how == "end":
        return "a<eos>b"
    died = HERE / "dieonce.once"
    while how == "hangonce" and (not died.exists() or died.read_text() in ("", str(os.getpid()))):
        time.sleep(0.01)  # until this process has been ended by the other call: this one hangs in the next process
    first = HERE / f"{how}.once"
    again = not how.endswith("once") or not first.exists()
    if not first.exists():
        first.write_text(str(os.getpid()))
    if again and how.startswith("die"):
        os._exit(1)
    if again and how.startswith("hang"):
        time.sleep(60)
    return "well"


class Slow:
    def __init__(self, seconds: float = 0.5):
        self.seconds = seconds

    def reset(self, row):
        with (HERE / "resets").open("a") as file:
            file.write("x")

    def step(self, message):
        if message["content"] == "broken":
            raise RuntimeError("no such move")
        time.sleep(self.seconds)
        return [{"role": "user", "content": "Go on."}], 1.0, False


class UntilLoaded(Slow):
    def step(self, message):
        while not (HERE / "loaded").exists():
            time.sleep(0.01)  # ended by the test, or by the deadline of the call
        return super().step(message)
'''.replace("{name}", "do")


def calling(how: str) -> str:
    return f'<tool_call>{{"name": "do", "arguments": {{"how": "{how}"}}}}</tool_call><eos>'


@dataclass
class Stage:
    """A `generate` stage of episodes, on pools that are up."""

    stages: GroupStages
    engines: Pool
    hosts: Pool
    events: list[tuple[str, dict[str, Any]]]
    rollouts: dict[int, RolloutWorker]
    processes: list[ProcessWorker]

    async def run(self, n: int = 1) -> PromptGroup:
        (stage,) = Pipeline(Prompts, generate(n=n)).with_episodes("environment").stages
        prompt = Prompt(0, (5,), [{"role": "user", "content": "Go."}], {})
        group = PromptGroup("g", 0, prompt, seed=1)
        found = await self.stages.run(stage, group, Sampling(LIMITS.tokens))
        assert found is not None
        return found

    def happened(self, kind: str, role: str = "environment") -> list[dict[str, Any]]:
        return [detail for event, detail in self.events if event == kind and detail["role"] == role]


def in_stage(
    tmp_path: Path,
    said: Callable[[int, int], str],
    talk: Callable[[Stage], Awaitable[Any]],
    *,
    environment: str | None = None,
    limits: Limits = LIMITS,
    engines: Sequence[dict[str, Any]] = ({},),
) -> Any:
    """`said(sample, turn)`: what the model says. `engines`: faults of each."""
    (tmp_path / "tokenizer").mkdir(exist_ok=True)
    byte_tokenizer().save_pretrained(tmp_path / "tokenizer")
    file = tmp_path / "code.py"
    file.write_text(CODE)
    tools = [] if environment else [f"{file}:do"]
    spec = EnvironmentSpec.of(tools, environment and f"{file}:{environment}", {}, {}).located()
    settings = EpisodeSettings("a", "environment", spec, limits, "auto", 1.0, 100)

    def tokens(request: Request, index: int) -> list[int]:
        name, _, turn = request.id.rpartition(".")
        return ids(said(int(name.rpartition("#")[2]), int(turn)))

    async def run() -> Any:
        events: list[tuple[str, dict[str, Any]]] = []
        rollouts: dict[int, RolloutWorker] = {}
        processes: list[ProcessWorker] = []

        async def start_engine(index: int) -> Any:
            options = {"completions": tokens, "vocab": 300, **engines[min(index, len(engines) - 1)]}
            engine = EngineSpec("scripted", "none", max_model_len=4000, options=options)
            conversation = ConversationSpec(str(tmp_path / "tokenizer"), TEMPLATE)
            rollouts[index] = RolloutWorker(f"rollout/{index}", engine, 0, conversation=conversation)
            return LocalWorker(f"rollout/{index}", rollouts[index])

        async def start_host(index: int) -> Any:
            kwargs = {"name": f"environment/{index}", "specs": {"a": spec}, "max_answer_chars": {"a": 100}}
            processes.append(ProcessWorker(f"environment/{index}", EnvironmentWorker, kwargs))
            return processes[-1]

        def pool(role: str, desired: int, policy: PoolPolicy, start: Any) -> Pool:
            def event(kind: str, detail: dict[str, Any]) -> None:
                events.append((kind, detail))

            async def stop(worker: Any) -> None:
                await worker.kill()

            watchdog = Watchdog(report_after_s=60.0)
            return Pool(role, desired, policy, start=start, stop=stop, event=event, watchdog=watchdog)

        engine_pool = pool("rollout", len(engines), POLICY, start_engine)
        hosts = pool("environment", 1, replace(POLICY, kill_on_timeout=True), start_host)
        async with AsyncExitStack() as stack:
            for each in (engine_pool, hosts):
                stack.push_async_callback(each.close)
                await each.open()
            stages = GroupStages({"rollout": engine_pool}, {}, {}, LocalObjects(), {"environment": hosts})
            stages.episodes.settings = settings
            found = await talk(Stage(stages, engine_pool, hosts, events, rollouts, processes))
        assert not [each for each in processes if psutil.pid_exists(each.process.pid or 0) and each.process.is_alive()]
        return found

    return asyncio.run(run())


def rows(group: PromptGroup) -> list[Batch]:
    return [block.target for block in group.rows.blocks]


def answers(group: PromptGroup) -> list[str]:
    """Of each sample, what it was first answered with."""
    return [ref.target.messages[1]["content"] for ref in group.transcripts]


def test_each_sample_is_answered_and_none_is_lost_whatever_another_s_tool_does(tmp_path: Path) -> None:
    """Six samples in one environment worker: one of them ends its process, one hangs in the next one."""
    hows = ["raise", "megabytes", "end", "die once", "hang once", "well"]

    def said(sample: int, turn: int) -> str:
        return "done<eos>" if turn else calling(hows[sample].replace(" ", ""))

    async def talk(stage: Stage) -> tuple[PromptGroup, list[dict[str, Any]]]:
        return await stage.run(len(hows)), stage.happened("evicted")

    # The others are answered well within the deadline that the one that hangs reaches.
    group, evicted = in_stage(tmp_path, said, talk, limits=replace(LIMITS, call_timeout_s=5.0))
    raised, long, end, *others = answers(group)
    assert json.loads(raised) == {"error": "that went wrong"} and others == ["well"] * 3
    assert long == "x" * 100 + " ... (cut: it has 5000000 characters)" and end == "a<eos>b"
    assert len(evicted) == 2 and "no answer within 5 s" in evicted[-1]["why"]
    assert [facts.failures for facts in group.episodes] == [1, 0, 0, 0, 0, 0]
    for row in rows(group):
        text = byte_tokenizer().decode(row["tokens"][row["mask"]].tolist())
        assert text.endswith("</tool_call><eos>done<eos>")
        answered = ~row["mask"] & (row["tokens"] == EOS)
        assert int(answered.sum()) == 2  # of the prompt, and the template's own after the answer
        assert not row["sample_logps"][~row["mask"]].any() and (row["version"][row["mask"]] == 0).all()
    assert group.rows["completion_tokens"].tolist() == [int(row["mask"].sum()) for row in rows(group)]
    assert group.rows.lengths.tolist() == [row.num_tokens for row in rows(group)]


@pytest.mark.parametrize("how", ["die", "hang"])
def test_a_sample_whose_environment_fails_every_time_fails_in_the_end_and_leaves_no_process(
    tmp_path: Path, how: str
) -> None:
    async def talk(stage: Stage) -> int:
        with pytest.raises(InfraFailure, match=r"environment: g#0 failed on 2 worker\(s\)"):
            await stage.run()
        return len(stage.processes)

    limits = replace(LIMITS, call_timeout_s=2.0)
    assert in_stage(tmp_path, lambda sample, turn: calling(how), talk, limits=limits) >= 2


def test_an_environment_that_raises_fails_its_sample_at_once_and_stays_up(tmp_path: Path) -> None:
    async def talk(stage: Stage) -> None:
        with pytest.raises(DataFailure, match=r"Slow\.step raised RuntimeError: no such move"):
            await stage.run()
        assert stage.happened("evicted") == [] and stage.happened("retry") == []

    in_stage(tmp_path, lambda sample, turn: "broken<eos>", talk, environment="Slow")


def test_an_engine_that_dies_in_an_episode_has_it_generated_again_elsewhere_from_its_start(tmp_path: Path) -> None:
    async def talk(stage: Stage) -> PromptGroup:
        return await stage.run()

    slow = {"seconds_per_step": 0.001}
    group = in_stage(
        tmp_path, lambda sample, turn: "hm<eos>", talk, environment="Slow", engines=({**slow, "break_at_step": 5}, slow)
    )
    (row,) = rows(group)
    assert (tmp_path / "resets").read_text() == "xx" and group.episodes[0].turns == 3
    assert byte_tokenizer().decode(row["tokens"][row["mask"]].tolist()) == "hm<eos>" * 3
    assert group.metas[0].worker == "rollout/1" and row["turn_reward"].sum() == 3.0


def test_weights_that_arrive_in_an_episode_show_in_the_versions_of_its_later_turns(tmp_path: Path) -> None:
    async def talk(stage: Stage) -> PromptGroup:
        running = asyncio.ensure_future(stage.run())
        await until_true(lambda: stage.rollouts[0].ping()["tokens"] == 3, "such state of the engine")
        await asyncio.wrap_future(stage.rollouts[0]._loop.load(lambda engine: engine.load([], 1) or ""))
        (tmp_path / "loaded").touch()
        return await running

    group = in_stage(tmp_path, lambda sample, turn: "hm<eos>", talk, environment="UntilLoaded")
    (row,) = rows(group)
    assert row["version"][row["mask"]].tolist() == [0] * 3 + [1] * 6
    assert (group.oldest_version, group.metas[0].newest_version) == (0, 1)


def test_an_episode_that_is_cancelled_leaves_nothing_in_the_engine_or_the_environment(tmp_path: Path) -> None:
    async def talk(stage: Stage) -> None:
        running = asyncio.ensure_future(stage.run(2))
        await until_true(lambda: stage.rollouts[0].ping()["tokens"] > 0, "such state of the engine")
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        assert stage.rollouts[0]._episodes == {}
        await until_true(lambda: stage.rollouts[0].ping()["requests"] == 0, "such state of the engine")
        with pytest.raises(InfraFailure, match="has no episode g#0"):
            await stage.processes[0].call("step", "g#0", {"role": "assistant", "content": ""}, timeout_s=PATIENCE_S)

    in_stage(tmp_path, lambda sample, turn: "hm<eos>", talk, environment="Slow")

"""One run on Ray with vLLM: pairs by what two judges prefer, an engine role of the run and a server, with online_dpo
and xpo; then episodes of an agent, whose pool of environment workers loses a process, is emptied and filled again."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest

from orchestrator.cluster.control import RunFile
from tests.contract.test_agent_runs import AGENT
from tests.judge_server import judge_server
from tests.runs import TROUPE, Run, plain_environment

pytest.importorskip("openai")
pytestmark = pytest.mark.timeout(600)
PAIRED = 3  # steps of each phase of pairs
ENGINES = ("rollout", "reference_rollout", "judge_rollout")
SMALL = {"cpus": 0.1}
VLLM = {"engine": "vllm", "kv_cache_gib": 0.05, **SMALL}


def recipe(where: Path, server: str) -> dict[str, Any]:
    (where / "agent.py").write_text(AGENT)
    (where / "question.txt").write_text("{response0}\n{response1}\n")
    # an untrained model judges: the last of its letters decides, and if it says nothing, the first answer is better
    judge = {"kind": "pairwise", "role": "judge_rollout", "max_tokens": 6, "template": f"{where}/question.txt"}
    judge |= {"pattern": r"(?s)(?P<first>[\x00-O]|^\Z)|(?P<second>.)"}
    phase = {
        "data": {"path": "example:calculator", "options": {"rows": 24}},
        "train": {"steps": PAIRED, "batch_size": 4, "learning_rate": 1e-3, "scheduler": "constant"},
        "sampling": {"max_tokens": 8},
    }
    talking = {
        "method": "grpo",
        "options": {"num_generations": 2},
        "episode": {"environment": f"{where}/agent.py:agent", "max_turn_tokens": 8},
        "train": {**phase["train"], "steps": 1000},
        "sampling": {"max_tokens": 64, "stop_token_ids": list(range(100, 160))},  # so that turns end by themselves
    }
    return {
        "name": "t",
        "output": str(where),
        "model": {"path": "example:calculator"},
        "rewards": [
            {"judge": judge, "name": "engine"},
            {"judge": {"url": server, "model": "long"}, "allow_private": True, "name": "server", "weight": 0.5},
        ],
        "phases": {
            "online_dpo": {**phase, "method": "online_dpo"},
            "xpo": {**phase, "method": "xpo"},
            "agents": {**phase, **talking},
        },
        "roles": {
            "rollout": VLLM,
            "reference_rollout": {"engine": "hf", **SMALL},
            "judge": {"kind": "frozen", "model": "example:calculator", **SMALL},
            "judge_rollout": {"kind": "engine", "follows": "judge", "max_model_len": 256, **VLLM},
            **dict.fromkeys(("policy", "reference", "reward"), SMALL),
            "environment": {"workers": 2, "timeout_s": 60, **SMALL},
        },
        "cluster": {"num_cpus": 4, "object_store_mib": 100},
        "checkpoint": {"every": None},
        "logging": {"completions_every": 1, "trackers": [], "curves": False},
    }


def test_judges_and_agents_on_ray_with_an_environment_pool_that_dies_and_is_resized(tmp_path: Path) -> None:
    with judge_server() as server:
        run = Run(tmp_path, base=recipe(tmp_path, server.url("").rstrip("/") + "/v1"))
        goes_on(run, 2 * PAIRED + 1)
        chats_with_vllm(run)
        kills_an_environment_worker(run)
        empties_and_fills_the_pool(run)
        told(run, "stop")
        assert run.process.wait(120) in (0, 143), run.output.read_text()[-4000:]
        assert server.calls("score"), "the server was asked"
    saved = [path.name for path in (run.folder / "checkpoints").rglob("*")]
    assert "policy" in saved and not any("judge" in name for name in saved), "a judge's model is where it came from"
    judged_each_pair(run)
    talked_with_the_agent(run)


def told(run: Run, *command: str) -> str:
    name, *rest = command
    asked = [TROUPE, name, str(run.folder), *rest]
    return subprocess.run(
        asked, env=plain_environment(), capture_output=True, text=True, timeout=120, check=True, cwd=run.where
    ).stdout


def goes_on(run: Run, to: int) -> None:
    run.until(lambda: run.steps() >= to, f"step {to}", timeout_s=240)


def of_environments(run: Run, kind: str) -> list[dict[str, Any]]:
    return [event for event in run.events(kind) if event["role"] == "environment"]


def kills_an_environment_worker(run: Run) -> None:
    joined = of_environments(run, "joined")
    assert len(joined) == 2
    os.kill(joined[0]["pid"], signal.SIGKILL)
    run.until(lambda: of_environments(run, "evicted"), "the loss of an environment worker")
    run.until(lambda: len(of_environments(run, "joined")) == 3, "another in its place")
    goes_on(run, run.steps() + 2)


def empties_and_fills_the_pool(run: Run) -> None:
    told(run, "scale", "environment=0")
    run.until(lambda: len(of_environments(run, "stopped")) >= 2, "the pool to be empty")
    told(run, "scale", "environment=2")
    stood = run.steps()
    run.until(lambda: len(of_environments(run, "joined")) == 5, "two new environment workers")
    goes_on(run, stood + 2)


def chats_with_vllm(run: Run) -> None:
    """At the run's own door, while it trains; `tests/contract/test_chat_tools.py` has calls of tools."""
    from openai import OpenAI

    found = RunFile.read(run.folder)
    assert set(found.models) == {run.folder.name, *(f"{run.folder.name}/{role}" for role in ENGINES)}
    client = OpenAI(base_url=f"{found.chat}/v1", api_key="-", timeout=120, max_retries=0)
    tool = {"type": "function", "function": {"name": "calculator", "parameters": {"type": "object", "properties": {}}}}
    asked: dict[str, Any] = {"messages": [{"role": "user", "content": "12*34"}], "max_tokens": 40, "seed": 7}
    for model in (found.models[0], f"{run.folder.name}/judge_rollout"):
        whole = client.chat.completions.create(model=model, **asked, temperature=0)
        assert (whole.usage.prompt_tokens, whole.choices[0].finish_reason) == (
            6,
            "length" if at_limit(whole) else "stop",
        )
        parts = list(client.chat.completions.create(model=model, **asked, stream=True))
        assert parts[-1].choices[0].finish_reason in ("stop", "length")
        offered = client.chat.completions.create(model=model, **asked, tools=[tool])
        assert offered.choices[0].finish_reason in ("stop", "length"), "an untrained model calls no tool"
        assert offered.choices[0].message.tool_calls is None
        streamed = list(client.chat.completions.create(model=model, **asked, tools=[tool], stream=True))
        text = "".join(each.delta.content or "" for part in streamed for each in part.choices)
        if model.endswith("judge_rollout"):  # its weights stay; those of the policy change meanwhile
            assert text == offered.choices[0].message.content


def at_limit(answer: Any) -> bool:
    return answer.usage.completion_tokens == 40


def judged_each_pair(run: Run) -> None:
    lines = [line for line in run.lines("metrics.jsonl") if "loss" in line and line["phase"] != "agents"]
    assert [line["phase"] for line in lines] == [name for name in ("online_dpo", "xpo") for _ in range(PAIRED)]
    for line in lines:
        assert line["grad_norm"] > 0 and line["rewards/chosen"] is not None
        assert line["rewards/server/frac_unparsable"] == line["rewards/engine/frac_unparsable"] == 0
        for judge in ("engine", "server"):
            assert 0 <= line[f"rewards/{judge}/mean"] <= 1, judge
        if (
            line["phase"] == "online_dpo"
        ):  # both are the policy's: what one wins, the other loses; and ties make no pair
            assert line["rewards/engine/mean"] == line["rewards/server/mean"] == 0.5
            assert max(line["rewards/server/std"], line["rewards/engine/std"]) > 0


def talked_with_the_agent(run: Run) -> None:
    lines = [line for line in run.lines("metrics.jsonl") if "loss" in line and line["phase"] == "agents"]
    assert len(lines) >= 5 and all(1 < line["episodes/mean_turns"] <= 2 for line in lines)
    assert any(line["grad_norm"] > 0 for line in lines)
    earned = [line["rewards/environment/mean"] for line in lines]  # an agent whose turn was cut earns nothing
    assert any(reward is not None and reward > 0 for reward in earned)

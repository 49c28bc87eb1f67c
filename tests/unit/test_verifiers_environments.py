"""Environments of the library `verifiers` in an environment worker; the test is the model. The library is no dependency
of Troupe: where it is not installed, only its absence is tested."""

from __future__ import annotations

import asyncio
import importlib.util
from pathlib import Path
from typing import Any

import pytest

from actors.errors import ConfigError
from rewards.environment_specs import EnvironmentSpec
from rewards.environment_worker import EnvironmentWorker, Opened, Reply
from rewards.environments.verifiers_environment import of_verifiers

CODE = '''
import verifiers as vf
from datasets import Dataset
from rewards.environments.verifiers_environment import of_verifiers

ROWS = Dataset.from_list([{"question": "2+3?", "answer": "5"}])

def right(completion, answer, **kwargs) -> float:
    return float(completion[-1]["content"] == answer)

def add(a: int, b: int) -> int:
    """Add two numbers.

    Args:
        a: One.
        b: Another.
    """
    return a + b

class Patient(vf.MultiTurnEnv):
    async def env_response(self, messages, state, **kwargs):
        return [{"role": "user", "content": "Are you sure?"}]

def single():
    return of_verifiers(lambda: vf.SingleTurnEnv(dataset=ROWS, system_prompt="Add.", rubric=vf.Rubric(funcs=[right])))

def tools():
    return of_verifiers(lambda: vf.ToolEnv(dataset=ROWS, tools=[add], max_turns=4, rubric=vf.Rubric(funcs=[right])))

def patient():
    return of_verifiers(lambda: Patient(dataset=ROWS, max_turns=2, rubric=vf.Rubric(funcs=[right], weights=[0.5])))
'''


def test_without_the_library_the_message_says_what_to_install():
    if importlib.util.find_spec("verifiers"):
        with pytest.raises(ConfigError, match=r"takes a verifiers\.Environment, not a str"):
            of_verifiers(lambda: "wordle")
    else:
        with pytest.raises(ConfigError, match=r"needs the package `verifiers`, version 0\.1\.12"):
            of_verifiers(lambda: "wordle")


def talked(tmp_path: Path, name: str, row: dict[str, Any], *turns: dict[str, Any]) -> tuple[Opened, list[Reply]]:
    (tmp_path / "environments.py").write_text(CODE)
    spec = EnvironmentSpec.of([], f"{tmp_path}/environments.py:{name}", {}, {}).located()

    async def run() -> tuple[Opened, list[Reply]]:
        worker = EnvironmentWorker("environment/0", {"phase": spec}, {"phase": 1000})
        await worker.ready()
        opened = await worker.open("e", "phase", row["prompt"], row)
        return opened, [await worker.step("e", turn) for turn in turns]

    return asyncio.run(asyncio.wait_for(run(), 60))


def says(content: str, **others: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **others}


QUESTION = [{"role": "user", "content": "2+3?"}]


def test_a_single_turn_is_scored_by_the_rubric(tmp_path: Path):
    pytest.importorskip("verifiers.envs")
    row = {"prompt": [{"role": "system", "content": "Add."}, *QUESTION], "answer": "5"}
    for text, reward in (("5", 1.0), ("6", 0.0), ("", 0.0)):
        opened, (reply,) = talked(tmp_path, "single", row, says(text))
        assert opened.prompt == row["prompt"]
        assert (reply.reward, reply.done) == (reward, True)


def test_its_tools_are_shown_to_the_model_and_called(tmp_path: Path):
    pytest.importorskip("verifiers.envs")
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 2, "b": 3}}}
    opened, (answer, end) = talked(
        tmp_path, "tools", {"prompt": QUESTION, "answer": "5"}, says("", tool_calls=[call]), says("5")
    )
    assert [tool["function"]["name"] for tool in opened.tools] == ["add"]
    assert [(each["role"], each["name"], each["content"]) for each in answer.messages] == [("tool", "add", "5")]
    assert (answer.done, end.done, end.reward) == (False, True, 1.0)


def test_its_answers_follow_until_its_own_limit_of_turns(tmp_path: Path):
    pytest.importorskip("verifiers.envs")
    _, (answer, end) = talked(tmp_path, "patient", {"prompt": QUESTION, "answer": "5"}, says("6"), says("5"))
    assert answer.messages == [{"role": "user", "content": "Are you sure?"}]
    assert (answer.done, end.done, end.reward) == (False, True, 0.5)

"""What users write for episodes, run by an environment worker in this process: tools, TRL's environment factories, and
environments with `reset` and `step`."""

from __future__ import annotations

import asyncio
import pickle
from collections.abc import Awaitable, Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest

from actors.errors import ConfigError, DataFailure, InfraFailure
from rewards.environment_specs import EnvironmentSpec
from rewards.environment_worker import EnvironmentWorker, Opened, Reply

CODE = '''
import time
from pathlib import Path


def add(a: int, b: int) -> int:
    """Add two numbers.

    Args:
        a: The first.
        b: The second.
    """
    return a + b


async def slowly(text: str) -> dict:
    """Say it again.

    Args:
        text: What to say.
    """
    return {"said": text}


def leave(code: int) -> str:
    """Leave.

    Args:
        code: Of the exit.
    """
    if code == 2:
        raise StopIteration("no more")
    raise SystemExit("gone")


def untyped(a):
    return a


class Counter:
    built = 0

    def __init__(self, start: int = 0):
        type(self).built += 1
        self.start = start

    def reset(self, **row):
        self.value = self.start
        return f" Count from {self.start}; you are {row['who']}."

    def up(self, by: int) -> int:
        """Count up.

        Args:
            by: How far.
        """
        self.value += by
        return self.value

    def get_reward(self) -> float:
        return self.value / 10


class Guess:
    def reset(self, row):
        self.left = 2
        self.secret = row["answer"]
        return [{"role": "user", "content": "Which number?"}]

    def step(self, message):
        self.left -= 1
        if message["content"] == "die":
            raise RuntimeError("the game is broken")
        if message["content"] == "nonsense":
            return "what?"
        if message["content"] == self.secret:
            return [], 1.0, True
        return {"role": "user", "content": "no" * 50}, -0.5, not self.left


class Slow:
    """Its calls may wait for a file, in a thread that nobody can stop."""

    def __init__(self):
        self.log = []

    def reset(self, row):
        self.log.append("reset")
        self.folder = Path(row["folder"])
        self.wait(row.get("reset", ""))

    def step(self, message):
        self.wait(message["content"])
        self.log.append(message["content"])
        if message["content"] == "fail":
            raise RuntimeError("late")
        return "and then?", None, False

    def get_reward(self):
        return self.log.count("hold")

    def abandon(self):
        self.log.append("abandoned")

    def wait(self, what):
        if what in ("hold", "fail"):
            (self.folder / "began").touch()
            while not (self.folder / "go").exists():
                time.sleep(0.01)
'''


@pytest.fixture
def code(tmp_path: Path) -> str:
    file = tmp_path / "environments.py"
    file.write_text(CODE)
    return str(file)


def worker_of(spec: EnvironmentSpec, max_chars: int = 1000) -> EnvironmentWorker:
    """As it reaches another process."""
    spec = pickle.loads(pickle.dumps(spec.located()))
    return EnvironmentWorker("environment/0", {"a": spec}, {"a": max_chars})


def run(worker: EnvironmentWorker, talk: Callable[[EnvironmentWorker], Awaitable[Any]]) -> Any:
    async def ready() -> Any:
        await worker.ready()
        return await talk(worker)

    try:
        return asyncio.run(ready())
    finally:
        worker.close()


def calling(name: str, arguments: Any) -> dict[str, Any]:
    call = {"type": "function", "function": {"name": name, "arguments": arguments}}
    return {"role": "assistant", "content": "", "tool_calls": [call]}


def answer_of(code: str, name: str, arguments: Any, *tools: str) -> tuple[str, Reply]:
    async def talk(worker: EnvironmentWorker) -> Reply:
        await worker.open("e", "a", "What?", {})
        return await worker.step("e", calling(name, arguments))

    reply: Reply = run(worker_of(EnvironmentSpec.of([f"{code}:{tool}" for tool in tools], None, {}, {})), talk)
    (message,) = reply.messages
    assert message["role"] == "tool" and message["name"] == name and not reply.done and reply.calls == 1
    return message["content"], reply


def test_a_tool_answers_with_its_result_and_a_mapping_as_json(code: str):
    assert answer_of(code, "add", {"a": 2, "b": 3}, "add")[0] == "5"
    assert answer_of(code, "slowly", {"text": "ä"}, "add", "slowly")[0] == '{"said": "ä"}'


@pytest.mark.parametrize(
    ("name", "arguments", "said"),
    [
        ("add", {"a": 2}, "missing 1 required positional argument: 'b'"),
        ("add", {"a": 2, "c": 3}, "unexpected keyword argument 'c'"),
        ("add", [2, 3], "the arguments must be an object, not [2, 3]"),
        ("divide", {"a": 2}, "there is no tool 'divide'; there are add, leave"),
        ("leave", {"code": 1}, "gone"),
        ("leave", {"code": 2}, "no more"),
    ],
)
def test_a_call_that_fails_is_answered_with_its_error_and_counted(code: str, name: str, arguments: Any, said: str):
    content, reply = answer_of(code, name, arguments, "add", "leave")
    assert said in content and content.startswith('{"error": ') and reply.failures == 1


def test_text_that_was_no_call_is_answered_with_what_is_wrong_with_it(code: str):
    async def talk(worker: EnvironmentWorker) -> tuple[Reply, Reply]:
        await worker.open("e", "a", "What?", {})
        invalid = {"name": None, "arguments": "{oops", "error": "Expecting property name"}
        first = await worker.step("e", {"role": "assistant", "content": "", "invalid_tool_calls": [invalid]})
        return first, await worker.step("e", {"role": "assistant", "content": "5"})

    first, last = run(worker_of(EnvironmentSpec.of([f"{code}:add"], None, {}, {})), talk)
    assert [message["content"] for message in first.messages] == ['{"error": "Expecting property name"}']
    assert not first.done and first.failures == 1 and last.done and last.messages == [] and last.calls == 0


def test_an_environment_factory_works_as_in_trl(code: str):
    """Public methods are tools, `reset` gets the row and adds to the user's last message, `get_reward` scores."""

    async def talk(worker: EnvironmentWorker) -> tuple[Opened, list[str], float | None, Opened, int]:
        opened = await worker.open("e", "a", [{"role": "user", "content": "Count."}], {"who": "me"})
        said = [(await worker.step("e", calling("up", {"by": by}))).messages[0]["content"] for by in (2, 3)]
        reward = await worker.end("e", score=True)
        again = await worker.open("f", "a", "Count.", {"who": "you"})
        built = type(worker._sessions["f"].environment.instance).built  # pyright: ignore
        return opened, said, reward, again, built

    spec = EnvironmentSpec.of([f"{code}:add"], None, {"": f"{code}:Counter"}, {"start": 4})
    opened, said, reward, again, built = run(worker_of(spec), talk)
    assert opened.prompt == [{"role": "user", "content": "Count. Count from 4; you are me."}]
    assert [tool["function"]["name"] for tool in opened.tools] == ["add", "up"]
    assert said == ["6", "9"] and reward == 0.9
    assert again.prompt[0]["content"].endswith("you are you.") and built == 1  # built once, reset often


def test_a_column_chooses_one_of_several_environments(code: str):
    async def talk(worker: EnvironmentWorker) -> list[list[str]]:
        tools: list[list[str]] = []
        for name in ("counter", "other"):
            opened = await worker.open(name, "a", "Go.", {"environment": name, "who": "me"})
            tools.append([tool["function"]["name"] for tool in opened.tools])
        with pytest.raises(DataFailure, match="'nowhere', which is none of counter, other"):
            await worker.open("e", "a", "Go.", {"environment": "nowhere"})
        return tools

    file = Path(code)
    file.write_text(CODE + "\n\nclass Other:\n    def reset(self, **row):\n        assert 'environment' not in row\n")
    spec = EnvironmentSpec.of((), None, {"counter": f"{code}:Counter", "other": f"{code}:Other"}, {})
    assert run(worker_of(spec), talk) == [["up"], []]


def test_an_environment_answers_with_messages_a_reward_and_whether_it_is_over(code: str):
    async def talk(worker: EnvironmentWorker) -> tuple[Opened, list[Reply], float | None]:
        opened = await worker.open("e", "a", "Guess!", {"answer": "7"})
        replies = [await worker.step("e", {"role": "assistant", "content": text}) for text in ("3", "7")]
        return opened, replies, await worker.end("e", score=True)

    opened, (wrong, right), reward = run(worker_of(EnvironmentSpec.of((), f"{code}:Guess", {}, {}), 20), talk)
    assert [message["content"] for message in opened.prompt] == ["Guess!", "Which number?"] and opened.tools == []
    assert wrong.messages == [{"role": "user", "content": "no" * 10 + " ... (cut: it has 100 characters)"}]
    assert (wrong.reward, wrong.done) == (-0.5, False) and (right.reward, right.done) == (1.0, True)
    assert reward is None


@pytest.mark.parametrize(("said", "why"), [("die", "RuntimeError: the game is broken"), ("nonsense", "must return")])
def test_an_environment_that_raises_or_answers_garbage_fails_the_sample(code: str, said: str, why: str):
    async def talk(worker: EnvironmentWorker) -> None:
        await worker.open("e", "a", "Guess!", {"answer": "7"})
        with pytest.raises(DataFailure, match=why):
            await worker.step("e", {"role": "assistant", "content": said})
        with pytest.raises(InfraFailure, match="no episode e"):
            await worker.step("e", {"role": "assistant", "content": "7"})

    run(worker_of(EnvironmentSpec.of((), f"{code}:Guess", {}, {})), talk)


def test_an_environment_whose_step_still_runs_in_a_thread_is_in_no_other_episode(code: str, tmp_path: Path):
    async def talk(worker: EnvironmentWorker) -> tuple[list[str], float | None, bool, bool]:
        await worker.open("e", "a", "Go.", {"folder": str(tmp_path)})
        left: Any = worker._sessions["e"].environment  # pyright: ignore
        await cancelled(worker.step("e", turn("hold")), tmp_path)
        await worker.end("e", score=False)
        await worker.open("f", "a", "Go.", {"folder": str(tmp_path)})
        is_reused = worker._sessions["f"].environment is left  # pyright: ignore
        (tmp_path / "go").touch()
        await until(lambda: "hold" in left.log)
        reward = await worker.end("f", score=True)
        # One that was given up between two turns is used again.
        await worker.open("g", "a", "Go.", {"folder": str(tmp_path)})
        between = worker._sessions["g"].environment  # pyright: ignore
        await worker.step("g", turn("a word"))
        await worker.end("g", score=False)
        await worker.open("h", "a", "Go.", {"folder": str(tmp_path)})
        return left.log, reward, is_reused, worker._sessions["h"].environment is between  # pyright: ignore

    log, reward, is_reused, is_kept = run(worker_of(EnvironmentSpec.of((), f"{code}:Slow", {}, {})), talk)
    assert reward == 0.0 and not is_reused and is_kept
    assert log == ["reset", "abandoned", "hold"]


def test_a_late_error_of_an_episode_leaves_the_one_that_was_begun_again_alone(code: str, tmp_path: Path):
    async def talk(worker: EnvironmentWorker) -> tuple[Reply, float | None]:
        await worker.open("e", "a", "Go.", {"folder": str(tmp_path)})
        late = asyncio.ensure_future(worker.step("e", turn("fail")))
        await until((tmp_path / "began").exists)
        await worker.open("e", "a", "Go.", {"folder": str(tmp_path)})  # on another rollout worker
        (tmp_path / "go").touch()
        with pytest.raises(DataFailure, match="late"):
            await late
        return await worker.step("e", turn("hold")), await worker.end("e", score=True)

    reply, reward = run(worker_of(EnvironmentSpec.of((), f"{code}:Slow", {}, {})), talk)
    assert reply.messages == [{"role": "user", "content": "and then?"}] and reward == 1.0


def test_a_late_start_of_an_episode_does_not_replace_the_one_that_was_begun_again(code: str, tmp_path: Path):
    async def talk(worker: EnvironmentWorker) -> float | None:
        late = asyncio.ensure_future(worker.open("e", "a", "Go.", {"folder": str(tmp_path), "reset": "hold"}))
        await until((tmp_path / "began").exists)
        await worker.open("e", "a", "Go.", {"folder": str(tmp_path)})
        (tmp_path / "go").touch()
        await worker.step("e", turn("hold"))
        with pytest.raises(InfraFailure, match="episode e was ended, or begun again, while it began"):
            await late
        return await worker.end("e", score=True)

    assert run(worker_of(EnvironmentSpec.of((), f"{code}:Slow", {}, {})), talk) == 1.0


def test_an_environment_whose_start_is_cancelled_is_abandoned_and_in_no_other_episode(code: str, tmp_path: Path):
    async def talk(worker: EnvironmentWorker) -> tuple[list[str], bool]:
        left: Any = worker._idle["a", ""][0]  # pyright: ignore
        await cancelled(worker.open("e", "a", "Go.", {"folder": str(tmp_path), "reset": "hold"}), tmp_path)
        (tmp_path / "go").touch()
        await worker.end("e", score=False)
        await worker.open("f", "a", "Go.", {"folder": str(tmp_path)})
        return left.log, worker._sessions["f"].environment is left  # pyright: ignore

    assert run(worker_of(EnvironmentSpec.of((), f"{code}:Slow", {}, {})), talk) == (["reset", "abandoned"], False)


def turn(said: str) -> dict[str, Any]:
    return {"role": "assistant", "content": said}


async def cancelled(call: Coroutine[Any, Any, Any], folder: Path) -> None:
    """The call, cancelled once the user's code is in it."""
    task = asyncio.ensure_future(call)
    await until((folder / "began").exists)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(60):
        while not condition():
            await asyncio.sleep(0.01)


@pytest.mark.parametrize(
    ("spec", "why"),
    [
        (lambda code: EnvironmentSpec.of([f"{code}:ad"], None, {}, {}), r"no 'ad' in .*did you mean add"),
        (lambda code: EnvironmentSpec.of([f"{code}:untyped"], None, {}, {}), "a tool is a function whose parameters"),
        (lambda code: EnvironmentSpec.of(["calculater"], None, {}, {}), "no tool is called 'calculater'"),
        (lambda code: EnvironmentSpec.of((), f"{code}:Counter", {}, {}), "no method `step`.*environment_factory"),
        (lambda code: EnvironmentSpec.of((), f"{code}:Guess", {}, {"speed": 1}), "has no option 'speed'"),
    ],
)
def test_what_cannot_be_a_tool_or_an_environment_is_refused_before_a_launch(
    code: str, spec: Callable[[str], EnvironmentSpec], why: str
):
    with pytest.raises(ConfigError, match=why):
        spec(code).located()

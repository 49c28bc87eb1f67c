"""Programs that speak the OpenAI protocol, run by an environment worker; the test is the model."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from actors.errors import DataFailure
from actors.worker import LocalWorker
from rewards.environment_specs import EnvironmentSpec
from rewards.environment_worker import EnvironmentWorker, Opened, Reply
from rewards.environments.chat_endpoint import endpoint
from rewards.environments.openai_agent import AgentEnvironment
from rollout.conversation import Conversation
from rollout.episode import Dialogue, EpisodeRequest, Limits
from rollout.sampling import Completion, Finish, Request, Sampling
from rollout.tool_calls import parser_of
from tests.conversations import byte_tokenizer

pytest.importorskip("openai")

AGENTS = '''
import asyncio, json, time
from pathlib import Path
from openai import AsyncOpenAI, OpenAI, APIStatusError
from rewards.environments.openai_agent import AgentEnvironment

TOOL = {"type": "function", "function": {"name": "add", "description": "Add.", "parameters": {
    "type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}}}}}
SEEN = []

def uses_tools(row, base_url, api_key):
    """A common agent: it appends the message object that it got, and the results of the tools."""
    client = OpenAI(base_url=base_url, api_key=api_key)
    messages = [{"role": "system", "content": "Add."}, {"role": "user", "content": row["question"]}]
    while True:
        message = client.chat.completions.create(model="policy", messages=messages, tools=[TOOL]).choices[0].message
        messages.append(message)
        if not message.tool_calls:
            return float(message.content == str(row["answer"]))
        for call in message.tool_calls:
            numbers = json.loads(call.function.arguments)
            messages.append({"role": "tool", "tool_call_id": call.id, "content": str(numbers["a"] + numbers["b"])})

async def chats(row, base_url, api_key):
    client = AsyncOpenAI(base_url=base_url, api_key=api_key)
    messages = [{"role": "user", "content": [{"type": "text", "text": "Say"}, {"type": "text", "text": " it."}]}]
    for _ in range(2):
        text = ""
        async for piece in await client.chat.completions.create(model="x", messages=messages, stream=True):
            text += piece.choices[0].delta.content or ""
        messages += [{"role": "assistant", "content": text}, {"role": "user", "content": "Again."}]
    assert [model.id async for model in client.models.list()] == ["policy"]

async def forgets(row, base_url, api_key):
    client = AsyncOpenAI(base_url=base_url, api_key=api_key)
    await client.chat.completions.create(model="x", messages=[{"role": "user", "content": "first"}])
    await client.chat.completions.create(model="x", messages=[{"role": "user", "content": "second"}])

async def retools(row, base_url, api_key):
    client = AsyncOpenAI(base_url=base_url, api_key=api_key)
    messages = [{"role": "user", "content": "first"}]
    messages.append((await client.chat.completions.create(model="x", messages=messages)).choices[0].message)
    messages.append({"role": "user", "content": "second"})
    await client.chat.completions.create(model="x", messages=messages, tools=[TOOL])

async def repeats(row, base_url, api_key):
    client = AsyncOpenAI(base_url=base_url, api_key=api_key)
    messages = [{"role": "user", "content": "first"}]
    messages.append((await client.chat.completions.create(model="x", messages=messages)).choices[0].message)
    await client.chat.completions.create(model="x", messages=messages)

async def asks_twice_at_once(row, base_url, api_key):
    client = AsyncOpenAI(base_url=base_url, api_key=api_key)

    async def ask(text):
        try:
            return await client.chat.completions.create(model="x", messages=[{"role": "user", "content": text}])
        except APIStatusError:
            Path(__file__).with_name("refused").touch()
            raise

    answers = await asyncio.gather(ask("one"), ask("two"), ask("one"), return_exceptions=True)
    refused = [answer for answer in answers if isinstance(answer, APIStatusError)]
    return float(len(refused) == 1 and refused[0].status_code == 400 and "being answered" in str(refused[0]))

async def asks_for_what_is_not_there(row, base_url, api_key):
    client = AsyncOpenAI(base_url=base_url, api_key=api_key)
    messages = [{"role": "user", "content": "x"}]
    as_json = {"response_format": {"type": "json_object"}}
    for option in ({"n": 2}, {"tool_choice": "required"}, {"stop": ["x"]}, as_json):
        try:
            await client.chat.completions.create(model="x", messages=messages, **option)
        except APIStatusError as error:
            assert error.status_code == 400 and next(iter(option)) in str(error)
            Path(__file__).with_name("refused").touch()
        else:
            raise AssertionError(option)
    await client.chat.completions.create(model="x", messages=messages, n=1, temperature=0.3, max_tokens=5)
    return 1

async def is_silent(row, base_url, api_key):
    return 1.0

async def breaks(row, base_url, api_key):
    raise KeyError("no such thing")

def is_told_that_it_is_over(row, base_url, api_key):
    if "prepares_until" in row:
        Path(__file__).with_name("began").touch()
        while not Path(row["prepares_until"]).exists():
            time.sleep(0.01)
    try:
        OpenAI(base_url=base_url, api_key=api_key).chat.completions.create(
            model="x", messages=[{"role": "user", "content": "x"}])
    except APIStatusError as error:
        SEEN.append((error.status_code, "over" in str(error)))
        raise

def seen(row, base_url, api_key):
    OpenAI(base_url=base_url, api_key=api_key).chat.completions.create(
        model="x", messages=[{"role": "user", "content": json.dumps(SEEN)}])
'''

Talk = Callable[[EnvironmentWorker], Awaitable[Any]]


def with_worker(tmp_path: Path, talk: Talk, *agents: str) -> Any:
    """`talk` with a worker that has the agents as phases of their names."""
    makers = [f"def make_{agent}(): return AgentEnvironment({agent})" for agent in agents]
    (tmp_path / "agents.py").write_text("\n".join([AGENTS, *makers]))
    specs = {agent: EnvironmentSpec.of([], f"{tmp_path}/agents.py:make_{agent}", {}, {}).located() for agent in agents}

    async def run() -> Any:
        worker = EnvironmentWorker("environment/0", specs, dict.fromkeys(specs, 1000))
        await worker.ready()
        try:
            return await asyncio.wait_for(talk(worker), 60)
        finally:
            worker.close()

    return asyncio.run(run())


def says(text: str, *calls: dict[str, Any], **others: Any) -> dict[str, Any]:
    made = [{"type": "function", "function": {"name": "add", "arguments": arguments}} for arguments in calls]
    return {"role": "assistant", "content": text, **({"tool_calls": made} if made else {}), **others}


def test_an_agent_with_tools_is_an_episode(tmp_path: Path):
    async def talk(worker: EnvironmentWorker) -> tuple[Opened, list[Reply]]:
        row = {"question": "2+3?", "answer": 5}
        opened = await worker.open("e", "uses_tools", "not used", row)
        replies = [await worker.step("e", says("Let me see.", {"a": 2, "b": 3})), await worker.step("e", says("5"))]
        assert await worker.end("e", score=True) is None
        return opened, replies

    opened, (first, last) = with_worker(tmp_path, talk, "uses_tools")
    assert opened.prompt == [{"role": "system", "content": "Add."}, {"role": "user", "content": "2+3?"}]
    assert [tool["function"]["name"] for tool in opened.tools] == ["add"]
    (answer,) = first.messages
    assert (answer["role"], answer["name"], answer["content"], first.done) == ("tool", "add", "5", False)
    assert (last.messages, last.reward, last.done) == ([], 1.0, True)


def test_a_call_that_is_malformed_reaches_the_agent_as_it_is(tmp_path: Path):
    broken = says("", invalid_tool_calls=[{"name": "add", "arguments": "{a: 2", "error": "no JSON"}])

    async def talk(worker: EnvironmentWorker) -> None:
        await worker.open("e", "uses_tools", "", {"question": "?", "answer": 1})
        await worker.step("e", broken)

    with pytest.raises(DataFailure, match="JSONDecodeError"):
        with_worker(tmp_path, talk, "uses_tools")


def test_an_async_agent_may_stream_and_use_parts_and_earn_nothing(tmp_path: Path):
    async def talk(worker: EnvironmentWorker) -> tuple[Opened, list[Reply]]:
        opened = await worker.open("e", "chats", "", {})
        return opened, [await worker.step("e", says(text)) for text in ("ä", "")]

    opened, (first, last) = with_worker(tmp_path, talk, "chats")
    assert opened.prompt == [{"role": "user", "content": "Say it."}] and opened.tools == []
    assert first.messages == [{"role": "user", "content": "Again."}] and not first.done
    assert (last.messages, last.reward, last.done) == ([], None, True)


@pytest.mark.parametrize(
    ("agent", "message"),
    [
        ("forgets", r'changed message 0 of its conversation: it was .*"first".*, it is .*"second"'),
        ("retools", "changed its tools"),
        ("repeats", "added no message"),
        ("breaks", "KeyError: 'no such thing'"),
        ("is_silent", "ended without a request"),
    ],
)
def test_an_agent_that_is_no_single_conversation_fails_with_the_reason(tmp_path: Path, agent: str, message: str):
    async def talk(worker: EnvironmentWorker) -> None:
        await worker.open("e", agent, "", {})
        await worker.step("e", says("a word"))

    with pytest.raises(DataFailure, match=message):
        with_worker(tmp_path, talk, agent)


@pytest.mark.parametrize("agent", ["asks_twice_at_once", "asks_for_what_is_not_there"])
def test_what_cannot_be_recorded_is_refused_with_a_status_that_is_not_repeated(tmp_path: Path, agent: str):
    async def talk(worker: EnvironmentWorker) -> Reply:
        await worker.open("e", agent, "", {})
        while not (tmp_path / "refused").exists():  # ended by `with_worker`
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.3)  # the third request was sent at the same time
        return await worker.step("e", says("a word"))

    reply = with_worker(tmp_path, talk, agent)
    assert (reply.reward, reply.done) == (1.0, True)


@pytest.mark.parametrize("how", ["cut", "dropped", "begun again"])
def test_an_agent_whose_episode_ends_without_it_is_told_so(tmp_path: Path, how: str):
    async def talk(worker: EnvironmentWorker) -> list[Any]:
        await worker.open("cut", "is_told_that_it_is_over", "", {})
        if how == "begun again":
            await worker.open("cut", "seen", "", {})
        else:
            assert await worker.end("cut", score=how == "cut") is None
        return await what_agents_were_told(worker)

    assert with_worker(tmp_path, talk, "is_told_that_it_is_over", "seen") == [[410, True]]


def test_an_agent_whose_start_is_cancelled_is_told_so(tmp_path: Path):
    go = tmp_path / "go"

    async def talk(worker: EnvironmentWorker) -> list[Any]:
        row = {"prepares_until": str(go)}
        start = asyncio.ensure_future(worker.open("cut", "is_told_that_it_is_over", "", row))
        while not (tmp_path / "began").exists():  # ended by `with_worker`
            await asyncio.sleep(0.01)
        start.cancel()
        with pytest.raises(asyncio.CancelledError):
            await start
        go.touch()
        return await what_agents_were_told(worker)

    assert with_worker(tmp_path, talk, "is_told_that_it_is_over", "seen") == [[410, True]]


async def test_a_start_that_is_cancelled_leaves_no_agent_and_no_address():
    called: list[str] = []

    async def agent(row: dict[str, Any], base_url: str, api_key: str) -> None:
        called.append(api_key)
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            called.append("cancelled")
            raise

    start = asyncio.ensure_future(AgentEnvironment(agent).reset({}))
    async with asyncio.timeout(30):
        while not called:
            await asyncio.sleep(0.01)
    assert endpoint()._open.keys() == {called[0]}  # pyright: ignore
    start.cancel()
    await asyncio.wait({start}, timeout=30)
    await asyncio.sleep(0)  # in which the agent's cancellation arrives
    assert start.cancelled() and called[1:] == ["cancelled"] and not endpoint()._open  # pyright: ignore


async def what_agents_were_told(worker: EnvironmentWorker) -> list[Any]:
    while True:  # ended by `with_worker`
        await asyncio.sleep(0.1)
        opened = await worker.open("later", "seen", "", {})
        if told := json.loads(opened.prompt[0]["content"]):
            return told


def test_many_sync_agents_wait_at_the_same_time(tmp_path: Path):
    async def talk(worker: EnvironmentWorker) -> list[bool]:
        names = [f"e{index}" for index in range(40)]
        for name in names:
            await worker.open(name, "uses_tools", "", {"question": name, "answer": name})
        replies = await asyncio.gather(*[worker.step(name, says(name)) for name in names])
        return [reply.done and reply.reward == 1.0 for reply in replies]

    assert with_worker(tmp_path, talk, "uses_tools") == [True] * 40


def test_what_was_sampled_is_recorded_as_it_was_and_never_tokenised_again(tmp_path: Path):
    """The tokenizer has one token for the opening of a call. This model spells it instead, letter by letter, and the
    agent sends it back as text; then the model uses the token."""
    opening, rest = '<tool_call>{"name": "add", "arguments": ', '{"a": 2, "b": 3}}</tool_call><eos>'
    tokenizer = byte_tokenizer()
    spelled = [*tokenizer(opening + rest, add_special_tokens=False).input_ids]
    tokenizer.add_tokens([opening])
    merged = tokenizer(opening + rest, add_special_tokens=False).input_ids
    assert len(merged) == len(spelled) - len(opening) + 1 and tokenizer.decode(merged) == tokenizer.decode(spelled)
    turns = [spelled, merged, tokenizer("5<eos>", add_special_tokens=False).input_ids]

    async def sample(request: Request, seconds: float) -> Completion:
        turn = int(request.id.rpartition(".")[2])
        said = np.asarray(turns[turn], np.int32)
        return Completion(
            0, said, np.full(len(said), -1.0, np.float32), np.full(len(said), turn, np.int32), Finish.STOP
        )

    async def talk(worker: EnvironmentWorker) -> Any:
        limits = Limits(turns=9, tokens=9999, prompt_tokens=9999, timeout_s=60.0, call_timeout_s=30.0)
        row = {"question": "2+3?", "answer": 5}
        request = EpisodeRequest("e", "uses_tools", "", row, Sampling(9999), seed=0, limits=limits)
        host = LocalWorker("environment/0", worker)
        dialogue = Dialogue(request, Conversation(tokenizer), parser_of("auto", tokenizer), sample, host)
        return await dialogue.run()

    episode, transcript, facts = with_worker(tmp_path, talk, "uses_tools")
    row = episode.rows()
    assert row["tokens"][row["mask"]].tolist() == [*spelled, *merged, *turns[2]]
    roles = [message["role"] for message in [*transcript.prompt, *transcript.messages]]
    assert roles == ["system", "user", "assistant", "tool", "assistant", "tool", "assistant"]
    assert tokenizer.decode(row["tokens"].tolist()).endswith(
        f"[user]2+3?<eos>\n[assistant]{opening}{rest}\n[tool]5<eos>\n[assistant]{opening}{rest}"
        "\n[tool]5<eos>\n[assistant]5<eos>"
    )
    assert (facts.turns, facts.reward, row["turn_reward"][-1]) == (3, 1.0, 1.0)

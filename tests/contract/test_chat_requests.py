"""Requests to a live policy that are not of the protocol's form, or ask for what it cannot do: each is refused with a
status that clients do not repeat, by the name of what is wrong."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from orchestrator.data import synthetic_examples
from tests.chat_engine import Engine, door_of

TEMPLATE = "{% for m in messages %}{{ m.content }}{% endfor %}"
ASKED: dict[str, Any] = {"model": "run", "messages": [{"role": "user", "content": "1+1="}]}


@pytest.fixture
def engine() -> Engine:
    tokenizer = synthetic_examples.tokenizer()
    tokenizer.chat_template = TEMPLATE
    return Engine(tokenizer)


async def answer_to(engine: Engine, body: dict[str, Any]) -> httpx.Response:
    engine.says = ["2"]
    async with door_of(engine) as url, httpx.AsyncClient(timeout=60, trust_env=False) as client:
        return await client.post(f"{url}/chat/completions", json=body)


def said_with(**message: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": "1", **message}]


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"messages": "1+1="}, "`messages`, a list"),
        ({"messages": [1]}, "messages[0] is 1"),
        ({"messages": [{"content": "1"}]}, "messages[0].role is null"),
        ({"messages": said_with(content=5)}, "messages[0].content is 5"),
        ({"messages": said_with(content=["1"])}, 'messages[0].content[0] is "1"'),
        ({"messages": said_with(tool_calls="abc")}, 'messages[0].tool_calls is "abc"'),
        ({"messages": said_with(tool_calls=[1])}, "messages[0].tool_calls[0] is 1"),
        ({"messages": said_with(tool_calls=[{"id": "c"}])}, "messages[0].tool_calls[0].function is null"),
        ({"messages": said_with(tool_calls=[{"function": "f"}])}, 'messages[0].tool_calls[0].function is "f"'),
        ({"messages": said_with(tool_calls=[{"function": {}}])}, "messages[0].tool_calls[0].function.name is null"),
        ({"stream": "false"}, 'stream is "false"'),
        ({"stream": True, "stream_options": "x"}, 'stream_options is "x"'),
        ({"stream": True, "stream_options": {"include_usage": 1}}, "stream_options.include_usage is 1"),
        ({"tools": "abc"}, 'tools is "abc"'),
        ({"tools": [1]}, "tools[0] is 1"),
        ({"tools": [{"type": "function"}]}, "tools[0].function is null"),
    ],
)  # fmt: skip
async def test_what_is_not_of_the_protocols_form_is_refused_by_its_place(
    engine: Engine, changes: dict[str, Any], named: str
):
    answer = await answer_to(engine, {**ASKED, **changes})
    assert answer.status_code == 400 and named in answer.json()["error"]["message"], answer.text
    assert engine.asked == [], "nothing was sampled for it"
    assert (await answer_to(engine, ASKED)).json()["choices"][0]["message"]["content"] == "2"


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("frequency_penalty", 0.5),
        ("presence_penalty", -1),
        ("repetition_penalty", 1.1),
        ("top_k", 40),
        ("min_p", 0.1),
        ("best_of", 4),
        ("best_of", True),
        ("stop_token_ids", [3]),
        ("reasoning_effort", "high"),
        ("parallel_tool_calls", False),
        ("n", True),
        ("logprobs", 0),
        ("temprature", 0.5),
    ],
)
async def test_what_a_live_policy_does_not_do_is_refused_by_its_name(engine: Engine, key: str, value: Any):
    refused = await answer_to(engine, {**ASKED, key: value})
    assert refused.status_code == 400 and refused.json()["error"]["message"].startswith(f"{key}="), refused.text
    assert (await answer_to(engine, {**ASKED, key: None})).status_code == 200, "null asks for nothing"


async def test_what_changes_nothing_is_taken_as_clients_send_it(engine: Engine):
    """Libraries send the protocol's defaults, and labels for whoever sells the answers."""
    defaults = {"frequency_penalty": 0.0, "presence_penalty": 0, "n": 1, "logprobs": False, "tool_choice": "auto"}
    more = {"repetition_penalty": 1.0, "top_k": -1, "min_p": 0.0, "store": False, "parallel_tool_calls": True}
    labels = {"user": "u", "metadata": {"a": "b"}, "safety_identifier": "s", "service_tier": "auto"}
    answer = await answer_to(engine, {**ASKED, **defaults, **more, **labels})
    assert answer.status_code == 200 and answer.json()["choices"][0]["message"]["content"] == "2"


async def test_the_type_of_an_error_follows_its_status(engine: Engine):
    async def error(**changes: Any) -> tuple[int, str]:
        answer = await answer_to(engine, {**ASKED, **changes})
        return answer.status_code, answer.json()["error"]["type"]

    assert await error(n=2) == (400, "bad_request")
    assert await error(model="another") == (404, "not_found")
    engine.engines["rollout"].paused = True
    assert await error() == (503, "unavailable")

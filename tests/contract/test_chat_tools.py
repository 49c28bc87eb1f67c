"""The `openai` client, as it is, offers tools to a live policy: through the door of a run's driver, with an engine in
this process that says what a test wants. `tests/ray/test_judges_and_agents.py` chats with vLLM."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from orchestrator.data import calculator_examples, synthetic_examples
from tests.chat_engine import Engine, door_of

openai = pytest.importorskip("openai")

CALL = '<tool_call>{"name": "calculator", "arguments": {"expression": "12*34"}}</tool_call>'
ANOTHER = '<tool_call>{"name": "calculator", "arguments": "{\\"expression\\": \\"7*8\\"}"}</tool_call>'
QUESTION = {"role": "user", "content": "12*34"}
PARAMETERS = {"type": "object", "properties": {"expression": {"type": "string"}}, "required": ["expression"]}
TOOLS = [{"type": "function", "function": {"name": "calculator", "description": "computes", "parameters": PARAMETERS}}]
SHOWS_TOOLS = "{%- for tool in tools or [] -%}[{{ tool.function.name }}]{%- endfor -%}" + calculator_examples.TEMPLATE


@pytest.fixture
def engine() -> Engine:
    tokenizer = calculator_examples.tokenizer(synthetic_examples.tokenizer())
    tokenizer.chat_template = SHOWS_TOOLS
    return Engine(tokenizer)


@asynccontextmanager
async def client_of(engine: Engine) -> AsyncIterator[Any]:
    async with door_of(engine) as url, openai.AsyncOpenAI(base_url=url, api_key="-", max_retries=0) as found:
        yield found


def calls(message: Any) -> list[tuple[str, Any]]:
    return [(call.function.name, json.loads(call.function.arguments)) for call in message.tool_calls]


async def test_calls_in_an_answer_are_calls_for_the_client_and_their_results_are_in_the_next_prompt(engine: Engine):
    engine.says = [f"well {CALL}{ANOTHER}", "408"]
    async with client_of(engine) as client:
        answer = await client.chat.completions.create(model="run", messages=[QUESTION], tools=TOOLS)
        [choice] = answer.choices
        assert (choice.finish_reason, choice.message.content) == ("tool_calls", "well")
        assert calls(choice.message) == [("calculator", {"expression": "12*34"}), ("calculator", {"expression": "7*8"})]
        results = [
            {"role": "tool", "tool_call_id": call.id, "content": result}
            for call, result in zip(choice.message.tool_calls, ("408", "56"))
        ]
        last = await client.chat.completions.create(
            model="run", messages=[QUESTION, choice.message, *results], tools=TOOLS
        )
        assert (last.choices[0].finish_reason, last.choices[0].message.content) == ("stop", "408")
        assert engine.asked[0] == "[calculator]12*34="
        assert engine.asked[1].startswith("[calculator]12*34=well<tool_call>") and engine.asked[1].endswith("408=56=")


async def test_a_stream_has_the_same_calls_each_with_its_index(engine: Engine):
    engine.says = [f"{CALL}{ANOTHER}"]
    async with client_of(engine) as client:
        stream = await client.chat.completions.create(
            model="run", messages=[QUESTION], tools=TOOLS, stream=True, stream_options={"include_usage": True}
        )
        parts = [part async for part in stream]
        found = [call for part in parts for each in part.choices for call in each.delta.tool_calls or []]
        assert [(call.index, call.function.name) for call in found] == [(0, "calculator"), (1, "calculator")]
        assert [json.loads(call.function.arguments)["expression"] for call in found] == ["12*34", "7*8"]
        assert len({call.id for call in found}) == 2
        assert [each.finish_reason for part in parts for each in part.choices][-1] == "tool_calls"
        assert parts[-1].usage.completion_tokens == len(engine.tokenizer.encode(CALL + ANOTHER))


async def test_without_tools_the_text_of_a_call_is_text(engine: Engine):
    engine.says = [CALL]
    async with client_of(engine) as client:
        answer = await client.chat.completions.create(model="run", messages=[QUESTION])
        assert answer.choices[0].message.tool_calls is None and "calculator" in answer.choices[0].message.content
        assert engine.asked == ["12*34="], "and the template has shown none"

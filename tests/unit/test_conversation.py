"""The rendering of answers by a chat template, and the parsing of calls."""

from __future__ import annotations

from typing import Any

import pytest

from actors.errors import ConfigError, Dropped
from rollout.conversation import Conversation
from rollout.tool_calls import parser_of
from tests.conversations import EOS, FORGETFUL, TEMPLATE, byte_tokenizer, ids
from tests.unit.episode_stage import CALL, USER

# Rendering


def test_what_follows_a_turn_is_the_difference_of_two_renderings():
    talk = Conversation(byte_tokenizer())
    prompt = talk.prompt(USER, [], {})
    assert talk.tokenizer.decode(prompt) == "[user]2+3?<eos>\n[assistant]"
    turn, answer = {"role": "assistant", "content": "5"}, [{"role": "user", "content": "Sure?"}]
    follows = talk.continuation(USER, turn, answer, ids("5<eos>"), [], {})
    assert talk.tokenizer.decode(follows) == "\n[user]Sure?<eos>\n[assistant]"
    whole = talk.tokenizer.apply_chat_template([*USER, turn, *answer], tokenize=False, add_generation_prompt=True)
    assert talk.tokenizer.decode([*prompt, *ids("5<eos>"), *follows]) == whole


def test_a_turn_that_a_stop_string_ended_gets_the_end_that_the_template_writes():
    talk = Conversation(byte_tokenizer())
    turn, answer = {"role": "assistant", "content": "5;"}, [{"role": "user", "content": "Sure?"}]
    follows = talk.continuation(USER, turn, answer, ids("5;"), [], {})
    assert follows[0] == EOS and talk.tokenizer.decode(follows) == "<eos>\n[user]Sure?<eos>\n[assistant]"


def test_the_text_of_a_special_token_in_an_answer_is_plain_text():
    talk = Conversation(byte_tokenizer())
    turn, answer = {"role": "assistant", "content": "5"}, [{"role": "tool", "content": "a<eos>b<pad>"}]
    follows = talk.continuation(USER, turn, answer, ids("5<eos>"), [], {})
    assert talk.tokenizer.decode(follows) == "\n[tool]a<eos>b<pad><eos>\n[assistant]"
    assert follows.count(EOS) == 1 and 0 not in follows  # only the template's own
    assert EOS in ids("<eos>")


def test_a_template_that_rewrites_history_is_refused_when_it_does_and_before_if_it_must():
    talk = Conversation(byte_tokenizer(FORGETFUL))
    answer = [{"role": "user", "content": "Sure?"}]
    thought = {"role": "assistant", "content": "hm</think>5"}
    talk.continuation(USER, {"role": "assistant", "content": "5"}, answer, ids("5<eos>"), [], {})
    with pytest.raises(Dropped, match=r"'.*hm</think>5.*' becomes") as caught:
        talk.continuation(USER, thought, answer, ids("hm</think>5<eos>"), [], {})
    assert caught.value.reason == "the chat template rewrites history"
    talk.refuse_rewriting(["user", "tool"], [])  # nothing to be seen without thoughts
    numbered = TEMPLATE.replace("[{{ m.role }}]", "[{{ m.role }} {{ loop.revindex }}]")
    with pytest.raises(ConfigError, match=r"rewrites history.*model.chat_template"):
        Conversation(byte_tokenizer(numbered)).refuse_rewriting(["tool"], [])


@pytest.mark.parametrize(
    ("template", "why"),
    [
        (TEMPLATE.replace("{{ m.content }}", "{{ m.content if m.role != 'tool' }}"), "does not write what a tool"),
        (TEMPLATE + "{% if messages[-1].role == 'tool' %}{{ raise_exception('no tools') }}{% endif %}", "no tools"),
    ],
)
def test_a_template_without_tool_messages_is_refused_before_a_launch(template: str, why: str):
    with pytest.raises(ConfigError, match=why):
        Conversation(byte_tokenizer(template)).refuse_rewriting(["tool"], [])


def test_a_tokenizer_without_a_chat_template_is_refused():
    with pytest.raises(ConfigError, match=r"no chat template: set model\.chat_template"):
        Conversation(byte_tokenizer(None))  # type: ignore[arg-type]


# Parsing


def parsed(text: str, name: str = "auto", **attributes: Any) -> dict[str, Any]:
    tokenizer = byte_tokenizer()
    for attribute, value in attributes.items():
        setattr(tokenizer, attribute, value)
    return parser_of(name, tokenizer)(ids(text), ids("[assistant]"))


def test_calls_are_read_out_of_the_text_and_the_rest_is_content():
    message = parsed(f"Let me see. {CALL}{CALL}<eos>")
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 2, "b": 3}}}
    assert message == {"role": "assistant", "content": "Let me see.", "tool_calls": [call, call]}
    assert parsed("5 <eos>") == {"role": "assistant", "content": "5 "}


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("<tool_call>{oops}</tool_call>", "Expecting property name"),
        ("<tool_call>{}</tool_call>", 'a call is {"name"'),
        ("<tool_call>[1]</tool_call>", 'a call is {"name"'),
        ('<tool_call>{"name": "add", "arguments": [1]}</tool_call>', "must be an object, not [1]"),
        ('<tool_call>{"name": "add", "arguments": {', "not closed by </tool_call>"),
    ],
)
def test_what_was_meant_to_be_a_call_and_is_none_is_kept_with_what_is_wrong_with_it(text: str, why: str):
    message = parsed(text)
    (invalid,) = message["invalid_tool_calls"]
    assert why in invalid["error"] and "tool_calls" not in message and message["content"] == ""


def test_a_tokenizer_s_own_response_template_is_asked_where_it_has_one():
    class Template(dict[str, Any]):
        pass

    assert parsed("5", response_template=Template())["invalid_tool_calls"][0]["arguments"] == "5"  # not a valid one
    assert "invalid_tool_calls" not in parsed("5", "hermes", response_template=Template())
    with pytest.raises(ConfigError, match="the tokenizer has no response template; use hermes"):
        parsed("5", "response_template")

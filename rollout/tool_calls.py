"""From the tokens of a turn to a message: what the model says, and the tools that it calls.

    hermes               <tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call>, any number (Hermes, Qwen)
    response_template    what the tokenizer brings (`tokenizer.parse_response` of transformers), for all other formats
    auto                 the tokenizer's where it has one, else hermes

What was meant to be a call and cannot be read is no error here: it is in the message's `invalid_tool_calls`, so that
the model can be told.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from typing import Any, cast

from actors.errors import ConfigError

Message = dict[str, Any]
Parser = Callable[[Sequence[int], Sequence[int]], Message]  # (tokens of the turn, tokens before it) -> message

OPEN, CLOSE = "<tool_call>", "</tool_call>"
CALL = re.compile(rf"{OPEN}(.*?)(?:{CLOSE}|\Z)", re.DOTALL)


def parser_of(name: str, tokenizer: Any) -> Parser:
    """The parser of that name for a tokenizer. Raises ConfigError for one that the tokenizer does not bring."""
    brings = getattr(tokenizer, "response_template", None) is not None
    if name == "response_template" and not brings:
        raise ConfigError(
            "episode.tool_parser=response_template: the tokenizer has no response template; use hermes, or a tokenizer "
            "whose tokenizer_config.json has one"
        )
    if name == "response_template" or (name == "auto" and brings):
        return lambda tokens, before: _by_template(tokenizer, tokens, before)
    return lambda tokens, before: _hermes(tokenizer, tokens)


def _hermes(tokenizer: Any, tokens: Sequence[int]) -> Message:
    text = str(tokenizer.decode(list(tokens), skip_special_tokens=OPEN not in tokenizer.all_special_tokens))
    calls: list[Message] = []
    invalid: list[Message] = []
    for match in CALL.finditer(text):
        body = match[1].strip()
        try:
            if not match[0].endswith(CLOSE):
                raise ValueError(f"the call is not closed by {CLOSE}")
            calls.append(_call(json.loads(body)))
        except ValueError as error:
            invalid.append({"name": None, "arguments": body, "error": str(error)})
    return _message(CALL.sub("", text).strip() if calls or invalid else text, calls, invalid)


def _by_template(tokenizer: Any, tokens: Sequence[int], before: Sequence[int]) -> Message:
    text = str(tokenizer.decode(list(tokens), skip_special_tokens=True))
    try:
        found = tokenizer.parse_response(list(tokens), prefix=list(before))
        calls = [_call(call.get("function", call)) for call in found.get("tool_calls") or []]
    except Exception as error:  # a template is a program of the model's author, and may raise anything
        return _message(text, [], [{"name": None, "arguments": text, "error": str(error)}])
    others = {name: value for name, value in found.items() if name not in ("tool_calls", "content", "role")}
    return {**_message(str(found.get("content") or "").removesuffix(tokenizer.eos_token or ""), calls, []), **others}


def _call(found: Any) -> Message:
    """A call in the form that chat templates read. Raises ValueError if it is none."""
    if not isinstance(found, dict) or not isinstance(cast(Message, found).get("name"), str):
        raise ValueError('a call is {"name": "...", "arguments": {...}}')
    call = cast(Message, found)
    arguments: Any = {} if call.get("arguments") is None else call["arguments"]
    if isinstance(arguments, str):  # JSON in JSON, as the OpenAI protocol has it
        arguments = json.loads(arguments)
    if not isinstance(arguments, dict):
        raise ValueError(f"the arguments must be an object, not {json.dumps(arguments)}")
    return {"type": "function", "function": {"name": call["name"], "arguments": arguments}}


def _message(content: str, calls: list[Message], invalid: list[Message]) -> Message:
    message: Message = {"role": "assistant", "content": content}
    if calls:
        message["tool_calls"] = calls
    if invalid:
        message["invalid_tool_calls"] = invalid
    return message

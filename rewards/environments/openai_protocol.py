"""Chat completions of the OpenAI protocol (https://platform.openai.com/docs/api-reference/chat): messages to those of
chat templates and back, and the bodies of answers.

One choice, text only. What a server does not support is refused with status 400 and never ignored.
"""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Callable, Collection, Mapping
from typing import Any

Message = dict[str, Any]
Body = Mapping[str, Any]
# By key of a request: the values that change nothing, None aside.
ONLY: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "tool_choice": ("auto",),
    "response_format": ({"type": "text"},),
    "logprobs": (False,),
    "logit_bias": ({},),
    "stop": ([], ""),
    "functions": ([],),
    "echo": (False,),
}

# `type` of an error, by its status.
TYPES = {
    400: "bad_request",
    401: "unauthorized",
    403: "forbidden",
    404: "not_found",
    405: "method_not_allowed",
    409: "conflict",
    410: "gone",
    413: "too_large",
    422: "invalid_request",
    429: "too_many_requests",
    502: "bad_gateway",
    503: "unavailable",
    504: "timeout",
}


def type_of(status: int) -> str:
    return TYPES.get(status, "error")


class Refused(Exception):
    """A request that is answered with an error. `status`: 4xx; the clients of the protocol repeat 408, 409 and 429."""

    def __init__(self, why: str, status: int = 400) -> None:
        super().__init__(why)
        self.status = status

    @property
    def body(self) -> dict[str, Any]:
        error = {"message": str(self), "type": type_of(self.status), "code": None, "param": None}
        return {"error": error}


def checked(
    body: Any, where: str, only: Mapping[str, tuple[Any, ...]] = ONLY, known: Collection[str] | None = None
) -> Body:
    """A request that has messages, is of the protocol's form as far as it is read here, and asks for nothing that is
    not supported `where`. `known`: all other keys that it may have; None: it may have any, which do not count. Raises
    Refused."""
    if not isinstance(body, dict) or not isinstance(body.get("messages"), list) or not body["messages"]:
        raise Refused("a request needs `messages`, a list")
    for place, message in enumerate(body["messages"]):
        _check_message(message, f"messages[{place}]")
    _need(body.get("stream"), bool, "stream", "true or false")
    _need(body.get("stream_options"), dict, "stream_options", "an object")
    _need(
        (body.get("stream_options") or {}).get("include_usage"), bool, "stream_options.include_usage", "true or false"
    )
    _check_tools(body.get("tools"))
    for key, value in body.items():
        if value is None:
            continue
        if key in only and not any(_same(value, allowed) for allowed in only[key]):
            raise Refused(f"{key}={json.dumps(value)[:80]} is not supported {where}")
        if known is not None and key not in only and key not in known:
            raise Refused(f"{key[:80]}={json.dumps(value)[:80]} is not supported {where}; it takes {', '.join(known)}")
    return body


def _same(value: Any, allowed: Any) -> bool:
    """0 is 0.0, and false is neither."""
    return value == allowed and isinstance(value, bool) == isinstance(allowed, bool)


def _check_message(message: Any, where: str) -> None:
    _need(message, dict, where, "an object with a `role`", required=True)
    _need(message.get("role"), str, f"{where}.role", "a text", required=True)
    content = message.get("content")
    _need(content, str | list, f"{where}.content", "a text, or a list of parts")
    for place, part in enumerate(content if isinstance(content, list) else []):
        _need(part, dict, f"{where}.content[{place}]", "an object with `type` and `text`", required=True)
    calls = message.get("tool_calls")
    _need(calls, list, f"{where}.tool_calls", "a list of calls")
    for place, call in enumerate(calls or []):
        this = f"{where}.tool_calls[{place}]"
        _need(call, dict, this, "an object with `id` and `function`", required=True)
        _need(call.get("function"), dict, f"{this}.function", "an object with `name` and `arguments`", required=True)
        _need(call["function"].get("name"), str, f"{this}.function.name", "a text", required=True)


def _check_tools(tools: Any) -> None:
    _need(tools, list, "tools", "a list of functions")
    for place, tool in enumerate(tools or []):
        _need(tool, dict, f"tools[{place}]", "an object with `function`", required=True)
        _need(tool.get("function"), dict, f"tools[{place}].function", "an object with a `name`", required=True)
        _need(tool["function"].get("name"), str, f"tools[{place}].function.name", "a text", required=True)


def _need(value: Any, kind: Any, where: str, form: str, *, required: bool = False) -> None:
    """Raises Refused for what is of another kind. None is what is not given."""
    if (required or value is not None) and not isinstance(value, kind):
        raise Refused(f"{where} is {short(value)}; it must be {form}")


def heading(model: str) -> dict[str, Any]:
    """What the bodies of one answer have in common."""
    return {"id": f"chatcmpl-{secrets.token_hex(12)}", "created": int(time.time()), "model": model}


def whole(head: Mapping[str, Any], message: Message, ended: str, usage: Mapping[str, int] | None = None) -> Message:
    choice = {"index": 0, "message": message, "finish_reason": ended, "logprobs": None}
    return {**head, "object": "chat.completion", "choices": [choice], **({"usage": dict(usage)} if usage else {})}


def piece(head: Mapping[str, Any], delta: Message, ended: str | None = None) -> bytes:
    """A server-sent event of a stream. Calls of tools have their index."""
    if delta.get("tool_calls"):
        delta = {**delta, "tool_calls": [{**call, "index": index} for index, call in enumerate(delta["tool_calls"])]}
    choice = {"index": 0, "delta": delta, "finish_reason": ended}
    return event({**head, "object": "chat.completion.chunk", "choices": [choice]})


def event(content: Any) -> bytes:
    return b"data: " + json.dumps(content).encode() + b"\n\n"


DONE = b"data: [DONE]\n\n"


def models(names: Mapping[str, float]) -> dict[str, Any]:
    """The answer that lists models: name -> since when."""
    data = [{"id": name, "object": "model", "created": int(at), "owned_by": "troupe"} for name, at in names.items()]
    return {"object": "list", "data": data}


def for_client(message: Message, numbered: Callable[[str, str], Message]) -> Message:
    """A model's turn as the protocol has it, calls that are malformed included. `numbered(name, arguments)`: a call
    with an id."""
    calls = [
        (call["function"]["name"], json.dumps(call["function"]["arguments"], ensure_ascii=False))
        for call in message.get("tool_calls") or []
    ]
    calls += [(call.get("name") or "", str(call["arguments"])) for call in message.get("invalid_tool_calls") or []]
    answer: Message = {"role": "assistant", "content": message["content"]}
    if calls:
        answer["tool_calls"] = [numbered(name, arguments) for name, arguments in calls]
    return answer


def for_template(message: Message, names: Mapping[str, str]) -> Message:
    """A client's message as chat templates read it: text content, arguments as mappings, tools' names, which are found
    in `names` by the id of the call. Raises ValueError for content that is no text."""
    shown = {**message, "content": text_of(message)}
    if message.get("tool_calls"):
        shown["tool_calls"] = [
            {"type": "function", "function": {"name": name, "arguments": arguments}}
            for name, arguments in calls_of(message)
        ]
    if message["role"] == "tool" and "name" not in message:
        shown["name"] = names.get(str(message.get("tool_call_id")), "")
    return shown


def text_of(message: Message) -> str:
    """Raises ValueError for content that is no text."""
    content = message.get("content")
    if content is None or isinstance(content, str):
        return content or ""
    parts = [part.get("text") if isinstance(part, Mapping) and part.get("type") == "text" else None for part in content]
    if None in parts:
        raise ValueError(f"the agent sent a message that is not text: {short(message)}")
    return "".join(map(str, parts))


def calls_of(message: Message) -> list[tuple[str, Any]]:
    """(name, arguments) of the tools that a message calls; arguments that are no JSON as they are."""
    return [_call(call["function"]) for call in message.get("tool_calls") or []]


def _call(function: Mapping[str, Any]) -> tuple[str, Any]:
    arguments = function.get("arguments")
    try:
        return str(function.get("name")), json.loads(arguments) if isinstance(arguments, str) else arguments
    except ValueError:
        return str(function.get("name")), arguments


def short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 200 else f"{text[:200]}..."

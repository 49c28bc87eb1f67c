"""One cell of a data set, checked: the value of a column in a row, as the type that it must have. Each function raises
`RowError` for a value of another type."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, cast

from orchestrator.data.conversation import Content, Message, RowError

Row = Mapping[str, Any]
APPLY_CHAT_TEMPLATE_PARAMETERS = """
    conversation conversations messages tools chat_template tokenize padding truncation max_length return_tensors
    return_dict return_assistant_tokens_mask tokenizer_kwargs add_generation_prompt continue_final_message
    compiled_template
"""
SPECIAL_TOKENS = """
    bos_token eos_token pad_token unk_token sep_token cls_token mask_token additional_special_tokens
"""
RESERVED = frozenset(f"{APPLY_CHAT_TEMPLATE_PARAMETERS} {SPECIAL_TOKENS}".split())


def content(row: Row, name: str) -> Content:
    return messages(row, name) if isinstance(row[name], list) else text(row, name)


def text(row: Row, name: str) -> str:
    value = row[name]
    if not isinstance(value, str):
        raise RowError(f"{name} is {_described(value)}, not a text")
    if not value:
        raise RowError(f"{name} is empty")
    return value


def messages(row: Row, name: str) -> list[Message]:
    messages = message_dicts(row, name)
    for message in messages:
        if not isinstance(message.get("role"), str):
            raise RowError(f"{name}: a message has no `role`")
        if "content" not in message and "tool_calls" not in message:
            raise RowError(f"{name}: a message has neither `content` nor `tool_calls`")
    return with_content(messages, name)


def with_content(messages: list[Message], name: str) -> list[Message]:
    if not any(message.get("content") or message.get("tool_calls") for message in messages):
        raise RowError(f"{name} is empty: none of its messages says anything")
    return messages


def message_dicts(row: Row, name: str) -> list[Message]:
    value = row[name]
    if not isinstance(value, list):
        raise RowError(f"{name} is {_described(value)}, not a list of messages")
    entries = cast(list[Any], value)
    if not entries:
        raise RowError(f"{name} is empty")
    if not all(isinstance(entry, dict) for entry in entries):
        raise RowError(f"{name} must be a list of messages, each with `role` and `content`")
    return [_given_keys(message) for message in cast(list[Message], entries)]


def _given_keys(message: Message) -> Message:
    """Leaves out a message's keys that are null, which writers of a fixed schema use for missing keys. Nulls below
    them, as in a tool call's arguments, are values."""
    return {key: value for key, value in message.items() if value is not None}


def integers(row: Row, name: str) -> list[int]:
    value = row[name]
    if not isinstance(value, list) or not all(type(entry) is int for entry in cast(list[Any], value)):
        raise RowError(f"{name} must be a list of integers")
    return cast(list[int], value)


def boolean(value: Any, name: str) -> bool:
    if value not in (True, False):
        raise RowError(f"{name} is {_shown(value)}, not true or false")
    return bool(value)


def one_of(row: Row, name: str, names: Sequence[str]) -> int:
    """Which of the names it is, from 0."""
    value = row.get(name)
    if value not in names:
        raise RowError(f"{name} is {_shown(value)}; it must be one of {', '.join(names)}")
    return names.index(value)


def number(row: Row, name: str, *, least: float = -math.inf) -> float | None:
    value = row.get(name)
    if value is None:
        return None
    try:
        number = float(value) if isinstance(value, int | float) else math.nan
    except OverflowError:  # of an integer with hundreds of digits
        number = math.inf
    if not math.isfinite(number) or number < least:
        bound = f"a number from {least:g} on" if math.isfinite(least) else "a finite number"
        raise RowError(f"{name} is {_shown(value)}; it must be {bound}")
    return number


def tools(value: Any) -> list[Any] | None:
    """Schemas of tools, given as a list or as the JSON text of one; None for an empty list."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError as error:
            raise RowError(f"tools is not JSON: {error}") from None
    if value is not None and not isinstance(value, list):
        raise RowError(f"tools is {_described(value)}, not a list of schemas")
    return cast(list[Any], value) or None if value is not None else None


def template_kwargs(value: Any) -> Mapping[str, Any]:
    """Variables of a row's own for the chat template."""
    if value is not None and not isinstance(value, dict):
        raise RowError(f"chat_template_kwargs is {_described(value)}, not a mapping")
    variables = cast(dict[str, Any], value) if value is not None else {}
    for name in variables:
        if name in RESERVED:
            raise RowError(
                f"chat_template_kwargs.{name} is not one of the template's own variables, and only those may be given "
                "(tools have a column of their own)"
            )
    return variables


def _shown(value: Any) -> str:
    """The value if it is short, else its type."""
    shown = repr(value)
    return shown if value is not None and len(shown) <= 40 else _described(value)


def _described(value: Any) -> str:
    return "missing" if value is None else f"of type {type(value).__name__}"

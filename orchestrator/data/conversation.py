"""Conversations: whose turn it is, what counts as an answer, and whether a rendering has the whole content."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, cast

Message = dict[str, Any]
Content = str | list[Message]
ASSISTANT = "assistant"
WORDS = ("content", "reasoning_content", "reasoning", "thinking")  # fields of a message that hold its content


class RowError(Exception):
    """Raised for a row that cannot be used; the message is the reason."""


def refuse_no_answer(content: Content, name: str) -> None:
    """Raises RowError if there is no answer to train on: a blank text, no assistant turn, or an empty one."""
    if isinstance(content, str):
        if not content.strip():
            raise RowError(f"{name} is blank")
        return
    if not any(message["role"] == ASSISTANT for message in content):
        roles = ", ".join(dict.fromkeys(str(message["role"]) for message in content))
        raise RowError(f"{name} has no turn of the assistant's, only of: {roles}")
    for number, message in enumerate(content, start=1):
        if message["role"] == ASSISTANT and not _says_something(message):
            raise RowError(f"{name}: message {number} is the assistant's and says nothing")


def refuse_other_beginning(completion: Content, name: str) -> None:
    """Raises RowError if the completion does not begin with an assistant turn."""
    if not isinstance(completion, str) and completion[0]["role"] != ASSISTANT:
        raise RowError(f"{name} begins with a turn of {completion[0]['role']}: what follows a prompt is an answer")


def refuse_other_ending(completion: Content) -> None:
    """Raises RowError if the last turn is not the assistant's, for data whose turns are all trained on."""
    if not isinstance(completion, str) and completion[-1]["role"] != ASSISTANT:
        raise RowError(
            f"it ends in a turn of {completion[-1]['role']}, which would be trained on like an answer: end it with an "
            "assistant turn, or set data.assistant_only=true to train on the assistant's turns only"
        )


def joined(prompt: Sequence[Message], completion: Sequence[Message]) -> list[Message]:
    """Prompt and completion as one conversation. If the prompt ends with an assistant turn, the completion continues
    it."""
    if not prompt or prompt[-1]["role"] != ASSISTANT:
        return [*prompt, *completion]
    begun, rest = prompt[-1], completion[0]
    if not (isinstance(begun.get("content"), str) and isinstance(rest.get("content"), str)):
        raise RowError("the prompt ends in the assistant's words, and the completion goes on: both must be texts")
    return [*prompt[:-1], {**begun, **rest, "content": begun["content"] + rest["content"]}, *completion[1:]]


def as_messages(content: Content) -> list[Message]:
    """A text is one message of the user's."""
    return [{"role": "user", "content": content}] if isinstance(content, str) else content


def answers(content: Content | None) -> list[Message]:
    """The assistant's messages."""
    return [] if content is None or isinstance(content, str) else [m for m in content if m["role"] == ASSISTANT]


def lost(message: Message, text: str) -> str | None:
    """A part of the message that is missing in `text`; None if there is none. White space is ignored."""
    squeezed = None
    for words in _texts(message):
        if words in text:
            continue
        squeezed = _squeezed(text) if squeezed is None else squeezed
        if _squeezed(words) not in squeezed:
            return words
    return None


def _says_something(message: Message) -> bool:
    return bool(message.get("tool_calls")) or any(text.strip() for text in _texts(message))


def _texts(message: Message) -> Iterator[str]:
    """A field is a text, or a list of parts of which some are texts."""
    for value in map(message.get, WORDS):
        for part in cast(list[Any], value) if isinstance(value, list) else [value]:
            text = cast(dict[str, Any], part).get("text") if isinstance(part, dict) else part
            if isinstance(text, str):
                yield text


def _squeezed(text: str) -> str:
    return "".join(text.split())

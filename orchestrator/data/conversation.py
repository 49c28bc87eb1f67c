"""What a conversation says: who speaks, what counts as an answer, and whether a rendering of it still says the same."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, cast

Message = dict[str, Any]
Content = str | list[Message]
ASSISTANT = "assistant"
WORDS = ("content", "reasoning_content", "reasoning", "thinking")  # fields of a message that hold what was said


class RowError(Exception):
    """Why one row cannot be used."""


def refuse_no_answer(content: Content, name: str) -> None:
    """Raises RowError for what teaches no answer: a blank text, nobody of the assistant's, an answer without a word."""
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
    """Raises RowError where somebody else speaks first: a prompt is followed by the assistant's words."""
    if not isinstance(completion, str) and completion[0]["role"] != ASSISTANT:
        raise RowError(f"{name} begins with a turn of {completion[0]['role']}: what follows a prompt is an answer")


def refuse_other_ending(completion: Content) -> None:
    """Raises RowError where somebody else speaks last, for data whose every turn is learned from."""
    if not isinstance(completion, str) and completion[-1]["role"] != ASSISTANT:
        raise RowError(
            f"it ends in a turn of {completion[-1]['role']}, which would be learned like an answer: end it with the "
            "assistant's, or set data.assistant_only=true to learn from the assistant's turns alone"
        )


def joined(prompt: Sequence[Message], completion: Sequence[Message]) -> list[Message]:
    """The conversation of both. Where the prompt ends in the assistant's words, the completion goes on with them."""
    if not prompt or prompt[-1]["role"] != ASSISTANT:
        return [*prompt, *completion]
    begun, rest = prompt[-1], completion[0]
    if not (isinstance(begun.get("content"), str) and isinstance(rest.get("content"), str)):
        raise RowError("the prompt ends in the assistant's words, and the completion goes on: both must be texts")
    return [*prompt[:-1], {**begun, **rest, "content": begun["content"] + rest["content"]}, *completion[1:]]


def answers(content: Content | None) -> list[Message]:
    """The assistant's messages."""
    return [] if content is None or isinstance(content, str) else [m for m in content if m["role"] == ASSISTANT]


def lost(message: Message, text: str) -> str | None:
    """Something that the message says and `text` does not; None where all is there. White space does not count."""
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

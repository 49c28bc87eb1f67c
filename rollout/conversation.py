"""How a conversation becomes tokens, and goes on as tokens: what a model has sampled is never tokenised again.

    prompt                     rendered by the chat template, with the opening of the model's turn
    the model's turn           the ids that it sampled
    what it is answered with   the difference of two renderings: the conversation with the answer, less the one without

A chat template is a program of the model's author. One that renders earlier messages differently when others follow
(it drops the thoughts of earlier turns, say) has no such difference: the tokens that were sampled would not be those of
the conversation. That is refused. What users' tools say is text: `<|im_end|>` in it is no end of a turn.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from actors.errors import ConfigError, DataFailure, Dropped
from actors.pretrained import load_tokenizer

Message = dict[str, Any]
Schema = dict[str, Any]

PROBE = "\ue010said\ue010"  # what no template writes by itself
QUOTED = re.compile("\ue000(\\d+)\ue001")  # in the place of a special token's text that a message contains
REMEDY = (
    "set model.chat_template to a file with a template that renders earlier messages in the same way whatever follows "
    "(TRL's documentation calls such templates prefix-preserving, and its package has one for each common model)"
)


@dataclass(frozen=True)
class ConversationSpec:
    """Which tokenizer, and which chat template (its text) if not the tokenizer's own."""

    tokenizer: str
    chat_template: str | None = None
    trust_remote_code: bool = False

    def load(self) -> Conversation:
        return Conversation(load_tokenizer(self.tokenizer, self.trust_remote_code, self.chat_template))


class Conversation:
    """Renders the conversations of one tokenizer."""

    def __init__(self, tokenizer: Any) -> None:
        if not tokenizer.chat_template:
            raise ConfigError(
                "an episode is a conversation, and the tokenizer has no chat template: set model.chat_template to a "
                "file that holds one"
            )
        self.tokenizer = tokenizer
        self._special = [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]
        self._special_ids = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}

    def prompt(self, messages: Sequence[Message], tools: Sequence[Schema], variables: Mapping[str, Any]) -> list[int]:
        """The tokens before the model's first turn."""
        return self._encode(self._render(messages, tools, variables, answered=False))

    def continuation(
        self,
        before: Sequence[Message],
        turn: Message,
        answer: Sequence[Message],
        sampled: Sequence[int],
        tools: Sequence[Schema],
        variables: Mapping[str, Any],
    ) -> list[int]:
        """The tokens between the model's turn, as it was `sampled`, and its next one: the rest of what ends a turn, the
        answer, and the opening of the next turn. Raises Dropped if the template rewrites history."""
        opened = self._render(before, tools, variables, answered=False)
        said = self._render([*before, turn], tools, variables, answered=True)
        whole = self._render([*before, turn, *answer], tools, variables, answered=False)
        for earlier, later in ((opened, said), (said, whole)):
            if not later.startswith(earlier):
                raise Dropped("the chat template rewrites history", _rewritten(earlier, later))
        ended = bool(sampled) and sampled[-1] in self._special_ids
        return self._encode(self._unwritten(said, len(opened), ended) + whole[len(said) :])

    def refuse_rewriting(self, roles: Sequence[str], tools: Sequence[Schema]) -> None:
        """Raises ConfigError for a template that cannot write an answer of one of these roles, does not write what it
        says, or rewrites what was before it. `tool`: the answer to a call."""
        call = {"type": "function", "function": {"name": _name_of(tools), "arguments": {}}}
        for role in roles:
            turn: Message = {"role": "assistant", "content": "Yes."}
            turn |= {"tool_calls": [call]} if role == "tool" else {}
            answer = {"role": role, "content": PROBE, **({"name": _name_of(tools)} if role == "tool" else {})}
            asked = [{"role": "user", "content": "Well?"}]
            try:
                self.continuation(asked, turn, [answer], [], tools, {})
                text = self._render([*asked, turn, answer], tools, {}, answered=False)
            except Dropped as error:
                raise ConfigError(f"the chat template rewrites history: {error}; {REMEDY}") from None
            except DataFailure as error:
                raise ConfigError(f"{error} (a {role} message after a turn of the assistant's); {REMEDY}") from None
            if PROBE not in text:
                raise ConfigError(f"the chat template does not write what a {role} message says; {REMEDY}")

    def _unwritten(self, said: str, start: int, ended: bool) -> str:
        """Of the text with which the template ends a turn, the part that the model did not write. It `ended` the turn
        with a special token, or was ended by a stop string. `start`: where its words begin in `said`."""
        ends = [
            (said.rfind(token, start) + len(token), token) for token in self._special if said.rfind(token, start) >= 0
        ]
        if not ends:  # the template ends turns with plain text, or not at all
            tail = self._tail()
            return "" if ended else tail
        stop, token = max(ends)
        return said[stop:] if ended else said[stop - len(token) :]

    def _tail(self) -> str:
        turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": PROBE}]
        return self._render(turns, (), {}, answered=True).rpartition(PROBE)[2]

    def _render(
        self, messages: Sequence[Message], tools: Sequence[Schema], variables: Mapping[str, Any], *, answered: bool
    ) -> str:
        """`answered`: without the opening of an answer. Raises DataFailure if the template refuses it."""
        quoted = [{**message, "content": self._quote(message.get("content") or "")} for message in messages]
        try:
            return self.tokenizer.apply_chat_template(
                [
                    {name: value for name, value in message.items() if name != "invalid_tool_calls"}
                    for message in quoted
                ],
                tools=list(tools) or None,
                tokenize=False,
                add_generation_prompt=not answered,
                **variables,
            )
        except Exception as error:  # it may raise anything
            raise DataFailure(f"the chat template refuses the conversation: {type(error).__name__}: {error}") from None

    def _quote(self, text: Any) -> Any:
        """The text without the texts of special tokens; parts of a message that are no text, as they are."""
        if not isinstance(text, str):
            return text
        for index, token in enumerate(self._special):
            text = text.replace(token, f"\ue000{index}\ue001")
        return text

    def _encode(self, text: str) -> list[int]:
        """Special tokens that the template writes are such; those that a message contains are plain text."""
        found: list[int] = []
        for place, piece in enumerate(QUOTED.split(text)):
            quoted = place % 2 == 1
            piece = self._special[int(piece)] if quoted else piece
            found += self.tokenizer(piece, add_special_tokens=False, split_special_tokens=quoted).input_ids
        return found


def _name_of(tools: Sequence[Schema]) -> str:
    """Some templates derive a tool's answer from the name of what was called."""
    return str(tools[0].get("function", {}).get("name", "tool")) if tools else "tool"


def _rewritten(earlier: str, later: str) -> str:
    at = next(
        (i for i, (a, b) in enumerate(zip(earlier, later, strict=False)) if a != b), min(len(earlier), len(later))
    )
    at = max(0, at - 20)
    return (
        f"what it wrote as {earlier[at : at + 60]!r} becomes {later[at : at + 60]!r} once another message follows, so "
        "that the tokens that were sampled would not be those of the conversation"
    )

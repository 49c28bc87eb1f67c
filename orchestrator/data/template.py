"""Renders conversations as text, for training, rollouts and evaluation. A chat template is a program of the model's
author, so this module checks its variables, limits its time, and checks that the rendering has the whole content of the
messages."""

# pyright: basic
# (transformers' tokenizers have incomplete types)

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import pairwise
from types import TracebackType
from typing import cast

from jinja2 import Environment, Template
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from actors.errors import DataError
from orchestrator.data.conversation import ASSISTANT, Message, RowError, lost
from orchestrator.data.formats import Example
from orchestrator.data.time_limit import OverTime, TimeLimit

RENDER_LIMIT_S = 5.0  # of processor time for one conversation, which usually takes less than a thousandth of it
SHOWN = 40  # characters of a text in a message
REMEDY = "set model.chat_template to a file with a template that does, or give prompt and completion as texts"


Span = tuple[int, int]  # of characters


class EndlessTemplate(RowError):
    """The template did not end for this row; it is not tried on others."""


@dataclass(frozen=True, slots=True)
class Rendered:
    """A conversation as text, and the spans of it that the template marks as generated."""

    text: str
    marked: tuple[Span, ...] = ()

    def marks_all(self, messages: list[Message], after: int) -> bool:
        """Whether the whole content of these assistant messages is marked, in the text after `after`."""
        marked = [self.text[start:stop] for start, stop in self.marked if max(start, after) < stop]
        text = "\n".join(marked)
        return len(marked) >= len(messages) and not any(lost(message, text) for message in messages)


@dataclass(frozen=True)
class ChatTemplate:
    """The template of a tokenizer, used by the thread that entered `limit`."""

    tokenizer: PreTrainedTokenizerBase
    limit: TimeLimit

    def prompt(self, example: Example, messages: list[Message]) -> str:
        """The prompt with the opening of the answer. A prompt that ends with an assistant turn is left open instead."""
        begun = messages[-1]["role"] == ASSISTANT
        return self._render(example, messages, add_generation_prompt=not begun, continue_final_message=begun).text

    def whole(self, example: Example, messages: list[Message], *, mark: bool = False) -> Rendered:
        """A conversation with its answers. `mark`: find the spans that the template marks; DataError if it marks none
        of any conversation."""
        if mark and not _code(self._source(example)).marks:
            raise DataError(
                "data.assistant_only needs a chat template that marks the assistant's words with "
                "{% generation %} ... {% endgeneration %}, and the tokenizer's does not: set model.chat_template to one"
            )
        return self._render(example, messages, return_assistant_tokens_mask=mark)

    def before_last_answer(self, example: Example, messages: list[Message]) -> str | None:
        """The prompt of the last answer; None if nothing precedes it, or nothing that the template accepts as a
        prompt."""
        last = max(number for number, message in enumerate(messages) if message["role"] == ASSISTANT)
        try:
            return self.prompt(example, messages[:last]) if last else None
        except EndlessTemplate:
            raise
        except RowError:
            return None

    def _render(self, example: Example, messages: list[Message], **options: bool) -> Rendered:
        source = self._source(example)
        for name in example.template_kwargs:
            if name in self.tokenizer.special_tokens_map:
                raise RowError(f"chat_template_kwargs.{name} is a special token of the tokenizer's: no row replaces it")
        variables = {**self.tokenizer.special_tokens_map, **example.template_kwargs}
        render = partial(
            render_jinja_template, [messages], tools=example.tools, chat_template=source, **options, **variables
        )
        try:
            texts, spans = cast(tuple[list[str], list[list[Span]]], self.limit.call(render))
        except OverTime as over:
            raise EndlessTemplate(self._endless(over.stopped_at, source)) from None
        except Exception as error:  # it may raise anything
            raise RowError(f"the chat template refuses it: {error}") from error
        return Rendered(texts[0], tuple(spans[0]) if spans else ())

    def _source(self, example: Example) -> str:
        if not self.tokenizer.chat_template:
            raise DataError(
                "the data holds conversations, and the tokenizer has no chat template: set model.chat_template to a "
                "file that holds one, or use text columns"
            )
        return self.tokenizer.get_chat_template(None, example.tools)  # type: ignore[arg-type]

    def refuse_lost_words(self, example: Example, messages: Iterable[Message], text: str) -> None:
        """Raises RowError if the rendering lacks a part of an assistant message."""
        reads_calls = "tool_calls" in _code(self._source(example)).names
        for message in messages:
            words = "tool_calls" if message.get("tool_calls") and not reads_calls else lost(message, text)
            if words is not None:
                raise RowError(
                    f"the chat template does not write all that the assistant says: {words[:SHOWN]!r} is missing, so "
                    f"that what is learned would not be what is sampled; {REMEDY}"
                )

    def unread(self, example: Example) -> tuple[str, ...]:
        """Remarks about variables of the row that the template does not read."""
        given = [*(["tools"] if example.tools else []), *example.template_kwargs]
        names = _code(self._source(example)).names if given else frozenset[str]()
        return tuple(f"{name!r} for the chat template, which does not read it" for name in given if name not in names)

    def _endless(self, stopped_at: TracebackType | None, source: str) -> str:
        line = _line_of_template(stopped_at)
        where = f" in its line {line}: {source.splitlines()[line - 1].strip()[:SHOWN]!r}" if line else ""
        return (
            f"the chat template ({self.tokenizer.name_or_path or 'of the tokenizer'}, or the file that "
            f"model.chat_template names) did not end within {self.limit.seconds:g} s of processor time; it was "
            f"stopped{where}. Mend it, or set model.chat_template to a file with another"
        )


def refuse_other_prompt(prompt: str, whole: str) -> None:
    """Raises RowError if the context of an answer differs between training and sampling."""
    if not whole.startswith(prompt):
        at = next((i for i, (a, b) in enumerate(zip(prompt, whole, strict=False)) if a != b), len(whole))
        at = max(0, at - SHOWN // 2)
        raise RowError(
            "the chat template does not begin a conversation with its answer as it begins the one that is to be "
            f"answered: {whole[at : at + SHOWN]!r} instead of {prompt[at : at + SHOWN]!r}, so that what is learned "
            f"would not be what is sampled; {REMEDY}"
        )


@dataclass(frozen=True)
class _Code:
    """The code of a template: all names in it, and whether it has generation markers."""

    names: frozenset[str]
    marks: bool


@lru_cache
def _code(source: str) -> _Code:
    try:
        tokens = [(kind, value) for _, kind, value in Environment().lex(source) if kind != "whitespace"]
    except Exception as error:
        raise RowError(f"the chat template is not valid: {error}") from error
    marks = any(a[0] == "block_begin" and b == ("name", "generation") for a, b in pairwise(tokens))
    return _Code(frozenset(value for kind, value in tokens if kind == "name"), marks)


def _line_of_template(stopped_at: TracebackType | None) -> int | None:
    """The line of the template at which it stopped (Jinja compiles templates to Python)."""
    line = None
    while stopped_at is not None:
        template = stopped_at.tb_frame.f_globals.get("__jinja_template__")
        if isinstance(template, Template):
            line = template.get_corresponding_lineno(stopped_at.tb_lineno)
        stopped_at = stopped_at.tb_next
    return line

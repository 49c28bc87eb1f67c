"""Examples become token ids with a mask of what is learned from.

A prompt and a completion are tokenised *together*; the boundary is where the tokens of both and those of the prompt
alone part. So the model sees the tokens that it would see in use, even where one straddles the boundary: such a token
belongs to the completion.
"""

# pyright: basic
# (transformers' tokenizers are typed in part only)

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from transformers import PreTrainedTokenizerBase

from actors.errors import DataError
from orchestrator.data.formats import Content, Example, Message, RowError

GENERATION_MARKER = re.compile(r"\{%-?\s*generation\b")
STEP_SEPARATOR = "\n"  # after each step of an answer with process labels; the label stands at its last token


@dataclass(slots=True)
class Encoded:
    """One item as tokens: one row per completion (a prompt alone is one row). `boundary`: tokens of the prompt."""

    rows: list[list[int]]
    masks: list[list[bool]]
    boundary: int = 0
    straddles: bool = False  # prompt and completion, tokenised together, share a token
    step_labels: list[list[int]] | None = None


@dataclass(frozen=True)
class Tokeniser:
    """How examples are tokenised. `completion_only=None`: learn from completions alone where there is a prompt."""

    tokenizer: PreTrainedTokenizerBase
    completion_only: bool | None = None
    assistant_only: bool = False
    append_eos: bool = True

    def encode(self, examples: Sequence[Example]) -> list[Encoded | RowError]:
        """One result per example, in order. All texts go through the tokenizer in two batched calls."""
        texts = _Texts()
        pending = [self._begin(example, texts) for example in examples]
        texts.tokenise(self.tokenizer)
        return [
            result if isinstance(result, Encoded | RowError) else self._finish(example, result, texts)
            for example, result in zip(examples, pending, strict=True)
        ]

    def _begin(self, example: Example, texts: _Texts) -> Encoded | RowError | _Pending:
        try:
            if example.input_ids is not None:
                self._check_ids(example.input_ids)
                return Encoded([example.input_ids], [_after_first(example.mask or [True] * len(example.input_ids))])
            if example.step_labels is not None:
                return self._encode_steps(example)
            if self.assistant_only and example.completions:
                return self._encode_assistant(example)
            return self._queue(example, texts)
        except RowError as error:
            return error

    def _check_ids(self, ids: list[int]) -> None:
        wrong = next((token for token in ids if not 0 <= token < self._size), None)
        if wrong is not None:
            raise RowError(f"input_ids holds {wrong}, and the tokenizer's ids are 0 to {self._size - 1}")

    def _queue(self, example: Example, texts: _Texts) -> _Pending:
        """Note the texts that this example needs tokenised."""
        text = all(isinstance(part, str) for part in (example.prompt or "", *example.completions))
        prompt = self._render_prompt(example) if example.prompt else None
        wholes = [self._render_whole(example, completion) for completion in example.completions]
        return _Pending(
            None if prompt is None else texts.add(prompt, special=text),
            [texts.add(whole, special=text) for whole in wholes],
            ends=self.append_eos and text,
        )

    def _finish(self, example: Example, pending: _Pending, texts: _Texts) -> Encoded | RowError:
        prompt = [] if pending.prompt is None else texts.ids(pending.prompt)
        if not example.completions:
            return Encoded([prompt], [[False] * len(prompt)], len(prompt)) if prompt else RowError("no token in it")
        rows = [self._ended(texts.ids(whole)) if pending.ends else texts.ids(whole) for whole in pending.wholes]
        boundary = min(_common(prompt, row) for row in rows)
        learned_from = boundary if self._only_completion(example) else 0
        masks = [[position >= max(1, learned_from) for position in range(len(row))] for row in rows]
        return Encoded(rows, masks, boundary, straddles=boundary < len(prompt))

    def _only_completion(self, example: Example) -> bool:
        return example.prompt is not None if self.completion_only is None else self.completion_only

    def _ended(self, ids: list[int]) -> list[int]:
        return ids if self._eos is None or ids[-1:] == [self._eos] else [*ids, self._eos]

    @cached_property
    def _eos(self) -> Any:
        """Transformers looks a special token up by name at each access."""
        return self.tokenizer.eos_token_id

    @cached_property
    def _size(self) -> int:
        return len(self.tokenizer)

    def _render_prompt(self, example: Example) -> str:
        """With the opening of the answer; a prompt that ends in the assistant's words is left open instead."""
        if isinstance(example.prompt, str):
            return example.prompt
        messages = _as_list(example.prompt)
        continues = messages[-1]["role"] == "assistant"
        return self._render(example, messages, add_generation_prompt=not continues, continue_final_message=continues)

    def _render_whole(self, example: Example, completion: Content) -> str:
        if isinstance(completion, str):
            return f"{example.prompt or ''}{completion}"
        return self._render(example, [*_as_list(example.prompt), *_as_list(completion)])

    def _render(self, example: Example, messages: list[Message], **options: Any) -> str:
        return str(self._apply_template(example, messages, tokenize=False, **options))

    def _apply_template(self, example: Example, messages: list[Message], **options: Any) -> Any:
        if not self.tokenizer.chat_template:
            raise DataError(
                "the data holds conversations, and the tokenizer has no chat template: set model.chat_template to a "
                "file that holds one, or use text columns"
            )
        options = {**options, "tools": example.tools, **example.template_kwargs}
        try:
            return self.tokenizer.apply_chat_template(messages, **options)
        except Exception as error:  # a template is a program of the model's author: it raises what it likes
            raise RowError(f"the chat template refuses it: {error}") from error

    def _encode_assistant(self, example: Example) -> Encoded:
        """Only the assistant's tokens, as the template's generation markers say."""
        if any(isinstance(part, str) for part in (example.prompt, *example.completions)):
            raise RowError("data.assistant_only needs conversations, and this is text")
        if self.tokenizer.chat_template and not GENERATION_MARKER.search(str(self.tokenizer.chat_template)):
            raise DataError(
                "data.assistant_only needs a chat template that marks the assistant's words with "
                "{% generation %} ... {% endgeneration %}, and the tokenizer's does not: set model.chat_template to one"
            )
        encoded = Encoded([], [])
        for completion in example.completions:
            messages = [*_as_list(example.prompt), *_as_list(completion)]
            options = {"tokenize": True, "return_dict": True, "return_assistant_tokens_mask": True}
            rendered = self._apply_template(example, messages, **options)
            mask = [bool(flag) for flag in rendered["assistant_masks"]]
            if not any(mask):
                raise RowError("no token of it is the assistant's (data.assistant_only)")
            encoded.rows.append(list(rendered["input_ids"]))
            encoded.masks.append(_after_first(mask))
        if example.prompt is not None:
            self._limit_to_completion(example, encoded)
        return encoded

    def _limit_to_completion(self, example: Example, encoded: Encoded) -> None:
        prompt = self.tokenizer(self._render_prompt(example), add_special_tokens=False)["input_ids"]
        encoded.boundary = min(_common(prompt, row) for row in encoded.rows)
        encoded.straddles = encoded.boundary < len(prompt)
        if self._only_completion(example):
            encoded.masks = [
                [learned and position >= encoded.boundary for position, learned in enumerate(mask)]
                for mask in encoded.masks
            ]

    def _encode_steps(self, example: Example) -> Encoded:
        """Prompt, then each step with a separator; -1 except at a step's last token."""
        tokens = list(self.tokenizer(str(example.prompt))["input_ids"])
        boundary = len(tokens)
        separator = self.tokenizer(STEP_SEPARATOR, add_special_tokens=False)["input_ids"]
        labels = [-1] * boundary
        for step, label in zip(example.completions, example.step_labels or (), strict=True):
            ids = [*self.tokenizer(str(step), add_special_tokens=False)["input_ids"], *separator]
            tokens += ids
            labels += [-1] * (len(ids) - 1) + [int(label)]
        mask = [position >= max(1, boundary) for position in range(len(tokens))]
        return Encoded([tokens], [mask], boundary, step_labels=[labels])


@dataclass(frozen=True, slots=True)
class _Pending:
    """Handles of one example's texts, until all texts of the batch are tokenised."""

    prompt: tuple[bool, int] | None
    wholes: list[tuple[bool, int]]
    ends: bool


@dataclass
class _Texts:
    """Texts to be tokenised together; those with the tokenizer's special tokens apart from those without."""

    queues: dict[bool, list[str]] = field(default_factory=lambda: {True: [], False: []})
    results: dict[bool, list[list[int]]] = field(default_factory=dict)

    def add(self, text: str, *, special: bool) -> tuple[bool, int]:
        if not text.isascii():
            try:
                text.encode()
            except UnicodeEncodeError:
                raise RowError("its text holds half of a surrogate pair, which is no character") from None
        self.queues[special].append(text)
        return special, len(self.queues[special]) - 1

    def tokenise(self, tokenizer: PreTrainedTokenizerBase) -> None:
        for special, queue in self.queues.items():
            options = {"add_special_tokens": special, "return_attention_mask": False, "verbose": False}
            self.results[special] = tokenizer(queue, **options)["input_ids"] if queue else []  # type: ignore

    def ids(self, handle: tuple[bool, int]) -> list[int]:
        special, index = handle
        return self.results[special][index]


def _as_list(content: Content | None) -> list[Message]:
    return content if isinstance(content, list) else []


def _after_first(mask: Sequence[bool]) -> list[bool]:
    """The first token has nothing before it to be predicted from."""
    return [False, *mask[1:]]


def _common(first: list[int], second: list[int]) -> int:
    """Length of the common start."""
    if second[: len(first)] == first:
        return len(first)
    return next(i for i, (a, b) in enumerate(zip([*first, None], [*second, None], strict=False)) if a != b)

"""Examples become token ids with a mask of the trained tokens.

A prompt and a completion are tokenised *together*; the boundary is the first token that differs from those of the
prompt alone. So the model is trained on the tokens that it would get in use, even if one of them crosses the boundary:
such a token belongs to the completion."""

# pyright: basic
# (transformers' tokenizers have incomplete types)

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from transformers import BatchEncoding, PreTrainedTokenizerBase

from actors.errors import DataError
from actors.other_prompts import INSERT
from orchestrator.data.conversation import Content, Message, RowError, answers, joined
from orchestrator.data.formats import Example
from orchestrator.data.teacher_prompts import MARK, spliced
from orchestrator.data.template import (
    RENDER_LIMIT_S,
    ChatTemplate,
    EndlessTemplate,
    Rendered,
    Span,
    refuse_other_prompt,
)
from orchestrator.data.time_limit import TimeLimit

STRADDLES = "a token that straddles prompt and completion: it is the completion's"
UNMARKED = "a turn of the assistant's that the chat template does not mark: it is not learned from"
PROBES = ("a", "1", " ", "\n", "<")  # every vocabulary has at least one of these texts


@dataclass(slots=True)
class Encoded:
    """One item as tokens: one row per completion (a prompt alone is one row). `boundary`: tokens of the prompt."""

    rows: list[list[int]]
    masks: list[list[bool]]
    boundary: int = 0
    remarks: tuple[str, ...] = ()  # remarks about the item for the report
    step_labels: list[list[int]] | None = None


@dataclass(frozen=True)
class Tokeniser:
    """How examples are tokenised. `completion_only=None`: train on completions only if there is a prompt.
    `step_separator` follows each step of an answer with step labels, of which `last_step_only` keeps one."""

    tokenizer: PreTrainedTokenizerBase
    completion_only: bool | None = None
    assistant_only: bool = False
    append_eos: bool = True
    step_separator: str = "\n"
    last_step_only: bool = False
    render_limit_s: float = RENDER_LIMIT_S

    def encode(self, examples: Sequence[Example]) -> list[Encoded | RowError]:
        """One result per example, in order, up to the first whose chat template does not end (an EndlessTemplate, and
        the last result). All texts go through the tokenizer in one batched call."""
        texts = _Texts()
        pending: list[Encoded | RowError | _Pending] = []
        with TimeLimit(self.render_limit_s) as limit:
            template = ChatTemplate(self.tokenizer, limit)
            for example in examples:
                pending.append(self._begin(example, texts, template))
                if isinstance(pending[-1], EndlessTemplate):
                    break
        texts.tokenise(self.tokenizer, offsets=self.assistant_only)
        return [
            self._finish(example, result, texts) if isinstance(result, _Pending) else result
            for example, result in zip(examples, pending, strict=False)
        ]

    def teacher_prompt(self, example: Example) -> tuple[int, ...]:
        """The tokens of an example's teacher prompt; INSERT stands for what is shown there. Raises RowError."""
        asked = example.teacher_prompt
        assert asked is not None
        if not isinstance(asked, str):
            with TimeLimit(self.render_limit_s) as limit:
                asked_text = ChatTemplate(self.tokenizer, limit).prompt(example, asked)
        else:
            asked_text = asked
        texts = _Texts()
        handles = [texts.add(part) for part in asked_text.split(MARK)]
        texts.tokenise(self.tokenizer, offsets=False)
        tokens = spliced([texts.ids(handle) for handle in handles], INSERT)
        return tuple(self._opened(tokens) if isinstance(asked, str) else tokens)

    def _begin(self, example: Example, texts: _Texts, template: ChatTemplate) -> Encoded | RowError | _Pending:
        try:
            if example.input_ids is not None:
                self._check_ids(example.input_ids)
                return Encoded([example.input_ids], [_after_first(example.mask or [True] * len(example.input_ids))])
            if example.step_labels is not None:
                return self._queue_steps(example, texts)
            if all(isinstance(part, str) for part in (example.prompt or "", *example.completions)):
                return self._queue_text(example, texts)
            return self._queue_conversation(example, texts, template)
        except RowError as error:
            return error

    def _check_ids(self, ids: list[int]) -> None:
        wrong = next((token for token in ids if not 0 <= token < self._size), None)
        if wrong is not None:
            raise RowError(f"input_ids holds {wrong}, and the tokenizer's ids are 0 to {self._size - 1}")

    def _queue_text(self, example: Example, texts: _Texts) -> _Pending:
        if self.assistant_only and example.completions:
            raise RowError("data.assistant_only needs conversations, and this is text")
        prompt = None if example.prompt is None else texts.add(str(example.prompt))
        return _Pending(prompt, [texts.add(f"{example.prompt or ''}{end}") for end in example.completions], text=True)

    def _queue_steps(self, example: Example, texts: _Texts) -> _Pending:
        """Steps and separators are tokenised apart, so that where a step ends does not depend on what follows it."""
        steps = [texts.add(str(step)) for step in example.completions]
        return _Pending(texts.add(str(example.prompt)), steps, separator=texts.add(self.step_separator))

    def _queue_conversation(self, example: Example, texts: _Texts, template: ChatTemplate) -> _Pending:
        """Raises RowError if an answer would be tokenised differently from sampling."""
        begun = _as_list(example.prompt)
        prompt = template.prompt(example, begun) if begun else None
        after = len(prompt) if prompt is not None and self._only_completion(example) else 0
        remarks, wholes = template.unread(example), list[Rendered]()
        for completion in map(_as_list, example.completions):
            messages = joined(begun, completion)
            whole = template.whole(example, messages, mark=self.assistant_only)
            before = prompt if prompt is not None else template.before_last_answer(example, messages)
            if before is not None:
                refuse_other_prompt(before, whole.text)
            learned = answers(completion if after else messages)
            template.refuse_lost_words(example, learned, whole.text[after:])
            if self.assistant_only and not whole.marks_all(learned, after):
                remarks = (*remarks, UNMARKED)
            wholes.append(whole)
        return _Pending(
            None if prompt is None else texts.add(prompt),
            [texts.add(whole.text) for whole in wholes],
            marked=[whole.marked for whole in wholes] if self.assistant_only else None,
            remarks=tuple(dict.fromkeys(remarks)),
        )

    def _finish(self, example: Example, pending: _Pending, texts: _Texts) -> Encoded | RowError:
        prompt = [] if pending.prompt is None else texts.ids(pending.prompt)
        if not example.completions and not prompt:
            return RowError("no token in it")
        rows = [texts.ids(whole) for whole in pending.wholes]
        if pending.separator is not None:
            return self._joined_steps(example, self._opened(prompt), rows, texts.ids(pending.separator))
        if pending.text:
            prompt, rows = self._opened(prompt), [self._ended(self._opened(row)) for row in rows]
        if not rows:
            return Encoded([prompt], [[False] * len(prompt)], len(prompt))
        boundary = min(_common(prompt, row) for row in rows)
        learned_from = max(1, boundary if self._only_completion(example) else 0)
        masks = [[position >= learned_from for position in range(len(row))] for row in rows]
        if pending.marked is not None:
            marked = map(texts.covered, pending.wholes, pending.marked)
            masks = [[a and b for a, b in zip(*both, strict=True)] for both in zip(masks, marked, strict=True)]
            if not all(map(any, masks)):
                return RowError("no token of it is the assistant's (data.assistant_only)")
        straddles = (STRADDLES,) if boundary < len(prompt) else ()
        return Encoded(rows, masks, boundary, (*straddles, *pending.remarks))

    def _only_completion(self, example: Example) -> bool:
        return example.prompt is not None if self.completion_only is None else self.completion_only

    def _opened(self, ids: list[int]) -> list[int]:
        """Prepends the tokenizer's beginning-of-sequence token, unless the text has it already. (An end-of-sequence
        token is not for prompts; `append_eos` adds it to rows.)"""
        opening = self._opening
        return ids if ids[: len(opening)] == opening else [*opening, *ids]

    def _ended(self, ids: list[int]) -> list[int]:
        if not self.append_eos or self._eos is None or ids[-1:] == [self._eos]:
            return ids
        return [*ids, self._eos]

    @cached_property
    def _opening(self) -> list[int]:
        for probe in PROBES:
            bare = list(self.tokenizer(probe, add_special_tokens=False)["input_ids"])  # type: ignore[arg-type]
            if bare:
                dressed = list(self.tokenizer(probe)["input_ids"])  # type: ignore[arg-type]
                starts = range(len(dressed) - len(bare) + 1)
                return dressed[: next(at for at in starts if dressed[at : at + len(bare)] == bare)]
        raise DataError(f"the tokenizer knows none of the texts {PROBES}: set model.tokenizer to the model's own")

    @cached_property
    def _eos(self) -> Any:
        """Cached, because transformers looks a special token up by name at each access."""
        return self.tokenizer.eos_token_id

    @cached_property
    def _size(self) -> int:
        return len(self.tokenizer)

    def _joined_steps(
        self, example: Example, prompt: list[int], steps: list[list[int]], separator: list[int]
    ) -> Encoded | RowError:
        """The prompt, then each step with its separator. The label of a step is at its last token, the separator's, so
        that no step is read before it is labelled; elsewhere -1."""
        tokens, labels = list(prompt), [-1] * len(prompt)
        for number, (step, label) in enumerate(zip(steps, example.step_labels or (), strict=True), start=1):
            ended = [*step, *separator]
            if not ended:
                return RowError("completions: a step has no token")
            counts = not self.last_step_only or number == len(steps)
            tokens += ended
            labels += [-1] * (len(ended) - 1) + [int(label) if counts else -1]
        mask = [position >= max(1, len(prompt)) for position in range(len(tokens))]
        return Encoded([tokens], [mask], len(prompt), step_labels=[labels])


@dataclass(frozen=True, slots=True)
class _Pending:
    """Handles of one example's texts until all texts of the batch are tokenised. `marked`: marked spans of each whole
    conversation. With a `separator`, the `wholes` are the steps of one answer."""

    prompt: int | None
    wholes: list[int]
    text: bool = False
    marked: list[tuple[Span, ...]] | None = None
    separator: int | None = None
    remarks: tuple[str, ...] = ()


@dataclass
class _Texts:
    """Texts to be tokenised together, without the tokenizer's special tokens."""

    queue: list[str] = field(default_factory=list)
    encoding: BatchEncoding | None = None

    def add(self, text: str) -> int:
        if not text.isascii():
            try:
                text.encode()
            except UnicodeEncodeError:
                raise RowError("its text holds half of a surrogate pair, which is not a character") from None
        self.queue.append(text)
        return len(self.queue) - 1

    def tokenise(self, tokenizer: PreTrainedTokenizerBase, *, offsets: bool) -> None:
        if offsets and not tokenizer.is_fast:
            raise DataError("data.assistant_only needs a fast tokenizer, which knows where in a text a token stands")
        if self.queue:
            self.encoding = tokenizer(self.queue, add_special_tokens=False, return_attention_mask=False, verbose=False)

    def ids(self, handle: int) -> list[int]:
        assert self.encoding is not None
        return self.encoding["input_ids"][handle]  # type: ignore[return-value]

    def covered(self, handle: int, spans: Iterable[Span]) -> list[bool]:
        """For each token of a text whether it has a character of one of the spans."""
        assert self.encoding is not None
        mask = [False] * len(self.ids(handle))
        for start, stop in spans:
            first = self._token(handle, range(start, stop))
            last = self._token(handle, range(stop - 1, start - 1, -1))
            if first is not None and last is not None:
                mask[first : last + 1] = [True] * (last + 1 - first)
        return mask

    def _token(self, handle: int, characters: Iterable[int]) -> int | None:
        """The token of the first character that has one: white space may have none."""
        assert self.encoding is not None
        tokens = (self.encoding.char_to_token(handle, character) for character in characters)
        return next((token for token in tokens if token is not None), None)


def _as_list(content: Content | None) -> list[Message]:
    return content if isinstance(content, list) else []


def _after_first(mask: Sequence[bool]) -> list[bool]:
    """Masks out the first token, because nothing precedes it."""
    return [False, *mask[1:]]


def _common(first: list[int], second: list[int]) -> int:
    """Length of the common prefix."""
    if second[: len(first)] == first:
        return len(first)
    return next(i for i, (a, b) in enumerate(zip([*first, None], [*second, None], strict=False)) if a != b)

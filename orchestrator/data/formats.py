"""The columns of each kind of data, and how they are read: rows become `Example`s.

Columns have our names, after `data.columns` was applied. The first format whose columns are all present is used. Each
row may have texts or lists of messages. A row that cannot be used is a `RowError`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import takewhile
from typing import Any, cast

from actors.errors import DataError
from orchestrator.config.schema import DataConfig
from orchestrator.data import cells
from orchestrator.data.cells import Row
from orchestrator.data.conversation import (
    ASSISTANT,
    Content,
    Message,
    RowError,
    refuse_no_answer,
    refuse_other_beginning,
)
from orchestrator.pipeline import DataKind

ROLES = {"human": "user", "gpt": ASSISTANT}  # of `conversations`; other roles are kept


@dataclass(frozen=True, slots=True)
class Example:
    """One item before it is tokenised: a prompt, or None, and its completions."""

    prompt: Content | None
    completions: tuple[Content, ...] = ()
    tools: list[Any] | None = None
    template_kwargs: Mapping[str, Any] = field(default_factory=dict[str, Any])
    label: bool | None = None
    margin: float | None = None
    weight: float | None = None
    teacher: int | None = None  # which of the kind's teachers
    teacher_prompt: Content | None = None  # what the teacher reads in the place of the prompt
    step_labels: tuple[bool, ...] | None = None  # one per completion; the completions are then the steps of one answer
    input_ids: list[int] | None = None  # tokenised by the user; then `mask` marks the trained tokens
    mask: list[bool] | None = None


Reader = Callable[[Row], list[Example]]


@dataclass(frozen=True)
class Format:
    """Columns that a row must have, and how it is read. `completion_only`: the values that `data.completion_only` may
    have; `talks`: whether a row may be a conversation."""

    columns: tuple[str, ...]
    read: Reader
    completion_only: tuple[bool, ...] = (True, False)
    talks: bool = True

    def __str__(self) -> str:
        return " + ".join(self.columns)


def choose(kind: DataKind, found: Sequence[str], data: DataConfig, source: str) -> Format:
    """The first format of `kind` whose columns are all among `found` (our names). Raises DataError if there is none."""
    formats = FORMATS[kind.name]
    for candidate in formats:
        if set(candidate.columns) <= set(found):
            _refuse_dead_choice(candidate, data, source)
            _refuse_no_teacher(kind, found, source)
            return candidate
    nearest = min(formats, key=lambda candidate: _distance(candidate, found))
    missing = next(name for name in nearest.columns if name not in found)
    raise DataError(
        f"{source} has no column {missing!r}: found {', '.join(found) or 'none'}; "
        f"{kind.name} need {' or '.join(map(str, formats))}.\n"
        f"  If the column has another name, say which: data.columns.{missing}=ITS_NAME"
    )


def _refuse_dead_choice(chosen: Format, data: DataConfig, source: str) -> None:
    """Raises DataError for a setting that has no effect on this format."""
    if data.completion_only is not None and data.completion_only not in chosen.completion_only:
        raise DataError(
            f"data.completion_only={str(data.completion_only).lower()} needs a prompt apart from the completion, and "
            f"{source} is read as {chosen}; leave it out"
            + (", or set data.assistant_only=true" if chosen.talks and chosen.completion_only else "")
        )
    if data.assistant_only and not chosen.talks:
        raise DataError(f"data.assistant_only=true needs conversations, and {source} is read as {chosen}; leave it out")


def _refuse_no_teacher(kind: DataKind, found: Sequence[str], source: str) -> None:
    if kind.teachers and "teacher" not in found:
        raise DataError(
            f"{source} has no column 'teacher', which says of each row whether it is for "
            f"{' or '.join(kind.teachers)} (options.teachers): found {', '.join(found)}.\n"
            "  If the column has another name, say which: data.columns.teacher=ITS_NAME. To mix the teachers in every "
            "row instead, set options.teacher_weights"
        )


def _distance(candidate: Format, found: Sequence[str]) -> tuple[int, int]:
    """Distance of a data set from a format: the number of columns that it lacks, then minus the number that it has."""
    missing = len(set(candidate.columns) - set(found))
    return missing, missing - len(candidate.columns)


def renamed(names: Sequence[str], columns: Mapping[str, str], source: str) -> dict[str, str]:
    """The data set's name -> ours, for every column. Raises DataError if `data.columns` names one that is not there."""
    for ours, theirs in columns.items():
        if theirs not in names:
            raise DataError(f"data.columns.{ours}={theirs}: {source} has no column {theirs!r}, only {', '.join(names)}")
    mapped = {theirs: ours for ours, theirs in columns.items()}
    return {name: mapped.get(name, name) for name in names if name in mapped or name not in columns}


def read_completion(row: Row) -> list[Example]:
    return [_example(row, *_answered(row, "completion"))]


def read_judged(row: Row) -> list[Example]:
    """The same where a completion may say nothing: that deserves a reward, too."""
    said = row["completion"]
    turns = [message.get("content") for message in said if isinstance(message, dict)] if isinstance(said, list) else []
    if said == "" or (turns and not any(turns)):
        prompt = cells.content(row, "prompt")
        nothing = "" if isinstance(prompt, str) else [{"role": ASSISTANT, "content": ""}]
        return [_example(row, prompt, (nothing,))]
    return read_completion(row)


def read_messages(row: Row) -> list[Example]:
    messages = cells.messages(row, "messages")
    refuse_no_answer(messages, "messages")
    return [_example(row, None, (messages,))]


def read_conversations(row: Row) -> list[Example]:
    turns = cells.message_dicts(row, "conversations")
    if not all(isinstance(turn.get("from"), str) and isinstance(turn.get("value"), str) for turn in turns):
        raise RowError("conversations: every turn needs `from` and `value`, both texts")
    messages = [{"role": ROLES.get(turn["from"], turn["from"]), "content": turn["value"]} for turn in turns]
    refuse_no_answer(cells.with_content(messages, "conversations"), "conversations")
    return [_example(row, None, (messages,))]


def read_text(row: Row) -> list[Example]:
    return [_example(row, None, (cells.text(row, "text"),))]


def read_input_ids(row: Row) -> list[Example]:
    """Trained tokens: `labels` are not -100 and every given mask (`completion_mask`, `assistant_masks`) is 1."""
    tokens = cells.integers(row, "input_ids")
    if not tokens:
        raise RowError("input_ids is empty")
    mask = [True] * len(tokens)
    for name in ("labels", "completion_mask", "assistant_masks"):
        if row.get(name) is not None:
            values = cells.integers(row, name)
            if len(values) != len(tokens):
                raise RowError(f"{name} has {len(values)} entries for {len(tokens)} input_ids")
            unlearned = -100 if name == "labels" else 0
            mask = [learned and value != unlearned for learned, value in zip(mask, values, strict=True)]
    return [replace(_example(row, None, ()), input_ids=tokens, mask=mask)]


def read_prompt(row: Row) -> list[Example]:
    return [_example(row, cells.content(row, "prompt"), ())]


def read_pair(row: Row) -> list[Example]:
    return [_example(row, *_answered(row, "chosen", "rejected"))]


def read_triple(row: Row) -> list[Example]:
    """A pair, and the gold completion as a third one."""
    return [_example(row, *_answered(row, "chosen", "rejected", "reference"))]


def read_pair_without_prompt(row: Row) -> list[Example]:
    """The prompt is the common prefix of chosen and rejected."""
    chosen, rejected = cells.content(row, "chosen"), cells.content(row, "rejected")
    _same_shape("chosen", chosen, "rejected", rejected)
    _apart(chosen, rejected)
    prompt, chosen, rejected = extract_prompt(chosen, rejected)
    for name, side in (("chosen", chosen), ("rejected", rejected)):
        if not side:
            raise RowError(
                f"{name} is a prefix of the other one, so its answer would be empty: give the prompt as a column"
            )
        refuse_no_answer(side, name)
        if prompt:
            refuse_other_beginning(side, name)
    return [_example(row, prompt or None, (chosen, rejected))]


def read_labelled(row: Row) -> list[Example]:
    return [_example(row, *_answered(row, "completion"), label=cells.boolean(row["label"], "label"))]


def read_pair_as_labelled(row: Row) -> list[Example]:
    """Chosen and rejected become two adjacent examples, so that an unshuffled batch has both classes."""
    pair = (read_pair if "prompt" in row else read_pair_without_prompt)(row)[0]
    labelled = zip(pair.completions, (True, False), strict=True)
    return [_example(row, pair.prompt, (completion,), label=label) for completion, label in labelled]


def read_steps(row: Row) -> list[Example]:
    prompt, steps, labels = cells.text(row, "prompt"), row["completions"], row["labels"]
    if not isinstance(steps, list) or not steps or not all(isinstance(step, str) for step in cast(list[Any], steps)):
        raise RowError("completions must be a list of texts, one per step")
    if not all(step.strip() for step in cast(list[str], steps)):
        raise RowError("completions: a step is blank")
    if not isinstance(labels, list) or len(cast(list[Any], labels)) != len(cast(list[Any], steps)):
        raise RowError("labels must be a list with one entry per step")
    step_labels = tuple(cells.boolean(label, "labels") for label in cast(list[Any], labels))
    return [replace(_example(row, prompt, tuple(cast(list[str], steps))), step_labels=step_labels)]


PAIRS = (
    Format(("prompt", "chosen", "rejected"), read_pair),
    Format(("chosen", "rejected"), read_pair_without_prompt),
)
LABELLED = (
    Format(("prompt", "completion", "label"), read_labelled),
    Format(("prompt", "chosen", "rejected"), read_pair_as_labelled),
    Format(("chosen", "rejected"), read_pair_as_labelled),
)
FORMATS: dict[str, tuple[Format, ...]] = {
    "completions": (
        Format(("input_ids",), read_input_ids, completion_only=(), talks=False),
        Format(("prompt", "completion"), read_completion),
        Format(("messages",), read_messages, completion_only=(False,)),
        Format(("conversations",), read_conversations, completion_only=(False,)),
        Format(("text",), read_text, completion_only=(False,), talks=False),
    ),
    "prompts": (
        Format(("prompt",), read_prompt, completion_only=(), talks=False),  # no token of them is trained on
        Format(("input_ids",), read_input_ids, completion_only=(), talks=False),
    ),
    "answered_prompts": (Format(("prompt", "completion"), read_completion, completion_only=(True,)),),
    "judged_completions": (Format(("prompt", "completion"), read_judged, completion_only=(True,)),),
    "pairs": PAIRS,
    "pairs_with_margin": tuple(replace(pair, columns=(*pair.columns, "margin")) for pair in PAIRS),
    "triples": (Format(("prompt", "chosen", "rejected", "reference"), read_triple),),
    "labelled": LABELLED,
    "mismatched_labelled": LABELLED,
    "weighted_labelled": LABELLED,
    "step_labels": (Format(("prompt", "completions", "labels"), read_steps, completion_only=(True,), talks=False),),
}


KEPT = ("tools", "chat_template_kwargs")  # they belong to the prompt, whatever becomes of it


def carried(columns: Iterable[str]) -> tuple[str, ...]:
    """Of a data set's columns, those that go on beside a prompt whose completions become data: all but what would be
    read as another completion, label or conversation."""
    read = {name for formats in FORMATS.values() for each in formats for name in each.columns}
    read |= {"completion_mask", "assistant_masks", "weight"}
    return tuple(name for name in columns if name in KEPT or name not in read)


def extract_prompt(chosen: Content, rejected: Content) -> tuple[Content, Content, Content]:
    """(prompt, chosen, rejected): the prompt is the longest common prefix, of characters or of messages.

    A space at the end of a text prompt goes to the completions. If one text is a prefix of the other, it is the prompt.
    If one conversation is a prefix of the other, its last message stays in the completions: it is an answer, which the
    other one continues."""
    shared = _shared(chosen, rejected)
    if isinstance(chosen, str):
        shared -= chosen[:shared].endswith(" ")
    elif shared == min(len(chosen), len(rejected)):
        shared = max(0, shared - 1)
    return chosen[:shared], chosen[shared:], rejected[shared:]


def _shared(first: Content, second: Content) -> int:
    """Length of the common prefix."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(first, second, strict=False)))


def _example(
    row: Row, prompt: Content | None, completions: tuple[Content, ...], *, label: bool | None = None
) -> Example:
    return Example(
        prompt,
        completions,
        tools=cells.tools(row.get("tools")),
        template_kwargs=cells.template_kwargs(row.get("chat_template_kwargs")),
        label=label,
        margin=cells.number(row, "margin"),
        weight=cells.number(row, "weight", least=0.0),
    )


def _answered(row: Row, *names: str) -> tuple[Content, tuple[Content, ...]]:
    """The prompt, and the completion in each of the columns. Raises RowError if `rejected` equals `chosen`."""
    prompt, answers = cells.content(row, "prompt"), [cells.content(row, name) for name in names]
    conversations = [answer for answer in answers if isinstance(answer, list)]
    if len(conversations) == len(answers) and (begun := _begun(prompt, conversations)):
        prompt, answers = begun, [answer[len(begun) :] for answer in answers]
    for name, answer in zip(names, answers, strict=True):
        _same_shape("prompt", prompt, name, answer)
        refuse_no_answer(answer, name)
        refuse_other_beginning(answer, name)
    if "rejected" in names:
        _apart(*answers[:2])
    return prompt, tuple(answers)


def _begun(prompt: Content, conversations: Sequence[list[Message]]) -> list[Message]:
    """The messages of the prompt if the columns are whole conversations that repeat it; else none.

    If the prompt is a text, one of the messages must contain it: the prompt is then the common prefix of several
    conversations, or the messages of a single one up to that message. Raises RowError if no message contains it."""
    first = conversations[0]
    if isinstance(prompt, list):
        repeated = all(len(each) > len(prompt) and each[: len(prompt)] == prompt for each in conversations)
        return prompt if repeated and prompt[0]["role"] != ASSISTANT else []
    shared = min(min(_shared(first, each), len(each) - 1) for each in conversations)
    said = [at for at, message in enumerate(first[:shared], start=1) if _is_asked(message, prompt)]
    if not said:
        raise RowError(
            "prompt is a text, and the answers are conversations that do not begin with it: make it a list of "
            "messages, or repeat it in all of them"
        )
    return first[: shared if len(conversations) > 1 else said[-1]]


def _is_asked(message: Message, text: str) -> bool:
    content = message.get("content")
    return message["role"] != ASSISTANT and isinstance(content, str) and content.strip() == text.strip()


def _same_shape(first_name: str, first: Content, second_name: str, second: Content) -> None:
    if isinstance(first, str) != isinstance(second, str):
        raise RowError(f"{first_name} and {second_name} must both be texts or both be lists of messages")


def _apart(chosen: Content, rejected: Content) -> None:
    if chosen == rejected:
        raise RowError("chosen and rejected are the same: nothing is preferred")

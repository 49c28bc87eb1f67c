"""From the rows of one prompt to the records of a data set, with the column names of TRL and `datasets`. Pure.

A *recording* is what a `write` stage executes: `call(answered, **options)` returns a list of records. `records(...)`
names the columns of the batch that it reads, and those of the data set that it fills.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from actors.batch import Array
from orchestrator.data.conversation import Content

Record = dict[str, Any]


@dataclass(frozen=True)
class Answered:
    """A prompt with the completions of its rows. `completions`: texts; messages, if the prompt is a list of messages.
    `columns`: the batch's columns per row, [n] each. `index`: of the prompt in its data set. `reward_names`: of the
    columns of `reward_parts`."""

    prompt: Content
    completions: tuple[Content, ...]
    columns: Mapping[str, Array]
    index: int = 0
    reward_names: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.completions)


Recording = TypeVar("Recording", bound=Callable[..., list[Record]])


def records(*, reads: set[str], columns: tuple[str, ...]) -> Callable[[Recording], Recording]:
    """Declares what a recording reads of a batch, and the columns that it fills."""

    def declare(call: Recording) -> Recording:
        call.__dict__.update(reads=frozenset(reads), columns=columns)
        return call

    return declare


def is_blank(content: Content) -> bool:
    """Whether a completion says nothing: there is nothing to learn from it."""
    said = (content,) if isinstance(content, str) else tuple(str(message["content"]) for message in content)
    return not any(text.strip() for text in said)


@records(reads={"truncated"}, columns=("prompt_index", "prompt", "completion", "truncated"))
def completions(answered: Answered) -> list[Record]:
    """Every completion, blank ones too, and which prompt of the data set it answers."""
    return [{"prompt_index": answered.index, **record} for record in _completions(answered)]


@records(
    reads={"truncated", "reward", "reward_parts"},
    columns=("prompt_index", "prompt", "completion", "truncated", "reward"),
)
def completions_with_rewards(answered: Answered) -> list[Record]:
    """The same with the reward, and each of those that it is the sum of as `rewards/NAME`; null where there is none."""
    parts = answered.columns["reward_parts"]
    return [
        {
            **record,
            "reward": _number(answered.columns["reward"][row]),
            **{f"rewards/{name}": _number(parts[row][part]) for part, name in enumerate(answered.reward_names)},
        }
        for row, record in enumerate(completions(answered))
    ]


@records(reads={"truncated", "reward"}, columns=("prompt", "completion", "truncated", "reward"))
def scored_completions(answered: Answered) -> list[Record]:
    """Every completion that says something with its reward, null where it could not be scored."""
    return [
        {**record, "reward": _number(answered.columns["reward"][row])}
        for row, record in enumerate(_completions(answered))
        if not is_blank(record["completion"])
    ]


@records(reads={"label", "reward"}, columns=("prompt", "completion", "label", "reward"))
def labelled_completions(answered: Answered) -> list[Record]:
    """Every completion that says something, with whether it is desirable."""
    labels, rewards = answered.columns["label"], answered.columns["reward"]
    return [
        {
            "prompt": answered.prompt,
            "completion": completion,
            "label": bool(labels[index]),
            "reward": _number(rewards[index]),
        }
        for index, completion in enumerate(answered.completions)
        if not is_blank(completion)
    ]


@records(reads={"preferred"}, columns=("prompt", "chosen", "rejected"))
def pairs(answered: Answered) -> list[Record]:
    """A record of each pair: of two rows that follow one another, the preferred one and the other. A pair of equal
    texts, or with a blank one, says nothing and is left out."""
    sides = ((answered.completions[chosen], answered.completions[rejected]) for chosen, rejected in _pairs(answered))
    return [{"prompt": answered.prompt, "chosen": chosen, "rejected": rejected} for chosen, rejected in sides]


@records(reads={"preferred", "reward"}, columns=("prompt", "chosen", "rejected", "score_chosen", "score_rejected"))
def scored_pairs(answered: Answered) -> list[Record]:
    """The same with the reward of each side."""
    rewards = answered.columns["reward"]
    return [
        {**record, "score_chosen": _number(rewards[chosen]), "score_rejected": _number(rewards[rejected])}
        for record, (chosen, rejected) in zip(pairs(answered), _pairs(answered), strict=True)
    ]


def _completions(answered: Answered) -> list[Record]:
    truncated = answered.columns["truncated"]
    return [
        {"prompt": answered.prompt, "completion": completion, "truncated": bool(truncated[row])}
        for row, completion in enumerate(answered.completions)
    ]


def _pairs(answered: Answered) -> list[tuple[int, int]]:
    """(chosen, rejected) by row, of the pairs that say something."""
    preferred, said = answered.columns["preferred"], answered.completions
    ordered = ((row, row + 1) if preferred[row] else (row + 1, row) for row in range(0, len(said) - 1, 2))
    return [
        (chosen, rejected)
        for chosen, rejected in ordered
        if said[chosen] != said[rejected] and not is_blank(said[chosen]) and not is_blank(said[rejected])
    ]


def _number(value: Any) -> float | None:
    return None if value != value else float(value)

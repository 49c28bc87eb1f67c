"""Rewards that come with Troupe. A reward is a plain function; this is what one may ask for, by parameter name:

    prompts         list of n prompts: strings, or lists of messages where the data is conversational
    completions     list of n completions: strings, or one assistant message each, as prompts are; of episodes, all
                    messages after the prompt
    completion_ids  list of n lists of token ids
    trainer_state   `.global_step`: the version of the weights that sampled
    log_extra       log_extra(column, values): n values beside the completions in their table
    log_metric      log_metric(name, value): a number among the run's metrics
    anything else   the column of the data set with that name, n values; or an option of the configuration

It returns n numbers, or None where it has no opinion. The same signature as TRL's, so that existing functions run as
they are. What is not in the signature is not passed, unless it ends in `**kwargs`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from rewards.verification import verifier

Completion = str | list[dict[str, str]]
Scores = list[float | None]


def exact_match(completions: Sequence[Completion], answer: Sequence[Any], *, strip: bool = True) -> Scores:
    """1 where the completion is the column `answer`, else 0; white space around either is ignored if `strip`."""
    pairs = [(text_of(completion), str(expected)) for completion, expected in zip(completions, answer, strict=True)]
    if strip:
        pairs = [(text.strip(), expected.strip()) for text, expected in pairs]
    return [float(text == expected) for text, expected in pairs]


def accuracy_reward(completions: Sequence[Completion], solution: Sequence[str]) -> Scores:
    """1 where the answer is mathematically equal to the column `solution`, else 0; None where the solution is not
    something that can be compared (see `rewards.mathematics` for what can). An answer that takes longer to compare than
    `rewards.verification` allows is wrong."""
    accuracy = verifier().accuracy
    return [accuracy(text_of(completion), expected) for completion, expected in zip(completions, solution, strict=True)]


def reasoning_accuracy_reward(
    completions: Sequence[Completion], solution: Sequence[str], *, reasoning_delimiters: Sequence[str] = ("</think>",)
) -> Scores:
    """`accuracy_reward` of the text after the last delimiter; 0 if there is none, because the reasoning never ended."""

    def judged(completion: Completion, expected: str) -> float | None:
        answer = _after_last(text_of(completion), reasoning_delimiters)
        return 0.0 if answer is None else verifier().accuracy(answer, expected)

    return [judged(completion, expected) for completion, expected in zip(completions, solution, strict=True)]


def think_format_reward(completions: Sequence[Completion], *, closers: Sequence[str] = ("</think>",)) -> Scores:
    """1 where the text starts with `<think>`, opens no second one and closes it (with any of `closers`), else 0."""

    def well_formed(text: str) -> bool:
        inside = text.removeprefix("<think>")
        return inside != text and "<think>" not in inside and any(closer in inside for closer in closers)

    return [float(well_formed(text_of(completion))) for completion in completions]


def soft_overlong_punishment(
    completion_ids: Sequence[Sequence[int]], *, max_completion_len: int = 1280, soft_punish_cache: int = 256
) -> Scores:
    """0 up to `max_completion_len - soft_punish_cache` tokens, then falling to -1 at `max_completion_len` and beyond.

    Source: arXiv:2503.14476, eq. 13."""

    def punishment(length: int) -> float:
        over = length - (max_completion_len - soft_punish_cache)
        return -1.0 if length > max_completion_len else min(0.0, -over / soft_punish_cache)

    return [punishment(len(ids)) for ids in completion_ids]


def repetition_penalty(
    completion_ids: Sequence[Sequence[int]], *, ngram_size: int = 3, max_penalty: float = -1.0
) -> Scores:
    """`max_penalty` x the share of n-grams that repeat an earlier one; 0 for fewer tokens than one n-gram.

    Source: arXiv:2502.03373, appendix B."""

    def penalty(ids: Sequence[int]) -> float:
        ngrams = [tuple(ids[start : start + ngram_size]) for start in range(len(ids) - ngram_size + 1)]
        return max_penalty * (1 - len(set(ngrams)) / len(ngrams)) if ngrams else 0.0

    return [penalty(ids) for ids in completion_ids]


def cosine_scaled(
    completions: Sequence[Completion],
    completion_ids: Sequence[Sequence[int]],
    solution: Sequence[str],
    *,
    max_len: int,
    wrong: tuple[float, float] = (-1.0, -0.5),
    correct: tuple[float, float] = (1.0, 0.5),
) -> Scores:
    """`accuracy_reward` scaled by length along half a cosine, so that a short right answer is worth more than a long
    one and a long wrong one costs less than a short one. `wrong` and `correct`: values at 0 and at `max_len` tokens.

    Source: arXiv:2502.03373, eq. 1."""
    accuracies = accuracy_reward(completions, solution)
    return [
        None if right is None else cosine_between(*(correct if right else wrong), len(ids) / max_len)
        for right, ids in zip(accuracies, completion_ids, strict=True)
    ]


def completion_length(completion_ids: Sequence[Sequence[int]], *, per_token: float = 1.0) -> Scores:
    """`per_token` for each token of the completion; a negative value penalises length."""
    return [per_token * len(ids) for ids in completion_ids]


def text_of(completion: Completion) -> str:
    """The text of a completion, plain or conversational (the last that the model says in it)."""
    if isinstance(completion, str):
        return completion
    return next(said["content"] for said in reversed(completion) if said["role"] == "assistant")


def cosine_between(short: float, long: float, progress: float) -> float:
    """From `short` at progress 0 to `long` at progress 1 and beyond, along half a cosine."""
    return long + 0.5 * (short - long) * (1 + math.cos(math.pi * min(progress, 1.0)))


def _after_last(text: str, delimiters: Sequence[str]) -> str | None:
    """What follows the last occurrence of any delimiter; None if there is none."""
    ends = [text.rfind(delimiter) + len(delimiter) for delimiter in delimiters if delimiter in text]
    return text[max(ends) :] if ends else None

"""Distillation from a teacher with another tokenizer."""

from __future__ import annotations

from typing import Any

from orchestrator.losses.cross_tokenizer import distil_across
from orchestrator.losses.distillation import TEACHER_TOP_K
from orchestrator.losses.reduce import row_mean_of_token_means
from orchestrator.methods.option_types import Count, Share
from orchestrator.pipeline import (
    AnsweredPrompts,
    Pipeline,
    Prompts,
    Stage,
    generate,
    infer_top_k,
    one_of,
    retokenised,
    take,
    update,
)


def gold(*, lmbda: Share = 1.0, teacher_top_k: Count = 100, shared_weight: Share = 0.0, beta: Share = 0.5) -> Pipeline:
    """General online logit distillation: learn from a teacher with another tokenizer, by sorted probabilities and by
    the tokens that both have, wherever tokens of both begin at the same character.

    Source: arXiv:2402.12030."""
    options: dict[str, Any] = {"shared_weight": shared_weight, **({"beta": beta} if shared_weight else {})}
    asked = infer_top_k("teacher", into=TEACHER_TOP_K, k=teacher_top_k, temperature=None)
    learn = (
        retokenised(asked),
        update("policy", distil_across, reduce=row_mean_of_token_means, temperature=None, **options),
    )
    data, rows = (Prompts, (generate("rollout"),)) if lmbda == 1 else (AnsweredPrompts, _answered(lmbda))
    return Pipeline(data.with_teacher_prompts("{prompt}"), *rows, *learn)


def _answered(lmbda: float) -> tuple[Stage, ...]:
    """By the student for this share of the prompts, else by the data."""
    return one_of(lmbda, generate("rollout"), take()) if lmbda else (take(),)

"""Distillation on the student's own samples: by whole distributions, by sampled tokens, or both."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field

from orchestrator.losses.declare import Sum, Term
from orchestrator.losses.distillation import TEACHER_TOP_K, distil_top_k
from orchestrator.losses.reduce import token_mean
from orchestrator.losses.sampled_distillation import (
    importance_weighted,
    sequence_reverse_kl,
    sequence_reverse_kl_beside,
)
from orchestrator.methods.teaching import TEACHER, Roles, Teachers, Weights, from_teachers
from orchestrator.pipeline import Pipeline, Prompts, Stage, generate, infer, infer_top_k, update


def on_policy_distillation(
    *,
    beta: Annotated[float, Field(ge=0, le=1)] = 1.0,
    teacher_top_k: Annotated[int, Field(ge=1)] | None = None,
    teachers: Roles = TEACHER,
    teacher_weights: Weights = None,
    token_metrics: bool = False,
) -> Pipeline:
    """On-policy distillation: draw the student's distributions, on its own samples, to a teacher's; by default reverse
    KL, at the temperature of sampling.

    Source: Thinking Machines, On-Policy Distillation, 2025; arXiv:2306.13649, algorithm 1."""
    asked = Teachers(teachers, teacher_weights)
    learn = from_teachers(asked, beta=beta, top_k=teacher_top_k, temperature=None, token_metrics=token_metrics)
    return Pipeline(asked.taught(Prompts), generate("rollout"), *learn)


def iw_opd(*, gamma: Annotated[float, Field(ge=0)] = 0.5, teachers: Roles = TEACHER) -> Pipeline:
    """On-policy distillation by sampled tokens, those before the student has drifted from the teacher weighing more.

    Source: arXiv:2606.22600, algorithm 1."""
    asked = Teachers(teachers)
    return Pipeline(
        asked.taught(Prompts),
        generate("rollout"),
        *asked.say(infer, into="teacher_logps"),
        update("policy", importance_weighted, reduce=token_mean, gamma=gamma),
    )


def minillm(
    *,
    gamma: Annotated[float, Field(ge=0, le=1)] = 0.0,
    length_normalization: bool = True,
    single_step_decomposition: bool = True,
    teacher_top_k: Annotated[int, Field(ge=1)] | None = None,
    teachers: Roles = TEACHER,
) -> Pipeline:
    """MiniLLM: a policy gradient whose reward is the log-ratio of teacher to student, and the exact reverse KL of each
    single step.

    Source: arXiv:2306.08543, section 2.2."""
    returns: dict[str, Any] = {"gamma": gamma, **({"length_normalization": length_normalization} if gamma else {})}
    asked = Teachers(teachers)
    if not single_step_decomposition:
        learn = _from_sampled_tokens(asked, returns)
    elif teacher_top_k is None:
        learn = _from_companion(asked, returns)
    else:
        learn = _from_top_k(asked, teacher_top_k, returns)
    return Pipeline(asked.taught(Prompts), generate("rollout"), *learn)


def _from_sampled_tokens(teachers: Teachers, returns: dict[str, Any]) -> tuple[Stage, ...]:
    return (
        *teachers.say(infer, into="teacher_logps"),
        update("policy", sequence_reverse_kl, reduce=token_mean, **returns),
    )


def _from_companion(teachers: Teachers, returns: dict[str, Any]) -> tuple[Stage, ...]:
    loss = sequence_reverse_kl_beside
    return (update("policy", loss, reduce=token_mean, companion=teachers.the_only_one, **returns),)


def _from_top_k(teachers: Teachers, k: int, returns: dict[str, Any]) -> tuple[Stage, ...]:
    single_step = {"beta": 1.0, "temperature": None}
    both = Sum(
        Term(sequence_reverse_kl, token_mean, options=returns), Term(distil_top_k, token_mean, options=single_step)
    )
    return (
        *teachers.say(infer_top_k, into=(*TEACHER_TOP_K, "teacher_logps"), k=k, temperature=None),
        update("policy", both),
    )

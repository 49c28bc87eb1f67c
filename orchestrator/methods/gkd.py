"""Generalised knowledge distillation."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from actors.errors import ConfigError
from orchestrator.methods.teaching import TEACHER, Roles, Teachers, Weights, from_teachers
from orchestrator.pipeline import AnsweredPrompts, Completions, Pipeline, Prompts, generate, one_of, take


def gkd(
    *,
    lmbda: Annotated[float, Field(ge=0, le=1)] = 1.0,
    beta: Annotated[float, Field(ge=0, le=1)] = 0.5,
    temperature: Annotated[float, Field(gt=0)] = 1.0,
    seq_kd: bool = False,
    teacher_top_k: Annotated[int, Field(ge=1)] | None = None,
    teachers: Roles = TEACHER,
    teacher_weights: Weights = None,
) -> Pipeline:
    """Generalised knowledge distillation: draw the student's distributions towards those of a teacher, whose model
    lives in the student's ranks, or in ranks of its own with `teacher_top_k`; or of several teachers.

    Source: arXiv:2306.13649, algorithm 1."""
    if seq_kd and len(teachers) > 1:
        raise ConfigError(f"options.seq_kd: there are samples of one teacher, and options.teachers={list(teachers)}")
    asked = Teachers(teachers, teacher_weights)
    learn = from_teachers(asked, beta=beta, top_k=teacher_top_k, temperature=temperature)
    student, teacher = generate("rollout"), generate("teacher_rollout")
    prompts = asked.taught(Prompts)
    if lmbda == 1:
        return Pipeline(prompts, student, *learn)
    if lmbda == 0:
        return Pipeline(prompts, teacher, *learn) if seq_kd else Pipeline(asked.taught(Completions), *learn)
    if seq_kd:
        return Pipeline(prompts, *one_of(lmbda, student, teacher), *learn)
    return Pipeline(asked.taught(AnsweredPrompts), *one_of(lmbda, student, take()), *learn)

"""Self-distillation: the teacher is the policy, or a slow copy of it, that reads more than its student does."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from actors.errors import ConfigError
from orchestrator.credit.advantages import demonstrated_by_siblings
from orchestrator.data.teacher_prompts import SAMPLED, fields_of
from orchestrator.losses.distillation import TEACHER_TOP_K, distil_samples_top_k
from orchestrator.losses.reduce import row_mean_of_token_means
from orchestrator.losses.sampled_distillation import by_sampled_tokens
from orchestrator.methods.option_types import Count, Positive, Several, Share
from orchestrator.pipeline import (
    DataKind,
    Pipeline,
    Prompts,
    Stage,
    behind_teacher_prompts,
    credit,
    generate,
    infer,
    infer_top_k,
    mix,
    score,
    update,
)

Weights = Literal["live", "ema", "base"]
Rate = Annotated[float, Field(gt=0, le=1)]

SHOWN_A_SIBLING = "{prompt}\n\nA correct answer:\n{demonstration}\n\nAnswer the question yourself."


def sdft(
    *,
    teacher_template: str = "{prompt}\n\n{privileged_context}",
    teacher: Weights = "ema",
    teacher_update_rate: Rate = 0.05,
    teacher_top_k: Count | None = 100,
    beta: Share = 0.0,
    importance_clip: Positive | None = 2.0,
) -> Pipeline:
    """Self-distillation fine-tuning: the policy answers, and learns what it would have said if it had been shown what
    the data knows of the prompt.

    Source: arXiv:2601.19897."""
    if f"{{{SAMPLED}}}" in teacher_template:
        raise ConfigError(
            f"options.teacher_template={teacher_template!r}: {{{SAMPLED}}} is a completion that sdpo samples; name "
            "columns of the data"
        )
    learn = _learn(teacher, teacher_update_rate, teacher_top_k, beta, importance_clip)
    return Pipeline(_data(teacher_template), generate("rollout"), *learn)


def sdpo(
    *,
    num_generations: Several = 8,
    success_threshold: float = 1.0,
    teacher_template: str = SHOWN_A_SIBLING,
    teacher: Weights = "ema",
    teacher_update_rate: Rate = 0.05,
    teacher_top_k: Count | None = 100,
    beta: Share = 0.5,
    importance_clip: Positive | None = 2.0,
) -> Pipeline:
    """Self-distillation policy optimisation: of several answers, the policy learns what it would have said if it had
    been shown another one of them that is right.

    Source: arXiv:2601.20802."""
    if f"{{{SAMPLED}}}" not in teacher_template:
        raise ConfigError(f"options.teacher_template={teacher_template!r} lacks {{{SAMPLED}}}, where the answer goes")
    learn = _learn(teacher, teacher_update_rate, teacher_top_k, beta, importance_clip, demonstrated=True)
    return Pipeline(
        _data(teacher_template),
        generate("rollout", n=num_generations),
        score("reward"),
        credit(demonstrated_by_siblings, threshold=success_threshold),
        *learn,
    )


def _data(template: str) -> DataKind:
    fields_of(template)
    return Prompts.with_teacher_prompts(template)


def _learn(
    teacher: Weights,
    rate: float,
    top_k: int | None,
    beta: float,
    importance_clip: float | None,
    *,
    demonstrated: bool = False,
) -> tuple[Stage, ...]:
    """From the policy itself, from the weights that it began with, or from their moving average."""
    role = "policy" if teacher == "live" else "reference"
    options: dict[str, Any] = {"importance_clip": importance_clip}
    if top_k is None:
        asked, loss = infer(role, into="teacher_logps"), by_sampled_tokens
    else:
        asked, loss = infer_top_k(role, into=TEACHER_TOP_K, k=top_k, temperature=None), distil_samples_top_k
        options |= {"beta": beta, "temperature": None}
    return (
        behind_teacher_prompts(asked, demonstrated=demonstrated),
        update("policy", loss, reduce=row_mean_of_token_means, **options),
        *((mix(role, "policy", share=rate, every=1),) if teacher == "ema" else ()),
    )

"""How a student learns from the distributions of a teacher, for every method that distils."""

from __future__ import annotations

from typing import Any

from orchestrator.losses.distillation import TEACHER_TOP_K, distil, distil_top_k
from orchestrator.losses.reduce import token_mean
from orchestrator.pipeline import Stage, infer_top_k, update


def from_teacher(
    *, beta: float, top_k: int | None, temperature: float | None, token_metrics: bool = False
) -> tuple[Stage, ...]:
    """Without `top_k` from a companion, a teacher in the student's ranks; with it from a teacher in processes of its
    own, of any size, of whose distribution k tokens go over the wire. `temperature`: None for that of sampling."""
    options: dict[str, Any] = {"beta": beta, "temperature": temperature, "token_metrics": token_metrics}
    if top_k is None:
        return (update("policy", distil, reduce=token_mean, companion="teacher", **options),)
    return (
        infer_top_k("teacher", into=TEACHER_TOP_K, k=top_k, temperature=temperature),
        update("policy", distil_top_k, reduce=token_mean, **options),
    )

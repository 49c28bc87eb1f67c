"""Distillation: train a student to match a teacher's distribution at every token.

What compares two distributions is given logits [n, V] of a chunk of tokens at a time (`actors/distributions.py`); the
losses see the result, one number per token.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from actors.objective import Stat
from orchestrator.losses.declare import Loss, compares
from orchestrator.losses.views import Distilled


def jensen_shannon(logits: Tensor, teacher_logits: Tensor, *, beta: float, temperature: float = 1.0) -> Tensor:
    """[n], nats: the generalised Jensen-Shannon divergence of softmaxes at a temperature.

    `beta=0` is KL(teacher || student), `beta=1` KL(student || teacher), and between them both are compared with their
    mixture `(1 - beta) student + beta teacher`. Source: arXiv:2306.13649, eq. 1 and section 3.
    """
    scale = 1 / temperature
    return _divergence(
        torch.log_softmax(logits * scale, dim=-1), torch.log_softmax(teacher_logits * scale, dim=-1), beta
    )


def _divergence(student: Tensor, teacher: Tensor, beta: float) -> Tensor:
    if beta == 0:
        return _kl(teacher, student)
    if beta == 1:
        return _kl(student, teacher)
    mixture = torch.logaddexp(student + math.log1p(-beta), teacher + math.log(beta))
    return beta * _kl(teacher, mixture) + (1 - beta) * _kl(student, mixture)


def _kl(of: Tensor, to: Tensor) -> Tensor:
    return (of.exp() * (of - to)).sum(-1)


@compares(jensen_shannon, companion=True)
def distil(tokens: Distilled, *, beta: float = 0.5, temperature: float = 1.0) -> Loss:
    """[T]: `jensen_shannon` of the student and the teacher that lives beside it.

    Source: arXiv:2306.13649, eq. 2.
    """
    return tokens.divergence, _metrics(tokens)


def _metrics(tokens: Distilled) -> dict[str, Stat]:
    return {"divergence": tokens.token_stat(tokens.divergence), "nll": tokens.token_stat(-tokens.logps)}

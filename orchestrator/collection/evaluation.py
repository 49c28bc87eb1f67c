"""Held-out evaluation: greedy completions of prompts that are never trained on, scored by the run's rewards; and a
phase's own loss and metrics on rows that are never trained on."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Any

import numpy as np

from actors.errors import DataFailure, RunError
from orchestrator.executor import Roles
from rewards.worker import ScoreResult
from rollout.sampling import Request, Sampling


@dataclass(frozen=True)
class Evaluation:
    """`score`: mean of the weighted reward over scorable prompts; `metrics` by reward and length."""

    score: float
    prompts: int
    metrics: dict[str, float]


async def evaluate(source: Any, roles: Roles, sampling: Sampling, *, label: str) -> Evaluation:
    """Score every prompt of `source` once. A prompt whose completion fails for good is counted, not scored as zero."""

    async def one(index: int) -> tuple[int, ScoreResult] | None:
        prompt = source.item(index)
        request = Request(f"eval/{label}/{index}", prompt.tokens, 1, sampling, seed=index, group=index)
        try:
            meta, tokens = await roles.generate(request)
            return (meta.lengths[0], await roles.score(prompt, tokens)) if meta.lengths else None
        except DataFailure:
            return None

    results = await asyncio.gather(*(one(index) for index in range(len(source))))
    done = [result for result in results if result is not None]
    if not done:
        raise RunError(f"evaluation {label}: all {len(results)} prompts failed")
    totals = np.array([score.total[0] for _, score in done], dtype=np.float64)
    metrics = {
        "eval_reward": float(np.nanmean(totals)),
        "eval_completions/mean_length": float(np.mean([n for n, _ in done])),
    }
    for column, name in enumerate(done[0][1].names):
        values = np.array([score.rewards[0, column] for _, score in done], dtype=np.float64)
        metrics[f"eval_rewards/{name}/mean"] = float(np.nanmean(values)) if not np.isnan(values).all() else float("nan")
    metrics["eval_failed"] = float(len(results) - len(done))
    return Evaluation(metrics["eval_reward"], len(done), metrics)


async def evaluate_rows(source: Any, roles: Roles) -> dict[str, float]:
    """`eval_loss` and the other metrics that a step reports, of all held-out rows as one batch: no number depends on
    how many rows a batch has."""
    batch = await asyncio.to_thread(source.batch, range(len(source)))
    return {f"eval_{name}": value for name, value in (await roles.evaluate(batch)).items()}


def greedy(sampling: Sampling, max_tokens: int | None) -> Sampling:
    """The same limits and stop conditions without randomness."""
    return Sampling(max_tokens or sampling.max_tokens, 0.0, stop=sampling.stop, stop_token_ids=sampling.stop_token_ids)

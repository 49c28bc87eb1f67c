"""Held-out evaluation: greedy completions of prompts that are never trained on, scored by the run's rewards; and a
phase's own loss and metrics on rows that are never trained on.

An evaluation never ends a run: it comes after the checkpoint of its step, and if it fails, a warning is printed and its
number is missing."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from actors.errors import DataFailure, InfraFailure, RunError
from actors.worker import all_or_first_error
from orchestrator.batches.row_table import RowTable
from orchestrator.batches.split_episodes import whole_episodes
from orchestrator.cluster.failures import Watchdog
from orchestrator.collection.scoring import ToScore
from orchestrator.config.roles import RolesConfig
from orchestrator.driver import Progress
from orchestrator.executor import Executor
from orchestrator.pipeline import Stage, generate
from orchestrator.planning.prepared import PreparedPhase
from orchestrator.reporting.console import Console
from orchestrator.reporting.metrics import METRICS_FILE, MetricsLog, read
from orchestrator.reporting.rollout_metrics import episode_metrics
from rewards.worker import ScoreResult
from rollout.sampling import GroupMeta, Sampling


@dataclass
class Evaluations:
    """All evaluations of a run. `scores`: mean rewards of held-out prompts by label, `before` and one per phase."""

    folder: Path
    log: MetricsLog
    console: Console
    watchdog: Watchdog
    event: Callable[[str, dict[str, Any]], None]
    settings: RolesConfig
    scores: dict[str, float] = field(default_factory=dict[str, float])

    async def at(self, phase: PreparedPhase, roles: Executor, progress: Progress) -> None:
        """Measure what the configuration wants at this step, unless the run's metrics have it already: from before it
        was resumed. Where a phase begins, prompts may have been answered already: at the end of the one before."""
        if not is_due(phase, progress.step):
            return
        total = phase.first_version + progress.step
        at_start, at_end = progress.step == 0, progress.step == phase.steps
        metrics = self._recorded(total, phase.name)
        if not metrics:
            label = phase.name if at_end else f"{phase.name}@{progress.step}"
            if phase.held_out is not None:
                metrics |= await self._unless_it_fails(label, self._rows(phase, roles, label))
            if phase.evaluation is not None and not (at_start and self.scores):
                label = "before" if at_start else label
                metrics |= await self._unless_it_fails(label, self._prompts(phase, roles, label, progress))
            if metrics:
                self.log.write(total, phase.name, metrics)
        score = metrics.get("eval_reward")
        if score is not None and (at_start or at_end):
            self.scores["before" if at_start else phase.name] = score

    def missing(self, phase: PreparedPhase) -> bool:
        """Whether the evaluation at the end of a phase is still to be made: its run ended before it, or it failed.
        If it was made, its score is known from here on."""
        recorded = self._recorded(phase.first_version + phase.steps, phase.name)
        if "eval_reward" in recorded:
            self.scores[phase.name] = recorded["eval_reward"]
        return is_due(phase, phase.steps) and not recorded

    def _recorded(self, total_step: int, phase: str) -> dict[str, Any]:
        lines = [
            line for line in read(self.folder / METRICS_FILE) if (line["step"], line["phase"]) == (total_step, phase)
        ]
        return {name: value for line in lines for name, value in line.items() if name.startswith("eval_")}

    async def _unless_it_fails(self, label: str, measuring: Coroutine[Any, Any, dict[str, float]]) -> dict[str, float]:
        """Turns any error, even a bug in a reward, into a warning; nothing is measured then."""
        try:
            return await measuring
        except Exception as error:
            why = f"{'' if isinstance(error, RunError) else type(error).__name__ + ': '}{error}"
            self.event("evaluation_failed", {"label": label, "why": why})
            self.console.warn(f"evaluation {label} failed, and its number is missing; training goes on: {why}")
            return {}

    async def _rows(self, phase: PreparedPhase, roles: Executor, label: str) -> dict[str, float]:
        with self.watchdog.waiting(f"evaluation {label} on held-out rows"):
            metrics = await evaluate_rows(phase.held_out, roles)
        self.console.held_out(label, metrics)
        return metrics

    async def _prompts(self, phase: PreparedPhase, roles: Executor, label: str, progress: Progress) -> dict[str, float]:
        """Held-out prompts, answered with the newest weights and scored."""
        assert phase.config.evaluation is not None
        async with roles.changing_weights():
            await roles.publish(progress.version)
        sampling = greedy(phase.sampling, phase.config.evaluation.max_tokens)
        engine = self.settings.engine_of(phase.pipeline.trained, phase.pipeline.roles)
        assert engine is not None, "the plan refuses what no engine samples from"
        with self.watchdog.waiting(lambda: None if roles.paused else f"evaluation {label}"):
            stage = _asking(engine, phase.config.environments)
            result = await evaluate(phase.evaluation, roles, stage, sampling, label=label)
        self.console.evaluation(label, result.score)
        failed = result.metrics["eval_failed"]
        if failed:
            self.console.warn(f"evaluation {label}: {failed:.0f} prompt(s) failed and are not in its mean")
        return result.metrics


def is_due(phase: PreparedPhase, step: int) -> bool:
    """Whether there is an evaluation after this step of the phase; 0: before the first."""
    evaluation = phase.config.evaluation
    if evaluation is None:
        return False
    if step == 0:
        return evaluation.at_start
    return step == phase.steps or (evaluation.every is not None and step % evaluation.every == 0)


@dataclass(frozen=True)
class Evaluation:
    """`score`: mean of the weighted reward over scorable prompts; `metrics` by reward and length."""

    score: float
    prompts: int
    metrics: dict[str, float]


def _asking(engine: str, environments: str | None) -> Stage:
    """One completion of each prompt, or one episode."""
    stage = generate(engine, n=1)
    return stage if environments is None else replace(stage, options={**stage.options, "episode": environments})


async def evaluate(source: Any, roles: Executor, stage: Stage, sampling: Sampling, *, label: str) -> Evaluation:
    """Score one completion of every prompt of `source`, sampled as the `generate` stage says. A prompt whose completion
    fails for good is counted, not scored as zero. Raises RunError if no prompt has a score."""

    async def one(index: int) -> tuple[GroupMeta, ScoreResult] | None:
        prompt, name = source.item(index), f"eval/{label}/{index}"
        try:
            samples = await stages.sampled(stage, prompt, name, sampling, index, index)
            if not samples.count:
                return None
            (meta,) = samples.metas
            episodes, _ = whole_episodes(samples.rows)
            scored = ToScore(name, index, prompt, episodes, samples.transcripts, meta.episodes)
            return meta, (await stages.score(scorers, scored)).result
        except (DataFailure, InfraFailure) as error:
            reasons.append(str(error))
            return None

    stages = roles.group_stages
    scorers = next(iter(stages.scorers))
    reasons: list[str] = []
    results = await all_or_first_error([one(index) for index in range(len(source))])
    done = [result for result in results if result is not None]
    if not done:
        raise RunError(f"all {len(results)} prompts failed, the last because: {''.join(reasons[-1:]) or 'no samples'}")
    totals = np.array([score.total[0] for _, score in done], dtype=np.float64)
    if np.isnan(totals).all():
        raise RunError(f"no reward had an opinion of any of {len(done)} completions")
    metrics = {
        "eval_reward": float(np.nanmean(totals)),
        "eval_completions/mean_length": float(np.mean([meta.lengths[0] for meta, _ in done])),
    }
    episodes = [facts for meta, _ in done for facts in meta.episodes]
    metrics |= {
        f"eval_{name}": value for name, value in episode_metrics(episodes, [m.lengths[0] for m, _ in done]).items()
    }
    for column, name in enumerate(done[0][1].names):
        values = np.array([score.rewards[0, column] for _, score in done], dtype=np.float64)
        metrics[f"eval_rewards/{name}/mean"] = float(np.nanmean(values)) if not np.isnan(values).all() else float("nan")
    metrics["eval_failed"] = float(len(results) - len(done))
    return Evaluation(metrics["eval_reward"], len(done), metrics)


async def evaluate_rows(source: Any, roles: Executor) -> dict[str, float]:
    """`eval_loss` and the other metrics that a step reports, of all held-out rows as one batch: no number depends on
    how many rows a batch has."""
    batch = await asyncio.to_thread(source.batch, range(len(source)))
    return {f"eval_{name}": value for name, value in (await roles.evaluate(RowTable(batch))).items()}


def greedy(sampling: Sampling, max_tokens: int | None) -> Sampling:
    """The same limits and stop conditions without randomness."""
    return Sampling(max_tokens or sampling.max_tokens, 0.0, stop=sampling.stop, stop_token_ids=sampling.stop_token_ids)

"""Rewards that do not go together, or with what a phase learns from. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from orchestrator.config.judges import JudgeConfig
from orchestrator.config.roles import EngineRole, RanksRole
from orchestrator.config.schema import PhaseConfig, RunConfig
from orchestrator.pipeline import Pipeline, Verb


def of_scoring_roles(config: RunConfig) -> Iterator[str]:
    """Roles that score have models, those that judge are engines."""
    for reward in config.rewards:
        for role in reward.role or ():
            settings = config.roles.get(role)
            if settings is not None and not isinstance(settings, RanksRole):
                yield f"rewards: {role} has no model to score with; name a role of kind trainer or frozen"
    for role in dict.fromkeys(judge.role for reward in config.rewards for judge in reward.judge or ()):
        yield from _of_judge(role, None if role is None else config.roles.get(role))


def of_learning(where: str, config: RunConfig, phase: PhaseConfig, pipeline: Pipeline) -> Iterator[str]:
    """The rewards are of the kind that the phase learns from."""
    if any(stage.verb is Verb.SCORE for stage in pipeline):
        yield from _of_preferences(where, config, phase, pipeline)
        yield from _of_steps(where, config, phase, pipeline)


def of_split_episodes(where: str, config: RunConfig, phase: PhaseConfig, pipeline: Pipeline) -> Iterator[str]:
    """With a row for each turn a sample is several rows, which not every stage can take."""
    if phase.episode is None or phase.episode.split != "turns":
        return
    split = f"{where}.episode.split=turns makes several rows of a sample, and"
    if any(stage.verb is Verb.REGROUP and "episode" not in stage.reads for stage in pipeline):
        yield f"{split} {phase.method} makes other rows of whole samples (pairs, say); leave one of them out"
    if any(stage.verb is Verb.REPLAY for stage in pipeline):
        yield f"{split} options.replay_buffer_size keeps groups of whole samples; leave out one of the two"
    if any(reward.steps == "each" for reward in config.rewards):
        yield f"{split} rewards with steps=each are those of one row; use steps=min, product, last or mean"


def _of_steps(where: str, config: RunConfig, phase: PhaseConfig, pipeline: Pipeline) -> Iterator[str]:
    """Rewards of steps are learned from, and there where a method needs them; a token has one."""
    given = [reward for reward in config.rewards if reward.steps == "each"]
    if len(given) > 1:
        yield f"rewards: {len(given)} of them have steps=each; one may, the others: min, product, last or mean"
    if given and not pipeline.takes_step_rewards:
        yield (
            f"rewards: steps=each rewards every step of an answer, and {phase.method} learns from one reward per "
            "answer; use steps=min, product, last or mean, or a method that learns from steps (docs/rewards.md)"
        )
    if pipeline.needs_step_rewards and not given:
        yield (
            f"{where}.options: {phase.method} is to learn from the rewards of steps, and no reward gives them; add "
            "{role: ROLE, steps: each} to rewards, ROLE being that of a process reward model"
        )


def _of_preferences(where: str, config: RunConfig, phase: PhaseConfig, pipeline: Pipeline) -> Iterator[str]:
    """What a judge prefers is a probability: nothing can be added to it."""
    judges = [reward for reward in config.rewards if reward.weight and any(map(_prefers, reward.judge or ()))]
    if not judges or not any("win_rate" in stage.reads for stage in pipeline):
        return
    others = [reward for reward in config.rewards if reward.weight and reward is not judges[0]]
    if others:
        yield (
            f"rewards: {phase.method} learns from what a pairwise judge prefers, and {len(others)} other rewards have "
            "a weight: a preference and a score do not add up; set the weight of one side to 0"
        )
    adjusts = (stage for stage in pipeline if stage.verb is Verb.REGROUP and "reward" in stage.writes)
    if any(adjusts):
        yield (
            f"{where}.options.missing_eos_penalty changes a reward, and {phase.method} learns from what a pairwise "
            "judge prefers instead; leave it out"
        )


def _prefers(judge: JudgeConfig) -> bool:
    return judge.kind == "pairwise" and judge.against is None


def _of_judge(role: str | None, settings: Any) -> Iterator[str]:
    if settings is None:
        return  # an endpoint; or a role that is not described, which is refused as such
    if not isinstance(settings, EngineRole):
        yield f"rewards: the judge {role} cannot be asked: roles.{role}.kind={settings.kind}, and it must be engine"
    elif settings.max_model_len is None:
        yield (
            f"roles.{role}.max_model_len is not set: what a judge is asked holds a prompt and two completions, and is "
            f"longer than what is sampled otherwise; set it, with room for the answer (4096, say)"
        )

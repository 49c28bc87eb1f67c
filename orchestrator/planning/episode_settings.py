"""How the episodes of a phase go, as its configuration says. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from orchestrator.config.roles import EnvironmentsRole
from orchestrator.config.schema import PhaseConfig
from rewards.environment_specs import EnvironmentSpec
from rollout.episode import Limits

FIRST_WORDS = 512  # tokens that the prompt may grow by what an environment and its tools say, if nothing else is said


@dataclass(frozen=True)
class EpisodeSettings:
    """`role`: of the environment workers."""

    phase: str
    role: str
    spec: EnvironmentSpec
    limits: Limits
    parser: str
    reward_weight: float
    max_answer_chars: int
    split: bool = False  # each turn is a row of its own

    @property
    def rewards(self) -> bool:
        """Whether an environment may reward; tools alone do not."""
        return bool(self.spec.environments)


def episode_settings(phase: PhaseConfig, name: str, role: EnvironmentsRole, prompt_tokens: int) -> EpisodeSettings:
    """Of a phase with episodes. `prompt_tokens`: the limit of a prompt if the configuration has none. The user's code
    is not looked for yet."""
    episode, hosts = phase.episode, phase.environments
    assert episode is not None and hosts is not None
    limits = Limits(
        turns=episode.max_turns,
        tokens=phase.sampling.max_tokens,
        prompt_tokens=episode.max_prompt_tokens or prompt_tokens,
        timeout_s=episode.timeout_s,
        call_timeout_s=role.timeout_s,
        turn_tokens=episode.max_turn_tokens,
    )
    spec = EnvironmentSpec.of(episode.tools, episode.environment, episode.factories, episode.options)
    return EpisodeSettings(
        name,
        hosts,
        spec,
        limits,
        episode.tool_parser,
        episode.reward_weight,
        episode.max_answer_chars,
        episode.split == "turns",
    )

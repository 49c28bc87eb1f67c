"""`troupe generate`: completions of the prompts of a data set, by any model."""

from __future__ import annotations

from collections.abc import Sequence

from orchestrator.completions.settings import (
    Settings,
    built,
    data_of,
    model_path,
    phase_tree,
    rewards_of,
    sampling_of,
)
from orchestrator.config.schema import RunConfig
from orchestrator.model_folders.found import Wanted
from orchestrator.result import RunResult
from orchestrator.run import run


def generate(
    model: str,
    data: str | None = None,
    overrides: Sequence[str] = (),
    *,
    samples: int = 1,
    split: str | None = None,
    rewards: Sequence[str] = (),
    scored: bool = False,
    recipe: str | None = None,
    phase: str | None = None,
    step: int | None = None,
    local: bool = False,
) -> RunResult:
    """Sample completions of each prompt of `data`, and write them as Parquet: `result.output`. What is interrupted is
    continued by `troupe resume RUN`. `model`: as `export` takes it; `step`: of a run, which checkpoint. `rewards`,
    `scored`: score them, by these or by the rewards of the recipe. The rest is as of `generation_config`."""
    config = generation_config(
        model,
        data,
        overrides,
        samples=samples,
        split=split,
        rewards=rewards,
        scored=scored,
        recipe=recipe,
        phase=phase,
        step=step,
    )
    return run(config, local=local)


def generation_config(
    model: str,
    data: str | None,
    overrides: Sequence[str] = (),
    *,
    samples: int = 1,
    split: str | None = None,
    rewards: Sequence[str] = (),
    scored: bool = False,
    recipe: str | None = None,
    phase: str | None = None,
    step: int | None = None,
) -> RunConfig:
    """The run that `generate` starts. Rewards, roles, sampling and, without `data`, the prompts are those of a `phase`
    of the recipe, or of the run that the model is of; `overrides` have the last word. Raises ConfigError."""
    settings = Settings.of(recipe, model)
    path = model_path(model, Wanted(step=step) if step is not None else None)
    tree, found = settings.tree(path), settings.phase(phase, evaluated=False)
    if rewards:
        tree["rewards"] = rewards_of(rewards)
    elif not scored:
        tree.pop("rewards", None)
    prompts = data_of(data, split)
    if data is None and found is not None:
        prompts = found.data.model_dump(mode="json", exclude_defaults=True)
    options = {"num_generations": samples, "scored": bool(rewards) or scored}
    return built("generate", tree, phase_tree(prompts, options, sampling_of(found)), overrides)

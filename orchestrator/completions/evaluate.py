"""`troupe evaluate`: what a model is worth at a task: prompts, rewards, samples, and the statistics of them.

generate n samples of each prompt ─► score ─► RUN/data/evaluate ─► pass@k, mean@n ─► RUN/evaluation.json
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from actors.errors import ConfigError, RunError
from orchestrator.completions.score import REWARD, Spread, records, spreads
from orchestrator.completions.settings import (
    Settings,
    built,
    data_of,
    greedy,
    model_path,
    phase_tree,
    rewards_of,
    sampling_of,
)
from orchestrator.completions.statistics import Estimate, measured
from orchestrator.config.loading import load_run
from orchestrator.config.schema import RunConfig
from orchestrator.data.parts import is_complete
from orchestrator.model_folders.found import Wanted
from orchestrator.planning.handover import written_folder
from orchestrator.run import run

NAME = "evaluate"  # of the run's only phase
RIGHT = 1.0  # a reward that counts as solved
REPORT = "evaluation.json"  # in the run's folder


@dataclass(frozen=True)
class Evaluation:
    """What was measured. `measures`: pass@k and mean@n by name; `rewards`: the spread of each reward over all samples;
    `unanswered`: prompts without a scored sample, which are in no measure."""

    run: Path
    model: str
    prompts: int
    unanswered: int
    samples: int
    threshold: float
    temperature: float
    measures: dict[str, Estimate]
    rewards: dict[str, Spread]

    def to_json(self) -> dict[str, Any]:
        return {
            "run": str(self.run),
            "model": self.model,
            "prompts": self.prompts,
            "unanswered": self.unanswered,
            "samples": self.samples,
            "threshold": self.threshold,
            "temperature": self.temperature,
            "measures": {name: estimate.to_json() for name, estimate in self.measures.items()},
            "rewards": {name: vars(spread) for name, spread in self.rewards.items()},
        }


def evaluate(
    model: str,
    overrides: Sequence[str] = (),
    *,
    ks: Sequence[int] = (1,),
    samples: int | None = None,
    threshold: float = RIGHT,
    data: str | None = None,
    split: str | None = None,
    rewards: Sequence[str] = (),
    recipe: str | None = None,
    phase: str | None = None,
    step: int | None = None,
    local: bool = False,
) -> Evaluation:
    """Sample completions of held-out prompts, score them, and measure: pass@k for each of `ks`, from `samples` of each
    prompt (default: the largest k), where a sample counts as right if its reward reaches `threshold`; and the mean
    reward. The task is that of a recipe, or of the run that the model is of: the prompts of its `evaluation.data`, its
    rewards and its sampling; one sample is drawn greedily, as during training, several at the task's temperature."""
    config = evaluation_config(
        model,
        overrides,
        ks=ks,
        samples=samples,
        data=data,
        split=split,
        rewards=rewards,
        recipe=recipe,
        phase=phase,
        step=step,
    )
    result = run(config, local=local)
    return report(result.folder, ks, threshold)


def evaluation_config(
    model: str,
    overrides: Sequence[str] = (),
    *,
    ks: Sequence[int] = (1,),
    samples: int | None = None,
    data: str | None = None,
    split: str | None = None,
    rewards: Sequence[str] = (),
    recipe: str | None = None,
    phase: str | None = None,
    step: int | None = None,
) -> RunConfig:
    """The run that `evaluate` starts. Raises ConfigError."""
    count = max(ks) if samples is None else samples
    _check_ks(ks, count)
    settings = Settings.of(recipe, model)
    found = settings.phase(phase, evaluated=data is None)
    prompts = data_of(data, split)
    sampling = sampling_of(found)
    if data is None:
        if found is None or found.evaluation is None or found.evaluation.data is None:
            raise ConfigError(
                f"there is no task: {model} is of no run with evaluation.data; name held-out prompts by --data, or a "
                "recipe or run that has some by --recipe"
            )
        prompts = found.evaluation.data.model_dump(mode="json", exclude_defaults=True)
        if found.evaluation.max_tokens is not None:
            sampling["max_tokens"] = found.evaluation.max_tokens
    tree = settings.tree(model_path(model, Wanted(step=step) if step is not None else None))
    if rewards:
        tree["rewards"] = rewards_of(rewards)
    sampling = sampling if count > 1 else greedy(sampling)
    return built(NAME, tree, phase_tree(prompts, {"num_generations": count}, sampling), overrides)


def report(folder: Path, ks: Sequence[int], threshold: float = RIGHT) -> Evaluation:
    """What an evaluation's run has measured, once it has ended; also written to its folder. Raises ConfigError if the
    folder is of no such run, RunError if nothing was scored."""
    config = load_run(folder)
    if tuple(config.phases) != (NAME,):
        raise ConfigError(f"{folder} is no run of `troupe {NAME}`")
    output = written_folder(folder, NAME)
    if not is_complete(output):
        raise ConfigError(f"{folder} has not ended: `troupe resume {folder}` continues it")
    settings = config.phases[NAME]
    samples = int(settings.options["num_generations"])
    _check_ks(ks, samples)
    by_prompt: dict[int, list[float | None]] = {}
    for row in records(output):
        by_prompt.setdefault(row["prompt_index"], []).append(row[REWARD])
    measures = measured(by_prompt, ks, samples=samples, threshold=threshold)
    if not measures:
        raise RunError(f"{output}: no sample of any prompt has a reward")
    answered = measures[f"mean@{samples}"].prompts
    prompts = _asked(folder)
    found = Evaluation(
        folder,
        config.model.path,
        prompts,
        prompts - answered,
        samples,
        threshold,
        settings.sampling.temperature,
        measures,
        spreads(output),
    )
    (folder / REPORT).write_text(json.dumps(found.to_json(), indent=2) + "\n")
    return found


def _check_ks(ks: Sequence[int], samples: int) -> None:
    if not ks or min(ks) < 1:
        raise ConfigError(f"-k {' -k '.join(map(str, ks)) or 'none'}: pass@k is of one sample at least")
    if samples < max(ks):
        raise ConfigError(
            f"-k {max(ks)} with --samples {samples}: pass@k needs k samples of each prompt; raise --samples"
        )


def _asked(folder: Path) -> int:
    """Prompts that the run asked: all of its data, once."""
    from orchestrator.checkpoint import CheckpointStore
    from orchestrator.collection.cursor import Cursor

    newest = CheckpointStore(folder / "checkpoints", keep=1).latest()
    if newest is None:
        raise ConfigError(f"{folder} has no checkpoint that can be used, so how many prompts it asked is not known")
    cursor = Cursor.from_json(newest.state.cursor)
    return cursor.frontier + len(cursor.beyond)

"""`troupe score`: the rewards of completions that a data set has already."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pyarrow import parquet

from orchestrator.completions.settings import Settings, built, data_of, phase_tree, rewards_of
from orchestrator.config.schema import RunConfig
from orchestrator.result import RunResult
from orchestrator.run import run

REWARD = "reward"  # the weighted sum; each of its parts is rewards/NAME


@dataclass(frozen=True)
class Spread:
    """Statistics of one reward over the completions that it scored. `silent`: how many it gave no score (None)."""

    mean: float | None
    standard_deviation: float | None
    least: float | None
    most: float | None
    count: int
    silent: int

    @classmethod
    def of(cls, values: Sequence[float | None]) -> Spread:
        known = [value for value in values if value is not None]
        silent = len(values) - len(known)
        if not known:
            return cls(None, None, None, None, 0, silent)
        deviation = statistics.stdev(known) if len(known) > 1 else None
        return cls(statistics.fmean(known), deviation, min(known), max(known), len(known), silent)


def score(
    data: str,
    overrides: Sequence[str] = (),
    *,
    rewards: Sequence[str] = (),
    recipe: str | None = None,
    split: str | None = None,
    model: str | None = None,
    local: bool = False,
) -> RunResult:
    """Score the completions of `data` (columns `prompt` and `completion`), and write them with the reward and each of
    its parts as Parquet: `result.output`. What is interrupted is continued by `troupe resume RUN`."""
    return run(scoring_config(data, overrides, rewards=rewards, recipe=recipe, split=split, model=model), local=local)


def scoring_config(
    data: str,
    overrides: Sequence[str] = (),
    *,
    rewards: Sequence[str] = (),
    recipe: str | None = None,
    split: str | None = None,
    model: str | None = None,
) -> RunConfig:
    """The run that `score` starts. Rewards and roles are those named by `rewards`, else those of the recipe. `model`:
    whose tokens rewards are given as `completion_ids`; without it bytes. Raises ConfigError."""
    from orchestrator.completions.settings import model_path

    tree = Settings.of(recipe).tree(None)
    if rewards:
        tree["rewards"] = rewards_of(rewards)
    tree["model"] = {} if model is None else {**tree.get("model", {}), "path": model_path(model)}
    prompts = {**data_of(data, split), "truncation": "error"}  # a row that is cut would be scored as another text
    return built("score", tree, phase_tree(prompts, {"keep": "data"}, {}, ahead=0), overrides)


def records(output: Path) -> Iterator[dict[str, Any]]:
    """The rows of a data set that a run made, in their order."""
    for part in sorted(output.glob("part-*.parquet")):
        yield from parquet.read_table(part).to_pylist()


def spreads(output: Path) -> dict[str, Spread]:
    """Of the total and of each reward, by name."""
    found: dict[str, list[float | None]] = {}
    for row in records(output):
        for name, value in row.items():
            if name == REWARD or name.startswith(f"{REWARD}s/"):
                found.setdefault(name, []).append(value)
    return {name: Spread.of(values) for name, values in found.items()}

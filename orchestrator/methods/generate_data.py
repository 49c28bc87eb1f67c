"""Data of the policy's own completions: nothing is trained."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

from actors.errors import ConfigError
from orchestrator.batches import records
from orchestrator.batches.regrouping import (
    Ties,
    accepted,
    best,
    best_and_worst,
    ended,
    first_against_others,
    labelled,
    last_turn,
    last_turn_over_first,
    statistical_rejection,
)
from orchestrator.methods.option_types import Count, Positive
from orchestrator.pipeline import (
    AnsweredPrompts,
    JudgedCompletions,
    Pipeline,
    Prompts,
    Stage,
    generate,
    regroup,
    score,
    take,
    when,
    write,
)

Keep = Literal[
    "all",
    "best",
    "accepted",
    "labelled",
    "best_and_worst",
    "statistical_rejection",
    "data_and_samples",
    "data",
    "last_turn",
    "last_turn_over_first",
]


def generate_data(
    *,
    num_generations: Count = 1,
    keep: Keep = "all",
    scored: bool = True,
    best_count: Count = 1,
    threshold: float | None = None,
    ties: Ties = "drop",
    rejection_beta: Positive = 0.5,
    accepted_count: Count = 8,
    drop_truncated: bool = False,
) -> Pipeline:
    """Make a data set: sample completions of each prompt, score them, and write those that are kept."""
    if keep == "data":
        return Pipeline(JudgedCompletions, take(), score("reward", parts=True), write(records.completions_with_rewards))
    if keep == "data_and_samples":
        ending = when(drop_truncated, regroup(ended))
        sources = (take(), generate("rollout", n=num_generations))
        return Pipeline(AnsweredPrompts, *sources, *ending, regroup(first_against_others), write(records.pairs))
    if keep in ("last_turn", "last_turn_over_first"):
        ending = (regroup(last_turn), write(records.completions))
        if keep == "last_turn_over_first":
            ending = (regroup(last_turn_over_first), write(records.pairs))
        return Pipeline(Prompts, generate("rollout", n=num_generations, turns=True), *ending)
    kept: dict[str, Callable[[], tuple[Stage, ...]]] = {
        "all": lambda: (write(records.completions_with_rewards if scored else records.completions),),
        "best": lambda: (regroup(best, count=best_count), write(records.scored_completions)),
        "accepted": lambda: (
            regroup(accepted, threshold=_given(threshold, keep)),
            write(records.scored_completions),
        ),
        "labelled": lambda: (
            regroup(labelled, threshold=_given(threshold, keep)),
            write(records.labelled_completions),
        ),
        "best_and_worst": lambda: (regroup(best_and_worst, rows=2, ties=ties), write(records.scored_pairs)),
        "statistical_rejection": lambda: (
            regroup(statistical_rejection, beta=rejection_beta, count=accepted_count),
            write(records.scored_pairs),
        ),
    }
    _refuse_too_few(num_generations, keep, best_count, accepted_count)
    return Pipeline(
        Prompts,
        generate("rollout", n=num_generations),
        *when(scored or keep != "all", score("reward", parts=keep == "all")),
        *when(drop_truncated, regroup(ended)),
        *kept[keep](),
    )


def _given(threshold: float | None, keep: str) -> float:
    if threshold is None:
        raise ConfigError(f"options.threshold is not set, and keep={keep} compares rewards with it; set it")
    return threshold


def _refuse_too_few(num_generations: int, keep: str, best_count: int, accepted_count: int) -> None:
    """Raises ConfigError for fewer samples of a prompt than are to be kept."""
    needed: dict[str, tuple[str, Any]] = {
        "best": ("options.best_count", best_count),
        "best_and_worst": ("options.keep=best_and_worst", 2),
        "statistical_rejection": ("options.accepted_count", accepted_count),
    }
    name, least = needed.get(keep, ("", 1))
    if num_generations < least:
        raise ConfigError(
            f"options.num_generations={num_generations}: {name} needs {least} samples of a prompt; raise it"
        )

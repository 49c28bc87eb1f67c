"""From what a process reward model says of each token to a reward of the answer, or of each of its steps.

    tokens    p p | 4 = 4 ⏎ | 2 + 2 ⏎ ⏎ | 8 eos        where steps end: the first separator after a step's text, and
    ends                  ^           ^     ^           the last token of an answer that ends without one
    σ(z)                 .9          .8    .5          the probability that the step is right
    reward    min .5, product .36, last .5, mean .73
    each      2.2, of which .9, .8 and .5 at the ends of the steps

Source: arXiv:2305.20050 (product and minimum); arXiv:2408.03314 (last); arXiv:2312.08935 (each step).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, cast

import numpy as np

from actors.batch import Array, Batch
from actors.errors import ConfigError, DataFailure
from actors.objective import Stat, World
from orchestrator.credit.advantages import credits

Aggregate = Literal["min", "product", "last", "mean", "each"]
AGGREGATES: Mapping[str, Callable[[Array], float]] = {
    "min": lambda steps: float(steps.min()),
    "product": lambda steps: float(steps.prod()),
    "last": lambda steps: float(steps[-1]),
    "mean": lambda steps: float(steps.mean()),
    "each": lambda steps: float(steps.sum()),
}


@dataclass(frozen=True)
class Steps:
    """How the steps of an answer are found and become one number; with `each`, they keep theirs. `separators`: tokens
    whose text has the separator in it; `special`: tokens that are no text."""

    aggregate: Aggregate
    separator: str
    separators: frozenset[int] = frozenset()
    special: frozenset[int] = frozenset()

    def found_in(self, tokenizer: Any) -> Steps:
        """The same, with the tokens of that tokenizer. Raises ConfigError if the separator is in none: it would never
        be seen."""
        special = frozenset(cast(list[int], tokenizer.all_special_ids))
        ids = [each for each in range(len(tokenizer)) if each not in special]
        texts: list[str] = tokenizer.batch_decode([[each] for each in ids])
        found = frozenset(each for each, text in zip(ids, texts, strict=True) if self.separator in text)
        if not found:
            raise ConfigError(
                f"rewards: step_separator={self.separator!r} is in none of the tokenizer's tokens; name a text that "
                "one token can hold, a line break for example"
            )
        return replace(self, separators=found, special=special)


@credits(reads={"tokens", "mask", "step_reward"}, writes={"reward"})
def reward_of_steps(batch: Batch, world: World, state: dict[str, Any], *, steps: Steps) -> tuple[dict[str, Array], Any]:
    """[B]: the probabilities that the steps of each row are right, as one number; NaN for a row without a step.
    `step_reward` holds the model's numbers. Raises DataFailure if one of them is not finite."""
    found = np.full(len(batch), np.nan, np.float32)
    ends, probabilities = _judged_steps(batch, steps)
    rows = batch.row_of_token[ends]
    for row in np.unique(rows):
        found[row] = AGGREGATES[steps.aggregate](probabilities[rows == row])
    metrics: dict[str, Stat] = {}
    return {"reward": found}, metrics


@credits(reads={"tokens", "mask", "step_reward"}, writes={"process_reward"})
def rewards_of_steps(
    batch: Batch, world: World, state: dict[str, Any], *, steps: Steps
) -> tuple[dict[str, Array], Any]:
    """[T]: at the last token of each step the probability that it is right, NaN elsewhere. Otherwise as
    `reward_of_steps`."""
    found = np.full(batch.num_tokens, np.nan, np.float32)
    ends, probabilities = _judged_steps(batch, steps)
    found[ends] = probabilities
    metrics: dict[str, Stat] = {}
    return {"process_reward": found}, metrics


def _judged_steps(batch: Batch, steps: Steps) -> tuple[Array, Array]:
    """[S] indices of the tokens at which steps end, and [S] float64 the probabilities that these are right."""
    ends = step_ends(batch, steps)
    scalars = batch["step_reward"][ends].astype(np.float64)
    if not np.isfinite(scalars).all():
        raise DataFailure("the process reward model gave numbers that are not finite")
    return ends, 1 / (1 + np.exp(-scalars.clip(-500, 500)))


def step_ends(batch: Batch, steps: Steps) -> Array:
    """[S] int64, ascending: indices of the tokens at which the steps of all rows end."""
    tokens, rows = batch["tokens"], batch.row_of_token
    written = np.flatnonzero(batch["mask"] & ~np.isin(tokens, list(steps.special)))
    separates = np.isin(tokens[written], list(steps.separators))
    row = rows[written]
    first_of_row = np.diff(row, prepend=-1) != 0
    last_of_row = np.diff(row, append=-1) != 0
    after_text = ~first_of_row & ~np.roll(separates, 1)
    return written[(separates & after_text) | (last_of_row & ~separates)]

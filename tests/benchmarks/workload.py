"""What both sides of a comparison train: which model, which rows in which order, how many of them per step.

Lengths are skewed as those of real data are: `max_length` x Beta(0.9, 2.1) tokens, prompt, completion and end of
sequence together, 30 % of the maximum on average. A character is a token of the generated models.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from orchestrator.data.synthetic_examples import model_folder, skewed

DISTILLING = ("gkd", "on_policy_distillation")  # from a teacher that is the model itself: as much to compute
SAMPLING = ("grpo", *DISTILLING)
METHODS = ("sft", "dpo", "kto", *SAMPLING)
SIZES = ("2.6m", "26m")
BATCHING = {"sft": ("plain", "packing", "group_by_length")}  # how TRL is asked to make batches; else plain
ROWS = 512  # of a data set
SEED = 0
Row = dict[str, Any]


@dataclass(frozen=True)
class Job:
    """One workload. `rows` are sequences per optimizer step: a pair is two, a prompt `samples`. `warmup` steps are run
    and not counted. Lengths are in tokens."""

    method: str
    size: str
    dtype: str
    rows: int = 16
    samples: int = 1
    batching: str = "plain"
    max_length: int = 256
    max_tokens: int = 96  # of a completion that is sampled
    beta: float = 0.1
    warmup: int = 2
    steps: int = 8
    threads: int = os.cpu_count() or 1

    @classmethod
    def of(cls, method: str, size: str, dtype: str, steps: int | None = None) -> Job:
        job = cls(method, size, dtype)
        if method == "grpo":
            prompts = 8 if size == "2.6m" else 4
            job = replace(job, rows=8 * prompts, samples=8, beta=0.04, warmup=1, steps=6)
        if method in DISTILLING:
            job = replace(job, rows=32, beta=0.5 if method == "gkd" else 1.0, warmup=1, steps=6)
        return job if steps is None else replace(job, steps=steps)

    @property
    def items(self) -> int:
        """Rows of the data set per step."""
        return self.rows // {"dpo": 2, "grpo": self.samples}.get(self.method, 1)

    @property
    def model(self) -> Path:
        return model_folder(f"skewed-{self.size}", SEED)

    def write(self, file: Path) -> None:
        """The data set, in the order in which it is trained on."""
        file.write_text("".join(json.dumps(row) + "\n" for row in self.data()))

    def data(self) -> list[Row]:
        rows = {"sft": completions, "dpo": pairs, "kto": labelled}
        return list(rows.get(self.method, prompts)(self.max_length))

    def tokens(self) -> list[int] | None:
        """Tokens of each counted step, those of completions that KTO borrows for its KL estimate not included; None
        where they are sampled."""
        if self.method in SAMPLING:
            return None
        lengths = [length_of(row) for row in self.data()]
        steps = range(self.warmup, self.warmup + self.steps)
        return [sum(lengths[i % ROWS] for i in range(step * self.items, (step + 1) * self.items)) for step in steps]


def completions(max_length: int) -> Iterator[Row]:
    texts = skewed(seed=SEED, split="train", rows=ROWS, max_length=max_length)
    for prompt, completion in zip(texts["prompt"], texts["completion"], strict=True):
        yield {"prompt": prompt, "completion": completion}


def prompts(max_length: int) -> Iterator[Row]:
    return ({"prompt": row["prompt"]} for row in completions(max_length))


def labelled(max_length: int) -> Iterator[Row]:
    """Every other row is desirable."""
    for index, row in enumerate(completions(max_length)):
        yield {**row, "label": index % 2 == 0}


def pairs(max_length: int) -> Iterator[Row]:
    """Chosen and rejected have lengths of their own, each skewed; a quarter of the shorter one is their prompt."""
    rng = np.random.default_rng(SEED)
    for _ in range(ROWS):
        totals = np.clip(np.rint(max_length * rng.beta(0.9, 2.1, 2)), 4, max_length).astype(int)
        prompt = max(1, int(totals.min()) // 4)
        chosen, rejected = (_letters(rng, total - prompt - 1) for total in totals)
        yield {"prompt": _letters(rng, prompt), "chosen": chosen, "rejected": rejected}


def length_of(row: Row) -> int:
    """Tokens of a row as it is trained on: with each completion go its prompt and an end-of-sequence token."""
    answers = [row[name] for name in ("completion", "chosen", "rejected") if name in row]
    return sum(len(row["prompt"]) + len(answer) + 1 for answer in answers)


def _letters(rng: np.random.Generator, count: int) -> str:
    return "".join(map(chr, rng.integers(ord("a"), ord("z") + 1, count)))

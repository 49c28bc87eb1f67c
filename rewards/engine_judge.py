"""Judges that are engine roles of the run: the questions as tokens of the role's model, and its answers as text.

    driver ── questions(samples) ──► this worker: texts of the completions ─► questions ─► tokens
    driver ── generate ────────────► engines of the role, whose answers stay in the object store
    driver ── judged(samples, answers) ──► this worker: answers ─► text ─► values

The questions pass through the driver, as prompts do; completions and answers do not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from actors.batch import Array, Batch
from rewards.calls import Log, Samples
from rewards.judge import Judge, JudgeSpec


@dataclass(frozen=True)
class Question:
    """What an engine role is asked, `judgements` times."""

    role: str
    tokens: tuple[int, ...]
    judgements: int
    max_tokens: int
    temperature: float


class EngineJudges:
    """The judges by name; `tokenizers` by engine role."""

    def __init__(self, specs: Sequence[JudgeSpec], tokenizers: Mapping[str, Any]) -> None:
        self._specs = {spec.label: spec for spec in specs}
        self._tokenizers = tokenizers

    def questions(self, name: str, samples: Samples) -> list[Question]:
        """In the order in which `judged` wants the answers."""
        return [self._question(judge, text) for judge, text in self._texts(name, samples)]

    def judged(self, name: str, samples: Samples, answers: Sequence[Batch]) -> tuple[Array, Log]:
        """([n] float32, NaN for no opinion; what is logged of it). `answers`: those to each question."""
        spec = self._specs[name]
        plans = spec.plans(samples)
        found: list[dict[str, list[str]]] = [{} for _ in plans]
        batches = iter(answers)
        for place, (judge, plan) in enumerate(zip(spec.judges, plans, strict=True)):
            for text in plan.questions:
                found[place][text] = self._read(judge, next(batches))
        return spec.scored(plans, found)

    def _texts(self, name: str, samples: Samples) -> list[tuple[Judge, str]]:
        spec = self._specs[name]
        plans = zip(spec.judges, spec.plans(samples), strict=True)
        return [(judge, text) for judge, plan in plans for text in plan.questions]

    def _question(self, judge: Judge, text: str) -> Question:
        assert judge.role is not None
        tokenizer, template = self._tokenizers[judge.role], True
        if tokenizer.chat_template is not None:
            message = [{"role": "user", "content": text}]
            text = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
            template = False  # it writes the special tokens that it wants
        tokens = tuple(tokenizer(text, add_special_tokens=template)["input_ids"])
        return Question(judge.role, tokens, judge.judgements, judge.max_tokens, judge.temperature)

    def _read(self, judge: Judge, answers: Batch) -> list[str]:
        assert judge.role is not None
        ids = [answers.row("tokens", row)[np.asarray(answers.row("mask", row))].tolist() for row in range(len(answers))]
        return self._tokenizers[judge.role].batch_decode(ids, skip_special_tokens=True)

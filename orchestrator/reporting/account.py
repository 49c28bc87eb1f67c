"""The costs of a run: steps and tokens by phase, the driver's seconds by activity. No second is counted twice."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

from orchestrator.pipeline import Pipeline, Verb
from orchestrator.reporting.metrics import of_first_role

WORK = ("start", "data", "generation", "scoring", "log-probabilities", "update", "publish", "evaluation", "save")
OF_VERB = {Verb.INFER: "log-probabilities", Verb.UPDATE: "update"}


@dataclass(frozen=True)
class PhaseCost:
    """Costs of one phase, in this process."""

    steps: int = 0
    tokens: int = 0


@dataclass
class Account:
    """Costs of one process. Time without a named activity is the `rest`."""

    phases: dict[str, PhaseCost] = field(default_factory=dict[str, PhaseCost])
    seconds: dict[str, float] = field(default_factory=dict[str, float])

    def spend(self, on: str, seconds: float) -> None:
        assert on in WORK, on
        self.seconds[on] = self.seconds.get(on, 0.0) + seconds

    @contextmanager
    def spending(self, on: str) -> Iterator[None]:
        began = time.perf_counter()
        try:
            yield
        finally:
            self.spend(on, time.perf_counter() - began)

    def step(self, phase: str, pipeline: Pipeline, metrics: Mapping[str, float]) -> None:
        """`metrics`: of a step, with its parts as `time/...`. Collecting is the driver's waiting time; it is divided in
        proportion to the times of generation, scoring and the stages after them, which may lie in an earlier step."""
        cost = self.phases.get(phase, PhaseCost())
        self.phases[phase] = PhaseCost(cost.steps + 1, cost.tokens + int(of_first_role(metrics, "num_tokens") or 0))
        waited = metrics.get("time/collect", 0.0)
        parts = {
            "generation": metrics.get("time/generate", 0.0),
            "scoring": max(0.0, metrics.get("time/score", 0.0)),
            "log-probabilities": metrics.get("time/batch_stages", 0.0),
        }
        whole = sum(parts.values())
        for on, part in parts.items():
            if whole > 0 and pipeline.generates:
                self.spend(on, waited * part / whole)
        if not (whole > 0 and pipeline.generates):
            self.spend("data", waited)
        for stage in pipeline.learn:
            if stage.verb in OF_VERB:
                self.spend(OF_VERB[stage.verb], metrics.get(f"time/{stage.name}", 0.0))
        self.spend("publish", metrics.get("time/publish", 0.0))

    def shares(self, whole: float) -> dict[str, float]:
        """Seconds by activity, in the order of a run; with the rest they add up to `whole`."""
        named = {on: self.seconds[on] for on in WORK if self.seconds.get(on, 0.0) > 0}
        return {**named, "rest": max(0.0, whole - sum(named.values()))}

"""Which stages of a pipeline are at work, as the driver sees it: for `troupe status` and the page. Pure.

    executor ── working(stage) around each call ──► Activity ── observed(), every second ──► RUN/status.json

A step may be much shorter than the time between two looks. So a look tells, besides the calls that are under way, for
which share of the time since the last look a stage was at work.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from orchestrator.pipeline import GROUPWISE, Pipeline, Stage, Verb

PUBLISH = "publish"  # what happens in each step beside the stages, where anything is sampled
LEAST_SHARE = 0.005  # of the time between two looks, for a stage that is not at work now to be named


@dataclass
class _Node:
    calls: int = 0
    since: float = 0.0  # when it was last counted as busy
    busy_s: float = 0.0  # since the last look, until `since`

    def count(self, now: float) -> None:
        self.busy_s += now - self.since if self.calls else 0.0
        self.since = now


class Activity:
    """Used from one event loop. `phase`: the one whose stages these are."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._now, self._nodes, self._looked = clock, dict[tuple[str, tuple[str, ...]], _Node](), clock()
        self.phase: str | None = None

    @contextmanager
    def working(self, on: Stage | str) -> Iterator[None]:
        """A call of a stage, or of what else happens in a phase, lasts as long as the block."""
        node = self._nodes.setdefault(_key(on), _Node())
        node.count(self._now())
        node.calls += 1
        try:
            yield
        finally:
            node.count(self._now())
            node.calls -= 1

    def observed(self) -> list[dict[str, Any]]:
        """What is at work, or was since the last call of this: `stage`, `writes`, the `calls` under way, and the
        `share` of that time, in [0, 1]."""
        now = self._now()
        since, self._looked = max(now - self._looked, 1e-9), now
        found: list[dict[str, Any]] = []
        for (name, writes), node in self._nodes.items():
            node.count(now)
            share, node.busy_s = min(1.0, node.busy_s / since), 0.0
            if node.calls or share >= LEAST_SHARE:
                found.append({"stage": name, "writes": list(writes), "calls": node.calls, "share": round(share, 3)})
        return found


def drawn(pipelines: Mapping[str, Pipeline]) -> dict[str, list[dict[str, Any]]]:
    """For each phase its stages in order, to be drawn: with `stage` and `writes` as in `observed`; `per`: what a call
    is for (`group`, `batch`, or the whole `data`, before the first step); `ahead`: whether it may run ahead of
    training."""
    return {phase: _drawn(pipeline) for phase, pipeline in pipelines.items()}


def _drawn(pipeline: Pipeline) -> list[dict[str, Any]]:
    ahead = {id(stage) for stage in pipeline.collect}
    nodes = [{**_named(stage), "per": _unit(stage), "ahead": id(stage) in ahead} for stage in pipeline]
    if pipeline.trained and pipeline.generates:
        nodes.append({**_named(PUBLISH), "per": "batch", "ahead": False})
    return nodes


def _unit(stage: Stage) -> str:
    return "data" if stage.precomputed else "group" if stage.verb in GROUPWISE else "batch"


def _named(on: Stage | str) -> dict[str, Any]:
    name, writes = _key(on)
    return {"stage": name, "writes": list(writes)}


def _key(on: Stage | str) -> tuple[str, tuple[str, ...]]:
    """Two `infer` stages of one role are told apart by what they write. The place in the pipeline would not do: a phase
    leaves out what was computed before its first step."""
    if isinstance(on, str):
        return on, ()
    return on.name, tuple(sorted(on.writes)) if on.verb is Verb.INFER else ()

"""What `service_load.py` sees in its windows of time, and its tables."""

from __future__ import annotations

import itertools
import statistics
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console
from rich.table import Table

WINDOWS = ("reads", "chats", "both")


@dataclass
class Seen:
    """What the client saw in one window. Seconds; `errors`: what was wrong, counted."""

    latencies: dict[str, list[float]] = field(default_factory=dict[str, list[float]])
    errors: Counter[str] = field(default_factory=Counter[str])

    def add(self, kind: str, seconds: float) -> None:
        self.latencies.setdefault(kind, []).append(seconds)

    def merge(self, other: Seen) -> None:
        for kind, seconds in other.latencies.items():
            self.latencies.setdefault(kind, []).extend(seconds)
        self.errors.update(other.errors)


@dataclass
class Window:
    kind: str
    began: float
    ended: float
    service_cores: float
    client_cores: float
    step_s: float = float("nan")


def ratio(windows: list[Window], kind: str) -> list[float]:
    """Of each loaded window: its step time over the mean of the quiet windows before and after it."""
    return [
        each.step_s / statistics.mean([windows[index - 1].step_s, windows[index + 1].step_s])
        for index, each in enumerate(windows)
        if each.kind == kind
    ]


def report(windows: list[Window], seen: dict[str, Seen], ratios: dict[str, list[float]]) -> list[dict[str, Any]]:
    return [
        {
            "load": kind,
            "step_time_ratio": round(statistics.median(ratios[kind]), 4),
            "ratios": [round(each, 4) for each in ratios[kind]],
            "step_s": [round(each.step_s, 4) for each in windows if each.kind == kind],
            "quiet_step_s": [round(each.step_s, 4) for each in windows if each.kind == "quiet"],
            "errors": dict(found.errors),
            "latency_ms": {name: _percentiles(values) for name, values in _grouped(found).items()},
            "service_cores": round(statistics.mean(each.service_cores for each in windows if each.kind == kind), 3),
            "client_cores": round(statistics.mean(each.client_cores for each in windows if each.kind == kind), 3),
        }
        for kind, found in seen.items()
        if ratios[kind]
    ]


def show(windows: list[Window], seen: dict[str, Seen], ratios: dict[str, list[float]], seconds: float) -> None:
    """`seconds`: that all windows of one kind took together."""
    console = Console(width=120)
    table = Table("window", "s a step", "service, cores", "client, cores", title="windows")
    for each in windows:
        table.add_row(each.kind, f"{each.step_s:.3f}", f"{each.service_cores:.3f}", f"{each.client_cores:.3f}")
    console.print(table)
    for kind, found in seen.items():
        if not ratios[kind]:
            continue
        count = sum(len(values) for name, values in found.latencies.items() if not name.startswith("chat"))
        title = (
            f"{kind}: step time x{statistics.median(ratios[kind]):.3f} ({', '.join(f'{r:.3f}' for r in ratios[kind])})"
        )
        table = Table("", "n", "p50 ms", "p95", "p99", "max", title=f"{title}, {count / seconds:.0f} reads a second")
        for name, values in (
            *_grouped(found).items(),
            *((n, v) for n, v in sorted(found.latencies.items()) if len(n) and n[0] == "/"),
        ):
            table.add_row(name, str(len(values)), *(f"{ms:.1f}" for ms in _percentiles(values)))
        console.print(table)
        console.print(f"errors: {dict(found.errors) or 'none'}")


def _grouped(found: Seen) -> dict[str, list[float]]:
    """All read routes together, and what was seen of chats."""
    together = list(itertools.chain(*(values for name, values in found.latencies.items() if name.startswith("/"))))
    chats = {name: values for name, values in found.latencies.items() if name.startswith("chat")}
    return {**({"reads": together} if together else {}), **chats}


def _percentiles(seconds: list[float]) -> list[float]:
    """p50, p95, p99 and the largest, in ms."""
    ordered = sorted(seconds)
    ranks = [min(len(ordered) - 1, int(len(ordered) * share)) for share in (0.5, 0.95, 0.99)]
    return [round(1000 * value, 2) for value in (*(ordered[rank] for rank in ranks), ordered[-1])]

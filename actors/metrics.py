"""Counts and metrics of micro-batches, combined over micro-batches and ranks. Collective, every function."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence

import torch

from actors.objective import Counts, Stat, World

_NOTHING = {"mean": 0.0, "sum": 0.0, "min": math.inf, "max": -math.inf}


def sum_counts(counts: Sequence[Counts], world: World, device: torch.device) -> Counts:
    """Sums over micro-batches and ranks. All must have the same keys, and every rank at least one micro-batch."""
    names = sorted(counts[0]) if counts else []
    local = [sum(float(each[name]) for each in counts) for name in names]
    total = world.sum(torch.tensor(local, dtype=torch.float64, device=device))
    return dict(zip(names, total.tolist(), strict=True))


def combine(stats: Sequence[dict[str, Stat]], world: World, device: torch.device) -> dict[str, float]:
    """One value per metric, equal on all ranks. A mean over nothing is left out.

    Ranks may know different metrics (one whose micro-batches were all empty knows none), so the names are agreed first.
    """
    kinds = _agree({name: stat.combine for each in stats for name, stat in each.items()}, world, device)
    if not kinds:
        return {}
    local = torch.tensor([_over_micro_batches(name, kind, stats) for name, kind in kinds.items()], dtype=torch.float64)
    gathered = world.gather(local.flatten().to(device)).view(-1, len(kinds), 2).cpu()
    values = {name: _over_ranks(kind, gathered[:, index]) for index, (name, kind) in enumerate(kinds.items())}
    return {name: value for name, value in values.items() if value is not None}


def _agree(kinds: dict[str, str], world: World, device: torch.device) -> dict[str, str]:
    """The union over ranks, in one order."""
    line = json.dumps(kinds).encode() + b"\n"
    lines = bytes(world.gather(torch.tensor(list(line), dtype=torch.uint8, device=device)).tolist()).splitlines()
    union: dict[str, str] = {}
    for each in lines:
        union.update(json.loads(each))
    return dict(sorted(union.items()))


def _over_micro_batches(name: str, kind: str, stats: Sequence[dict[str, Stat]]) -> tuple[float, float]:
    """(total, weight)."""
    found = [each[name] for each in stats if name in each]
    totals = [float(stat.total) for stat in found] or [_NOTHING[kind]]
    total = {"min": min, "max": max}.get(kind, sum)(totals)
    return total, sum(float(stat.weight) for stat in found)


def _over_ranks(kind: str, parts: torch.Tensor) -> float | None:
    """`parts` [ranks, 2] of (total, weight)."""
    totals, weights = parts[:, 0], parts[:, 1]
    if kind == "mean":
        return (totals.sum() / weights.sum()).item() if weights.sum() else None
    return getattr(torch, kind)(totals).item()

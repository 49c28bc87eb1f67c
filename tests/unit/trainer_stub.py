"""What a trainer does with an objective, without a model: outputs are given, ranks are threads.

Values and gradients come back whole, in the order of the rows that were given, however they were split.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from actors.columns import COLUMNS, Axis
from actors.objective import DIVERGENCE, MicroBatch, Objective, Outputs, Stat

Split = Sequence[Sequence[Sequence[int]]]  # ranks -> micro-batches -> rows


@dataclass(frozen=True)
class Rows:
    """A whole batch: its columns, and what a forward pass found. All per-token tensors are flat. `logps` is what the
    head says, whichever that is: [T], or with `per_row` scores [B]. For an objective that compares distributions,
    `extra` may have `logits` [T, V], and the companion's, from which the divergence is made."""

    micro: MicroBatch
    logps: Tensor
    extra: Mapping[str, Tensor] = field(default_factory=dict)
    per_row: bool = False

    def __len__(self) -> int:
        return len(self.micro)

    def token_index(self, rows: Sequence[int]) -> Tensor:
        offsets = self.micro.offsets.tolist()
        spans = [torch.arange(offsets[row], offsets[row + 1]) for row in rows]
        return torch.cat(spans) if spans else torch.zeros(0, dtype=torch.int64)

    def select(self, rows: Sequence[int]) -> Rows:
        """Those rows in that order; the parts stay connected to this batch's log-probabilities and extras."""
        index, tokens = torch.tensor(list(rows), dtype=torch.int64), self.token_index(rows)
        columns = {
            name: values[tokens] if COLUMNS[name].axis is Axis.TOKEN else values[index]
            for name, values in self.micro.columns.items()
        }
        extra = {name: values[tokens] for name, values in self.extra.items()}
        said = self.logps[index if self.per_row else tokens]
        return Rows(MicroBatch(self.micro.lengths[index], columns), said, extra, self.per_row)


@dataclass(frozen=True)
class Result:
    """The batch's loss, its gradient with respect to the log-probabilities [T] and extras, and metrics of rank 0."""

    value: float
    gradient: Tensor
    extra_gradients: dict[str, Tensor]
    metrics: dict[str, float]


class ThreadWorld:
    """`World` over threads of this process."""

    def __init__(self, rank: int, size: int, board: list[Any], barrier: threading.Barrier) -> None:
        self.rank, self.size = rank, size
        self._board, self._barrier = board, barrier

    def sum(self, values: Tensor) -> Tensor:
        return torch.stack(self._exchange(values)).sum(0)

    def gather(self, values: Tensor) -> Tensor:
        parts = [part for part in self._exchange(values) if len(part)]
        return torch.cat(parts) if parts else values

    def _exchange(self, values: Tensor) -> list[Tensor]:
        self._board[self.rank] = values
        self._barrier.wait()
        parts = list(self._board)
        self._barrier.wait()
        return parts


def optimise(
    objective: Objective, rows: Rows, split: Split | None = None, states: list[dict[str, Any]] | None = None
) -> Result:
    """One update's worth of loss and gradient. `split`: default one rank, one micro-batch."""
    split = [[range(len(rows))]] if split is None else split
    extra = {name: _leaf(values) for name, values in rows.extra.items()}
    leaf = Rows(rows.micro, _leaf(rows.logps), extra, rows.per_row)
    parts = learned_from(objective, leaf, split)
    counts = _counts(objective, parts)
    states = states if states is not None else [{} for _ in split]
    statistics = statistics_of(objective, seen_by_statistics(objective, leaf, split), states)
    value, stats = torch.zeros((), dtype=rows.logps.dtype), list[dict[str, Stat]]()
    for rank, found in zip(parts, statistics, strict=True):
        for part in filter(len, rank):  # an empty micro-batch moves through the model, but has no loss
            loss, metrics = objective.loss(part.micro, _outputs(objective, part), counts, found)
            value = value + loss
            stats.append(metrics)
    value.backward()
    gradients = {name: _gradient(values) for name, values in leaf.extra.items()}
    return Result(float(value.detach()), _gradient(leaf.logps), gradients, combined(stats))


def combined(stats: Sequence[Mapping[str, Stat]]) -> dict[str, float]:
    """Metrics over micro-batches and ranks."""
    found = {}
    for name in dict.fromkeys(name for each in stats for name in each):
        entries = [each[name] for each in stats if name in each]
        totals = [float(torch.as_tensor(stat.total).detach()) for stat in entries]
        weight = sum(float(stat.weight) for stat in entries)
        kinds = {"mean": sum(totals) / weight if weight else 0.0, "sum": sum(totals)}
        kinds |= {"max": max(totals), "min": min(totals)}
        found[name] = kinds[entries[0].combine]
    return found


def learned_from(objective: Objective, rows: Rows, split: Split) -> list[list[Rows]]:
    """The micro-batches of each rank, without the rows that the objective sets aside."""
    return _where(
        rows,
        split,
        torch.ones(len(rows)).bool() if objective.statistics_rows is None else ~rows.micro[objective.statistics_rows],
    )


def seen_by_statistics(objective: Objective, rows: Rows, split: Split) -> list[list[Rows]]:
    """The micro-batches of each rank, of all rows or of those that the objective sets aside."""
    return _where(
        rows,
        split,
        torch.ones(len(rows)).bool() if objective.statistics_rows is None else rows.micro[objective.statistics_rows],
    )


def _where(rows: Rows, split: Split, chosen: Tensor) -> list[list[Rows]]:
    return [[rows.select([row for row in members if chosen[row]]) for members in rank] for rank in split]


def _counts(objective: Objective, parts: list[list[Rows]]) -> dict[str, float]:
    each = [objective.counts(part.micro) for rank in parts for part in rank]
    return {name: sum(counts[name] for counts in each) for name in each[0]}


def statistics_of(objective: Objective, parts: list[list[Rows]], states: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Per rank, in threads, because it is collective. Empty micro-batches are left out, as a trainer does."""
    found: list[dict[str, Any]] = [{} for _ in parts]
    failures: list[BaseException] = []
    board, barrier = [None] * len(parts), threading.Barrier(len(parts), timeout=20)

    def work(rank: int) -> None:
        filled = [part for part in parts[rank] if len(part)]
        world = ThreadWorld(rank, len(parts), board, barrier)
        try:
            found[rank] = objective.statistics(
                [p.micro for p in filled], [_outputs(objective, p) for p in filled], world, states[rank]
            )
        except BaseException as error:
            failures.append(error)
            barrier.abort()

    if objective.coupled:
        threads = [threading.Thread(target=work, args=(rank,)) for rank in range(len(parts))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=30)
    if failures:
        raise failures[0]
    return found


def _outputs(objective: Objective, part: Rows) -> Outputs:
    asked = objective.of_logits
    if asked is None or "logits" not in part.extra:
        return Outputs(part.logps, part.extra)
    everything = torch.arange(len(part.extra["logits"]))
    predicted = (
        everything if "all_tokens" in objective.needs else everything[part.micro["mask"]]
    )  # as `actors.forward` does: nothing is computed of the others
    given = [part.extra["companion_logits"][predicted]] if asked.companion else []
    given += [part.micro[name][predicted] for name in asked.columns]
    found = asked.at(1.0)(part.extra["logits"][predicted], *given)
    everywhere = found.new_zeros(len(part.extra["logits"]), *found.shape[1:]).index_copy(0, predicted, found)
    return Outputs(part.logps, {**part.extra, DIVERGENCE: everywhere})


def _leaf(values: Tensor) -> Tensor:
    return values.detach().clone().requires_grad_(values.is_floating_point())


def _gradient(leaf: Tensor) -> Tensor:
    return torch.zeros_like(leaf) if leaf.grad is None else leaf.grad

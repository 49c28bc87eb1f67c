"""Prompt groups that taught much, kept to take the places of groups that teach nothing.

    batch ──► groups of one reward each leave ──► as many of the buffer's take their places ──► what is learned from
                groups with a spread ─────────────────────────────────────────────────────────► and into the buffer

A group in the buffer is its rows as they were sampled: the driver's table of them, and references to the blocks with
their tokens, which stay in the object store. A checkpoint has the buffer with its tokens, so that a run that is resumed
replays the same groups.
"""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from actors.batch import Array, Batch
from actors.errors import ConfigError
from actors.worker import Objects
from orchestrator.batches.row_table import RowTable
from orchestrator.credit.advantages import Scale, zscore_by_group

FILE = "replay.npz"  # in a checkpoint
FETCH_TIMEOUT_S = 120.0


@dataclass(frozen=True)
class Kept:
    """A group, how much it teaches, and the step that first trained on it."""

    score: float
    step: int
    rows: RowTable


@dataclass
class ReplayBuffer:
    """The `size` groups with the highest scores, the best first; of equal ones the newer."""

    size: int
    groups: list[Kept] = field(default_factory=list[Kept])

    def add(self, kept: Kept) -> None:
        self.groups = sorted([kept, *self.groups], key=lambda each: -each.score)[: self.size]

    def forget(self, before: int) -> None:
        """Drop groups that an earlier step than that trained on first."""
        self.groups = [each for each in self.groups if each.step >= before]

    def draw(self, count: int, seed: tuple[int, ...]) -> list[Kept]:
        """So many different groups, as far as there are, each as likely as its score is high; fixed by `seed`."""
        weights = np.array([each.score for each in self.groups])
        chosen = np.random.default_rng(seed).choice(
            len(weights), size=min(count, len(weights)), replace=False, p=weights / weights.sum()
        )
        return [self.groups[index] for index in chosen]


def replayed(
    table: RowTable, buffer: ReplayBuffer, *, step: int, seed: int, max_age: int, scale: Scale
) -> tuple[RowTable, dict[str, float]]:
    """The batch with groups of the buffer in the places of those whose rewards are all one, as far as the buffer has
    any; its other groups are in the buffer afterwards. A group's score is `Σ|A| std(r)`, over its scored samples."""
    groups, scores = group_scores(table, scale)
    dead = [group for group, score in zip(groups, scores, strict=True) if score <= 0]
    buffer.forget(before=step - max_age)
    drawn = buffer.draw(len(dead), (seed, step)) if dead and buffer.groups else []
    in_place = dict(zip(dead, drawn, strict=False))
    parts: list[RowTable] = []
    for group, score in zip(groups, scores, strict=True):
        own = table.select(np.flatnonzero(table["group"] == group))
        parts.append(in_place[group].rows if group in in_place else own)
        if score > 0:
            buffer.add(Kept(score, step, own))
    metrics = {
        "replay/groups_without_spread": float(len(dead)),
        "replay/groups_replaced": float(len(drawn)),
        "replay/buffer": float(len(buffer.groups)),
    }
    if drawn:
        metrics["replay/age"] = float(np.mean([step - each.step for each in drawn]))
    return RowTable.concat(parts), metrics


def group_scores(table: RowTable, scale: Scale) -> tuple[list[int], list[float]]:
    """The groups of a batch in order of appearance, and of each `Σ|A| std(r)`; 0 without a spread."""
    rewards, member = np.asarray(table["reward"], np.float64), table["group"]
    advantages = np.abs(zscore_by_group(rewards, member, scale=scale))
    groups = list(dict.fromkeys(member.tolist()))
    return groups, [_score(advantages[member == group], rewards[member == group]) for group in groups]


def _score(advantages: Array, rewards: Array) -> float:
    scored = rewards[~np.isnan(rewards)]
    return float(advantages.sum() * scored.std(ddof=1)) if len(scored) > 1 else 0.0


async def save(buffer: ReplayBuffer, objects: Objects, folder: Path) -> None:
    """Write the buffer, with the values that lie in blocks."""
    arrays: dict[str, Array] = {}
    entries: list[dict[str, Any]] = []
    for index, kept in enumerate(buffer.groups):
        table = kept.rows
        blocks = await asyncio.gather(*(objects.get(ref, timeout_s=FETCH_TIMEOUT_S) for ref in table.blocks))
        whole = table.whole().shard.fetched(blocks).batch
        arrays |= {f"{index}/{name}": values for name, values in whole.columns.items()}
        arrays[f"{index}/lengths"] = whole.lengths
        stored = [sorted(each.names) for each in table.stored]
        entries.append({"score": kept.score, "step": kept.step, "stored": stored, "columns": sorted(whole.columns)})
    arrays["entries"] = np.frombuffer(json.dumps(entries).encode(), np.uint8)
    await asyncio.to_thread(_write, folder / FILE, arrays)


async def load(objects: Objects, folder: Path) -> list[Kept]:
    """The groups of a checkpoint, their values in blocks of this run. Raises ConfigError if it has none."""
    file = folder / FILE
    if not file.is_file():
        raise ConfigError(
            f"{file} does not exist: the run that wrote this checkpoint replayed no groups; resume with the options of "
            "its method that it had"
        )
    with np.load(file) as arrays:
        found = {name: arrays[name] for name in arrays.files}
    return [
        await _restored(objects, index, entry, found)
        for index, entry in enumerate(json.loads(found["entries"].tobytes()))
    ]


async def _restored(objects: Objects, index: int, entry: dict[str, Any], arrays: dict[str, Array]) -> Kept:
    whole = Batch.build(arrays[f"{index}/lengths"], **{name: arrays[f"{index}/{name}"] for name in entry["columns"]})
    everywhere = np.arange(len(whole))
    table = RowTable(whole).without(name for names in entry["stored"] for name in names)
    for names in entry["stored"]:
        table = table.with_blocks(names, [(everywhere, await objects.put(whole.only(names)))])
    return Kept(entry["score"], entry["step"], table)


def _write(file: Path, arrays: dict[str, Array]) -> None:
    with file.open("wb") as stream:
        np.savez(stream, allow_pickle=False, **arrays)

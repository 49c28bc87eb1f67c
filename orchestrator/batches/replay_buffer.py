"""Prompt groups that taught much, kept to take the places of groups that teach nothing.

    batch ──► groups of one reward each leave ──► as many of the buffer's take their places ──► what is learned from
                groups with a spread ─────────────────────────────────────────────────────────► and into the buffer

A group in the buffer is its rows as they were sampled: the driver's table of them, and references to the blocks with
their tokens, which stay in the object store. A checkpoint has the buffer with its tokens, so that a run that is resumed
replays the same groups.
"""

from __future__ import annotations

import json
from collections.abc import Set
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from actors.batch import Array
from actors.errors import ConfigError
from actors.worker import Objects
from orchestrator.batches import saved_tables
from orchestrator.batches.row_table import RowTable
from orchestrator.credit.advantages import Scale, zscore_by_group

FILE = "replay.npz"  # in a checkpoint


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


@dataclass(frozen=True)
class Loaded:
    """`groups` of a checkpoint. `unusable`: of each group that can be replayed no more, why."""

    groups: list[Kept]
    unusable: tuple[str, ...] = ()

    @property
    def warning(self) -> str | None:
        """What the user should know; None if every group can be replayed."""
        if not self.unusable:
            return None
        why = "; ".join(dict.fromkeys(self.unusable))
        return (
            f"{len(self.unusable)} groups of the checkpoint's replay buffer are not replayed: {why}. They were sampled "
            "with other settings, or by another version of Troupe; to replay them, resume with those"
        )


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
    arrays: saved_tables.Arrays = {}
    entries: list[dict[str, Any]] = []
    for index, kept in enumerate(buffer.groups):
        stored, values = await saved_tables.packed(kept.rows, objects)
        arrays |= saved_tables.numbered(index, values)
        entries.append({"score": kept.score, "step": kept.step, "stored": stored})
    arrays["entries"] = np.frombuffer(json.dumps(entries).encode(), np.uint8)
    await saved_tables.write(folder / FILE, arrays)


async def load(objects: Objects, folder: Path, written: Set[str] = frozenset()) -> Loaded:
    """The groups of a checkpoint, their values in blocks of this run. `written`: columns that the phase's stages write,
    which every group must have, because it stands in a batch beside new ones. Raises ConfigError if the checkpoint has
    no buffer."""
    file = folder / FILE
    if not file.is_file():
        raise ConfigError(
            f"{file} does not exist: the run that wrote this checkpoint replayed no groups; resume with the options of "
            "its method that it had"
        )
    arrays = await saved_tables.read(file)
    groups: list[Kept] = []
    unusable: list[str] = []
    for index, entry in enumerate(json.loads(arrays.pop("entries").tobytes())):
        own = saved_tables.of_number(index, arrays)
        if why := saved_tables.misfit(own, written):
            unusable.append(why)
        else:
            rows = await saved_tables.unpacked(entry["stored"], own, objects)
            groups.append(Kept(entry["score"], entry["step"], rows))
    return Loaded(groups, tuple(unusable))

"""Prompt groups that have ended and were not trained on yet, in a checkpoint: a run that is resumed does not sample
them again.

    collector.finished ──► tables, values of their blocks, scores ──► finished_groups.npz
                                                                         │
    collector.restore  ◄── groups with blocks of the new run ◄───────────┘

What a group needed on its way only (clocks, transcripts) is not kept. A group whose rows have other columns than the
phase's stages write (another version of Troupe saved it) cannot stand in a batch beside new ones: it is not restored,
and is sampled again.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from actors.errors import BlockLost
from actors.worker import Objects
from orchestrator.batches import saved_tables
from orchestrator.collection.group_stages import PromptGroup
from rewards.worker import ScoredTexts, ScoreResult
from rollout.sampling import EpisodeFacts, Finish, GroupMeta, TurnRow

FILE = "finished_groups.npz"  # in a checkpoint


@dataclass(frozen=True)
class Restored:
    """`groups`: of a checkpoint, their values in blocks of this run. `unusable`: of each group that is to be sampled
    again, why."""

    groups: tuple[PromptGroup, ...] = ()
    unusable: tuple[str, ...] = ()

    @property
    def warning(self) -> str | None:
        """What the user should know; None if every group was restored."""
        if not self.unusable:
            return None
        why = "; ".join(dict.fromkeys(self.unusable))
        return (
            f"{len(self.unusable)} finished prompt groups of the checkpoint are sampled again: {why}. Another version "
            "of Troupe saved them; to train on them, resume with that version"
        )


async def save(groups: Sequence[PromptGroup], objects: Objects, folder: Path) -> None:
    """Write the groups; those whose blocks are gone with a node are left out, and are sampled again after a resume."""
    arrays: saved_tables.Arrays = {}
    entries: list[dict[str, Any]] = []
    for group in groups:
        try:
            entry, values = await _packed(group, objects)
        except BlockLost:
            continue
        arrays |= saved_tables.numbered(len(entries), values)
        entries.append(entry)
    arrays["entries"] = np.frombuffer(json.dumps(entries, default=str).encode(), np.uint8)
    await saved_tables.write(folder / FILE, arrays)


async def load(
    objects: Objects, folder: Path, drawn: Callable[[int], PromptGroup], written: Set[str] = frozenset()
) -> Restored:
    """The groups of a checkpoint; none if it has no file of them. `drawn`: the group of a position as it is before its
    first stage; `written`: columns that the phase's stages write, which every group must have."""
    file = folder / FILE
    if not file.is_file():
        return Restored()
    arrays = await saved_tables.read(file)
    entries: list[dict[str, Any]] = json.loads(arrays.pop("entries").tobytes())
    groups: list[PromptGroup] = []
    unusable: list[str] = []
    for index, entry in enumerate(entries):
        own = saved_tables.of_number(index, arrays)
        if why := saved_tables.misfit(own, written):
            unusable.append(why)
        else:
            groups.append(await _unpacked(entry, own, objects, drawn(int(entry["position"]))))
    return Restored(tuple(groups), tuple(unusable))


async def _packed(group: PromptGroup, objects: Objects) -> tuple[dict[str, Any], saved_tables.Arrays]:
    """What of a group is JSON, and what is arrays."""
    stored, arrays = await saved_tables.packed(group.rows, objects)
    texts: list[ScoredTexts | None] = await asyncio.gather(
        *(objects.get(ref, timeout_s=saved_tables.FETCH_TIMEOUT_S) for ref in group.texts)
    )
    entry: dict[str, Any] = {
        "id": group.id,
        "position": group.position,
        "stored": stored,
        "metas": [asdict(meta) for meta in group.metas],
        "own": group.own,
        "passed": group.passed,
        "oldest_version": group.oldest_version,
        "texts": [_texts_to_json(each) for each in texts],
        "score": None,
    }
    if group.score is not None:
        score = group.score
        arrays |= {"score/rewards": score.rewards, "score/total": score.total, "score/weights": score.weights}
        entry["score"] = {
            "names": score.names,
            "metrics": dict(score.metrics),
            "preferring": sorted(score.preferring),
        }
    return entry, arrays


async def _unpacked(
    entry: Mapping[str, Any], arrays: saved_tables.Arrays, objects: Objects, drawn: PromptGroup
) -> PromptGroup:
    texts = [_texts_of_json(each) for each in entry["texts"]]
    return replace(
        drawn,
        id=entry["id"],
        rows=await saved_tables.unpacked(entry["stored"], arrays, objects),
        metas=tuple(_meta(each) for each in entry["metas"]),
        own=tuple(entry["own"]),
        passed=entry["passed"],
        oldest_version=entry["oldest_version"],
        score=_score(entry["score"], arrays),
        texts=tuple([await objects.put(each) for each in texts]),
    )


def _score(entry: Mapping[str, Any] | None, arrays: saved_tables.Arrays) -> ScoreResult | None:
    """Without the statistics of its calls: those were of the run that is over."""
    if entry is None:
        return None
    return ScoreResult(
        tuple(entry["names"]),
        arrays["score/rewards"],
        arrays["score/total"],
        metrics=entry["metrics"],
        weights=arrays["score/weights"],
        preferring=frozenset(entry["preferring"]),
    )


def _meta(entry: Mapping[str, Any]) -> GroupMeta:
    made: dict[str, Any] = {**entry}
    made["lengths"], made["failures"] = tuple(entry["lengths"]), tuple(entry["failures"])
    made["finishes"] = tuple(Finish(each) for each in entry["finishes"])
    made["episodes"] = tuple(EpisodeFacts(**each) for each in entry["episodes"])
    if entry["totals"] is not None:
        made["totals"] = tuple(entry["totals"])
    if entry["turn_rows"] is not None:
        made["turn_rows"] = tuple(TurnRow(**each) for each in entry["turn_rows"])
    return GroupMeta(**made)


def _texts_to_json(scored: ScoredTexts | None) -> dict[str, Any] | None:
    return None if scored is None else {"texts": scored.texts, "extra": dict(scored.extra)}


def _texts_of_json(entry: Mapping[str, Any] | None) -> ScoredTexts | None:
    if entry is None:
        return None
    return ScoredTexts(tuple(entry["texts"]), {name: tuple(values) for name, values in entry["extra"].items()})

"""What the driver keeps of sampled completions: a table of rows, and where their tokens are."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from actors.batch import Batch
from actors.columns import ADMITTED, ROUTES
from actors.worker import Ref
from orchestrator.batches.row_table import RowTable
from rollout.sampling import Finish, GroupMeta, Sampling

SAMPLED = frozenset({"tokens", "mask", "sample_logps", "version"})  # columns of every sample, which lie in its block


@dataclass(frozen=True)
class Samples:
    """What was sampled of a prompt. `failures`: why some samples are missing."""

    rows: RowTable
    metas: tuple[GroupMeta, ...]
    transcripts: tuple[Ref, ...] = ()
    failures: tuple[str, ...] = ()

    @property
    def count(self) -> int:
        return sum(len(meta.lengths) for meta in self.metas)


def recorded(sampling: Sampling) -> frozenset[str]:
    """Columns that samples have besides `SAMPLED`, because they were asked for."""
    asked = {ADMITTED: sampling.records_admitted, ROUTES: sampling.replay_routing}
    return frozenset(name for name, wanted in asked.items() if wanted)


def rows_of_samples(
    meta: GroupMeta, block: Ref, *, group: int, sampler: int, prompt_tokens: int = 0, also: Iterable[str] = ()
) -> RowTable:
    """A table of the samples that lie in one block. `prompt_tokens`: of each, unless `meta` has whole
    lengths. `also`: columns of the block besides `SAMPLED`."""
    count, wrote = len(meta.lengths), np.asarray(meta.lengths, np.int32)
    rows = Batch.build(
        wrote.astype(np.int64) + prompt_tokens if meta.totals is None else np.asarray(meta.totals, np.int64),
        group=np.full(count, group, np.int64),
        truncated=[finish is Finish.LENGTH for finish in meta.finishes],
        sampler=np.full(count, sampler, np.int8),
        completion_tokens=wrote,
    )
    return RowTable.of_block(rows, block, SAMPLED | frozenset(also))


def rows_of_turns(
    meta: GroupMeta, block: Ref, *, group: int, sampler: int, number: int, also: Iterable[str] = ()
) -> RowTable:
    """A table of an episode each turn of which is a row. `number`: of the episode among those of its stage."""
    turns = meta.turn_rows or ()
    (finish,), count = meta.finishes, len(turns)
    rows = Batch.build(
        np.array([turn.tokens for turn in turns], np.int64),
        group=np.full(count, group, np.int64),
        truncated=np.full(count, finish is Finish.LENGTH),
        sampler=np.full(count, sampler, np.int8),
        completion_tokens=np.array([turn.written for turn in turns], np.int32),
        episode=np.full(count, (sampler << 32) + number, np.int64),
        earlier_reward=np.array([turn.earlier_reward for turn in turns], np.float32),
    )
    return RowTable.of_block(rows, block, SAMPLED | frozenset(also))

"""Episodes whose turns are rows of their own: rewards and baselines are computed from one row of each episode.

    rows      turn 1   turn 2   turn 3 | turn 1 | turn 1   turn 2
    episode   ───────── 0 ──────────── | ─ 1 ── | ────── 2 ──────
    whole                       turn 3 | turn 1 |          turn 2     the rows of which rewards and baselines are taken

An episode of many turns would otherwise count many times in the mean of its group, and a row would be compared with
others of its own episode, which have its own reward. Pure.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from actors.batch import Array
from orchestrator.batches.row_table import RowTable


def whole_episodes(rows: RowTable) -> tuple[RowTable, Array]:
    """(the last row of each episode, the index [B] among those of each row's episode). In the former,
    `completion_tokens` counts the whole episode. A row that is not a turn is an episode by itself."""
    if "episode" not in rows:
        return rows, np.arange(len(rows))
    keys = np.stack([rows["group"], rows["episode"]], axis=1)
    _, first, member = np.unique(keys, axis=0, return_index=True, return_inverse=True)
    order = np.argsort(first)  # episodes in order of appearance
    place = np.empty_like(order)
    place[order] = np.arange(len(order))
    member = place[member.reshape(-1)]
    last = np.zeros(len(order), np.int64)
    np.maximum.at(last, member, np.arange(len(rows)))
    written = np.bincount(member, weights=rows["completion_tokens"]).astype(np.int32)
    return rows.select(last).with_values(completion_tokens=written), member


def by_episode(call: Callable[..., dict[str, Array]], rows: RowTable, **options: Any) -> dict[str, Array]:
    """What a credit call makes of whole episodes, for each of their rows."""
    episodes, member = whole_episodes(rows)
    return {name: values[member] for name, values in call(episodes, **options).items()}

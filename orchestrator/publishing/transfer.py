"""Weights from one group of ranks to another, through the object store.

source rank 0 ── its share of the weights ─┬─► rank 0 of the target: its slice of each (`actors/weight_shares.py`)
source rank 1 ── its share ────────────────┴─► rank 1 ...
"""

from __future__ import annotations

import asyncio
from typing import Any

from actors.worker import Group, Ref, all_or_first_error

BUCKET_BYTES = 64 * 2**20


async def export_payload(source: Group, *arguments: Any, timeout_s: float) -> tuple[Any, Ref]:
    """What `export`, called with these arguments, makes of the source's weights where its consumer returns a pair: the
    second stays in the object store. All ranks take part, because weights are gathered."""
    first, *others = source.workers
    async with source.turn():
        (value, ref), *_ = await asyncio.gather(
            first.call_split("export", *arguments, timeout_s=timeout_s),
            *(worker.call("export", *arguments, timeout_s=timeout_s) for worker in others),
        )
    return value, ref


async def mix_towards(source: Group, target: Group, share: float, *, timeout_s: float, task_name: str) -> None:
    """Every weight of the target becomes `share` of the source's and the rest of its own, on all of its ranks."""
    ranks = len(target.workers)
    async with source.turn():
        sent = await all_or_first_error(
            worker.call_split("shares", ranks, BUCKET_BYTES, timeout_s=timeout_s, task_name=task_name, refs=ranks)
            for worker in source.workers
        )
    blocks = [[each[1 + rank] for each in sent] for rank in range(ranks)]
    await target.call("mix", share, BUCKET_BYTES, blocks=blocks, timeout_s=timeout_s, task_name=task_name)

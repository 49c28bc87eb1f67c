"""Weights from one group of ranks to another, through the object store.

source ── export ─► buckets, one object ─┬─► rank 0 of the target ─► mixes each tensor into its own
(gathered, rank 0 packs)                 └─► rank 1 ...
"""

from __future__ import annotations

import asyncio
from typing import Any

from actors.worker import Group, Ref
from rollout.weights import ManifestOf, PackBuckets, UnpackBuckets

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
    look = ManifestOf(None, BUCKET_BYTES)
    manifest = (await source.call("export", look, BUCKET_BYTES, "in_memory", timeout_s=timeout_s))[0]
    report, payload = await export_payload(
        source, PackBuckets(manifest, 0), BUCKET_BYTES, "in_memory", timeout_s=timeout_s
    )
    reader = UnpackBuckets(manifest, report.fingerprint)
    await target.call("mix", payload, reader, share, BUCKET_BYTES, timeout_s=timeout_s, task_name=task_name)

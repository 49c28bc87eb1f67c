"""The benchmark of the driver at a size runs, and counts: on a few GPUs that compute nothing."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.benchmarks.at_size import PINGS_OF_POOLS, PINGS_OF_RANKS, measured

STEP = ("collect and reference", "policy.update", "publish", "checkpoint")


@pytest.mark.parametrize("gpus", [8, 32])
async def test_the_calls_of_a_step_are_counted_by_its_parts_and_grow_with_the_ranks(gpus: int, tmp_path: Path) -> None:
    """Half of the GPUs are ranks, of two roles; an engine has eight of the other half."""
    ranks, engines = gpus // 2, max(1, gpus // 16)
    meter = await measured(gpus, tmp_path)
    calls = {part: count.calls for part, count in meter.parts.items()}
    assert calls["policy.update"] == ranks
    assert calls["publish"] == ranks + engines
    assert calls["checkpoint"] == 2 * ranks
    assert (calls[PINGS_OF_RANKS], calls[PINGS_OF_POOLS]) == (2 * ranks, 2 * engines)
    assert calls["collect and reference"] >= gpus + ranks, "a sample of each prompt, and a pass of the reference"
    shards = meter.parts["policy.update"]
    assert shards.objects == 0 and 2_000 < shards.nbytes / ranks < 64 * 2**10, "a rank's small shard is in its call"
    for part in STEP:
        assert meter.parts[part].nbytes > 0 and meter.parts[part].seconds > 0, part
    per_member = meter.parts["publish"].nbytes / (ranks + engines)
    assert 10_000 < per_member < 100_000, "the manifest of 723 tensors goes with each call, and no weights do"

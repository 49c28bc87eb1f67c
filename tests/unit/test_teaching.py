"""What an engine says of rows becomes the columns that the same model in ranks writes."""

from __future__ import annotations

import asyncio
from pathlib import Path

import numpy as np
import pytest

from actors.batch import Batch
from actors.columns import Head
from actors.distributions import TopK
from actors.errors import RunError
from actors.model import ModelSpec
from actors.model_worker import ModelWorker
from actors.sharding import shard
from actors.specs import BackendSpec
from orchestrator.losses.distillation import TEACHER_TOP_K
from rollout.engine import EngineSpec
from rollout.worker import RolloutWorker
from tests.unit.tiny import tiny_model_folder

COLUMNS = (*TEACHER_TOP_K, "teacher_logps")


def rows() -> Batch:
    rng = np.random.default_rng(3)
    lengths = [7, 4, 9]
    mask = np.concatenate([np.arange(length) >= 2 for length in lengths])
    return Batch.build(lengths, tokens=rng.integers(2, 64, sum(lengths)), mask=mask)


@pytest.mark.parametrize("into", [TEACHER_TOP_K, COLUMNS], ids=["top k", "and its own token"])
def test_an_engine_writes_the_columns_that_the_same_model_in_ranks_writes(
    tmp_path: Path, into: tuple[str, ...]
) -> None:
    folder, batch, k = str(tiny_model_folder(tmp_path, hidden=32)), rows(), 5
    model = ModelWorker("teacher", ModelSpec(folder), BackendSpec("single", None), threads=1)
    model.ready()
    ((order, part),) = shard(batch, 1, 64)
    expected = model.infer(part, into, Head.VOCABULARY, 1.0, True, TopK(k, 1.0, 64))[1].select(np.argsort(order))
    engine = RolloutWorker("coach", EngineSpec("hf", folder, max_model_len=16))

    async def said(vocabulary: int) -> Batch:
        await engine.ready()
        ((_, mine),) = shard(batch, 1, 64)
        return (await engine.top_k("t", mine, into, k, vocabulary))[1].select(np.argsort(order))

    async def both() -> Batch:
        try:
            found = await said(64)
            with pytest.raises(RunError, match=r"finds entry \d+ of a padded vocabulary likely, .* has 30 tokens"):
                await said(30)
            return found
        finally:
            engine.close()

    found = asyncio.run(both())
    assert set(found.columns) == set(into) and np.ptp(found["teacher_topk_logps"]) > 0.1
    for name in into:
        assert found[name].dtype == expected[name].dtype
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-4, atol=1e-4, err_msg=name)

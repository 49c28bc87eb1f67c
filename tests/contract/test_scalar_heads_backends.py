"""A reward model learns the same whatever trains it: ranks of DeepSpeed at every ZeRO stage, whole or with adapters,
learn what one process learns, go on from their state to the bit, and save folders with equal scores in transformers.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from actors.batch import Batch
from actors.columns import Head
from actors.model import ModelSpec
from actors.sharding import Shard, shard, shard_groups
from actors.specs import BackendSpec, LoraSpec, OptimSpec
from orchestrator.losses.objective import LossObjective
from orchestrator.methods import build
from tests.contract.backend_stage import Role
from tests.trainer_ranks import Gangs
from tests.unit.test_scalar_heads import rows, transformers_scores
from tests.unit.tiny import tiny_model_folder

STEPS = 3
OPTIM = OptimSpec(learning_rate=1e-2, total_steps=10, adam_eps=1e-3)
LORA = LoraSpec(r=4, alpha=8)
OBJECTIVE = LossObjective.of(build("reward_model", {"center_rewards_coefficient": 0.1}).updates[0])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model_folder(tmp_path_factory.mktemp("model"), hidden=32, tied=False)


def started(gangs: Gangs, folder: Path, kind: str, stage: int, adapters: LoraSpec | None) -> Role:
    role = Role(gangs(2 if kind == "deepspeed" else 1), rows())
    model = ModelSpec(str(folder), head=Head.ROW_SCALAR, lora=adapters)
    role.call("start", model, BackendSpec(kind, OPTIM, None, stage))
    return role


def learn(role: Role, steps: int = STEPS) -> list[dict[str, float]]:
    parts = [part for _, part in shard(role.batch, len(role.gang.workers), 40, keep_groups=True)]
    found = [role.call("act_on", "update", OBJECTIVE, 1.0, "u", per_rank=parts)[0] for _ in range(steps)]
    assert all(report.grad_norm > 1e-3 for report in found)
    names = ("loss", "accuracy", "margin", "min_reward", "mean_reward", "max_reward")
    return [{name: report.metrics[name] for name in names} for report in found]


def scores(role: Role) -> np.ndarray:
    return _scores(role, role.batch, shard(role.batch, len(role.gang.workers), 40))


def scores_of_groups(role: Role, batch: Batch) -> np.ndarray:
    """In passes of one shape, as rewards are given; a rank may have none."""
    return _scores(role, batch, shard_groups(batch, len(role.gang.workers), 40))


def _scores(role: Role, batch: Batch, dealt: list[tuple[list[int], Shard]]) -> np.ndarray:
    found = np.zeros(len(batch), np.float32)
    parts = [part for _, part in dealt]
    blocks = role.call("act_on", "infer", ("reward",), Head.ROW_SCALAR, 1.0, True, per_rank=parts)
    for (order, _), (_, block) in zip(dealt, blocks, strict=True):
        found[order] = block["reward"]
    return found


@pytest.mark.parametrize("adapters", [None, LORA], ids=["whole", "lora"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_ranks_of_deepspeed_learn_and_save_what_one_process_does(
    gangs: Gangs, folder: Path, tmp_path: Path, stage: int, adapters: LoraSpec | None
) -> None:
    alone = started(gangs, folder, "single", 0, adapters)
    expected, expected_scores = learn(alone), scores(alone)
    role = started(gangs, folder, "deepspeed", stage, adapters)
    for one, other in zip(learn(role), expected, strict=True):
        assert one == pytest.approx(other, rel=2e-3, abs=2e-4)
    np.testing.assert_allclose(scores(role), expected_scores, rtol=2e-3, atol=5e-4)
    together, first = scores_of_groups(role, role.batch), role.batch.select([0])
    np.testing.assert_allclose(together, scores(role), rtol=1e-4, atol=1e-5)
    assert scores_of_groups(role, first)[0] == together[0], "to the bit, whichever rank it is dealt to"
    role.act("save_model", str(tmp_path / "model"))
    np.testing.assert_allclose(transformers_scores(tmp_path / "model"), scores(role), rtol=1e-4, atol=1e-5)
    (tmp_path / "state").mkdir()
    role.act("save_state", str(tmp_path / "state"))
    further = learn(role, 1)
    resumed = started(gangs, folder, "deepspeed", stage, adapters)
    resumed.act("load_state", str(tmp_path / "state"))
    assert learn(resumed, 1) == further

"""Every method takes three real steps on a two-layer model whatever trains it: two ranks of DeepSpeed's ZeRO stage 2
learn what one process learns, and adapters alone learn with the model without them as the reference."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from actors.backends import BackendSpec
from actors.backends.optimizer import OptimSpec
from actors.batch import Batch
from actors.lora import LoraSpec
from actors.model import ModelSpec
from actors.model_worker import ModelWorker
from actors.sharding import shard
from orchestrator.losses.objective import LossObjective
from orchestrator.methods import METHODS, build
from orchestrator.pipeline import Pipeline, Verb
from tests.contract.test_backends import Role, start_gangs
from tests.contract.test_methods_learn import TOKEN_BUDGET, logps_of, made_up
from tests.unit.tiny import tiny_model_folder

STEPS = 3
# `adam_eps` is large enough not to blow up what is rounding noise.
OPTIM = OptimSpec(learning_rate=1e-2, total_steps=4 * STEPS, adam_eps=1e-3)
CASES: list[tuple[str, dict[str, Any]]] = [
    *((name, {}) for name in METHODS if not build(name, {}).companions),  # those: test_companion.py
    ("sft", {"loss_type": "dft"}),
    ("dpo", {"loss_type": "aot"}),  # looks across rows, micro-batches and ranks, as kto and bco do
    ("dpo", {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]}),
    ("dpo", {"use_weighting": True, "token_metrics": True}),
    ("kto", {"loss_type": "apo_zero_unpaired"}),
    ("bco", {"density_ratio": True}),
]
every_method = pytest.mark.parametrize(("method", "options"), CASES, ids=[f"{m} {o}" for m, o in CASES])

Update = Callable[[Batch, LossObjective, str], dict[str, float]]
"""One optimizer step; its metrics and gradient norm."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ModelSpec:
    return ModelSpec(str(tiny_model_folder(tmp_path_factory.mktemp("model"), hidden=32, vocab=32)))


@pytest.fixture(scope="module")
def two_ranks() -> Iterator[Any]:
    with start_gangs() as gang:
        yield gang(2)


def three_steps(pipeline: Pipeline, batch: Batch, ref_logps: np.ndarray, update: Update) -> list[dict[str, float]]:
    """The pipeline's update, three times on the same batch."""
    columns = {stage.options["into"]: ref_logps for stage in pipeline if stage.verb is Verb.LOGPS}
    batch = batch.with_columns(**columns)
    for stage in pipeline:
        if stage.verb is Verb.CREDIT and stage.call is not None:
            batch = batch.with_columns(**stage.call(batch, **stage.options))
    (stage,) = pipeline.updates
    objective = LossObjective.of(stage)
    needed = batch.only({"tokens", "mask", "group"} | objective.columns)
    return [update(needed, objective, stage.name) for _ in range(STEPS)]


def updating(policy: ModelWorker) -> Update:
    def update(batch: Batch, objective: LossObjective, stage: str) -> dict[str, float]:
        ((_, part),) = shard(batch, 1, TOKEN_BUDGET, keep_groups=objective.keep_groups)
        report = policy.update(part, objective, 1.0, stage)
        return {**report.metrics, "grad_norm": report.grad_norm}

    return update


def updating_gang(role: Role) -> Update:
    def update(batch: Batch, objective: LossObjective, stage: str) -> dict[str, float]:
        dealt = shard(batch, len(role.gang.workers), TOKEN_BUDGET, keep_groups=objective.keep_groups)
        reports = role.call("act_on", "update", objective, 1.0, stage, per_rank=[part for _, part in dealt])
        first, *others = [{**report.metrics, "grad_norm": report.grad_norm} for report in reports]
        assert all(other == first for other in others)
        return first

    return update


def single(model: ModelSpec) -> ModelWorker:
    made = ModelWorker("policy", model, BackendSpec("single", OPTIM), threads=1)
    made.ready()
    return made


@every_method
def test_two_ranks_of_zero_stage_2_learn_what_one_process_learns(
    model: ModelSpec, two_ranks: Any, method: str, options: dict[str, Any]
) -> None:
    pipeline, policy = build(method, options), single(model)
    batch = made_up(pipeline, policy)
    noise = np.random.default_rng(1).normal(0, 0.1, batch.num_tokens)  # a reference like the policy, and not the same
    ref_logps = (logps_of(policy, batch, "ref_logps") - np.abs(noise) * batch["mask"]).astype(np.float32)
    expected = three_steps(pipeline, batch, ref_logps, updating(policy))
    gang = Role(two_ranks, batch)
    gang.call("start", model, BackendSpec("deepspeed", OPTIM, None, 2))
    found = three_steps(pipeline, batch, ref_logps, updating_gang(gang))
    for one, other in zip(found, expected, strict=True):
        assert one.pop("padding_share") == other.pop("padding_share") == 0
        assert one == pytest.approx(other, rel=2e-3, abs=2e-5)


@every_method
def test_adapters_learn_with_the_model_without_them_as_the_reference(
    model: ModelSpec, method: str, options: dict[str, Any]
) -> None:
    pipeline, policy = build(method, options), single(replace(model, lora=LoraSpec(r=4, alpha=8)))
    batch = made_up(pipeline, policy)
    ref_logps = logps_of(policy, batch, "ref_logps", adapters=False)
    steps = three_steps(pipeline, batch, ref_logps, updating(policy))
    np.testing.assert_array_equal(logps_of(policy, batch, "ref_logps", adapters=False), ref_logps)
    assert all(step["grad_norm"] > 0 and np.isfinite(step["loss"]) for step in steps)
    assert np.abs(logps_of(policy, batch, "old_logps") - ref_logps).max() > 1e-4

"""Every method takes three real steps on a two-layer model whatever trains it: two ranks of DeepSpeed's ZeRO stage 2
for each trained role learn what one process learns, and adapters alone learn with the model without them as reference.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import ray

from actors.columns import Head
from actors.group import RayGroup
from actors.model import ModelSpec
from actors.model_worker import ModelWorker, UpdateReport
from actors.specs import BackendSpec, LoraSpec, OptimSpec
from actors.worker import Group, Ref
from orchestrator.batches.row_table import RowTable
from orchestrator.methods import METHODS, build
from orchestrator.pipeline import Pipeline
from tests.contract.backend_stage import VERB_S, Role
from tests.contract.test_methods_learn import TOKEN_BUDGET, made_up, said_of
from tests.local_executor import executor_of, in_process, local_executor, model_workers, steps
from tests.trainer_ranks import Gangs
from tests.unit.tiny import tiny_model_folder

STEPS = 3
# `adam_eps` is large enough not to blow up what is rounding noise.
OPTIM = OptimSpec(learning_rate=1e-2, total_steps=4 * STEPS, adam_eps=1e-3)


def in_miniature(built: Pipeline) -> dict[str, Any]:
    """Options with which a method runs here: few tokens are in the vocabulary, and `test_moving_weights.py` is about
    weights that move from a trained role to another."""
    few = {"teacher_top_k": 4} if any(stage.top_k for stage in built) else {}
    return few | ({"teacher": "base"} if built.mixed else {})


CASES: list[tuple[str, dict[str, Any]]] = [
    *(
        (name, in_miniature(built))
        for name in METHODS
        if (built := build(name, {})).trained and not built.companions  # those: test_companion.py
    ),
    ("sft", {"loss_type": "dft"}),
    ("dpo", {"loss_type": "aot"}),  # looks across rows, micro-batches and ranks, as kto and bco do
    ("dpo", {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]}),
    ("dpo", {"use_weighting": True, "token_metrics": True}),
    ("kto", {"loss_type": "apo_zero_unpaired"}),
    ("bco", {"density_ratio": True}),
    ("online_dpo", {"loss_type": "ipo", "token_metrics": True}),
    ("ppo", {"num_mini_batches": 2, "kl_target": 0.01, "missing_eos_penalty": 0.5, "whiten_rewards": True}),
    ("gkd", {"teacher_top_k": 4}),
    ("minillm", {"gamma": 0.5, "teacher_top_k": 4}),
]
every_method = pytest.mark.parametrize(("method", "options"), CASES, ids=[f"{m} {o}" for m, o in CASES])


class SharedGang(RayGroup):
    """A gang of `Rank`s beside roles of this process, which read the blocks that it leaves: they come back by value."""

    async def call(self, method: str, *args: Any, **options: Any) -> list[Any]:
        first, *others = await super().call(method, *args, **options)
        if isinstance(first, UpdateReport):
            assert all(other.metrics == first.metrics and other.grad_norm == first.grad_norm for other in others)
        return [first, *others]

    async def call_split(self, method: str, *args: Any, **options: Any) -> list[tuple[Any, Ref]]:
        found = await super().call_split(method, *args, **options)
        return [(value, Ref(ray.get(block.target, timeout=VERB_S))) for value, block in found]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ModelSpec:
    return ModelSpec(str(tiny_model_folder(tmp_path_factory.mktemp("model"), hidden=32, vocab=32)))


def workers_of(pipeline: Pipeline, model: ModelSpec, other: ModelSpec) -> dict[str, ModelWorker]:
    """Roles that are not trained hold another model, or at the first step there is nothing to learn from their
    difference."""
    workers = model_workers(pipeline, model, OPTIM)
    return workers | {role: frozen(role, pipeline, other) for role in workers.keys() - set(pipeline.trained)}


def frozen(role: str, pipeline: Pipeline, model: ModelSpec) -> ModelWorker:
    worker = ModelWorker(role, replace(model, head=pipeline.heads[role]), BackendSpec("single", None), 1)
    worker.ready()
    return worker


@every_method
def test_two_ranks_of_zero_stage_2_learn_what_one_process_learns(
    model: ModelSpec, gangs: Gangs, tmp_path: Any, method: str, options: dict[str, Any]
) -> None:
    pipeline, other = build(method, options), ModelSpec(str(tiny_model_folder(tmp_path, hidden=32, vocab=32, seed=1)))
    workers = workers_of(pipeline, model, other)
    table = RowTable(made_up(pipeline, workers[pipeline.trained[0]]))
    groups: dict[str, Group] = {
        role: in_process(role, worker)
        for role, worker in workers_of(pipeline, model, other).items()
        if role not in pipeline.trained
    }
    expected = steps(executor_of(pipeline, workers, token_budget=TOKEN_BUDGET, tokenizer=model.path), table, STEPS)
    for place, role in enumerate(pipeline.trained):
        two_ranks = gangs(2, place)
        Role(two_ranks, table.rows).call(
            "start", replace(model, head=pipeline.heads[role]), BackendSpec("deepspeed", OPTIM, None, 2)
        )
        groups[role] = SharedGang(role, two_ranks.workers)
    found = steps(local_executor(pipeline, groups, token_budget=TOKEN_BUDGET, tokenizer=model.path), table, STEPS)
    for one, wanted in zip(found, expected, strict=True):
        assert learned(pipeline, one) == pytest.approx(learned(pipeline, wanted), rel=2e-3, abs=2e-5)
        assert any(one.get(name) == 0 for name in ("padding_share", f"{pipeline.trained[0]}/padding_share"))


def learned(pipeline: Pipeline, metrics: dict[str, float]) -> dict[str, float]:
    """Without times, and without shares of tokens beyond a threshold, which one token's rounding changes."""
    norms = [value for name, value in metrics.items() if name.endswith("grad_norm")]
    assert len(norms) == len(pipeline.trained) and min(norms) > 1e-3, "every trained role has a gradient"
    return {name: value for name, value in metrics.items() if "time/" not in name and "clipfrac" not in name}


@every_method
def test_adapters_learn_with_the_model_without_them_as_the_reference(
    model: ModelSpec, tmp_path: Any, method: str, options: dict[str, Any]
) -> None:
    pipeline = build(method, options)
    workers = model_workers(pipeline, replace(model, lora=LoraSpec(r=4, alpha=8)), OPTIM)
    assert set(workers) == set(pipeline.trained)
    batch = made_up(pipeline, workers[pipeline.trained[0]])

    def said(*, adapters: bool) -> dict[str, np.ndarray]:
        return {
            role: said_of(workers[role], batch, pipeline.heads[role], adapters=adapters) for role in pipeline.trained
        }

    base, begun = said(adapters=False), said(adapters=True)
    for role in pipeline.trained:
        np.testing.assert_allclose(begun[role], base[role], atol=1e-6)
    other = ModelSpec(str(tiny_model_folder(tmp_path, hidden=32, vocab=32, seed=1)))
    workers |= {role: frozen(role, pipeline, other) for role in pipeline.teachers}
    reports = steps(
        executor_of(pipeline, workers, token_budget=TOKEN_BUDGET, tokenizer=model.path), RowTable(batch), STEPS
    )
    assert all(learned(pipeline, report) and np.isfinite(list(report.values())).all() for report in reports)
    for role, now in said(adapters=True).items():
        assert np.abs(now - begun[role]).max() > 1e-4
    for role, now in said(adapters=False).items():
        if pipeline.heads[role] is Head.VOCABULARY:  # a scalar head is trained whole, adapters or not
            np.testing.assert_array_equal(now, base[role])

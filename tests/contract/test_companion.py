"""A frozen model that lives in the ranks of a trained one: what is learned from it, by which backend."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from actors.batch import Batch
from actors.columns import Head
from actors.distributions import TopK
from actors.errors import RunError
from actors.group import RayGroup
from actors.model import LanguageModel, ModelSpec, load_model
from actors.model_worker import ModelWorker
from actors.sharding import shard
from actors.specs import BackendSpec, LoraSpec, OptimSpec
from actors.worker import Group
from orchestrator.batches.row_table import RowTable
from orchestrator.losses.objective import LossObjective
from orchestrator.methods import build
from tests.contract.backend_stage import Role
from tests.contract.test_methods_backends import SharedGang
from tests.local_executor import executor_of, in_process, local_executor, steps
from tests.trainer_ranks import Gangs
from tests.unit.tiny import tiny_model_folder

BUDGET = 96  # several micro-batches
VOCAB = 32
OPTIM = OptimSpec(learning_rate=1e-2, total_steps=1000, adam_eps=1e-3)
DISTIL = LossObjective.of(build("gkd", {"lmbda": 0.0}).updates[0])
SEQUENCE = LossObjective.of(build("minillm", {"gamma": 0.5}).updates[0])
ON_POLICY = LossObjective.of(build("on_policy_distillation", {}).updates[0])
IMITATE = LossObjective.of(build("sft", {}).updates[0])


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> ModelSpec:
    return ModelSpec(str(tiny_model_folder(tmp_path_factory.mktemp("student"), hidden=32, vocab=VOCAB)))


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> ModelSpec:
    folder = tiny_model_folder(tmp_path_factory.mktemp("teacher"), hidden=64, vocab=VOCAB, seed=1, tied=False)
    return ModelSpec(str(folder))


@pytest.fixture
def two_ranks(gangs: Gangs) -> RayGroup:
    return gangs(2)


def worker(model: ModelSpec, companion: ModelSpec | None = None, optim: OptimSpec = OPTIM) -> ModelWorker:
    made = ModelWorker("policy", model, BackendSpec("single", optim), threads=1)
    made.ready()
    made.set_companion(companion)
    return made


def sampled(teacher: ModelSpec, seed: int, rows: int = 32) -> Batch:
    """Rows that the teacher samples, token by token."""
    return sampled_by(load_model(teacher, trainable=False), seed, rows)


def sampled_by(model: LanguageModel, seed: int, rows: int = 32, length: int = 12) -> Batch:
    """Rows that a model samples as it is now, after two random tokens."""
    rng = torch.Generator().manual_seed(seed)
    tokens = torch.randint(2, VOCAB, (rows, 2), generator=rng)
    attention, model.causal.config._attn_implementation = model.causal.config._attn_implementation, "eager"
    with torch.no_grad():
        while tokens.shape[1] < length:
            chances = torch.softmax(model.causal(input_ids=tokens).logits[:, -1], -1)
            tokens = torch.cat([tokens, torch.multinomial(chances, 1, generator=rng)], 1)
    model.causal.config._attn_implementation = attention
    mask = np.tile(np.arange(length) >= 2, rows)
    return Batch.build([length] * rows, tokens=tokens.flatten().numpy(), mask=mask, group=np.arange(rows))


def update(policy: ModelWorker, batch: Batch, objective: LossObjective = DISTIL) -> dict[str, float]:
    ((_, part),) = shard(batch, 1, BUDGET)
    report = policy.update(part, objective, 1.0, "policy.update")
    return {**report.metrics, "grad_norm": report.grad_norm}


def distance(policy: ModelWorker, batch: Batch, objective: LossObjective = DISTIL) -> float:
    ((_, part),) = shard(batch, 1, BUDGET)
    return policy.evaluate(part, objective, 1.0, "policy.update")["divergence"]


@pytest.mark.parametrize("on_policy", [False, True], ids=["gkd", "on_policy_distillation"])
def test_a_student_comes_nearer_to_its_teacher_than_by_imitating_as_many_of_its_samples(
    student: ModelSpec, teacher: ModelSpec, on_policy: bool
) -> None:
    """As many steps of as many rows. `gkd` learns from the teacher's samples, `on_policy_distillation` from its own;
    both measures of how far it is from the teacher are taken on samples of the teacher's that neither has seen."""
    optim, objective = replace(OPTIM, adam_eps=1e-8), ON_POLICY if on_policy else DISTIL
    distilled, imitating = worker(student, teacher, optim), worker(student, teacher, optim)
    sampler, measures = load_model(teacher, trainable=False), (DISTIL, ON_POLICY)
    held_out = sampled_by(sampler, seed=99)
    starts = [distance(distilled, held_out, measure) for measure in measures]
    for step in range(30):
        batch = sampled_by(sampler, seed=step)
        own = sampled_by(distilled.backend.model, seed=step) if on_policy else batch
        update(distilled, own, objective)
        update(imitating, batch, IMITATE)
    for start, measure in zip(starts, measures, strict=True):
        found, without = distance(distilled, held_out, measure), distance(imitating, held_out, measure)
        assert found < 0.85 * without < 0.85 * 0.8 * start


def test_the_companion_stays_as_it_is_and_is_no_part_of_what_is_saved(
    student: ModelSpec, teacher: ModelSpec, tmp_path: Path
) -> None:
    policy, batch = worker(student, teacher), sampled(teacher, seed=1)
    companion = policy._companion
    assert companion is not None
    before = [weight.clone() for weight in companion.parameters()]
    update(policy, batch)
    assert all(torch.equal(one, other) for one, other in zip(before, companion.parameters(), strict=True))
    policy.save_state(str(tmp_path))
    alone = worker(student)
    alone.load_state(str(tmp_path))
    with pytest.raises(RunError, match="started without one"):
        distance(alone, batch)
    alone.set_companion(teacher)
    assert distance(alone, batch) == distance(policy, batch)
    alone.set_companion(None)
    with pytest.raises(RunError, match="started without one"):
        distance(alone, batch)


@pytest.mark.parametrize("objective", [DISTIL, SEQUENCE], ids=["gkd", "minillm"])
def test_adapters_learn_from_a_companion(student: ModelSpec, teacher: ModelSpec, objective: LossObjective) -> None:
    policy, batch = worker(replace(student, lora=LoraSpec(r=4, alpha=8)), teacher), sampled(teacher, seed=1)
    steps = [update(policy, batch, objective) for _ in range(3)]
    assert all(step["grad_norm"] > 0 for step in steps)
    assert steps[2]["divergence"] < steps[0]["divergence"]


@pytest.mark.parametrize(
    ("method", "options"),
    [("gkd", {"lmbda": 0.0}), ("on_policy_distillation", {}), ("minillm", {"gamma": 0.5})],
    ids=str,
)
def test_all_tokens_over_the_wire_teach_what_a_companion_teaches(
    student: ModelSpec, teacher: ModelSpec, method: str, options: dict[str, Any]
) -> None:
    batch = sampled(teacher, seed=1)
    beside, objective = worker(student, teacher), LossObjective.of(build(method, options).updates[0])
    expected = [update(beside, batch, objective) for _ in range(3)]
    pipeline = build(method, {**options, "teacher_top_k": VOCAB})
    apart = ModelWorker("teacher", teacher, BackendSpec("single", None), threads=1)
    apart.ready()
    executor = executor_of(pipeline, {"policy": worker(student), "teacher": apart}, token_budget=BUDGET)
    found = steps(executor, RowTable(batch), 3)
    for one, wanted in zip(found, expected, strict=True):
        assert one["loss"] == pytest.approx(wanted["loss"], rel=1e-4)
        assert one["grad_norm"] == pytest.approx(wanted["grad_norm"], rel=1e-3)
    assert found[2]["loss"] < 0.99 * found[0]["loss"]


@pytest.mark.parametrize("weights", [None, (9.0, 1.0)], ids=["routed", "mixed"])
def test_of_several_teachers_each_teaches_the_rows_that_name_it_or_all_teach_every_row_by_weight(
    student: ModelSpec, teacher: ModelSpec, weights: tuple[float, ...] | None
) -> None:
    """With all tokens over the wire, the first step's divergence is what the companions give, one by one."""
    specs = {"math": teacher, "code": replace(teacher, path=student.path)}
    batch = sampled(teacher, seed=1)
    batch = batch.with_columns(teacher=np.arange(len(batch)) % 3 == 0)
    alone = {role: worker(student, spec) for role, spec in specs.items()}
    rows = {role: np.flatnonzero(batch["teacher"] == at) for at, role in enumerate(specs)}
    if weights is None:
        parts = [(len(rows[role]), distance(alone[role], batch.select(rows[role]))) for role in specs]
    else:
        parts = [(weight, distance(alone[role], batch)) for role, weight in zip(specs, weights, strict=True)]
    expected = sum(share * found for share, found in parts) / sum(share for share, _ in parts)
    options = {"teachers": tuple(specs), "teacher_top_k": VOCAB, **({"teacher_weights": weights} if weights else {})}
    pipeline = build("gkd", {"lmbda": 0.0, **options})
    roles = {role: ModelWorker(role, spec, BackendSpec("single", None), threads=1) for role, spec in specs.items()}
    for each in roles.values():
        each.ready()
    executor = executor_of(pipeline, {"policy": worker(student), **roles}, token_budget=BUDGET)
    found = steps(executor, RowTable(batch), 3)
    assert found[0]["divergence"] == pytest.approx(expected, rel=1e-4)
    assert found[2]["divergence"] < 0.99 * found[0]["divergence"]
    assert abs(expected - distance(alone["math"], batch)) > 0.05 * expected, "the other teacher changes something"


@pytest.mark.parametrize("every", [3, 32], ids=["a third", "one row"])
def test_a_teacher_of_two_ranks_teaches_the_rows_that_name_it_as_one_process_does(
    student: ModelSpec, teacher: ModelSpec, two_ranks: RayGroup, every: int
) -> None:
    """Fewer rows than ranks may name it: then a rank has none, and takes part in gathering the weights all the same."""
    specs = {"code": replace(teacher, path=student.path), "math": teacher}
    batch = sampled(teacher, seed=1)
    batch = batch.with_columns(teacher=np.arange(len(batch)) % every == 0)
    pipeline = build("gkd", {"lmbda": 0.0, "teachers": tuple(specs), "teacher_top_k": 8})

    def groups() -> dict[str, Group]:
        alone = {role: ModelWorker(role, spec, BackendSpec("single", None), threads=1) for role, spec in specs.items()}
        for each in alone.values():
            each.ready()
        return {role: in_process(role, each) for role, each in {"policy": worker(student), **alone}.items()}

    expected = steps(local_executor(pipeline, groups(), token_budget=BUDGET), RowTable(batch), 3)
    Role(two_ranks, batch).call("start", teacher, BackendSpec("deepspeed", None, None, 3))
    spread = {**groups(), "math": SharedGang("math", two_ranks.workers)}
    found = steps(local_executor(pipeline, spread, token_budget=BUDGET), RowTable(batch), 3)
    for one, wanted in zip(found, expected, strict=True):
        assert one["divergence"] == pytest.approx(wanted["divergence"], rel=1e-4)
        assert one["grad_norm"] == pytest.approx(wanted["grad_norm"], rel=1e-3)
    nobody = batch.with_columns(teacher=np.zeros(len(batch), bool))
    without = steps(local_executor(pipeline, groups(), token_budget=BUDGET), RowTable(nobody), 1)
    assert abs(without[0]["divergence"] - expected[0]["divergence"]) > 1e-3, "the teacher of two ranks teaches nothing"


@pytest.mark.parametrize(("objective", "stage"), [(DISTIL, 2), (SEQUENCE, 2), (DISTIL, 3)])
def test_two_ranks_learn_from_their_companions_what_one_process_learns(
    student: ModelSpec, teacher: ModelSpec, two_ranks: Any, objective: LossObjective, stage: int
) -> None:
    batch = sampled(teacher, seed=1)
    policy = worker(student, teacher)
    expected = [update(policy, batch, objective) for _ in range(3)]
    gang = Role(two_ranks, batch)
    gang.call("start", student, BackendSpec("deepspeed", OPTIM, None, stage))
    gang.act("set_companion", teacher)
    for step in expected:
        dealt = shard(batch, 2, BUDGET)
        reports = gang.call("act_on", "update", objective, 1.0, "policy.update", per_rank=[part for _, part in dealt])
        assert reports[0].metrics["divergence"] == pytest.approx(step["divergence"], rel=2e-3)
        assert reports[0].grad_norm == pytest.approx(step["grad_norm"], rel=2e-3)


def test_a_teacher_spread_over_two_ranks_by_zero_3_names_the_tokens_that_one_process_names(
    teacher: ModelSpec, two_ranks: Any
) -> None:
    names = ("teacher_topk_ids", "teacher_topk_logps", "teacher_tail_logps")
    batch, asked = sampled(teacher, seed=2), (names, Head.VOCABULARY, 1.0, True, TopK(4, 0.7))
    whole = ModelWorker("teacher", teacher, BackendSpec("single", None), threads=1)
    whole.ready()
    ((order, everything),) = shard(batch, 1, BUDGET)
    expected = whole.infer(everything, *asked)[1].select(np.argsort(order))
    gang = Role(two_ranks, batch)
    gang.call("start", teacher, BackendSpec("deepspeed", None, None, 3))
    dealt = shard(batch, 2, BUDGET)
    found = gang.call("act_on", "infer", *asked, per_rank=[part for _, part in dealt])
    for (rows, _), (_, block) in zip(dealt, found, strict=True):
        mine = expected.select(rows)
        for name in names:
            np.testing.assert_allclose(block[name], mine[name], atol=1e-5)
    assert np.ptp(expected["teacher_topk_logps"]) > 0.1

"""Every method moves what it exists to move: its own stages, a few steps, on a two-layer model, in one process.

What the data, the sampler and the reward would supply is made up here; everything after that is the method's pipeline.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from actors.batch import Batch
from actors.columns import Head
from actors.model import ModelSpec
from actors.model_worker import ModelWorker
from actors.other_prompts import INSERT
from actors.sharding import shard
from actors.specs import BackendSpec, OptimSpec
from orchestrator.batches.row_table import RowTable
from orchestrator.methods import build
from orchestrator.pipeline import Pipeline
from tests.local_executor import executor_of, model_workers, steps
from tests.unit.tiny import tiny_model_folder

STEPS = 6
TOKEN_BUDGET = 96  # several micro-batches

CASES: list[tuple[str, dict[str, Any], str]] = [
    ("sft", {"token_metrics": True}, "likelihood"),
    ("sft", {"loss_type": "dft"}, "likelihood"),
    ("sft", {"label_smoothing": 0.1}, "likelihood"),
    *[("dpo", {"loss_type": name}, "margin") for name in ("sigmoid", "hinge", "ipo", "nca_pair", "bco_pair", "aot")],
    *[("dpo", {"loss_type": name}, "margin") for name in ("sppo_hard", "apo_zero", "apo_down", "aot_unpaired")],
    ("dpo", {"loss_type": "discopop", "discopop_tau": 1.0}, "margin"),  # at 0.05 its slope at the start is positive
    ("dpo", {"loss_type": "exo_pair", "label_smoothing": 0.01}, "margin"),
    ("dpo", {"loss_type": "robust", "label_smoothing": 0.1}, "margin"),
    ("dpo", {"loss_type": ["sigmoid_norm", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]}, "margin"),
    ("dpo", {"use_weighting": True, "ld_alpha": 0.5, "f_divergence_type": "js_divergence"}, "margin"),
    ("dpo", {"token_metrics": True}, "margin"),
    ("cpo", {}, "margin"),
    ("simpo", {}, "margin"),
    ("alphapo", {}, "margin"),
    ("orpo", {"beta": 1.0}, "margin"),
    ("tpo", {}, "margin"),
    ("kto", {}, "margin"),
    ("kto", {"loss_type": "apo_zero_unpaired"}, "margin"),
    ("bco", {}, "margin"),
    ("bco", {"density_ratio": True}, "margin"),
    ("online_dpo", {}, "margin"),
    ("online_dpo", {"loss_type": "ipo", "missing_eos_penalty": 1.0, "token_metrics": True}, "margin"),
    ("reward_model", {}, "order"),
    ("process_reward_model", {}, "labels"),
    ("grpo", {}, "advantage"),
    ("grpo", {"loss_type": "grpo", "beta": 0.01, "updates_per_batch": 2, "minibatches": 2}, "advantage"),
    ("grpo", {"loss_type": "cispo", "epsilon_high": 5.0, "correction": "token_truncate"}, "advantage"),
    ("grpo", {"top_entropy_quantile": 0.5, "entropy_coef": 0.001, "mask_truncated_completions": True}, "advantage"),
    ("grpo", {"beta": 0.01, "kl_estimator": "k2", "use_bias_correction_kl": False}, "advantage"),
    ("grpo", {"use_adaptive_entropy": True, "entropy_coef": 0.01, "entropy_target": 5.0}, "advantage"),
    ("grpo", {"replay_buffer_size": 4, "updates_per_batch": 2}, "advantage"),
    ("grpo", {"multi_objective_aggregation": "normalize_then_sum"}, "advantage"),
    ("gfpo", {"num_remains_in_group": 3, "rejected": "advantage_0", "group_filter": "reward_per_token"}, "advantage"),
    ("xpo", {"alpha": 1e-3}, "margin"),
    ("nash_md", {"token_metrics": True}, "advantage"),
    ("a2po", {"beta2": 0.1}, "advantage"),
    ("sppo", {"beta": 0.1}, "preferred"),
    ("rloo", {"normalize_advantages": True, "correction": "sequence_truncate", "updates_per_batch": 2}, "advantage"),
    ("reinforce_pp", {"gamma": 0.9, "minibatches": 2}, "advantage"),
    ("reinforce_pp_baseline", {"mask_truncated_completions": True}, "advantage"),
    *[("grpo", {"loss_type": name}, "advantage") for name in ("bnpo", "luspo", "sapo", "gmpo", "vespo", "dppo")],
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model_folder(tmp_path_factory.mktemp("model"), hidden=32, vocab=32)


def learners(pipeline: Pipeline, model: ModelSpec, optim: OptimSpec | None = None) -> dict[str, ModelWorker]:
    return model_workers(pipeline, model, optim or OptimSpec(learning_rate=1e-3, total_steps=4 * STEPS))


def made_up(pipeline: Pipeline, policy: ModelWorker) -> Batch:
    """A batch of the pipeline's kind of data, with every column that the data, the sampler and the reward write."""
    rng = np.random.default_rng(0)
    size = min(pipeline.rows_per_item, 4)
    lengths = rng.integers(5, 12, 32 // size * size)
    rows = np.arange(len(lengths))
    mask = np.concatenate([np.arange(length) >= 2 for length in lengths])
    batch = Batch.build(lengths, tokens=rng.integers(2, 32, lengths.sum()), mask=mask, group=rows // size)
    of_row = {
        "preferred": rows % size == 0,
        "imitated": rows % size == 2,
        "mismatched": rows % size == 1,
        "label": rows // size % 2 == 0,
        "weight": rng.uniform(0.5, 2.0, len(rows)),
        "reward": (rows % size < size // 2 if size > 1 else rows % 2).astype(np.float32),
        "truncated": rows % 7 == 0,
        "sampler": (rows % size).astype(np.int8),
        "optimal_value": np.full(len(rows), 0.5, np.float32),
        "preference": np.where(rows % 2, 0.73, 0.27).astype(np.float32),
        "completion_tokens": lengths.astype(np.int32) - 2,
        # another prompt of two tokens, and a place for a demonstration
        "teacher_prompt": np.tile(np.array([3, INSERT, 5], np.int32), (len(rows), 1)),
        "teacher_row_tokens": lengths.astype(np.int32),
    }
    parts = np.stack([of_row["reward"], rng.normal(size=len(rows))], axis=1)
    of_row |= {"reward_parts": parts, "reward_weights": np.tile([1.0, 0.1], (len(rows), 1))}
    step_label = np.where(mask, rng.integers(-1, 2, lengths.sum()), -1)
    samples = any(stage.head is Head.VOCABULARY for stage in pipeline.updates)
    sampled = said_of(policy, batch) if samples else np.zeros(batch.num_tokens, np.float32)
    return batch.with_columns(**of_row, sample_logps=sampled, step_label=step_label)


SAID = {
    Head.VOCABULARY: "old_logps",
    Head.TOKEN_SCALAR: "values",
    Head.STEP_SCALAR: "step_reward",
    Head.ROW_SCALAR: "reward",
}


def said_of(worker: ModelWorker, batch: Batch, head: Head = Head.VOCABULARY, *, adapters: bool = True) -> np.ndarray:
    """[T] or [B]: what a role's model says of the batch."""
    column = np.zeros(len(batch) if head.per_row else batch.num_tokens, np.float32)
    ((rows, part),) = shard(batch.only({"tokens", "mask"}), 1, TOKEN_BUDGET)
    _, block = worker.infer(part, (SAID[head],), head, 1.0, adapters)
    order = np.asarray(rows)
    column[order if head.per_row else batch.token_index(order)] = block[SAID[head]]
    return column


def likelihood(policy: ModelWorker, batch: Batch) -> float:
    return float(said_of(policy, batch)[batch["mask"]].mean())


def margin(policy: ModelWorker, batch: Batch) -> float:
    """By how much better rows are more likely, per token, than worse ones; unpaired rows have a label for that."""
    of_row = batch.sum_by_row(said_of(policy, batch) * batch["mask"]) / batch.sum_by_row(batch["mask"])
    better, worse = batch["preferred"], ~batch["preferred"] & ~batch["imitated"]
    return float(of_row[better].mean() - of_row[worse].mean())


def label_margin(policy: ModelWorker, batch: Batch) -> float:
    """By how much desirable rows are more likely than undesirable ones."""
    of_row = batch.sum_by_row(said_of(policy, batch) * batch["mask"])
    return float(of_row[batch["label"]].mean() - of_row[~batch["label"]].mean())


def advantage(policy: ModelWorker, batch: Batch) -> float:
    """Mean log-probability of rewarded samples, above that of the others."""
    of_row = batch.sum_by_row(said_of(policy, batch) * batch["mask"])
    return float(of_row[batch["reward"] > 0].mean() - of_row[batch["reward"] == 0].mean())


def order(reward_model: ModelWorker, batch: Batch) -> float:
    """By how much chosen rows score higher than rejected ones."""
    scores = said_of(reward_model, batch, Head.ROW_SCALAR)
    return float(scores[batch["preferred"]].mean() - scores[~batch["preferred"]].mean())


def labels(reward_model: ModelWorker, batch: Batch) -> float:
    """By how much right steps are above wrong ones."""
    said, label = said_of(reward_model, batch, Head.STEP_SCALAR), batch["step_label"]
    return float(said[label == 1].mean() - said[label == 0].mean())


def preferred(policy: ModelWorker, batch: Batch) -> float:
    """By how much rows with a preference above a half are more likely than the others."""
    of_row = batch.sum_by_row(said_of(policy, batch) * batch["mask"])
    return float(of_row[batch["preference"] > 0.5].mean() - of_row[batch["preference"] < 0.5].mean())


MEASURES = {
    "likelihood": likelihood,
    "margin": margin,
    "advantage": advantage,
    "preferred": preferred,
    "order": order,
    "labels": labels,
}


@pytest.mark.parametrize(("method", "options", "aim"), CASES, ids=[f"{m} {o}" for m, o, _ in CASES])
def test_a_few_steps_move_what_the_method_exists_to_move(
    folder: Path, method: str, options: dict[str, Any], aim: str
) -> None:
    pipeline = build(method, options)
    workers = learners(pipeline, ModelSpec(str(folder)))
    policy = workers[pipeline.trained[0]]
    batch = made_up(pipeline, policy)
    measure = label_margin if "label" in pipeline.data.columns else MEASURES[aim]
    before = measure(policy, batch)
    executor = executor_of(pipeline, workers, token_budget=TOKEN_BUDGET)
    metrics = steps(executor, RowTable(batch), STEPS)[-1]
    assert measure(policy, batch) > before + 0.01
    assert all(np.isfinite(value) for value in metrics.values()), metrics


def test_ppo_makes_rewarded_samples_likelier_and_its_critic_explains_more_of_the_returns(folder: Path) -> None:
    pipeline = build("ppo", {"num_ppo_epochs": 2, "lam": 1.0})
    workers = learners(pipeline, ModelSpec(str(folder)))
    batch = made_up(pipeline, workers["policy"])
    before = advantage(workers["policy"], batch)
    first, *_, last = steps(executor_of(pipeline, workers, token_budget=TOKEN_BUDGET), RowTable(batch), STEPS)
    assert advantage(workers["policy"], batch) > before + 0.01
    assert last["val/explained_variance"] > max(first["val/explained_variance"], 0) + 0.3
    assert last["val/error"] < first["val/error"]


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("grpo", {"beta": 0.1, "correction": "token_truncate"}),
        ("rloo", {"correction": "sequence_truncate"}),
        ("reinforce_pp", {"correction": "token_mask"}),
        ("reinforce_pp_baseline", {"correction": "token_truncate"}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_on_fresh_weights_the_ratio_to_the_sampler_is_1_and_the_kl_is_0(
    folder: Path, tmp_path: Path, method: str, options: dict[str, Any]
) -> None:
    pipeline = build(method, options)
    kl = "objective/kl" if method == "reinforce_pp" else "kl"
    first: dict[str, dict[str, float]] = {}
    others = {"same": folder, "other": tiny_model_folder(tmp_path, hidden=32, vocab=32, seed=1)}
    for name, reference in others.items():
        workers = learners(pipeline, ModelSpec(str(folder)))
        workers["reference"] = ModelWorker("reference", ModelSpec(str(reference)), BackendSpec("single", None), 1)
        workers["reference"].ready()
        table = RowTable(made_up(pipeline, workers["policy"]))
        first[name] = steps(executor_of(pipeline, workers, token_budget=TOKEN_BUDGET), table, 1)[0]
        assert first[name]["sampling/importance_sampling_ratio/mean"] == pytest.approx(1, abs=1e-5)
        assert first[name]["clip_ratio/region_mean"] == 0
    assert first["same"][kl] == pytest.approx(0, abs=1e-6)
    assert abs(first["other"][kl]) > 1e-3

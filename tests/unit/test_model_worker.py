"""What an update computes and what it keeps: its steps, statistics, metrics and states, by one worker."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import MixtralConfig, MixtralForCausalLM

from actors.batch import Batch
from actors.errors import RunError
from actors.model_worker import ModelWorker, UpdateReport
from actors.objective import Stat, World
from actors.sharding import Shard, shard
from tests.unit.model_worker_stage import (
    OPTIM,
    VARIANTS,
    Nll,
    assert_equal_bits,
    batch,
    folder,
    logps,
    part,
    train,
    trainable,
    weights,
)

__all__ = ["folder"]  # a fixture


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_same_seed_gives_the_same_bits(folder: Path, variant: str) -> None:
    one, other = (trainable(folder, seed=3, **VARIANTS[variant]) for _ in range(2))
    for step in range(3):  # by turns, in one process: neither may draw from the other's random numbers
        train(one, range(step, step + 1))
        train(other, range(step, step + 1))
    assert_equal_bits(weights(one), weights(other))


def test_another_seed_draws_other_noise(folder: Path) -> None:
    one, other = (trainable(folder, seed=seed, neftune_noise_alpha=5.0) for seed in (1, 2))
    assert train(one, range(1))[0].metrics["loss"] != train(other, range(1))[0].metrics["loss"]


@pytest.mark.parametrize("variant", VARIANTS)
def test_training_lowers_the_loss(folder: Path, variant: str) -> None:
    target = trainable(folder, **VARIANTS[variant], optim=replace(OPTIM, learning_rate=1e-2))
    data = part(batch())
    losses = [target.update(data, Nll(), 1.0, "policy.update").metrics["loss"] for _ in range(8)]
    assert losses[-1] < losses[0] - 0.5


def test_a_result_does_not_depend_on_how_the_batch_was_cut(folder: Path) -> None:
    reports, results = [], []
    for token_budget in (24, 64, 1000):
        target = trainable(folder)
        reports.append(target.update(part(batch(), token_budget), Nll(), 1.0, "policy.update"))
        results.append(weights(target))
    for report, result in zip(reports[1:], results[1:], strict=True):
        assert report.metrics == pytest.approx(reports[0].metrics, rel=1e-5)
        assert report.grad_norm == pytest.approx(reports[0].grad_norm, rel=1e-5)
        for name, tensor in result.items():
            torch.testing.assert_close(tensor, results[0][name], rtol=1e-3, atol=1e-5)


def test_an_empty_micro_batch_changes_nothing(folder: Path) -> None:
    plain, padded = trainable(folder), trainable(folder)
    data = part(batch())
    with_empty = Shard(data.batch, ((), *data.micro_batches, ()))
    expected = plain.update(data, Nll(coupled=True), 1.0, "policy.update")
    found = padded.update(with_empty, Nll(coupled=True), 1.0, "policy.update")
    assert_equal_bits(weights(plain), weights(padded))
    assert found.metrics.pop("padding_share") == pytest.approx(2 / (data.batch.num_tokens + 2))
    assert expected.metrics.pop("padding_share") == 0.0
    assert found.metrics == expected.metrics
    np.testing.assert_array_equal(logps(plain, data), logps(padded, with_empty))


def test_the_balancing_loss_of_experts_weighs_each_micro_batch_by_its_tokens(tmp_path: Path) -> None:
    config: dict[str, Any] = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 16, "num_hidden_layers": 1}
    heads: dict[str, Any] = {"num_attention_heads": 2, "num_key_value_heads": 1, "num_local_experts": 4}
    torch.manual_seed(0)
    MixtralForCausalLM(MixtralConfig(**config, **heads)).save_pretrained(tmp_path)
    data = batch(rows=1).select([0, 0, 0])  # equal rows are routed alike, so that the cut cannot change the formula
    reports = []
    for micro_batches in (((0, 1, 2),), ((0,), (1, 2))):
        target = trainable(tmp_path, router_aux_loss_coef=10.0)
        reports.append(target.update(Shard(data, micro_batches), Nll(), 1.0, "policy.update"))
    plain = trainable(tmp_path, router_aux_loss_coef=0.0)
    without = plain.update(Shard(data, ((0, 1, 2),)), Nll(), 1.0, "policy.update")
    assert reports[0].metrics["aux_loss"] == pytest.approx(reports[1].metrics["aux_loss"], rel=1e-4)
    assert reports[0].grad_norm == pytest.approx(reports[1].grad_norm, rel=1e-4)
    assert reports[0].grad_norm != pytest.approx(without.grad_norm, rel=1e-2)
    assert "aux_loss" not in without.metrics


def passes(target: ModelWorker, of: Shard, objective: Nll) -> tuple[list[tuple[int, bool]], UpdateReport]:
    """(tokens, with gradient) of each forward pass of an update, and its report."""
    seen: list[tuple[int, bool]] = []
    hook = target.backend.model.register_forward_hook(
        lambda _, args, __: seen.append((len(args[0]), torch.is_grad_enabled()))
    )
    report = target.update(of, objective, 1.0, "policy.update")
    hook.remove()
    return seen, report


def test_statistics_rows_pass_once_without_gradient_and_only_enter_the_statistics(folder: Path) -> None:
    data = batch()
    marked = np.arange(len(data)) % 3 == 0
    data = data.with_columns(mismatched=marked)
    kept, left = (data.select(np.flatnonzero(rows)) for rows in (~marked, marked))
    target, plain = trainable(folder), trainable(folder)
    ((_, dealt),) = shard(data, 1, 1000, statistics_rows="mismatched")
    seen, report = passes(target, dealt, Nll(coupled=True, statistics_rows="mismatched"))
    assert seen == [(left.num_tokens, False), (kept.num_tokens, True)]
    expected = plain.update(part(kept, 1000), Nll(), 1.0, "policy.update")
    assert report.metrics["nll"] == pytest.approx(-float(plain_logps(folder, left).sum()), rel=1e-5)
    assert report.metrics["loss"] == expected.metrics["loss"]
    assert report.metrics["num_tokens"] == data.num_tokens
    assert_equal_bits(weights(target), weights(plain))


def plain_logps(folder: Path, data: Batch) -> np.ndarray:
    return logps(trainable(folder, optim=None), part(data, 1000))


def test_one_micro_batch_passes_once_even_if_its_rows_are_coupled_and_several_twice(folder: Path) -> None:
    data = batch()
    once, one = passes(trainable(folder), part(data, 1000), Nll(coupled=True))
    assert once == [(data.num_tokens, True)]
    ((_, cut),) = shard(data, 1, 64)
    twice, several = passes(trainable(folder), cut, Nll(coupled=True))
    sizes = [int(cut.batch.lengths[list(rows)].sum()) for rows in cut.micro_batches]
    assert len(sizes) > 1
    assert sorted(twice) == sorted([(size, grad) for size in sizes for grad in (False, True)])
    assert several.metrics["nll"] == pytest.approx(one.metrics["nll"], rel=1e-5)
    assert several.grad_norm == pytest.approx(one.grad_norm, rel=1e-5)


@pytest.mark.parametrize("token_budget", [64, 1000])
def test_statistics_use_the_same_noisy_outputs_as_the_loss(folder: Path, token_budget: int) -> None:
    data = batch()
    quiet, noisy = trainable(folder), trainable(folder, neftune_noise_alpha=5.0)
    of_quiet, of_noisy = (
        target.update(part(data, token_budget), Nll(coupled=True), 1.0, "policy.update").metrics
        for target in (quiet, noisy)
    )
    assert of_noisy["nll"] == pytest.approx(of_noisy["loss"] * data["mask"].sum(), rel=1e-6)
    assert of_noisy["nll"] != pytest.approx(of_quiet["nll"], rel=1e-4)


def test_a_batch_of_statistics_rows_only_is_refused(folder: Path) -> None:
    data = batch().with_columns(mismatched=np.ones(12, bool))
    ((_, dealt),) = shard(data, 1, 1000, statistics_rows="mismatched")
    with pytest.raises(RunError, match="empty batch"):
        trainable(folder).update(dealt, Nll(coupled=True, statistics_rows="mismatched"), 1.0, "policy.update")


def test_metrics_are_combined_over_micro_batches_in_their_own_way(folder: Path) -> None:
    data = batch()
    report = trainable(folder).update(part(data), Nll(), 1.0, "policy.update")
    whole = trainable(folder).update(part(data, 10_000), Nll(), 1.0, "policy.update")
    assert report.metrics["longest"] == data.lengths.max()
    assert report.metrics["num_tokens"] == report.tokens == data.num_tokens
    assert report.metrics["entropy"] == pytest.approx(whole.metrics["entropy"], rel=1e-5)
    assert "unmeasured" not in report.metrics
    assert report.seconds.keys() == {"forward", "backward", "step"}
    coupled = trainable(folder).update(part(data), Nll(coupled=True), 1.0, "policy.update")
    assert coupled.seconds.keys() == {"forward", "backward", "step", "statistics"}
    assert all(seconds > 0 for seconds in report.seconds.values())


def test_a_new_phase_starts_schedule_moments_and_states_afresh_on_the_same_weights(
    folder: Path, tmp_path: Path
) -> None:
    target = trainable(folder)
    train(target, range(3), Nll(coupled=True))
    target.save_model(str(tmp_path / "phase"))
    target.reset(replace(OPTIM, learning_rate=1e-3))
    fresh = trainable(tmp_path / "phase", optim=replace(OPTIM, learning_rate=1e-3))
    found, expected = (train(each, range(3, 5), Nll(coupled=True)) for each in (target, fresh))
    assert [r.metrics for r in found] == [r.metrics for r in expected]
    assert found[0].learning_rate == 1e-3
    assert found[0].metrics["steps"] == 1
    assert_equal_bits(weights(target), weights(fresh))


def test_a_gradient_that_is_not_finite_ends_the_run(folder: Path) -> None:
    class Broken(Nll):
        def loss(self, *args: Any) -> tuple[Tensor, dict[str, Stat]]:
            loss, stats = super().loss(*args)
            return loss * math.nan, stats

    with pytest.raises(RunError, match="gradient norm of step 1 is nan"):
        trainable(folder).update(part(batch()), Broken(), 1.0, "policy.update")


def test_an_empty_batch_is_refused(folder: Path) -> None:
    with pytest.raises(RunError, match="empty batch"):
        trainable(folder).update(Shard(Batch.empty(), ()), Nll(), 1.0, "policy.update")


def test_sleep_and_wake_do_not_change_training(folder: Path) -> None:
    rested, restless = trainable(folder, dtype="bfloat16"), trainable(folder, dtype="bfloat16")
    train(rested, range(1))
    rested.sleep()
    rested.wake()
    train(rested, range(1, 3))
    train(restless, range(3))
    assert_equal_bits(weights(rested), weights(restless))


def test_half_precision_weights_follow_float32_masters(folder: Path, tmp_path: Path) -> None:
    """Steps far below bfloat16's resolution must add up: 10 steps of 1e-5 move weights of about 0.1."""
    small = replace(OPTIM, learning_rate=1e-5, scheduler="constant", weight_decay=0.0)
    half, full = (trainable(folder, optim=small, dtype=dtype) for dtype in ("bfloat16", "float32"))
    start = weights(full)
    for target in (half, full):
        for _ in range(10):
            target.update(part(batch()), Nll(), 1.0, "policy.update")
    moved = {name: (tensor - start[name]) for name, tensor in weights(full).items()}
    half.save_state(str(tmp_path))
    masters = torch.load(tmp_path / "single.pt")["weights"]
    for name, movement in moved.items():
        if movement.ndim == 2:
            found = masters[name] - start[name].bfloat16().float()
            assert torch.cosine_similarity(found.flatten(), movement.flatten(), dim=0) > 0.9


def counting(of: Batch, world: World, state: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Stat]]:
    """A credit call that says at every token how often it was called."""
    state["calls"] = state.get("calls", 0) + 1
    return {"advantages": np.full(of.num_tokens, state["calls"], np.float32)}, {"calls": Stat(state["calls"])}


def test_what_a_credit_call_keeps_is_there_after_a_resume_and_stays_as_it_is_in_an_evaluation(
    folder: Path, tmp_path: Path
) -> None:
    def calls(target: ModelWorker, *, learning: bool = True) -> float:
        metrics, block = target.credit(part(batch()), counting, {}, "driver.credit counting", learning)
        assert set(block["advantages"]) == {metrics["calls"]}
        return metrics["calls"]

    target = trainable(folder)
    assert [calls(target), calls(target), calls(target, learning=False), calls(target)] == [1, 2, 3, 3]
    target.save_state(str(tmp_path))
    resumed = trainable(folder, seed=5)
    resumed.load_state(str(tmp_path))
    assert calls(resumed) == 4
    resumed.reset(OPTIM)
    assert calls(resumed) == 1

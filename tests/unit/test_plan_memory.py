"""The memory that a plan estimates, and roles that take turns on a GPU."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from transformers import Qwen2Config

from orchestrator.config.colocation import bucket_bytes_between, transport_between
from orchestrator.planning.memory_estimate import Shape, Training, estimate
from tests.unit.plan_stage import SEVEN_BILLION, config, planned, report

ON_ONE_GPU: dict[str, Any] = {
    "policy": {"gpus": 0.4},
    "reference": {"gpus": 0.2, "colocate": "policy"},
    "rollout": {"gpus": 0.4, "colocate": "policy", "kv_cache_gib": 8},
    "reward": {"gpus": 0.0, "colocate": "policy"},
}


def test_colocated_roles_that_hold_models_take_turns_so_that_the_largest_counts_and_not_the_sum() -> None:
    plan = planned(config(options={"beta": 0.1}, roles=ON_ONE_GPU), parameters=1_000_000_000)
    assert plan.turns == (("policy", "reference", "rollout"),), "not who runs users' code"
    held = [memory.on_device for role in plan.turns[0] if (memory := plan.roles[role].memory) is not None]
    assert len(held) == 3 and sum(held) > 1.4 * max(held)
    said = report(plan)
    assert f"about {max(held):.2f} GiB of each GPU are in use at most (policy) instead of {sum(held):.2f}" in said
    assert f"up to {sum(held) - min(held):.2f} wait on the host" in said
    on_cpu = {role: {"colocate": keys["colocate"]} for role, keys in ON_ONE_GPU.items() if "colocate" in keys}
    assert "and on a CPU keep their memory" in report(planned(config(options={"beta": 0.1}, roles=on_cpu)))
    apart = planned(config(options={"beta": 0.1}))
    assert apart.turns == () and "take turns" not in report(apart)


def test_an_engine_that_samples_ahead_of_training_stays_awake_while_the_others_take_turns() -> None:
    ahead = config(options={"beta": 0.1, "correction": "token_truncate"}, train={"max_staleness": 1}, roles=ON_ONE_GPU)
    assert planned(ahead).turns == (("policy", "reference"),)


@pytest.mark.parametrize(
    ("train", "asked", "used"),
    [
        ({}, None, "object_store"),
        ({}, "disk", "disk"),
        ({"max_staleness": 1}, None, "collective"),
        ({"max_staleness": 1}, "collective", "collective"),
    ],
)
def test_weights_wait_on_the_host_for_an_engine_that_sleeps_while_its_trainer_is_awake(
    train: dict[str, Any], asked: Any, used: str
) -> None:
    changed = config(train=train, roles=ON_ONE_GPU, weights={"transport": asked})
    assert transport_between(changed, planned(changed).turns, "policy", "rollout") == used


@pytest.mark.parametrize(
    ("policy", "rollout", "asked", "mib"),
    [(0, 0, None, 16), (1, 1, None, 256), (1, 0, None, 16), (1, 1, 0.5, 0.5), (0, 0, 64, 64)],
)
def test_buckets_are_larger_between_gpus_unless_the_user_says_a_size(
    policy: float, rollout: float, asked: float | None, mib: float
) -> None:
    roles = {"policy": {"gpus": policy}, "rollout": {"gpus": rollout}}
    changed = config(roles=roles, weights={"bucket_mib": asked})
    assert bucket_bytes_between(changed, "policy", "rollout") == int(mib * 2**20)


def test_zero_stages_divide_what_they_shard_and_adapters_cost_little() -> None:
    def training(stage: int, **changes: Any) -> Training:
        return replace(Training(stage, 8, None, gradient_checkpointing=False), **changes)

    plain, one, two, three = (estimate(SEVEN_BILLION, "bfloat16", training=training(stage)) for stage in range(4))
    assert plain.weights == pytest.approx(7e9 * 2 / 2**30)
    assert plain.optimizer == pytest.approx(7e9 * 12 / 2**30) and one.optimizer == plain.optimizer / 8
    assert one.gradients == plain.gradients and two.gradients == plain.gradients / 8
    assert two.weights == plain.weights and three.weights == plain.weights / 8
    adapters = estimate(SEVEN_BILLION, "bfloat16", training=training(0, lora_rank=16))
    assert adapters.weights == plain.weights and adapters.optimizer < 0.02 * plain.optimizer


def test_activations_follow_from_the_shape_where_it_is_known() -> None:
    """Qwen2's 0.5B has a feed-forward of 5.4 times its width; a usual shape has 2.7 times."""
    config = Qwen2Config(hidden_size=896, intermediate_size=4864, num_hidden_layers=24, num_attention_heads=14,
                         num_key_value_heads=2)  # fmt: skip
    shape = Shape.of(config)
    assert shape == Shape(layers=24, hidden=896, queries=896, keys=128, gated=4864, fusable=True)
    training = Training(0, 1, None, gradient_checkpointing=False)
    told, guessed = (
        estimate(390_000_000, "bfloat16", tokens=16_384, training=training, shape=each) for each in (shape, None)
    )
    assert told.activations == pytest.approx(16_384 * 24 * 25_088 * 2 / 2**30)
    assert 1.3 < told.activations / guessed.activations < 2 and told.weights == guessed.weights


@pytest.mark.parametrize(
    ("tokens", "vocabulary", "fused", "gib"),
    [
        (12_205, 32_000, False, 22.9),
        (12_205, 32_000, True, 16.8),
        (12_205, 151_936, True, 18.7),
        (46_493, 32_000, True, 48.1),
    ],
)
def test_the_estimate_is_near_the_peak_that_was_measured_on_an_h200(
    tokens: int, vocabulary: int, fused: bool, gib: float
) -> None:
    """docs/performance.md: `sft` of the 0.5B shape in bfloat16; `tokens` of the largest micro-batch."""
    shape = Shape(layers=24, hidden=896, queries=896, keys=128, gated=4864, fusable=True)
    training = Training(0, 1, None, gradient_checkpointing=False, fused=fused)
    parameters = 357_898_112 + 896 * vocabulary
    found = estimate(parameters, "bfloat16", tokens=tokens, training=training, shape=shape)
    assert found.total - found.process == pytest.approx(gib, rel=0.2)


def test_recomputing_activations_takes_a_fraction_of_storing_them() -> None:
    kept = Training(0, 1, None, gradient_checkpointing=False)
    stored = estimate(SEVEN_BILLION, "bfloat16", tokens=8192, training=kept)
    recomputed = estimate(SEVEN_BILLION, "bfloat16", tokens=8192, training=replace(kept, gradient_checkpointing=True))
    assert 0.05 < recomputed.activations / stored.activations < 0.2


def test_averages_cost_three_copies_of_what_is_trained_shared_by_the_ranks() -> None:
    roles = {"policy": {"backend": "deepspeed", "ranks": 4, "zero_stage": 0}}
    plain, averaged = (
        planned(config("dpo", train={"bema": bema}, roles=roles), parameters=SEVEN_BILLION).roles for bema in (None, {})
    )
    policy = averaged["policy"].memory
    assert policy is not None and policy.averages == pytest.approx(3 * 4 * 7e9 / 4 / 2**30)
    assert plain["policy"].memory == replace(policy, averages=0.0)
    assert averaged["reference"].memory == plain["reference"].memory


def test_an_engine_s_cache_is_what_is_left_of_a_gpu_and_small_on_a_cpu() -> None:
    def cache(**rollout: Any) -> float:
        plan = planned(config(roles={"policy": {"gpus": 1}, "rollout": {"gpus": 1, **rollout}}), parameters=10**9)
        memory = plan.roles["rollout"].memory
        assert memory is not None
        return memory.kv_cache

    assert cache() == 0 and cache(kv_cache_gib=2.0) == 2.0
    on_cpu = planned(config(), parameters=10**9).roles["rollout"].memory
    assert on_cpu is not None and on_cpu.kv_cache == 0.25

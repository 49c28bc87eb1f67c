"""A key that cannot act where it is set is refused or warned of."""

from __future__ import annotations

from typing import Any

import pytest

from orchestrator.config.schema import RunConfig
from orchestrator.planning.machine import Machine
from orchestrator.planning.plan import draft_plan
from orchestrator.planning.resolve import build_pipeline
from tests.unit.run_configs import CLASSIC, EXPLORED, GRPO, JUDGED, PPO, SFT, TALKING, TAUGHT, merged

IDLE: list[tuple[dict[str, Any], str]] = [  # a configuration, and the key that its warnings name
    (merged(SFT, {"phases": {"a": {"sampling": {"top_k": 4}}}}), "phases.a.sampling.top_k=4"),
    (
        merged(SFT, {"phases": {"a": {"sampling": {"temperature": 0.5}, "evaluation": {"data": {"path": "x"}}}}}),
        "phases.a.sampling.temperature=0.5",
    ),
    (
        merged(SFT, {"phases": {"a": {"evaluation": {"rows": {"path": "x"}, "max_tokens": 4}}}}),
        "phases.a.evaluation.max_tokens=4",
    ),
    (merged(SFT, {"rewards": [{"fn": "exact_match"}]}), "rewards: nothing is scored"),
    (merged(SFT, {"weights": {"bucket_mib": 9.0}}), "weights.bucket_mib=9.0"),
    (merged(SFT, {"logging": {"completions_shown": 9}}), "logging.completions_shown=9"),
    (merged(SFT, {"roles": {"rollout": {"max_model_len": 9}}}), "roles.rollout.max_model_len=9"),
    (merged(SFT, {"roles": {"reference": {"call_timeout_s": 9}}}), "roles.reference.call_timeout_s=9.0"),
    (merged(GRPO, {"model": {"lora": {}}, "roles": {"reference": {"threads": 2}}}), "roles.reference.threads=2"),
    (merged(GRPO, {"roles": {"policy": {"zero_stage": 3}}}), "roles.policy.zero_stage=3"),
    (
        merged(GRPO, {"roles": {"value": {"optimizer": {"warmup_steps": 3}}}}),
        "roles.value.optimizer.warmup_steps=3: no phase trains the role",
    ),
    (merged(GRPO, {"roles": {"teacher": {"model": "another"}}}), "roles.teacher.model=another"),
    (merged(SFT, {"roles": {"reference": {"copies": "value"}}}), "roles.reference.copies=value"),
    (merged(GRPO, {"roles": {"teacher": {"ping_timeout_s": 9}}}), "roles.teacher.ping_timeout_s=9.0"),
    (merged(GRPO, {"roles": {"teacher_rollout": {"follows": "value"}}}), "roles.teacher_rollout.follows=value"),
    (
        merged(
            GRPO, {"rewards": [{"role": "reward_model"}], "roles": {"reward_model": {"optimizer": {"warmup_steps": 3}}}}
        ),
        "roles.reward_model.optimizer.warmup_steps=3: no phase trains the role",
    ),
    (
        merged(GRPO, {"roles": {"reference": {"model": "another", "copies": "value"}}}),
        "roles.reference.copies=value",
    ),
    (
        merged(
            GRPO,
            {
                "phases": {"a": {"train": {"weight_decay": 0.5}}},
                "roles": {"policy": {"optimizer": {"weight_decay": 0.1}}},
            },
        ),
        "phases.a.train.weight_decay=0.5",
    ),
    (merged(GRPO, {"roles": {"rollout": {"engine": "hf", "kv_cache_gib": 2}}}), "roles.rollout.kv_cache_gib=2.0"),
    (merged(GRPO, {"cluster": {"gpu_memory_gib": 80}}), "cluster.gpu_memory_gib=80"),
    (merged(GRPO, {"weights": {"lora": "merged"}}), "weights.lora=merged: without model.lora"),
    (merged(GRPO, {"cluster": {"address": "a:1", "dashboard": True}}), "cluster.dashboard=True"),
    (
        merged(GRPO, {"phases": {"a": {"train": {"scheduler": "constant", "min_lr_ratio": 0.5}}}}),
        "phases.a.train.min_lr_ratio=0.5",
    ),
    (merged(GRPO, {"phases": {"a": {"train": {"warmup_steps": 50}}}}), "phases.a.train.warmup_steps=50"),
    (merged(GRPO, {"roles": {"rollout": {"mixes": "reference"}}}), "roles.rollout.mixes=reference"),
    (merged(GRPO, {"model": {"lm_head_fp32": True}}), "model.lm_head_fp32=True"),
    (merged(SFT, {"phases": {"a": {"sampling": {"replay_truncation": True}}}}), "sampling.replay_truncation=True"),
    (merged(GRPO, {"phases": {"a": {"sampling": {"top_p": 0.9}}}}), "set replay_truncation=true"),
    (merged(GRPO, {"phases": {"a": {"options": {"epsilon": 0.1}}}}), "phases.a: options.epsilon"),
]
REFUSED: list[tuple[dict[str, Any], str]] = [
    (merged(GRPO, {"phases": {"a": {"sampling": {"temperature": 0}}}}), "phases.a.sampling.temperature=0"),
    (merged(GRPO, {"rewards": [{"fn": "exact_match", "weight": 0}]}), "rewards: all weights are 0"),
    (
        merged(
            CLASSIC,
            {
                "rewards": [{"judge": {"role": "asked"}}],
                "roles": {
                    "judge": {"kind": "frozen", "model": "${phases.a.model}"},
                    "asked": {"kind": "engine", "follows": "judge", "max_model_len": 99},
                },
            },
        ),
        "roles.asked.follows=judge: its model is there only when an earlier phase has ended",
    ),
    (
        merged(GRPO, {**JUDGED, "phases": {"a": {"method": "nash_md", "options": {"missing_eos_penalty": 1.0}}}}),
        "missing_eos_penalty changes a reward, and nash_md learns from what a pairwise judge prefers",
    ),
    (
        merged(GRPO, {"rewards": [*JUDGED["rewards"], *GRPO["rewards"]], "phases": {"a": {"method": "nash_md"}}}),
        "a preference and a score do not add up",
    ),
    (
        merged(TALKING, {"phases": {"a": {"episode": {"split": "turns"}, "options": {"replay_buffer_size": 9}}}}),
        "phases.a.episode.split=turns makes several rows of a sample, and options.replay_buffer_size",
    ),
    (
        merged(EXPLORED, {"phases": {"a": {"episode": {"tools": ["add.py:add"], "split": "turns"}}}}),
        "xpo makes other rows of whole samples",
    ),
    (
        merged(
            merged(PPO, {"rewards": [{"role": "reward_model", "steps": "each"}]}),
            {"phases": {"a": {"episode": {"tools": ["add.py:add"], "split": "turns"}}}},
        ),
        "rewards with steps=each are those of one row",
    ),
    (merged(GRPO, {"rewards": [{"role": "reward_model", "steps": "each"}]}), "grpo learns from one reward per answer"),
    (merged(GRPO, {"phases": {"a": {"options": {"supervision": "process"}}}}), "no reward gives them; add {role: ROLE"),
    (
        merged(PPO, {"rewards": [{"role": "reward_model", "steps": "each", "name": name} for name in ("a", "b")]}),
        "rewards: 2 of them have steps=each",
    ),
    (merged(GRPO, {"rewards": [{"role": ["reward_model", "rollout"]}]}), "rewards: rollout has no model to score with"),
    (merged(GRPO, {"rewards": [{"judge": {"role": "reference"}}]}), "the judge reference cannot be asked"),
    (merged(GRPO, {"rewards": [{"judge": {"role": "rollout"}}]}), "roles.rollout.max_model_len is not set"),
    (
        merged(GRPO, {"phases": {"a": {"sampling": {"replay_truncation": True}}}}),
        "phases.a.sampling.replay_truncation: nothing cuts",
    ),
    (
        merged(GRPO, {"phases": {"a": {"sampling": {"replay_truncation": True, "top_p": 0.9}}}}),
        "set phases.a.sampling.top_k (128, say)",
    ),
    (
        merged(TAUGHT, {"phases": {"a": {"sampling": {"replay_truncation": True, "top_k": 9}}}}),
        "phases.a.sampling.replay_truncation: gkd learns from whole distributions",
    ),
    (
        merged(GRPO, {"phases": {"a": {"data": {"path": "x", "mixture": [{"path": "y", "fraction": 1}]}}}}),
        "phases.a.data.path=x beside phases.a.data.mixture",
    ),
    (
        merged(GRPO, {"roles": {"rollout": {"engine": "hf", "tensor_parallel": 2}}}),
        "roles.rollout.tensor_parallel=2",
    ),
]


def drafted(tree: dict[str, Any]) -> Any:
    config = RunConfig.model_validate(tree)
    pipelines = {name: build_pipeline(phase) for name, phase in config.phases.items()}
    return draft_plan(config, pipelines, machine=Machine(4))


@pytest.mark.parametrize(("tree", "said"), IDLE, ids=[said for _, said in IDLE])
def test_a_key_without_effect_is_one_warning(tree: dict[str, Any], said: str) -> None:
    (warning,) = drafted(tree).warnings
    assert said in warning


@pytest.mark.parametrize(("tree", "said"), REFUSED, ids=[said for _, said in REFUSED])
def test_settings_with_which_nothing_would_be_learned_are_refused(tree: dict[str, Any], said: str) -> None:
    (refusal,) = drafted(tree).refusals
    assert said in refusal


def test_a_plain_configuration_gives_no_warning() -> None:
    falling = {"phases": {"a": {"train": {"scheduler": "constant", "min_lr_ratio": 0.5}}}}
    own = {"roles": {"value": {"optimizer": {"scheduler": "cosine"}}}}
    copying = {"model": {"lora": {}}, "roles": {"reference": {"copies": "value"}}}
    for tree in (GRPO, SFT, PPO, CLASSIC, TAUGHT, merged(merged(PPO, falling), own), merged(GRPO, copying)):
        assert drafted(tree).warnings == () and drafted(tree).refusals == ()

"""Every key of the configuration: set to another value it changes what a run is made of, or a named test shows what it
does; and where it cannot act, setting it is refused or warned of.

What a run is made of: the plan, what the workers of each role are started with, the deadlines of calls, the schedule,
how completions are drawn, which models score, and the items of the data. A warning or a refusal is no part of it.
"""

from __future__ import annotations

import asyncio
import json
import re
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel, ValidationError

from actors.batch import Batch
from actors.errors import UserError
from actors.worker import Ref
from orchestrator.batches.batch_stages import PhaseSettings
from orchestrator.batches.row_table import RowTable
from orchestrator.cluster.background_tasks import rank_limits
from orchestrator.cluster.failures import Watchdog
from orchestrator.cluster.launch import _Starting, average_spec, model_spec, optim_spec
from orchestrator.config.error_messages import schema_keys
from orchestrator.config.overrides import dotted
from orchestrator.config.roles import EngineRole, EnvironmentsRole, RanksRole, RolesConfig
from orchestrator.config.schema import (
    BemaConfig,
    DataConfig,
    PhaseConfig,
    RewardConfig,
    RunConfig,
    SamplingConfig,
    TrainConfig,
)
from orchestrator.config.section import types_in
from orchestrator.data.items import Longest
from orchestrator.data.source import open_source
from orchestrator.executor import Executor
from orchestrator.methods import build
from orchestrator.pipeline import Completions, Pipeline, Verb
from orchestrator.planning.episode_settings import EpisodeSettings, episode_settings
from orchestrator.planning.machine import Machine
from orchestrator.planning.plan import Plan, draft_plan
from orchestrator.planning.prepared import Prepared, PreparedPhase
from orchestrator.planning.resolve import _scoring, build_pipeline
from orchestrator.planning.schedule import Schedule
from rewards.specs import spec_of
from rollout.sampling import Sampling
from tests.unit.tiny import tiny_tokenizer

ROOT = Path(__file__).parents[2]
GRPO: dict[str, Any] = {
    "phases": {"a": {"method": "grpo", "options": {"beta": 0.1}, "train": {"steps": 50}}},
    "rewards": [{"fn": "exact_match"}],
}
SFT: dict[str, Any] = {"phases": {"a": {"method": "sft", "train": {"steps": 50}}}}
PPO: dict[str, Any] = {**GRPO, "phases": {"a": {"method": "ppo", "train": {"steps": 50}}}}
CLASSIC: dict[str, Any] = {  # a model that scores is trained, then asked
    "phases": {"a": {"method": "reward_model", "train": {"steps": 50}}, "b": GRPO["phases"]["a"]},
    "rewards": [{"role": "reward_model"}],
}
TAUGHT: dict[str, Any] = {  # by what the teacher samples
    "phases": {"a": {"method": "gkd", "options": {"lmbda": 0, "seq_kd": True}, "train": {"steps": 50}}},
    "roles": {"teacher": {"model": "big"}},
}
EXPLORED: dict[str, Any] = {**GRPO, "phases": {"a": {"method": "xpo", "train": {"steps": 50}}}}
OPPOSED: dict[str, Any] = {**GRPO, "phases": {"a": {"method": "nash_md", "train": {"steps": 50}}}}
TALKING: dict[str, Any] = {  # episodes with a tool
    **GRPO,
    "phases": {"a": {**GRPO["phases"]["a"], "episode": {"tools": ["add.py:add"]}}},
}
PLAYING: dict[str, Any] = {"phases": {"a": {"episode": {"tools": (), "environment": "game.py:Game"}}}}
LAUNCHES = {  # the others: GRPO
    "environment": TALKING,
    "value": PPO,
    "reward_model": CLASSIC,
    "teacher": TAUGHT,
    "teacher_rollout": TAUGHT,
    "reference_rollout": EXPLORED,
    "mixture_rollout": OPPOSED,
}
JUDGE: dict[str, Any] = {"url": "https://a.example/v1", "model": "m"}
JUDGED: dict[str, Any] = {"rewards": [{"judge": [JUDGE]}]}
ENSEMBLE: dict[str, Any] = {"rewards": [{"role": ["reward_model", "other"]}], "roles": {"other": {"kind": "frozen"}}}
RUBRIC: dict[str, Any] = {"rewards": [{"judge": [{**JUDGE, "kind": "rubric"}]}]}
RENAMED = {"phases": {"a": {"rename_roles": {"reference": "teacher"}}}}
DEEPSPEED = {"roles": {"ROLE": {"backend": "deepspeed"}}}
SELECTED = {"roles": {"ROLE": {"label_selector": {"zone": "a"}}}}
LORA = {"model": {"lora": {}}}
BEMA = {"phases": {"a": {"train": {"bema": {}}}}}

# key -> another value, and what else is set for it to act. `roles.*`: of each role that has the key, in a run
# that launches the role, which is the `ROLE` of what else is set.
PLANNED: dict[str, tuple[Any, dict[str, Any]]] = {
    "name": ("other", {}),
    "seed": (7, {}),
    "model.tokenizer": ("elsewhere", {}),
    "model.dtype": ("bfloat16", {}),
    "model.lora": ({}, {}),
    "model.lora.r": (4, LORA),
    "model.lora.alpha": (3.0, LORA),
    "model.lora.dropout": (0.5, LORA),
    "model.lora.target_modules": ("q_proj", LORA),
    "model.lora.use_rslora": (True, LORA),
    "model.lora.use_dora": (True, LORA),
    "model.gradient_checkpointing": (True, {}),
    "model.attention_dtype": ("bfloat16", {}),
    "model.fused_kernels": (True, {}),
    "model.neftune_noise_alpha": (5.0, {}),
    "model.router_aux_loss_coef": (0.1, {}),
    "model.lm_head_fp32": (True, {}),
    "model.trust_remote_code": (True, {}),
    "phases.NAME.method": ("dpo", {}),
    "phases.NAME.rename_roles": ({"reference": "teacher"}, {}),
    "phases.NAME.options": ({"beta": 0.0}, {}),
    "phases.NAME.episode": ({"tools": ["add.py:add"]}, {}),
    "phases.NAME.episode.tools": (["subtract.py:subtract"], TALKING),
    "phases.NAME.episode.environment": ("chess.py:Chess", PLAYING),
    "phases.NAME.episode.environment_factory": ("game.py:Game", TALKING),
    "phases.NAME.episode.options": ({"level": 2}, PLAYING),
    "phases.NAME.episode.split": ("turns", TALKING),
    "phases.NAME.episode.max_turns": (3, TALKING),
    "phases.NAME.episode.max_turn_tokens": (9, TALKING),
    "phases.NAME.episode.max_prompt_tokens": (99, TALKING),
    "phases.NAME.episode.timeout_s": (9, TALKING),
    "phases.NAME.episode.max_answer_chars": (99, TALKING),
    "phases.NAME.episode.tool_parser": ("hermes", TALKING),
    "phases.NAME.episode.reward_weight": (0.5, TALKING),
    "phases.NAME.train.batch_size": (8, {}),
    "phases.NAME.train.steps": (9, {}),
    "phases.NAME.train.learning_rate": (1e-3, {}),
    "phases.NAME.train.weight_decay": (0.1, {}),
    "phases.NAME.train.adam_betas": ((0.8, 0.9), {}),
    "phases.NAME.train.adam_eps": (1e-6, {}),
    "phases.NAME.train.scheduler": ("cosine", {}),
    "phases.NAME.train.warmup_steps": (5, {}),
    "phases.NAME.train.min_lr_ratio": (0.1, {}),
    "phases.NAME.train.max_grad_norm": (0.5, {}),
    "phases.NAME.train.max_staleness": (1, {"phases": {"a": {"options": {"correction": "token_mask"}}}}),
    "phases.NAME.train.token_budget": (999, {"phases": {"a": {"data": {"max_prompt_length": 8}}}}),
    "phases.NAME.train.deterministic": (True, {}),
    "phases.NAME.train.bema": ({}, {}),
    **{
        f"phases.NAME.train.bema.{key}": (value, BEMA)
        for key, value in {
            "update_freq": 3,
            "ema_power": 0.1,
            "bias_power": 0.1,
            "lag": 2.0,
            "multiplier": 2.0,
            "update_after": 2,
            "min_ema_multiplier": 0.3,
        }.items()
    },
    **{
        f"phases.NAME.sampling.{key}": (value, {})
        for key, value in {
            "max_tokens": 9,
            "temperature": 0.5,
            "top_p": 0.5,
            "top_k": 4,
            "min_p": 0.1,
            "stop": ("x",),
            "stop_token_ids": (5,),
            "replay_routing": True,
            "replay_truncation": True,
        }.items()
    },
    "phases.NAME.evaluation.data": ({"path": "x"}, {}),
    "phases.NAME.evaluation.max_tokens": (999, {"phases": {"a": {"evaluation": {"data": {"path": "x"}}}}}),
    "rewards.N.fn": ("completion_length", {}),
    "rewards.N.role": ("value", {"rewards": [{"role": "reward_model"}]}),
    "rewards.N.combine": ("min", ENSEMBLE),
    "rewards.N.deviations": (2.0, {"rewards": [{**ENSEMBLE["rewards"][0], "combine": "mean_minus_std"}]}),
    "rewards.N.weight": (0.5, {}),
    "rewards.N.name": ("right", {}),
    "rewards.N.options": ({"column": "x"}, {}),
    "rewards.N.timeout_s": (7.0, {}),
    "rewards.N.retries": (7, {}),
    "rewards.N.on_failure": (0.5, {}),
    "rewards.N.concurrency": (7, {}),
    "rewards.N.actor": ("ray://judges/other", {"rewards": [{"actor": "ray://judges/math"}]}),
    "rewards.N.method": ("judge", {"rewards": [{"actor": "ray://judges/math"}]}),
    "rewards.N.columns": (("answer",), {"rewards": [{"actor": "ray://judges/math"}]}),
    "rewards.N.url": ("https://b.example", {"rewards": [{"url": "https://a.example"}]}),
    "rewards.N.headers_from_env": ({"Authorization": "TOKEN"}, {"rewards": [{"url": "https://a.example"}]}),
    "rewards.N.allow_private": (True, {"rewards": [{"url": "https://a.example"}]}),
    "rewards.N.steps": ("min", {"rewards": [{"role": "reward_model"}]}),
    "rewards.N.step_separator": (";", {"rewards": [{"role": "reward_model", "steps": "min"}]}),
    "rewards.N.judge": ({**JUDGE, "model": "other"}, JUDGED),
    **{
        f"rewards.N.judge.N.{key}": (value, JUDGED)
        for key, value in {
            "kind": "binary",
            "url": "https://b.example/v1",
            "model": "other",
            "api_key_env": "KEY",
            "request": {"seed": 1},
            "template": "mine.txt",
            "pattern": "(?P<first>0)|(?P<second>1)",
            "against": "gold",
            "temperature": 0.5,
            "max_tokens": 9,
        }.items()
    },
    "rewards.N.judge.N.score_range": ([1.0, 5.0], RUBRIC),
    "rewards.N.judge.N.judgements": (3, {"rewards": [{"judge": [{**JUDGE, "temperature": 1.0}]}]}),
    "rewards.N.judge.N.role": ("reference_rollout", {"rewards": [{"judge": [{"role": "rollout"}]}]}),
    "roles.*.backend": ("deepspeed", {}),
    "roles.*.ranks": (2, DEEPSPEED),
    "roles.*.workers": (3, {}),
    "roles.*.autoscale": ({"max": 8}, {}),
    **{
        f"roles.*.autoscale.{key}": (value, {"roles": {"ROLE": {"autoscale": {"max": 8}}}})
        for key, value in {
            "min": 0,
            "max": 9,
            "target_wait": 0.5,
            "target_load": 0.5,
            "steps": 9,
            "cooldown_s": 9.0,
            "idle_s": 9.0,
        }.items()
    },
    "roles.*.gpus": (1.0, {}),
    "roles.*.cpus": (3.0, {}),
    "roles.*.threads": (3, {}),
    "roles.*.memory_gib": (3.0, {}),
    "roles.*.resources": ({"disk": 1.0}, {}),
    "roles.*.label_selector": ({"zone": "a"}, {}),
    "roles.*.fallback_strategy": ([{"label_selector": {"zone": "b"}}], SELECTED),
    "roles.*.fallback_strategy.N.label_selector": (
        {"zone": "c"},
        {"roles": {"ROLE": {"label_selector": {"zone": "a"}, "fallback_strategy": [{"label_selector": {}}]}}},
    ),
    "roles.*.deepspeed": ({"zero_optimization": {"stage": 1}}, DEEPSPEED),
    "roles.*.zero_stage": (3, DEEPSPEED),
    "roles.*.colocate": ("policy", {}),
    "roles.policy.colocate": ("reference", {}),
    "roles.*.call_timeout_s": (7.0, {}),
    "roles.*.ping_timeout_s": (7.0, {}),
    "roles.*.optimizer.learning_rate": (1e-3, {}),
    "roles.*.optimizer.weight_decay": (0.1, {}),
    "roles.*.optimizer.scheduler": ("cosine", {}),
    "roles.*.optimizer.warmup_steps": (5, {}),
    "roles.*.optimizer.max_grad_norm": (0.5, {}),
    "roles.*.copies": ("value", {}),
    "roles.*.follows": ("value", {}),
    "roles.*.mixes": ("value", {}),
    "roles.*.model": ("another", {}),
    "roles.*.dtype": ("float16", {}),
    "roles.*.concurrency": (9, {}),
    "roles.*.timeout_s": (9.0, {}),
    "roles.*.max_attempts": (9, {}),
    "roles.*.engine": ("hf", {}),
    "roles.*.tensor_parallel": (2, {}),
    "roles.*.kv_cache_gib": (2.0, {}),
    "roles.*.max_concurrency": (9, {}),
    "roles.*.max_model_len": (999, {}),
    "roles.*.engine_options": ({"x": 1}, {}),
    "roles.*.start_timeout_s": (9.0, {}),
    "roles.*.request_timeout_s": (9.0, {}),
    "roles.*.max_restarts": (9, {}),
}
READ: dict[str, tuple[Any, dict[str, Any]]] = {  # of `phases.NAME.data`: another value, and what else is set
    "columns": ({"prompt": "completion", "completion": "prompt"}, {}),
    "max_length": (5, {}),
    "max_prompt_length": (2, {}),
    "truncation": ("drop", {"max_length": 9}),
    "packing": ("bfd", {"max_length": 30}),
    "completion_only": (False, {}),
    "append_eos": (False, {}),
    "shuffle": (False, {}),
    "streaming": (True, {}),
    "limit": (2, {}),
    "split": ("test", {}),
    "path": ("missing.jsonl", {}),
    "mixture": ([{"path": "SAME", "fraction": 1.0}], {"path": None}),
}
SHOWN_BY: dict[str, str] = {  # what happens while a run goes on, or needs other data: the test that shows it
    "model.path": "tests/unit/test_pretrained.py",
    "model.chat_template": "tests/unit/test_model_worker.py",
    "output": "tests/unit/test_preconditions.py",
    "phases.NAME.data.assistant_only": "tests/unit/test_source_formats.py",
    "phases.NAME.data.cache_dir": "tests/unit/test_source_cache.py",
    "phases.NAME.data.max_bad_rows": "tests/unit/test_source_files.py",
    "phases.NAME.data.options": "tests/unit/test_source_values.py",
    "phases.NAME.data.mixture.N.path": "tests/unit/test_source_files.py",
    "phases.NAME.data.mixture.N.fraction": "tests/unit/test_source_files.py",
    "phases.NAME.data.mixture.N.split": "tests/unit/test_source_files.py",
    "phases.NAME.train.epochs": "tests/contract/test_resumed_runs.py",
    "phases.NAME.evaluation.rows": "tests/contract/test_evaluation_runs.py",
    "phases.NAME.evaluation.every": "tests/contract/test_evaluation_runs.py",
    "phases.NAME.evaluation.at_start": "tests/contract/test_evaluation_runs.py",
    "rounds": "tests/unit/test_rounds.py",
    "rounds.count": "tests/unit/test_rounds.py",
    "rounds.phases": "tests/unit/test_rounds.py",
    "roles.reward.on_failure": "tests/unit/test_collector.py",
    "weights.transport": "tests/unit/test_weights.py",
    "weights.bucket_mib": "tests/unit/test_plan.py",
    "weights.timeout_s": "tests/unit/test_links.py",
    "weights.dtype": "tests/unit/test_weights.py",
    "weights.lora": "tests/unit/test_published_adapters.py",
    "checkpoint.every": "tests/contract/test_resumed_runs.py",
    "checkpoint.grace_s": "tests/unit/test_shutdown.py",
    "checkpoint.keep": "tests/unit/test_checkpoint.py",
    "logging.trackers": "tests/unit/test_trackers.py",
    "logging.ray_train_tab": "tests/ray/test_private_head.py",
    "logging.curves": "tests/contract/test_run_handle.py",
    "logging.project": "tests/contract/test_tracker_libraries.py",
    "logging.completions_every": "tests/runs.py",
    "logging.token_samples": "tests/contract/test_episode_runs.py",
    "logging.token_steps": "tests/contract/test_episode_runs.py",
    "cluster.address": "tests/unit/test_ray_address.py",
    "cluster.num_cpus": "tests/ray/test_placement.py",
    "cluster.gpu_memory_gib": "tests/unit/test_token_budget.py",
    "cluster.object_store_mib": "tests/ray/test_precompute.py",
    "cluster.dashboard": "tests/ray/test_private_head.py",
    "cluster.placement_timeout_s": "tests/ray/test_placement.py",
}
READ_WHILE_RUNNING: dict[str, str] = {  # no test sees them: the line that reads them
    "logging.every": "orchestrator/phases/phase_run.py: logging.every",
    "logging.ray_metrics": "orchestrator/phases/run_context.py: logging.ray_metrics",
    "logging.completions_shown": "orchestrator/phases/phase_run.py: logging.completions_shown",
    "logging.token_length": "orchestrator/phases/token_recorder.py: logging.token_length",
    "cluster.watchdog_s": "orchestrator/phases/run_context.py: cluster.watchdog_s",
    "debug": "orchestrator/run.py: config.debug",
}
KINDS = {"trainer", "frozen", "engine", "scorers", "environments"}
FIXED = {f"roles.{role}.kind" for role in RolesConfig.model_fields}  # a usual name has one kind, and says it at most
NO_MATTER = {"phases.NAME.evaluation.data.shuffle": "all of it is evaluated, in any order"}


def merged(base: dict[str, Any], extra: dict[str, Any]) -> dict[str, Any]:
    found = dict(base)
    for key, value in extra.items():
        found[key] = (
            merged(found[key], value) if isinstance(value, dict) and isinstance(found.get(key), dict) else value
        )
    return found


def at(path: list[str], value: Any, tree: dict[str, Any]) -> dict[str, Any]:
    """The tree with a value at a path; `NAME` is the phase, `N` the first of a list."""
    head, *rest = path
    if head == "NAME":
        head = "a"
    if head == "N":
        return [at(rest, value, tree[0] if tree else {})]  # pyright: ignore[reportReturnType, reportArgumentType]
    below = (tree or {}).get(head)
    return {**(tree or {}), head: at(rest, value, below if below is not None else {}) if rest else value}


@cache
def all_keys() -> list[str]:
    return [dotted(keys) for keys in schema_keys(RunConfig)]


class Recorder:
    """A cluster that starts nothing and keeps what it was asked to start."""

    def __init__(self) -> None:
        self.started: list[Any] = []

    async def start_group(self, role: str, kind: type, ranks: list[dict[str, Any]]) -> Any:
        self.started.append((role, kind.__name__, ranks))

    async def start_worker(self, role: str, index: int, kind: type, kwargs: dict[str, Any]) -> Any:
        self.started.append((role, index, kind.__name__, kwargs))

    async def stop_worker(self, *_: Any) -> None: ...


class Data:
    """In the place of a data set: as much of it as a plan asks for."""

    longest = Longest(row=20, item=20, prompt=20)


def made_of(tree: dict[str, Any]) -> str:
    """What a run of this configuration is made of."""
    config = RunConfig.model_validate(tree)
    pipelines = {name: build_pipeline(phase) for name, phase in config.phases.items()}
    plan = draft_plan(config, pipelines, parameters=1_000_000, machine=Machine(4))
    phases = tuple(_prepared_phase(index, name, config, pipelines[name]) for index, name in enumerate(pipelines))
    prepared = _prepared(config, phases)
    companions = [role for phase in phases for role in phase.pipeline.companions.values()]
    recorder: Any = Recorder()
    return repr(
        [
            replace(plan, phases=(), refusals=(), warnings=()),
            [replace(each, pipeline=None) for each in plan.phases],
            [(stage.name, sorted(stage.options)) for pipeline in pipelines.values() for stage in pipeline],
            [
                [optim_spec(phase, role, config.roles.ranks(role)) for role in phase.pipeline.trained]
                for phase in phases
            ],
            [(average_spec(phase), phase.sampling, phase.episode) for phase in phases],
            [model_spec(prepared, role, None, trained=False) for role in companions],
            prepared.model_rewards,
            asyncio.run(_started(prepared, plan, recorder)),
        ]
    )


def _prepared_phase(index: int, name: str, config: RunConfig, pipeline: Pipeline) -> PreparedPhase:
    phase = config.phases[name]
    data: Any = Data()
    return PreparedPhase(
        name=name,
        index=index,
        config=phase,
        pipeline=pipeline,
        source=data,
        evaluation=data if phase.evaluation and phase.evaluation.data else None,
        held_out=None,
        schedule=Schedule.of_steps(phase.train.steps or 1, phase.train.batch_size),
        sampling=Sampling(**phase.sampling.model_dump()),
        first_version=0,
        episode=_episode(config, name),
    )


def _episode(config: RunConfig, name: str) -> EpisodeSettings | None:
    phase = config.phases[name]
    if phase.environments is None:
        return None
    return episode_settings(phase, name, config.roles.environments(phase.environments), prompt_tokens=20)


def _prepared(config: RunConfig, phases: tuple[PreparedPhase, ...]) -> Prepared:
    """As `resolve.prepare` does, of models and rewards that need not be there."""
    return Prepared(
        config=config,
        model="m",
        models={
            role: settings.model
            for role, settings in config.roles
            if isinstance(settings, RanksRole) and settings.model is not None
        },
        handed_over={},
        tokenizer_path=config.model.tokenizer or "m",
        tokenizer=None,
        phases=phases,
        rewards=tuple(spec_of(reward) for reward in config.rewards if reward.role is None),
        model_rewards=_scoring(config.rewards, None),
        parameters=1_000_000,
    )


async def _started(prepared: Prepared, plan: Plan, recorder: Any) -> list[Any]:
    policies: list[Any] = []
    starting = _Starting(prepared, plan, recorder, lambda *_: None, Watchdog(report_after_s=9.0))
    groups = [role for role, planned in plan.roles.items() if not planned.pool]
    for role in groups:
        await starting.group(role)
    for role in plan.roles.keys() - set(groups):
        settings = prepared.config.roles[role]
        engine, hosts = isinstance(settings, EngineRole), isinstance(settings, EnvironmentsRole)
        pool: Any = (
            starting.engines(role) if engine else starting.environments(role) if hosts else starting.scorers(role)
        )
        policies.append((role, pool.policy))
        await pool._start(0)
    recorder.started.sort(key=str)
    return [recorder.started, sorted(policies, key=str), {role: rank_limits(prepared.config, role) for role in groups}]


@cache
def roles_with(key: str) -> list[str]:
    return [name for name in all_keys() if name.startswith("roles.") and name.split(".", 2)[2:] == [key]]


@cache
def planned_keys() -> dict[str, tuple[Any, dict[str, Any]]]:
    found: dict[str, tuple[Any, dict[str, Any]]] = {}
    for key, (value, extra) in PLANNED.items():
        for name in roles_with(key.removeprefix("roles.*.")) if key.startswith("roles.*.") else [key]:
            found[name] = value, _of_role(name.split(".")[1], extra) if name.startswith("roles.") else extra
    return found


def _of_role(role: str, extra: dict[str, Any]) -> dict[str, Any]:
    """What else is set, of that role."""
    settings = extra.get("roles", {})
    return {**extra, "roles": {role if name == "ROLE" else name: each for name, each in settings.items()}}


def run_with(key: str) -> dict[str, Any]:
    """A run that has what the key is of."""
    if key == "roles.teacher.copies":
        return merged(GRPO, RENAMED)  # as a companion it has a model of its own
    if key.startswith("roles."):
        return LAUNCHES.get(key.split(".")[1], GRPO)
    return SFT if key == "phases.NAME.evaluation.data" else GRPO  # the other samples in any case


def data_key(key: str) -> str:
    """Held-out data is opened as the phase's own is."""
    for place in ("data", "rows"):
        key = key.replace(f".evaluation.{place}.", ".data.")
    return key


def test_every_key_of_the_schema_is_in_one_of_the_tables() -> None:
    keys = {data_key(key) for key in all_keys() if not any(other.startswith(f"{key}.") for other in all_keys())}
    sections = {key for key in planned_keys() if key in all_keys()}
    read = {f"phases.NAME.data.{key}" for key in READ}
    assert keys - planned_keys().keys() - read - SHOWN_BY.keys() - READ_WHILE_RUNNING.keys() - FIXED == set()
    assert sections == planned_keys().keys(), "a key that does not exist"
    assert SHOWN_BY.keys() | READ_WHILE_RUNNING.keys() <= set(all_keys())
    assert set(NO_MATTER) | FIXED <= set(all_keys())


@pytest.mark.parametrize("key", planned_keys())
def test_a_changed_key_changes_the_run(key: str) -> None:
    value, extra = planned_keys()[key]
    base = merged(run_with(key), extra)
    assert made_of(at(key.split("."), value, base)) != made_of(base)


@pytest.mark.parametrize("role", RolesConfig.model_fields)
def test_a_usual_name_has_one_kind_and_another_is_refused(role: str) -> None:
    own = RunConfig.model_validate(GRPO).roles[role].kind
    assert made_of(at(["roles", role, "kind"], own, GRPO)) == made_of(GRPO)
    for kind in KINDS - {own}:
        with pytest.raises(ValidationError, match=rf"(?s)roles\.{role}\.kind.*{own}"):
            RunConfig.model_validate(at(["roles", role, "kind"], kind, GRPO))


def test_the_kind_decides_the_class_of_a_role_with_a_new_name() -> None:
    found = {kind: RunConfig.model_validate(at(["roles", "mine", "kind"], kind, GRPO)).roles["mine"] for kind in KINDS}
    assert len({type(settings) for settings in found.values()}) == len(KINDS)
    with pytest.raises(ValidationError, match="needs a kind"):
        RunConfig.model_validate(at(["roles", "mine", "kind"], "other", GRPO))


@pytest.mark.parametrize("key", SHOWN_BY)
def test_the_test_that_shows_a_key_names_it(key: str) -> None:
    assert re.search(rf"\b{key.split('.')[-1]}\b", (ROOT / SHOWN_BY[key]).read_text())


@pytest.mark.parametrize("key", READ_WHILE_RUNNING)
def test_a_key_that_only_a_run_reads_is_read_in_the_named_line(key: str) -> None:
    file, line = READ_WHILE_RUNNING[key].split(": ")
    assert line in (ROOT / file).read_text()


@pytest.mark.parametrize("key", READ)
def test_a_changed_key_of_the_data_changes_the_items_or_is_refused(key: str, tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    rows = [{"prompt": f"{n}+{n}=", "completion": "9" * n} for n in range(1, 9)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    value, extra = READ[key]
    if key == "mixture":
        value = [{"path": str(file), "fraction": 0.5}, {"path": str(file), "fraction": 0.5}]

    def items(**data: Any) -> list[Any]:
        tree = {"path": str(file), **extra, **data}
        config = DataConfig.model_validate({**tree, "path": None} if data.get("mixture") else tree)
        source = open_source(config, Completions, tiny_tokenizer(), seed=1, model_max_length=64)
        batch = source.batch(range(4))
        return [type(source).__name__, source.report.lines(), batch["tokens"].tolist(), batch["mask"].tolist()]

    extra = {name: each for name, each in extra.items() if name != "path"}
    before = items()
    if key in ("path", "split"):  # of which there is no other
        with pytest.raises(UserError, match=str(value)):
            items(**{key: value})
    else:
        assert items(**{key: value}) != before


# What cannot act

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


@pytest.mark.parametrize(
    ("keys", "value"),
    [
        ("seed", -1),
        ("seed", 2**32),
        ("phases.NAME.train.learning_rate", True),
        ("phases.NAME.train.learning_rate", float("inf")),
        ("phases.NAME.train.steps", True),
        ("phases.NAME.train.adam_betas", [0.9, 1.0]),
        ("phases.NAME.sampling.stop_token_ids", [True]),
        ("phases.NAME.sampling.stop_token_ids", [-1]),
        ("phases.NAME.sampling.stop", [""]),
        ("phases.NAME.sampling.top_k", 0),
    ],
    ids=str,
)
def test_nan_and_numbers_out_of_range_are_refused(keys: str, value: Any) -> None:
    RunConfig.model_validate(SFT)
    with pytest.raises(ValidationError) as caught:
        RunConfig.model_validate(at(keys.split("."), value, SFT))
    assert keys.split(".")[-1] in str(caught.value)


def numbers(schema: type[BaseModel]) -> list[str]:
    return [
        name
        for name, field in schema.model_fields.items()
        if {int, float} & set(types_in(field.annotation)) and not {bool, Any} & set(types_in(field.annotation))
    ]


@pytest.mark.parametrize("section", [TrainConfig, SamplingConfig, RewardConfig, PhaseConfig, EngineRole, BemaConfig])
def test_true_is_refused_where_a_number_is_needed(section: type[BaseModel]) -> None:
    for name in numbers(section):
        with pytest.raises(ValidationError, match=f"(?s){name}.*a number; true, yes and on are not numbers"):
            section.model_validate({name: True})


def test_each_role_s_calls_have_the_deadline_of_that_role() -> None:
    config = RunConfig.model_validate(
        merged(GRPO, {"roles": {"policy": {"call_timeout_s": 11}, "reference": {"call_timeout_s": 22}}})
    )
    found: dict[str, float] = {}

    class Group:
        workers = ("only",)

        def __init__(self, role: str) -> None:
            self.role = role

        async def call_split(self, verb: str, *arguments: Any, timeout_s: float, **_: Any) -> list[Any]:
            found[f"{self.role}.{verb}"] = timeout_s
            return [(0.0, Ref(None))]

    class Objects:
        async def put(self, value: Any) -> Any:
            return value

    groups: Any = {role: Group(role) for role in ("policy", "reference")}
    objects: Any = Objects()
    roles = Executor(
        groups,
        objects,
        start=lambda role, model: asyncio.sleep(0),
        engines={},
        scorers={},
        model_rewards=(),
        publishers=(),
        call_timeout_s={role: config.roles.ranks(role).call_timeout_s for role in groups},
        stand_ins={},
        concurrent=False,
    )
    pipeline = build("grpo", {"beta": 0.1, "updates_per_batch": 2})
    roles.enter(PhaseSettings(pipeline, 64, 1.0, 0, Sampling(4)))
    table = RowTable(Batch.build([3], tokens=[1, 2, 3], mask=[False, True, True], group=[0]))
    asyncio.run(roles.run([stage for stage in pipeline if stage.verb is Verb.INFER], table))
    assert found == {"reference.infer": 22.0, "policy.infer": 11.0}

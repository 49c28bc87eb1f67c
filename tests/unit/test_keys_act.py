"""Every key of the configuration: set to another value it changes what a run is made of, or a named test shows what it
does. Where it cannot act: `test_keys_without_effect.py`.

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
from pydantic import ValidationError

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
from orchestrator.config.schema import DataConfig, RunConfig
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
from tests.unit.key_tables import FIXED, KINDS, NO_MATTER, PLANNED, READ, READ_WHILE_RUNNING, SHOWN_BY
from tests.unit.run_configs import GRPO, LAUNCHES, RENAMED, SFT, at, merged
from tests.unit.tiny import tiny_tokenizer

ROOT = Path(__file__).parents[2]


@cache
def all_keys() -> list[str]:
    return [dotted(keys) for keys in schema_keys(RunConfig)]


class Recorder:
    """A cluster that starts nothing and keeps what it was asked to start."""

    has_processes = True

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
    watchdog = Watchdog(report_after_s=9.0)
    starting = _Starting(prepared, plan, recorder, lambda *_: None, watchdog, prepared.phases[0])
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


def test_a_function_without_a_limit_of_its_own_has_that_of_its_role_where_it_is_started():
    for calls in (1, 3):
        told = made_of(at(["roles", "reward", "concurrency"], calls, GRPO))
        assert f"timeout_s=None, retries=0, on_failure='retry', concurrency={calls})" in told


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

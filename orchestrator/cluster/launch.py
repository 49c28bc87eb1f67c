"""From a plan to running roles: starts each with its settings, and ends all of them afterwards.

Groups of ranks (policy, reference, ...) and the pools' first workers start at the same time, because imports take
long. Rollout workers are up but not admitted until the first publish.

    groups, and of the pools what the first phase needs ──► all are up ──► the run begins
                                                                └─► the pools' other workers start beside it
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Coroutine, Mapping
from contextlib import AsyncExitStack, asynccontextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from actors.columns import Head
from actors.errors import ConfigError
from actors.model import ModelSpec
from actors.model_worker import ModelWorker
from actors.specs import BackendSpec, OptimSpec
from actors.weight_averaging import AverageSpec
from actors.worker import Group, Worker
from orchestrator.cluster.attached_worker import AttachedWorker
from orchestrator.cluster.base import Cluster
from orchestrator.cluster.failures import Watchdog
from orchestrator.cluster.pool import Event, Pool, PoolPolicy
from orchestrator.cluster.turns import TurnGroup, takes_turns, turns_of
from orchestrator.config.colocation import bucket_bytes_between, transport_between
from orchestrator.config.roles import EngineRole, EnvironmentsRole, FrozenRole, RanksRole, ScorersRole, TrainerRole
from orchestrator.config.schema import RunConfig, TrainConfig
from orchestrator.executor import Executor
from orchestrator.planning.plan import Plan
from orchestrator.planning.prepared import Prepared, PreparedPhase
from orchestrator.plugins import importable
from orchestrator.publishing.publisher import Publisher
from rewards.environment_worker import EnvironmentWorker
from rewards.specs import call_timeout_s, with_concurrency, with_deadlines
from rewards.worker import RewardWorker
from rollout.conversation import ConversationSpec
from rollout.engine import EngineSpec
from rollout.weights.protocol import Part
from rollout.worker import RolloutWorker

ATTACH_TIMEOUT_S = 30.0  # until an engine elsewhere says that it is this run's; its start comes after that


@asynccontextmanager
async def launch(
    prepared: Prepared,
    plan: Plan,
    cluster: Cluster,
    folder: Path,
    event: Event,
    watchdog: Watchdog,
    first: PreparedPhase,
) -> AsyncIterator[Executor]:
    """All roles of the plan, up as far as the phase needs them that comes `first`. If a worker that starts beside the
    block cannot, the block is cancelled and the error raised in its place. All roles are closed when the block ends,
    however it ends."""
    roles = prepared.config.roles
    groups: dict[str, Group] = {}
    async with AsyncExitStack() as stack:
        starting = _Starting(prepared, plan, cluster, event, watchdog, first)
        engines = {role: starting.engines(role) for role in plan.roles if isinstance(roles[role], EngineRole)}
        scorers = {role: starting.scorers(role) for role in plan.roles if isinstance(roles[role], ScorersRole)}
        hosts = {role: starting.environments(role) for role in plan.roles if isinstance(roles[role], EnvironmentsRole)}
        pools = [*engines.values(), *scorers.values(), *hosts.values()]
        turns = turns_of(plan.turns)
        for pool in pools:
            stack.push_async_callback(pool.close)
            if pool.role in turns:
                takes_turns(pool, turns[pool.role])

        async def start_group(role: str, model: str | None = None) -> None:
            async with turns[role].at_work(role) if role in turns else nullcontext():
                began = time.monotonic()
                group = await starting.group(role, model)
                groups[role] = TurnGroup(group, turns[role]) if role in turns else group
            ranks = [worker.where for worker in groups[role].workers]
            event("up", {"role": role, "seconds": round(time.monotonic() - began, 3), "ranks": ranks})

        gangs = [role for role in plan.roles if isinstance(roles[role], RanksRole)]
        given = [role for role in gangs if role not in prepared.handed_over]
        at_once, later = [pool for pool in pools if pool.role not in turns], [p for p in pools if p.role in turns]
        await _all_or_none(*(pool.open() for pool in at_once), *(start_group(role) for role in given))
        await _all_or_none(*(pool.open() for pool in later))  # with their deadlines, once it can be their turn
        publishers = [
            publisher
            for role, pool in engines.items()
            for publisher in _publishers(prepared.config, role, groups, pool, cluster, folder, event, plan)
        ]
        async with _beside(*(pool.grow(plan.roles[pool.role].count) for pool in pools)):
            yield Executor(
                groups,
                cluster.objects,
                start=start_group,
                engines=engines,
                scorers=scorers,
                environments=hosts,
                model_rewards=prepared.model_rewards,
                judges=prepared.engine_judges,
                publishers=publishers,
                call_timeout_s={role: roles.ranks(role).call_timeout_s for role in gangs},
                stand_ins=plan.stand_ins,
                concurrent=plan.overlaps,
            )


async def _all_or_none(*work: Any) -> None:
    """Run together; the first failure cancels the others and is raised."""
    try:
        async with asyncio.TaskGroup() as tasks:
            for coroutine in work:
                tasks.create_task(coroutine)
    except BaseExceptionGroup as group:
        raise group.exceptions[0] from None


@asynccontextmanager
async def _beside(*work: Coroutine[Any, Any, None]) -> AsyncIterator[None]:
    """While the block runs, so does this work; a failure of it cancels the block, and is raised."""
    try:
        async with asyncio.TaskGroup() as tasks:
            running = [tasks.create_task(coroutine) for coroutine in work]
            yield
            for task in running:
                task.cancel()
    except BaseExceptionGroup as group:
        raise group.exceptions[0] from None


def _deepspeed_config(role: str, config: RanksRole) -> dict[str, Any] | None:
    """As it is given, or read from the file that is named."""
    if not isinstance(config.deepspeed, Path):
        return config.deepspeed
    try:
        return json.loads(config.deepspeed.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"roles.{role}.deepspeed={config.deepspeed}: no readable JSON file ({error})") from None


def optim_spec(phase: PreparedPhase, role: str, settings: RanksRole) -> OptimSpec:
    """The optimizer and schedule of a role in a phase; its length counts optimizer steps, several per batch where there
    are."""
    train: TrainConfig = phase.config.train
    total = phase.steps * phase.pipeline.optimizer_steps_of(role)
    shared = set(OptimSpec.__dataclass_fields__) & set(TrainConfig.model_fields)
    own = settings.optimizer.model_dump(exclude_none=True) if isinstance(settings, TrainerRole) else {}
    return OptimSpec(**{**{name: getattr(train, name) for name in shared}, **own}, total_steps=total)


def average_spec(phase: PreparedPhase) -> AverageSpec | None:
    """How the policy's weights are averaged in a phase, if they are."""
    bema = phase.config.train.bema
    return None if bema is None else AverageSpec(**bema.model_dump())


def model_spec(prepared: Prepared, role: str, path: str | None, *, trained: bool) -> ModelSpec:
    """The model in `path`, else the role's own or the run's, with the head that the pipelines ask for; adapters if it
    is trained."""
    model, settings = prepared.config.model, prepared.config.roles.ranks(role)
    return ModelSpec(
        path=path or model_of(prepared, role),
        head=prepared.heads.get(role, Head.VOCABULARY),
        tokenizer=prepared.tokenizer_path,
        chat_template=chat_template(prepared),
        dtype=settings.dtype or model.dtype,
        lora=prepared.lora if trained else None,
        attention_dtype=model.attention_dtype,
        fused_kernels=model.fused_kernels,
        gradient_checkpointing=model.gradient_checkpointing and trained,
        neftune_noise_alpha=model.neftune_noise_alpha if trained else 0.0,
        router_aux_loss_coef=model.router_aux_loss_coef,
        lm_head_fp32=model.lm_head_fp32,
        trust_remote_code=model.trust_remote_code,
    )


def chat_template(prepared: Prepared) -> str | None:
    """The text of the chat template, if it is not the tokenizer's own."""
    return prepared.tokenizer.chat_template if prepared.config.model.chat_template is not None else None


def model_of(prepared: Prepared, role: str) -> str:
    """Folder or hub name: the role's own, that of the role that it copies, or the run's."""
    settings, models = prepared.config.roles.ranks(role), prepared.models
    copied = models.get(settings.copies) if isinstance(settings, FrozenRole) else None
    return models.get(role) or copied or prepared.model


def _admitted(phase: PreparedPhase) -> int:
    """Tokens that are recorded beside each one that is sampled."""
    return phase.sampling.top_k if phase.sampling.records_admitted else 0


@dataclass(frozen=True)
class _Starting:
    """What starting any role needs."""

    prepared: Prepared
    plan: Plan
    cluster: Cluster
    event: Event
    watchdog: Watchdog
    first: PreparedPhase

    async def group(self, role: str, model: str | None = None) -> Group:
        """The ranks of a role that holds a model: `model` if it is given, else that which the configuration says."""
        prepared, settings = self.prepared, self.prepared.config.roles.ranks(role)
        trained = next((phase for phase in prepared.phases if role in phase.pipeline.trained), None)
        backend = BackendSpec(
            kind=settings.backend,
            gpus=settings.gpus,
            optim=None if trained is None else optim_spec(trained, role, settings),
            deepspeed=_deepspeed_config(role, settings),
            zero_stage=settings.zero_stage,
            deterministic=any(phase.config.train.deterministic for phase in prepared.phases),
        )
        common = {
            "model": model_spec(prepared, role, model, trained=trained is not None),
            "backend": backend,
            "threads": self.plan.roles[role].threads,
            "seed": prepared.config.seed,
        }
        ranks = [
            {**common, "name": f"{role}/{rank}", "rank": rank, "world_size": settings.ranks}
            for rank in range(settings.ranks)
        ]
        return await self.cluster.start_group(role, ModelWorker, ranks)

    @property
    def _samples(self) -> int:
        """Completions of a prompt, at most."""
        return max(phase.pipeline.samples_per_prompt or 1 for phase in self.prepared.phases)

    def engines(self, role: str) -> Pool:
        prepared, config = self.prepared, self.prepared.config
        settings = config.roles.engine(role)
        spec = EngineSpec(
            kind=importable(settings.engine, f"roles.{role}.engine"),
            model=model_of(prepared, settings.follows),
            dtype=settings.dtype or config.model.dtype,
            max_model_len=settings.max_model_len or prepared.longest,
            max_concurrency=settings.max_concurrency,
            threads=self.plan.roles[role].threads,
            tensor_parallel=settings.tensor_parallel,
            gpus=settings.gpus,
            alone_on_gpu=any(role in roles for roles in self.plan.turns),
            kv_cache_gib=settings.kv_cache_gib,
            seed=config.seed,
            trust_remote_code=config.model.trust_remote_code,
            lora=prepared.lora if self.plan.adapters_alone(role) else None,
            mixes=None if settings.mixes is None else model_of(prepared, settings.mixes),
            lm_head_fp32=config.model.lm_head_fp32,
            max_admitted=max(max(_admitted(each), prepared.asked_of_engines(each)) for each in prepared.phases),
            options=settings.engine_options,
        )
        episodes = any(phase.episode is not None for phase in prepared.phases)
        calls = settings.max_concurrency // (1 if episodes else self._samples)  # an episode is a call by itself
        policy = PoolPolicy(
            slots=max(1, 2 * calls),  # twice: the engine must never wait for the driver
            max_attempts=settings.max_attempts,
            call_timeout_s=settings.request_timeout_s,
            start_timeout_s=settings.start_timeout_s,
            max_restarts=settings.max_restarts,
            alone_after=settings.max_attempts,  # a worker with a single request is slow: only for the last attempt
            at_a_time=max(1, calls),
        )
        kwargs: dict[str, Any] = {"spec": spec}
        if episodes:
            template, trusted = chat_template(prepared), config.model.trust_remote_code
            kwargs["conversation"] = ConversationSpec(prepared.tokenizer_path, template, trusted)
        pool = self._pool(role, policy, RolloutWorker, kwargs)
        asked = any(prepared.asked_of_engines(phase) for phase in prepared.phases)
        depends = settings.mixes is not None or spec.lora is not None or spec.alone_on_gpu
        if not (episodes or asked or depends):
            pool.start_attached = partial(self._attached, role, spec)
        return pool

    async def _attached(self, role: str, spec: EngineSpec, index: int, *, address: str, token: str) -> Worker:
        worker = AttachedWorker(f"{role}/{index}", address, token, self.cluster.objects)
        try:
            await worker.attach(spec, timeout_s=ATTACH_TIMEOUT_S)
        except BaseException:
            await worker.kill()
            raise
        return worker

    def _tokenizer_of(self, engine: str) -> str:
        """Where the tokenizer of an engine role is: with the model of the role that it follows, if that is one of its
        own."""
        return self.prepared.models.get(self.prepared.config.roles.engine(engine).follows, self.prepared.tokenizer_path)

    def scorers(self, role: str) -> Pool:
        settings = self.prepared.config.roles.scorers(role)
        rewards = with_concurrency(self.prepared.rewards, settings.concurrency)
        rewards = with_deadlines(rewards, settings.timeout_s)
        policy = PoolPolicy(
            slots=settings.concurrency,
            max_attempts=settings.max_attempts,
            call_timeout_s=call_timeout_s(rewards, settings.timeout_s, settings.concurrency, self._samples),
            start_timeout_s=settings.start_timeout_s,
            max_restarts=settings.max_restarts,
            kill_on_timeout=True,
            abort_on_failure=settings.on_failure == "abort",
        )
        kwargs = {
            "rewards": rewards,
            "tokenizer": self.prepared.tokenizer_path,
            "judge_tokenizers": {asked: self._tokenizer_of(asked) for asked in self.prepared.judging_roles},
            "trust_remote_code": self.prepared.config.model.trust_remote_code,
        }
        return self._pool(role, policy, RewardWorker, kwargs)

    def environments(self, role: str) -> Pool:
        settings = self.prepared.config.roles.environments(role)
        policy = PoolPolicy(
            slots=settings.concurrency,
            max_attempts=settings.max_attempts,
            call_timeout_s=settings.timeout_s,
            start_timeout_s=settings.start_timeout_s,
            max_restarts=settings.max_restarts,
            kill_on_timeout=True,
        )
        hosted = [phase.episode for phase in self.prepared.phases if phase.episode and phase.episode.role == role]
        kwargs = {
            "specs": {each.phase: each.spec for each in hosted},
            "max_answer_chars": {each.phase: each.max_answer_chars for each in hosted},
        }
        return self._pool(role, policy, EnvironmentWorker, kwargs)

    def _at_first(self, role: str) -> int:
        """Workers of a pool that start with the groups, and are waited for: all of them, but none where the first phase
        only learns from rows. Whoever takes turns starts before there are calls to take turns with, and in one process
        all start before anything is computed: they set its number of threads."""
        planned, stages = self.plan.roles[role], self.first.pipeline.roles
        in_turns = any(role in turns for turns in self.plan.turns)
        samples = self.first.evaluation is not None or any(each.name in stages for each in self.plan.elastic)
        return planned.count if samples or in_turns or not self.cluster.has_processes else 0

    def _pool(self, role: str, policy: PoolPolicy, target: type, kwargs: dict[str, Any]) -> Pool:
        async def start(index: int) -> Worker:
            return await self.cluster.start_worker(role, index, target, {"name": f"{role}/{index}", **kwargs})

        stop = self.cluster.stop_worker
        return Pool(
            role, self._at_first(role), policy, start=start, stop=stop, event=self.event, watchdog=self.watchdog
        )


def _publishers(
    config: RunConfig,
    role: str,
    groups: Mapping[str, Group],
    pool: Pool,
    cluster: Cluster,
    folder: Path,
    event: Event,
    plan: Plan,
) -> list[Publisher]:
    """Between an engine role and the role that it follows; its workers join when they have those weights, or that
    role's adapters alone. If it mixes in another role, the publisher of that comes first, and they join when they have
    both."""
    settings = config.roles.engine(role)
    dtype = config.weights.dtype or settings.dtype or config.model.dtype

    def publisher(source: str, part: Part, second: Publisher | None = None) -> Publisher:
        return Publisher(
            groups[source],
            pool,
            cluster.objects,
            config.weights,
            role=role,
            source=source,
            dtype=dtype,
            folder=str(folder / "weights" / role / part),
            event=event,
            transport=transport_between(config, plan.turns, source, role),
            bucket_bytes=bucket_bytes_between(config, source, role),
            part=part,
            second=second,
        )

    second = [] if settings.mixes is None else [publisher(settings.mixes, "second")]
    own = publisher(settings.follows, "adapters" if plan.adapters_alone(role) else "own", *second)
    pool.admit = own.admit
    return [*second, own]

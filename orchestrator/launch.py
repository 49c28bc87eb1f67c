"""From a plan to living roles: who is started with what, and who is gone at the end.

Groups of ranks (policy, reference, ...) and the pools' first workers start at the same time: what takes long is
imports. Rollout workers are up but not admitted until the first publish.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Iterable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

from actors.averaging import AverageSpec
from actors.backends import BackendSpec
from actors.backends.optimizer import OptimSpec
from actors.errors import ConfigError
from actors.model import ModelSpec
from actors.trainable import Trainable
from actors.worker import Group, Worker
from orchestrator.cluster import Cluster
from orchestrator.config import FrozenRole, RunConfig, TrainConfig, TrainedRole
from orchestrator.plan import Plan
from orchestrator.pool import Event, Pool, PoolPolicy
from orchestrator.prepare import Prepared, PreparedPhase
from orchestrator.publisher import Publisher
from orchestrator.roles import Roles
from orchestrator.supervision import Watchdog
from rewards.actor import RewardWorker
from rollout.actor import RolloutWorker
from rollout.engine import EngineSpec


@asynccontextmanager
async def launch(
    prepared: Prepared, plan: Plan, cluster: Cluster, folder: Path, event: Event, watchdog: Watchdog
) -> AsyncIterator[Roles]:
    """All roles of the plan, up. They are closed when the block ends, however it ends."""
    config = prepared.config
    groups: dict[str, Group] = {}
    async with AsyncExitStack() as stack:
        rollout = _rollout_pool(prepared, plan, cluster, event, watchdog) if "rollout" in plan.roles else None
        reward = _reward_pool(prepared, cluster, event, watchdog) if "reward" in plan.roles else None
        for pool in (rollout, reward):
            if pool is not None:
                stack.push_async_callback(pool.close)
        trained = [role for role in plan.roles if role not in ("rollout", "reward")]

        async def start_group(role: str) -> None:
            began = time.monotonic()
            groups[role] = await _start_group(role, prepared, plan, cluster)
            ranks = [worker.where for worker in groups[role].workers]
            event("up", {"role": role, "seconds": round(time.monotonic() - began, 3), "ranks": ranks})

        opening = [pool.open() for pool in (rollout, reward) if pool is not None]
        await _all_or_none(*opening, *(start_group(role) for role in trained))
        publisher = None
        if rollout is not None:
            publisher = _publisher(config, groups["policy"], rollout, cluster, folder, event)
            rollout.admit = publisher.admit
        yield Roles(
            groups,
            cluster.objects,
            rollout=rollout,
            reward=reward,
            publisher=publisher,
            call_timeouts_s=call_timeouts(config, groups),
            implicit_reference=plan.implicit_reference,
        )


async def _all_or_none(*work: Any) -> None:
    """Run together; the first failure cancels the others and is raised."""
    try:
        async with asyncio.TaskGroup() as tasks:
            for coroutine in work:
                tasks.create_task(coroutine)
    except BaseExceptionGroup as group:
        raise group.exceptions[0] from None


async def _start_group(role: str, prepared: Prepared, plan: Plan, cluster: Cluster) -> Group:
    config: TrainedRole = getattr(prepared.config.roles, role)
    frozen = isinstance(config, FrozenRole)
    optim = None if frozen else optim_spec(prepared.phases[0])
    backend = BackendSpec(
        kind=config.backend,
        gpus=config.gpus,
        optim=optim,
        deepspeed=_deepspeed_config(role, config),
        zero_stage=config.zero_stage,
    )
    spec = _model_spec(prepared, role)
    common = {"model": spec, "backend": backend, "threads": plan.roles[role].threads, "seed": prepared.config.seed}
    ranks = [
        {**common, "name": f"{role}/{rank}", "rank": rank, "world_size": config.ranks} for rank in range(config.ranks)
    ]
    return await cluster.start_group(role, Trainable, ranks)


def _deepspeed_config(role: str, config: TrainedRole) -> dict[str, Any] | None:
    """As it is given, or read from the file that is named."""
    if not isinstance(config.deepspeed, Path):
        return config.deepspeed
    try:
        return json.loads(config.deepspeed.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"roles.{role}.deepspeed={config.deepspeed}: no readable JSON file ({error})") from None


def _model_spec(prepared: Prepared, role: str) -> ModelSpec:
    """The policy's model, or for a frozen role that model without adapters, or another one if the role names it."""
    model, own = prepared.config.model, getattr(prepared.config.roles, role)
    frozen = isinstance(own, FrozenRole)
    return ModelSpec(
        path=prepared.models.get(role, prepared.model),
        tokenizer=prepared.tokenizer_path,
        chat_template=prepared.tokenizer.chat_template if model.chat_template is not None else None,
        dtype=(own.dtype if frozen and own.dtype else model.dtype),
        lora=None if frozen else prepared.lora,
        gradient_checkpointing=model.gradient_checkpointing and not frozen,
        neftune_noise_alpha=0.0 if frozen else model.neftune_noise_alpha,
        router_aux_loss_coef=model.router_aux_loss_coef,
        trust_remote_code=model.trust_remote_code,
    )


def optim_spec(phase: PreparedPhase) -> OptimSpec:
    """The optimizer and schedule of a phase; its length counts optimizer steps, several per batch where there are."""
    train: TrainConfig = phase.config.train
    total = phase.steps * phase.pipeline.optimizer_steps_per_batch
    shared = set(OptimSpec.__dataclass_fields__) & set(TrainConfig.model_fields)
    return OptimSpec(**{name: getattr(train, name) for name in shared}, total_steps=total)


def call_timeouts(config: RunConfig, roles: Iterable[str]) -> dict[str, float]:
    """Seconds that one verb of each group of ranks may take."""
    return {role: getattr(config.roles, role).call_timeout_s for role in roles}


def average_spec(phase: PreparedPhase) -> AverageSpec | None:
    """How the policy's weights are averaged in a phase, if they are."""
    bema = phase.config.train.bema
    return None if bema is None else AverageSpec(**bema.model_dump())


def _rollout_pool(prepared: Prepared, plan: Plan, cluster: Cluster, event: Event, watchdog: Watchdog) -> Pool:
    config = prepared.config
    role, planned = config.roles.rollout, plan.roles["rollout"]
    spec = EngineSpec(
        kind=role.engine,
        model=prepared.model,
        dtype=role.dtype or config.model.dtype,
        max_model_len=role.max_model_len or prepared.longest,
        max_concurrency=role.max_concurrency,
        threads=planned.threads,
        tensor_parallel=role.tensor_parallel,
        gpus=role.gpus,
        kv_cache_gib=role.kv_cache_gib,
        seed=config.seed,
        trust_remote_code=config.model.trust_remote_code,
        options=role.engine_options,
    )

    async def start(index: int) -> Worker:
        return await cluster.start_worker("rollout", index, RolloutWorker, {"name": f"rollout/{index}", "spec": spec})

    policy = PoolPolicy(
        slots=max(
            1, 2 * role.max_concurrency // _samples(prepared)
        ),  # twice: the engine must never wait for the driver
        max_attempts=role.max_attempts,
        call_timeout_s=role.request_timeout_s,
        start_timeout_s=role.start_timeout_s,
        max_restarts=role.max_restarts,
        alone_after=role.max_attempts,  # a worker with one request is slow: only before a request would be given up
    )
    return Pool("rollout", role.workers, policy, start=start, stop=cluster.stop_worker, event=event, watchdog=watchdog)


def _samples(prepared: Prepared) -> int:
    return max(
        int(phase.pipeline.generates.options["n"]) if phase.pipeline.generates else 1 for phase in prepared.phases
    )


def _reward_pool(prepared: Prepared, cluster: Cluster, event: Event, watchdog: Watchdog) -> Pool:
    role = prepared.config.roles.reward

    async def start(index: int) -> Worker:
        kwargs = {
            "name": f"reward/{index}",
            "rewards": list(prepared.rewards),
            "tokenizer": prepared.tokenizer_path,
            "trust_remote_code": prepared.config.model.trust_remote_code,
        }
        return await cluster.start_worker("reward", index, RewardWorker, kwargs)

    policy = PoolPolicy(
        slots=role.concurrency,
        max_attempts=role.max_attempts,
        call_timeout_s=role.timeout_s,
        start_timeout_s=role.start_timeout_s,
        max_restarts=role.max_restarts,
        kill_on_timeout=True,
    )
    return Pool("reward", role.workers, policy, start=start, stop=cluster.stop_worker, event=event, watchdog=watchdog)


def _publisher(
    config: RunConfig, policy: Group, rollout: Pool, cluster: Cluster, folder: Path, event: Event
) -> Publisher:
    dtype = config.weights.dtype or config.roles.rollout.dtype or config.model.dtype
    return Publisher(
        policy, rollout, cluster.objects, config.weights, dtype=dtype, folder=str(folder / "weights"), event=event
    )

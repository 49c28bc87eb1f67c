"""An `Executor` whose roles live in this process: what a method's stages do, as the loop has them done."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from actors.model import ModelSpec
from actors.model_worker import ModelWorker
from actors.other_prompts import OtherPrompts
from actors.specs import BackendSpec, OptimSpec
from actors.worker import Group, LocalGroup, LocalObjects, LocalWorker
from orchestrator.batches.batch_stages import PhaseSettings
from orchestrator.batches.row_table import RowTable
from orchestrator.executor import Executor
from orchestrator.pipeline import GROUPWISE, Pipeline, Stage
from rollout.sampling import Sampling

TIMEOUT_S = 200.0


def local_executor(
    pipeline: Pipeline,
    groups: Mapping[str, Group],
    *,
    token_budget: int,
    stand_ins: Mapping[str, str] | None = None,
    concurrent: bool = False,
    objects: Any = None,
    publishers: Sequence[Any] = (),
    tokenizer: str | None = None,
) -> Executor:
    """Over these groups; nobody samples or scores. `tokenizer`: that of the models, where a stage asks for it."""

    async def start(role: str, model: str) -> None:
        raise AssertionError(f"{role} is started already")

    executor = Executor(
        dict(groups),
        objects or LocalObjects(),
        start=start,
        engines={},
        scorers={},
        model_rewards=(),
        publishers=publishers,
        call_timeout_s=dict.fromkeys(groups, TIMEOUT_S),
        stand_ins=stand_ins or {},
        concurrent=concurrent,
    )
    tokenizers = {stage.role: OtherPrompts(tokenizer, tokenizer) for stage in pipeline if stage.retokenised}
    executor.enter(PhaseSettings(pipeline, token_budget, 1.0, 0, Sampling(max_tokens=8), tokenizers=tokenizers))
    return executor


def in_process(role: str, target: Any) -> LocalGroup:
    return LocalGroup(role, LocalWorker(f"{role}/0", target))


def model_workers(pipeline: Pipeline, model: ModelSpec, optim: OptimSpec) -> dict[str, ModelWorker]:
    """A worker for each role that holds a model, with the head that the pipeline asks for, ready. With adapters, roles
    that are not trained are left out: the first trained one stands in for them."""
    workers: dict[str, ModelWorker] = {}
    for role, head in pipeline.heads.items():
        trained = role in pipeline.trained
        if trained or model.lora is None:
            backend = BackendSpec("single", optim if trained else None)
            workers[role] = ModelWorker(role, replace(model, head=head), backend, threads=1)
            workers[role].ready()
    return workers


def executor_of(
    pipeline: Pipeline, workers: Mapping[str, ModelWorker], *, token_budget: int, tokenizer: str | None = None
) -> Executor:
    groups = {role: in_process(role, worker) for role, worker in workers.items()}
    absent = {role: pipeline.trained[0] for role in pipeline.heads if role not in workers}
    return local_executor(pipeline, groups, token_budget=token_budget, stand_ins=absent, tokenizer=tokenizer)


def batch_stages(pipeline: Pipeline) -> Sequence[Stage]:
    """What is to be done with a batch that is sampled, scored and regrouped already."""
    return [stage for stage in pipeline if stage.verb not in GROUPWISE]


def steps(executor: Executor, table: RowTable, count: int) -> list[dict[str, float]]:
    """The metrics of so many steps on the same batch."""

    async def run() -> list[dict[str, float]]:
        stages = batch_stages(executor.phase.pipeline)
        return [(await executor.run(stages, table, step))[1] for step in range(count)]

    return asyncio.run(run())

"""A whole run: prepare, plan, launch, then phase after phase.

prepare ─► plan ─► cluster ─► launch ─► phase (`phase_run.py`) ─► phase ─► ... ─► result
                                 │
                   in the background: requests from outside, watchdog (overdue waits)
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, ExitStack, asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from actors.errors import ConfigError, Interrupted, TroupeError, UserError
from actors.saved_state import writing
from orchestrator.activity import drawn
from orchestrator.checkpoint import AVERAGED, MODEL
from orchestrator.cluster import train_tab
from orchestrator.cluster.background_tasks import supervised, watching
from orchestrator.cluster.base import Cluster, LocalCluster
from orchestrator.cluster.chat_door import ChatDoor, chat_door
from orchestrator.cluster.control import RunFile
from orchestrator.cluster.event_loop import run_to_end
from orchestrator.cluster.fleet import State
from orchestrator.cluster.launch import launch
from orchestrator.cluster.run_lock import Driver, driving
from orchestrator.cluster.shutdown import Ending, hangups_ignored
from orchestrator.collection.live_chat import LiveChat, models_of
from orchestrator.config.loading import SAVED
from orchestrator.config.overrides import leaves
from orchestrator.config.roles import EngineRole
from orchestrator.config.schema import RunConfig
from orchestrator.config.section import refuse_run_id
from orchestrator.executor import Executor
from orchestrator.phases.phase_run import PhaseRun
from orchestrator.phases.resuming import Resumption, resume_point, save_config
from orchestrator.phases.run_context import RunContext
from orchestrator.planning.handover import kept_folder, written_folder
from orchestrator.planning.preconditions import refuse_engines, refuse_surroundings
from orchestrator.planning.resolve import prepare
from orchestrator.reporting.gains import phase_gains
from orchestrator.reporting.metrics import METRICS_FILE, read
from orchestrator.reporting.plot import draw
from orchestrator.result import RunResult
from orchestrator.status import has_saved


def run(
    config: RunConfig,
    *,
    local: bool = False,
    resume: Path | None = None,
    from_step: int | None = None,
    run_id: str | None = None,
) -> RunResult:
    """Train as configured. `local` keeps everything in this process. With `resume`, continue the run of that folder
    from its newest valid checkpoint, or that of `from_step`; from the beginning if it never saved one.
    `run_id`: the name of a new run's folder; None: one is made from the run's name and the time. Raises UserError
    before anything is launched, RunError afterwards."""
    began = time.monotonic()
    with writing(resume or config.output), ExitStack() as stack:
        if resume is not None:  # first of all: what another process is writing must not be read either
            stack.enter_context(driving(resume))
        refuse_surroundings(config, local=local, resume=resume)
        prepared = prepare(config, run=resume)
        plan = prepared.plan().accepted()
        refuse_engines(prepared, plan.roles, local=local)
        if resume is None:
            folder, resumed = _new_folder(prepared.config, run_id), None
            stack.enter_context(driving(folder))
        elif from_step is None and not has_saved(resume):
            folder, resumed = resume, None
        else:
            folder, resumed = resume, resume_point(resume, prepared, from_step)
        return _Run(RunContext(prepared, plan, folder, local), resumed, again=resume is not None, began=began).run()


def _new_folder(config: RunConfig, run_id: str | None) -> Path:
    """Without an id, named by the second and the process; a number tells those apart that one process starts within a
    second."""
    if run_id is not None:
        return _own_folder(config, run_id)
    name = f"{config.name}-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"
    try:
        config.output.mkdir(parents=True, exist_ok=True)
        for suffix in ("", *(f"-{number}" for number in range(2, 1000))):
            folder = config.output / f"{name}{suffix}"
            with contextlib.suppress(FileExistsError):
                folder.mkdir(mode=0o700)  # it says where the run is reached, and with which token
                save_config(folder, config)
                return folder
    except OSError as error:  # a full or read-only disk
        raise ConfigError(f"output={config.output}: no folder can be made there: {error}") from None
    raise ConfigError(f"output={config.output} holds a thousand runs called {name}")


def _own_folder(config: RunConfig, run_id: str) -> Path:
    """It may be there already, with what was submitted in it, but it must not be a run's."""
    folder = config.output / run_id
    try:
        refuse_run_id(run_id)
    except ValueError as error:
        raise ConfigError(f"--id: {error}") from None
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"output={config.output}: no folder can be made there: {error}") from None
    if (folder / SAVED).exists():
        raise ConfigError(f"there is a run {run_id} in {config.output} already: `troupe resume {folder}` continues it")
    save_config(folder, config)
    return folder


def _in_words(error: BaseException) -> str:
    """An error of ours says what it is; of others the class does."""
    return str(error) if isinstance(error, TroupeError) else f"{type(error).__name__}: {error}"


@dataclass
class _Run:
    """From the plan to the result. `again`: the folder has had a driver before. `began`: when the run was asked for, on
    the monotonic clock."""

    context: RunContext
    resumed: Resumption | None
    again: bool
    began: float
    dashboard: str | None = None  # the URL of Ray's dashboard

    def run(self) -> RunResult:
        context = self.context
        if self.resumed is not None:
            self._continue_from(self.resumed)
            last = context.prepared.phases[-1]
            if self.resumed.nothing_to_train(context.prepared) and not context.evaluations.missing(last):
                if self.resumed.chosen:
                    self._go_back(self.resumed)
                context.console.nothing_to_do(context.folder, last.name)
                return self._finish(self._drawn())
        elif self.again:
            self._begin_again()
        return run_to_end(self.execute)

    def _begin_again(self) -> None:
        """What the run wrote so far is of steps that are made again."""
        context = self.context
        context.log.rewind(0)
        save_config(context.folder, context.config)
        context.event("begun_again", {})
        context.console.note("the run ended before its first checkpoint: it begins again from the start")

    def _continue_from(self, resumed: Resumption) -> None:
        context = self.context
        context.last_checkpoint = resumed.checkpoint
        context.evaluations.scores.update(resumed.state.scores)
        if not resumed.chosen:
            self._go_back(resumed)
        context.event("resumed", {"step": resumed.state.total_step, "changed": resumed.changed})
        for line in resumed.lines():
            context.console.note(line)

    def _go_back(self, resumed: Resumption) -> None:
        """From here on the run is at that step. Later checkpoints than a chosen one go first of all: a process that
        dies in here must not come back to them with other metrics and settings."""
        context = self.context
        if resumed.chosen:
            context.store.give_up_after(resumed.checkpoint)
        context.log.rewind(resumed.state.total_step)
        save_config(context.folder, context.config)  # for the next resume

    async def execute(self) -> RunResult:
        """Raises Interrupted if a signal ended the run. An error says where the run can be continued."""
        context = self.context
        try:
            return await self._execute()
        except (asyncio.CancelledError, Exception) as error:  # after a signal it is a consequence: Ray may be gone
            ending = context.ending_or_none
            if ending is None or ending.signal is None:
                context.log.close("failed")
                context.event("failed", {"error": _in_words(error)})
                if not isinstance(error, UserError):
                    error.add_note(context.how_to_continue())
                raise
            context.log.close("interrupted")
            ending.say()
            raise Interrupted(ending.signal) from None

    async def _execute(self) -> RunResult:
        pipelines = {phase.name: phase.pipeline for phase in self.context.prepared.phases}
        self._since_start("prepared", pipelines=drawn(pipelines))
        context, found = self.context, self.resumed.checkpoint if self.resumed is not None else None
        prepared, plan, folder, console = context.prepared, context.plan, context.folder, context.console
        first = prepared.phases[found.state.phase_index if found is not None else 0]
        async with (
            self._cluster() as cluster,
            watching(cluster, context.watchdog, console.warn, self._ray_is_gone),
            launch(prepared, plan, cluster, folder, context.event, context.watchdog, first) as roles,
            chat_door(self._chat(roles), cluster.host) as chat,
            self._supervised(cluster, chat, roles),
            self._in_train_tab(cluster),
        ):
            console.placed(cluster.describe())
            for role, pool in roles.pools.items():
                if later := plan.roles[role].count - len(pool.indices(State.JOINING, State.SERVING)):
                    console.note(f"{later} {role} worker(s) start beside {first.name}")
            console.at(folder, self.dashboard)
            for warning in plan.warnings:
                console.warn(warning)
            self._since_start("started")
            if (
                self.resumed is not None and self.resumed.chosen
            ):  # now that neither cluster nor role has refused the run
                self._go_back(self.resumed)
            context.account.spend("start", time.monotonic() - self.began)
            for phase in prepared.phases:
                if found is None or phase.index >= found.state.phase_index:
                    inside = found is not None and phase.index == found.state.phase_index
                    await PhaseRun(context, phase, roles, found if inside else None).run()
            drawing = asyncio.ensure_future(asyncio.to_thread(self._drawn))  # while the processes end
        return self._finish(await drawing)

    def _supervised(self, cluster: Cluster, chat: ChatDoor, roles: Executor) -> AbstractAsyncContextManager[None]:
        context = self.context
        context.autoscaler.attach(roles.pools, cluster.room)
        run, requests, warn = self._run_file(cluster, chat, roles), context.requests, context.console.warn
        return supervised(
            context.config, run, context.folder, roles, requests, context.watchdog, warn, context.autoscaler
        )

    def _in_train_tab(self, cluster: Cluster) -> AbstractAsyncContextManager[None]:
        context = self.context
        trained = {role for phase in context.prepared.phases for role in phase.pipeline.trained}
        ranks = [row for row in cluster.describe() if row["role"] in trained]
        if not context.config.logging.ray_train_tab or context.local or not ranks:
            return contextlib.nullcontext()
        folder, settings = context.folder, dict(leaves(context.config.model_dump(mode="json")))
        begin = partial(train_tab.TrainTab, folder.name, ranks, settings, str(folder.absolute()))
        return train_tab.shown(begin, context.console.warn)

    def _chat(self, roles: Executor) -> LiveChat:
        config, run = self.context.config, self.context.folder.name
        settings = {role: config.roles[role] for role in roles.engines}
        followed = {role: each.follows for role, each in settings.items() if isinstance(each, EngineRole)}
        trained = [role for phase in self.context.prepared.phases for role in phase.pipeline.trained]
        return LiveChat(models_of(run, followed, trained), self.context.prepared.tokenizer, roles)

    def _run_file(self, cluster: Cluster, chat: ChatDoor, roles: Executor) -> RunFile:
        elastic = tuple(role.name for role in self.context.plan.elastic)
        autoscaled = self.context.autoscaler.roles
        attachable = tuple(role for role, pool in roles.engines.items() if pool.start_attached is not None)
        return RunFile(
            self.context.folder.name,
            cluster.address,
            Driver.here(),
            elastic,
            chat.url,
            chat.models,
            autoscaled,
            attachable,
        )

    def _finish(self, picture: Path | None) -> RunResult:
        context = self.context
        context.log.close()
        checkpoint = context.last_checkpoint.path if context.last_checkpoint else None
        result = RunResult(
            context.folder,
            dict(context.evaluations.scores),
            checkpoint,
            model=self._model(),
            averaged=checkpoint / AVERAGED if checkpoint and (checkpoint / AVERAGED).is_dir() else None,
            picture=picture,
            output=self._output(),
            gains=phase_gains(self._lines_of_training(), context.account.phases),
            seconds=context.account.shares(time.monotonic() - self.began),
        )
        context.event("finished", result.to_json())
        context.console.done(result)
        return result

    def _lines_of_training(self) -> list[dict[str, Any]]:
        """Of the metrics file, those of phases that train something."""
        trained = {phase.name for phase in self.context.prepared.phases if phase.pipeline.trained}
        return [line for line in read(self.context.folder / METRICS_FILE) if line["phase"] in trained]

    def _model(self) -> Path | None:
        """That of the last phase that trained something, if one has ended."""
        context, last = self.context, self.context.prepared.phases[-1]
        trained = [phase for phase in context.prepared.phases if phase.pipeline.trained]
        if not trained or context.last_checkpoint is None:
            return None
        left = context.last_checkpoint.path if last.pipeline.trained else kept_folder(context.folder, trained[-1].name)
        return left / MODEL

    def _output(self) -> Path | None:
        """The data set of the last phase that made one."""
        made = [phase.name for phase in self.context.prepared.phases if phase.pipeline.written_columns]
        return written_folder(self.context.folder, made[-1]) if made else None

    def _drawn(self) -> Path | None:
        try:
            return draw(self.context.folder) if self.context.config.logging.curves else None
        except Exception as error:  # the training has succeeded: a failure to draw it must not turn it into an error
            self.context.console.warn(f"the curves could not be drawn: {type(error).__name__}: {error}")
            return None

    def _ray_is_gone(self, what: str) -> None:
        self.context.event("failed", {"error": what})
        self.context.ending.failed(what)

    def _since_start(self, kind: str, **detail: Any) -> None:
        """Reports that a part of the start is done: seconds since the run was asked for, without the imports."""
        self.context.event(kind, {"seconds": round(time.monotonic() - self.began, 3), **detail})

    @asynccontextmanager
    async def _cluster(self) -> AsyncIterator[Cluster]:
        """Ray, or this process, with the plan's bundles reserved; from here on signals end the run in order."""
        context = self.context
        if context.local:
            cluster: Cluster = LocalCluster()
        else:
            from orchestrator.cluster.ray_cluster import RayCluster
            from orchestrator.cluster.ray_connection import connect

            with hangups_ignored():
                debug = context.config.debug  # then the console shows what workers log
                json_logs = context.config.logging.ray_logs == "json" and not debug
                self.dashboard = connect(context.config.cluster, context.plan, debug=debug, json_logs=json_logs)
            self._since_start("connected")
            cluster = RayCluster(context.config, run=context.folder.name)
        context.ending_or_none = Ending(
            lambda: cluster.lost() is None,
            context.how_to_continue,
            lambda sent: context.event("interrupted", {"signal": sent.name}),
            save_within_s=context.config.checkpoint.grace_s,
        )
        context.ending.install_handlers()
        if context.output_closed:
            context.ending.output_closed()
        try:
            await cluster.reserve(context.plan)
            self._since_start("reserved")
            yield cluster
        finally:
            await cluster.close()

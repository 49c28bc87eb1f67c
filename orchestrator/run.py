"""A whole run: prepare, plan, place, then train phase after phase, writing metrics, completions and checkpoints.

prepare ─► plan ─► cluster ─► launch ─► for each phase: [resume] ─► evaluate ─► train ─► evaluate ─► checkpoint
                                 │
                   in the background: control actor (scale), watchdog (overdue waits)
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import time
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import ExitStack, asynccontextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from actors.errors import ConfigError, InfraFailure, Interrupted, RunError, UserError
from actors.saved_state import writing
from orchestrator.checkpoint import AVERAGED, MODEL, Checkpoint, CheckpointStore, RunState
from orchestrator.cluster.background_tasks import board_of, supervised, watching
from orchestrator.cluster.base import Cluster, LocalCluster
from orchestrator.cluster.event_loop import run_to_end
from orchestrator.cluster.failures import Ledger, Watchdog
from orchestrator.cluster.launch import launch
from orchestrator.cluster.requests import Requests
from orchestrator.cluster.run_lock import driving
from orchestrator.cluster.shutdown import Ending, Stopped, hangups_ignored
from orchestrator.collection.collected import Collector
from orchestrator.collection.cursor import Cursor
from orchestrator.collection.evaluation import Evaluations
from orchestrator.collection.group_collector import GroupCollector
from orchestrator.collection.precompute import precompute
from orchestrator.collection.row_collector import RowCollector
from orchestrator.collection.staleness import Contract
from orchestrator.config.schema import RunConfig
from orchestrator.driver import Progress, StepRecord, train
from orchestrator.executor import Executor, PhaseSettings
from orchestrator.phase_weights import keep_phase, reference_folder, save_weights, set_optimizers, set_weights
from orchestrator.planning.plan import Plan, make_plan
from orchestrator.planning.preconditions import refuse_surroundings
from orchestrator.planning.prepared import Prepared, PreparedPhase
from orchestrator.planning.resolve import prepare
from orchestrator.reporting.account import Account
from orchestrator.reporting.console import Console
from orchestrator.reporting.metrics import METRICS_FILE, MetricsLog, read
from orchestrator.reporting.plot import draw
from orchestrator.reporting.rollout_metrics import completion_rows, rollout_metrics
from orchestrator.reporting.worth import Worth, phases_worth
from orchestrator.resuming import Resumption, fingerprint, resume_point, save_config


@dataclass(frozen=True)
class RunResult:
    """What a finished run leaves: `scores` by label (`before`, then one per phase), and where things are."""

    folder: Path
    scores: dict[str, float]
    checkpoint: Path | None
    model: Path | None
    averaged: Path | None  # the model with the average of the weights that the last phase went through
    picture: Path | None
    worth: tuple[Worth, ...] = ()  # what each phase gained
    seconds: Mapping[str, float] = field(default_factory=dict[str, float])  # by what this process spent them on

    def to_json(self) -> dict[str, Any]:
        """For the event `finished`."""
        paths = {"checkpoint": self.checkpoint, "model": self.model, "averaged": self.averaged, "picture": self.picture}
        return {
            "scores": self.scores,
            **{name: str(path) if path else None for name, path in paths.items()},
            "worth": [asdict(each) for each in self.worth],
            "seconds": {on: round(spent, 3) for on, spent in self.seconds.items()},
        }

    @classmethod
    def from_json(cls, folder: Path, event: Mapping[str, Any]) -> RunResult:
        """Of the run in a folder, from its event `finished`."""
        paths = {name: event[name] and Path(event[name]) for name in ("checkpoint", "model", "averaged", "picture")}
        worth = tuple(Worth(**each) for each in event["worth"])
        return cls(folder, dict(event["scores"]), **paths, worth=worth, seconds=dict(event["seconds"]))


def run(
    config: RunConfig, *, local: bool = False, resume: Path | None = None, from_step: int | None = None
) -> RunResult:
    """Train as configured. `local` keeps everything in this process. With `resume`, continue the run of that folder
    from its newest valid checkpoint, or that of `from_step`. Raises UserError before anything is launched, RunError
    afterwards."""
    began = time.monotonic()
    with writing(resume or config.output), ExitStack() as stack:
        if resume is not None:  # first of all: what another process is writing must not be read either
            stack.enter_context(driving(resume))
        refuse_surroundings(config, local=local, resume=resume)
        prepared = prepare(config)
        pipelines = {phase.name: phase.pipeline for phase in prepared.phases}
        plan = make_plan(config, pipelines, parameters=prepared.parameters, own_parameters=prepared.own_parameters)
        if resume is None:
            folder, resumed = _new_folder(config), None
            stack.enter_context(driving(folder))
        else:
            folder, resumed = resume, resume_point(resume, prepared, from_step)
        return _Run(prepared, plan, folder, local=local, resumed=resumed, began=began).run()


def _new_folder(config: RunConfig) -> Path:
    """Named by the second and the process; a number tells those apart that one process starts within a second."""
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


@dataclass
class _Run:
    """One run's moving parts. `state` is what a checkpoint holds."""

    prepared: Prepared
    plan: Plan
    folder: Path
    local: bool
    resumed: Resumption | None
    began: float
    last_checkpoint: Checkpoint | None = None
    dashboard: str | None = None  # Ray's
    ending: Ending | None = None  # once there is something to put in order
    output_closed: bool = False  # the reader of standard output is gone

    def __post_init__(self) -> None:
        config = self.prepared.config
        self.config = config
        steps = {phase.name: phase.steps for phase in self.prepared.phases}
        self.console = Console(steps, closed=self._output_closed)
        self.store = CheckpointStore(self.folder / "checkpoints", keep=config.checkpoint.keep)
        self.watchdog = Watchdog(report_after_s=config.cluster.watchdog_s)
        self.log = MetricsLog(
            self.folder,
            run=self.folder.name,
            tensorboard=config.logging.tensorboard,
            ray_metrics=config.logging.ray_metrics and not self.local,
        )
        self.account = Account()
        self.evaluations = Evaluations(self.folder, self.log, self.console, self.watchdog, self.event)
        self.requests = Requests(lambda: self._ending.asked())
        self.ledger = Ledger(allowed_in_a_row=max(64, 4 * max(p.config.train.batch_size for p in self.prepared.phases)))

    def run(self) -> RunResult:
        if self.resumed is not None:
            self._go_on_from(self.resumed)
            if self.resumed.nothing_to_train(self.prepared) and not self.evaluations.missing(self.prepared.phases[-1]):
                self.console.nothing_to_do(self.folder, self.prepared.phases[-1].name)
                return self._finish()
        return run_to_end(self.execute)

    def _go_on_from(self, resumed: Resumption) -> None:
        self.last_checkpoint = resumed.checkpoint
        self.evaluations.scores.update(resumed.state.scores)
        self.log.rewind(resumed.state.total_step)
        save_config(self.folder, self.config)  # for the next resume
        self.event("resumed", {"step": resumed.state.total_step, "changed": resumed.changed})
        for line in resumed.lines():
            self.console.note(line)

    async def execute(self) -> RunResult:
        """Raises Interrupted if a signal ended the run. An error says where the run can be continued."""
        try:
            return await self._execute()
        except (asyncio.CancelledError, Exception) as error:  # after a signal it is a consequence: Ray may be gone
            if self.ending is None or self.ending.signal is None:
                if not isinstance(error, UserError):
                    error.add_note(self._where_it_stands())
                raise
            self.log.close()
            self.ending.say()
            raise Interrupted(self.ending.signal) from None

    async def _execute(self) -> RunResult:
        self._since_start("prepared")
        found = self.resumed.checkpoint if self.resumed is not None else None
        async with (
            self._cluster() as cluster,
            watching(cluster, self.watchdog, self.console.warn, self._ray_is_gone),
            board_of(self.folder, cluster) as board,
            launch(self.prepared, self.plan, cluster, self.folder, self.event, self.watchdog) as roles,
            supervised(self.config, self.folder, roles, await board, self.requests, self.console.warn),
        ):
            self.console.placed(cluster.describe())
            self.console.at(self.folder, self.dashboard)
            for said in self.plan.warnings:
                self.console.warn(said)
            self._since_start("started")
            self.account.spend("start", time.monotonic() - self.began)
            for phase in self.prepared.phases:
                if found is None or phase.index >= found.state.phase_index:
                    mine = found if found is not None and phase.index == found.state.phase_index else None
                    await self._phase(phase, roles, mine)
        return self._finish()

    async def _phase(self, phase: PreparedPhase, roles: Executor, found: Checkpoint | None) -> None:
        """One phase, from its start or from a checkpoint inside it."""
        self._enter(phase, roles)
        self.console.data(phase.name, [*phase.source.report.lines(), phase.drawn])
        await set_weights(self.prepared, self.folder, phase, roles, found)
        with self.account.spending("log-probabilities"):
            phase = await self._precompute(phase, roles)
        await set_optimizers(self.config, phase, roles, found)
        progress = Progress(found.state.step, found.state.version) if found else Progress(0, phase.first_version)
        cursor = Cursor.from_json(found.state.cursor) if found else Cursor()
        with self.account.spending("publish"):
            async with roles.changing_weights():
                report = await roles.publish(progress.version)
        if report is not None:
            self.event("published", {"version": report.version, "seconds": round(report.seconds, 3)})
        with self.account.spending("evaluation"):
            await self.evaluations.at(phase, roles, progress)
        collector = self._collector(phase, roles, cursor, progress)
        before_step = partial(self._as_asked, phase, roles, cursor, progress)
        after_step, stop = self._after_step(phase, roles, cursor), self._ending.stop
        with self._ending.saving():
            try:
                await train(phase.pipeline, phase.steps, roles, collector, progress, before_step, after_step, stop)
            except Stopped:
                await collector.close()
                await self._save_last_step(phase, roles, cursor, progress)
                raise
            finally:
                await collector.close()
        if phase.index + 1 < len(self.prepared.phases) and self.last_checkpoint is not None:
            await asyncio.to_thread(keep_phase, self.folder, phase, self.last_checkpoint.path)

    def _enter(self, phase: PreparedPhase, roles: Executor) -> None:
        budget = phase.config.train.token_budget
        roles.enter(PhaseSettings(phase.pipeline, budget, phase.temperature, self.config.seed, phase.sampling))

    async def _precompute(self, phase: PreparedPhase, roles: Executor) -> PreparedPhase:
        """What frozen roles say about the whole data set, from the cache or now. Roles that are not needed after that
        are ended."""
        passed = {stage.role for stage in phase.pipeline.precomputed}

        def announce(column: str, detail: dict[str, Any]) -> None:
            self.event("precomputed", {"phase": phase.name, "column": column, **detail})
            self.console.precomputed(phase.name, column, detail)

        with self.watchdog.waiting(f"what {phase.name} computes before its first step"):
            phase = await precompute(
                self.config,
                self.prepared.model,
                phase,
                roles,
                began_with=str(reference_folder(self.folder, phase)),
                announce=announce,
                progress=lambda column, share: self.console.progress(phase.name, column, share),
            )
        self._enter(phase, roles)
        needed = {role for later in (phase, *self.prepared.phases[phase.index + 1 :]) for role in later.pipeline.roles}
        for role in passed & roles.groups.keys() - needed:
            await roles.release(role)
            self.event("released", {"role": role})
        return phase

    def _collector(self, phase: PreparedPhase, roles: Executor, cursor: Cursor, progress: Progress) -> Collector:
        train_config = phase.config.train
        if not phase.pipeline.generates:
            last = (phase.first_version + phase.steps - 1, phase.schedule.last)
            items, overlaps = train_config.batch_size, self.plan.overlaps
            return RowCollector(phase.source, roles, cursor, items, overlaps=overlaps, last=last)
        return GroupCollector(
            phase.source,
            roles,
            phase.pipeline,
            cursor,
            Contract(
                train_config.max_staleness,
                train_config.batch_size,
                phase.first_version,
                phase.steps,
                phase.schedule.last,
            ),
            run=phase.name,
            seed=self.config.seed + phase.index,
            version=progress.version,
            ledger=self.ledger,
            watchdog=self.watchdog,
        )

    async def _as_asked(self, phase: PreparedPhase, roles: Executor, cursor: Cursor, progress: Progress) -> None:
        """What was asked from outside, between two steps: a checkpoint, and a pause, which this waits out. What is
        being generated goes on until the batches that it may run ahead are there. Before the first step of a run there
        is nothing to save: that waits until after it."""
        paused = False
        while True:
            if (progress.step or phase.index) and self.requests.checkpoints:
                await self._save(phase, roles, cursor, progress)
            if self.requests.paused is not paused:
                paused = self.requests.paused
                self.event("paused" if paused else "unpaused", {"step": phase.first_version + progress.step})
                self.console.note("paused" if paused else "going on")
            if not paused:
                return
            await self._ending.stop.before(self.requests.changed())

    def _after_step(self, phase: PreparedPhase, roles: Executor, cursor: Cursor) -> Any:
        async def after_step(record: StepRecord) -> None:
            step, last = record.step, record.step == phase.steps
            sampled = rollout_metrics(record.collected, record.version - 1)
            metrics = {**sampled, **record.metrics, **phase.source.report.metrics()}
            total = phase.first_version + step
            self.account.step(phase.name, phase.pipeline, metrics)
            with self._warned_of(f"metrics of step {total}"):
                if last or step % self.config.logging.every == 0:
                    self.console.step(phase.name, step, phase.steps, metrics)
                    self.log.write(total, phase.name, metrics)
            with self._warned_of(f"completions of step {total}"):
                await self._show_completions(phase, roles, record, last)
            if last or (self.config.checkpoint.every and step % self.config.checkpoint.every == 0):
                with self.account.spending("save"):
                    await self._save(phase, roles, cursor, Progress(step, record.version))
            with self.account.spending("evaluation"):
                await self._ending.stop.before(self.evaluations.at(phase, roles, Progress(step, record.version)))

        return after_step

    async def _show_completions(self, phase: PreparedPhase, roles: Executor, record: StepRecord, last: bool) -> None:
        every = self.config.logging.completions_every
        groups = [group for group in record.collected.groups if group.texts is not None]
        if not groups or every is None:
            return
        scored = await roles.fetch([group.texts for group in groups if group.texts is not None])
        rows = [row for group, texts in zip(groups, scored, strict=True) for row in completion_rows(group, texts)]
        self.log.write_completions(phase.first_version + record.step, rows)
        if last or record.step % every == 0:
            shown = rows[:: max(1, len(rows) // self.config.logging.completions_shown)]
            self.console.completions(shown[: self.config.logging.completions_shown])

    async def _save_last_step(self, phase: PreparedPhase, roles: Executor, cursor: Cursor, progress: Progress) -> None:
        """Saves the last step of a run that was asked to stop, unless a checkpoint has it already."""
        saved = self.last_checkpoint.state.total_step if self.last_checkpoint else 0
        if phase.first_version + progress.step > saved:
            try:
                await self._save(phase, roles, cursor, progress)
            except RunError as error:
                self.console.warn(str(error))

    async def _save(self, phase: PreparedPhase, roles: Executor, cursor: Cursor, progress: Progress) -> None:
        """A checkpoint: the weights of the phase, and where the run stands."""
        total = phase.first_version + progress.step
        state = RunState(
            phase=phase.name,
            phase_index=phase.index,
            step=progress.step,
            total_step=total,
            version=progress.version,
            cursor=cursor.to_json(),
            config=self.config.model_dump(mode="json"),
            data=await asyncio.to_thread(fingerprint, phase),
            scores=dict(self.evaluations.scores),
        )
        began, tickets = time.monotonic(), self.requests.checkpoints
        if self.last_checkpoint is None or self.last_checkpoint.state.total_step != total:
            self.last_checkpoint = await self.store.write(
                lambda folder: save_weights(self.config, phase, roles, folder), state
            )
        self.requests.answered(tickets)
        self.event(
            "checkpoint",
            {
                "step": total,
                "seconds": round(time.monotonic() - began, 3),
                "path": str(self.last_checkpoint.path),
                "asked": tickets,
            },
        )

    def _finish(self) -> RunResult:
        self.log.close()
        picture = self._drawn()
        checkpoint = self.last_checkpoint.path if self.last_checkpoint else None
        model = checkpoint / MODEL if checkpoint else None
        averaged = checkpoint / AVERAGED if checkpoint and (checkpoint / AVERAGED).is_dir() else None
        worth = phases_worth(read(self.folder / METRICS_FILE), self.account.phases)
        seconds = self.account.shares(time.monotonic() - self.began)
        result = RunResult(
            self.folder, dict(self.evaluations.scores), checkpoint, model, averaged, picture, worth, seconds
        )
        self.event("finished", result.to_json())
        self.console.done(result)
        return result

    def _drawn(self) -> Path | None:
        try:
            return draw(self.folder)
        except Exception as error:  # the run is done: what is drawn of it must not make it a failure
            self.console.warn(f"the curves could not be drawn: {type(error).__name__}: {error}")
            return None

    @property
    def _ending(self) -> Ending:
        assert self.ending is not None, "there is a cluster"
        return self.ending

    def _output_closed(self) -> None:
        self.output_closed = True
        if self.ending is not None:
            self.ending.output_closed()

    def _ray_is_gone(self, what: str) -> None:
        self.event("ray_is_gone", {"what": what})
        self._ending.failed(what)

    def _since_start(self, kind: str) -> None:
        """A stage of starting is over: seconds since the run was asked for, imports of its own rooms not included."""
        self.event(kind, {"seconds": round(time.monotonic() - self.began, 3)})

    def event(self, kind: str, detail: dict[str, Any]) -> None:
        """One line in `events.jsonl`: stages of starting, joins, deaths, retries, resizes, checkpoints."""
        line = {"time": round(time.time(), 3), "event": kind, **detail}
        with self._warned_of(f"event {kind}"), (self.folder / "events.jsonl").open("a") as stream:
            stream.write(json.dumps(line) + "\n")
        if kind in ("evicted", "resized", "sync_failed"):
            self.console.warn(f"{kind}: " + ", ".join(f"{name}={value}" for name, value in detail.items()))

    @contextlib.contextmanager
    def _warned_of(self, what: str) -> Iterator[None]:
        """A disk that does not take what is only evidence is a warning: weights that are trained come first."""
        try:
            yield
        except (OSError, InfraFailure) as error:
            self.console.warn(f"{what} not written: {error}")

    @asynccontextmanager
    async def _cluster(self) -> AsyncIterator[Cluster]:
        """Ray, or this process, with the plan's bundles reserved; signals end the run in order."""
        if self.local:
            cluster: Cluster = LocalCluster()
        else:
            from orchestrator.cluster.ray_cluster import RayCluster
            from orchestrator.cluster.ray_connection import connect

            with hangups_ignored():
                self.dashboard = connect(self.config.cluster, self.plan, debug=self.config.debug)
            self._since_start("connected")
            cluster = RayCluster(self.config, run=self.folder.name)
        self.ending = Ending(
            lambda: cluster.lost() is None,
            self._where_it_stands,
            lambda sent: self.event("interrupted", {"signal": sent.name}),
            save_within_s=self.config.checkpoint.grace_s,
        )
        self.ending.install_handlers()
        if self.output_closed:
            self.ending.output_closed()
        try:
            await cluster.reserve(self.plan)
            self._since_start("reserved")
            yield cluster
        finally:
            await cluster.close()

    def _where_it_stands(self) -> str:
        """The last line for the user: the last checkpoint, and how to continue."""
        if self.last_checkpoint is None:
            return f"no checkpoint yet; checkpoint.every=N writes one every N steps. The run's folder: {self.folder}"
        return f"last checkpoint {self.last_checkpoint.path}; continue with `troupe resume {self.folder}`"

"""One phase of a run, from its start or from a checkpoint inside it, to its last step.

open made data ─► set_weights ─► precompute ─► set_optimizers ─► publish ─► evaluate ─► train ─► keep the phase's model
                                                                                          │
                                       between two steps: pause, checkpoint, metrics, completions, evaluation
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from actors.errors import RunError
from actors.saved_state import Seal
from orchestrator.batches import replay_buffer
from orchestrator.batches.batch_stages import PhaseSettings
from orchestrator.batches.written_data import Output
from orchestrator.checkpoint import Checkpoint, RunState
from orchestrator.cluster.shutdown import Stopped
from orchestrator.collection import saved_groups
from orchestrator.collection.collected import Collector
from orchestrator.collection.cursor import Cursor
from orchestrator.collection.group_collector import GroupCollector
from orchestrator.collection.precompute import precompute
from orchestrator.collection.row_collector import RowCollector
from orchestrator.collection.staleness import Contract
from orchestrator.config.schema import RunConfig
from orchestrator.data.parts import Parts
from orchestrator.driver import Progress, StepRecord, train
from orchestrator.executor import Executor
from orchestrator.phases.collected_by import collected_by, differing, scored_by
from orchestrator.phases.phase_weights import (
    begin_save,
    checkpoint_parts,
    finish_save,
    keep_phase,
    reference_folder,
    set_optimizers,
    set_weights,
)
from orchestrator.phases.resuming import fingerprint
from orchestrator.phases.run_context import RunContext
from orchestrator.phases.saving import Saving
from orchestrator.phases.token_recorder import TokenRecorder
from orchestrator.planning.handover import kept_folder, written_folder
from orchestrator.planning.phase_data import with_made_data
from orchestrator.planning.prepared import PreparedPhase
from orchestrator.reporting.rollout_metrics import completion_rows, rollout_metrics


@dataclass
class PhaseRun:
    """`found` is the checkpoint inside this phase from which the run continues, if there is one."""

    context: RunContext
    phase: PreparedPhase
    roles: Executor
    found: Checkpoint | None

    def __post_init__(self) -> None:
        state = self.found.state if self.found else None
        self.progress = Progress(state.step, state.version) if state else Progress(0, self.phase.first_version)
        self.cursor = Cursor.from_json(state.cursor) if state else Cursor()
        self.collector: Collector | None = None  # until the phase's first step
        self.tokens = TokenRecorder(self.context, self.roles)
        self.saving = Saving(self.context, self._save_parts)
        self.output: Output | None = None  # the data set that the phase makes, if it makes one

    async def run(self) -> None:
        context, roles, progress = self.context, self.roles, self.progress
        prepared, folder, account = context.prepared, context.folder, context.account
        await asyncio.to_thread(self._open_data)
        self._enter()
        context.autoscaler.enter()
        context.console.data(self.phase.name, [*self.phase.source.report.lines(), self.phase.drawn])
        await set_weights(prepared, folder, self.phase, roles, self.found)
        with account.spending("log-probabilities"):
            await self._precompute()
        await set_optimizers(context.config, self.phase, roles, self.found)
        await self._set_replay_buffer()
        with account.spending("publish"):
            async with roles.changing_weights():
                reports = await roles.publish(progress.version, begins=True)
        for report in reports:
            names = ("role", "source", "version", "fingerprint")
            detail = {name: getattr(report, name) for name in names}
            context.event("published", {"phase": self.phase.name, **detail, "seconds": round(report.seconds, 3)})
        with account.spending("evaluation"), roles.activity.working("evaluation"):
            await context.evaluations.at(self.phase, roles, progress)
        collector = self.collector = self._collector()
        await self._restore_groups(collector)
        phase, stop = self.phase, context.ending.stop
        with context.ending.saving():
            try:
                async with self.tokens:
                    await train(
                        phase.pipeline,
                        phase.steps,
                        roles,
                        collector,
                        progress,
                        self._before_step,
                        self._after_step,
                        stop,
                    )
                with account.spending("save"):
                    await self.saving.ended()
            except Stopped:
                await collector.close()
                await self._save_last_step()
                raise
            finally:
                await collector.close()
                await self.saving.settle()
        followed = phase.index + 1 < len(prepared.phases)
        if followed:  # a signal after the last step; from here on one cancels the run at once
            stop.raise_if_asked()
        if followed and phase.pipeline.trained and context.last_checkpoint is not None:
            kept = kept_folder(folder, phase.name)
            await asyncio.to_thread(keep_phase, kept, phase.pipeline.trained, context.last_checkpoint.path)

    def _open_data(self) -> None:
        """What the phase reads of earlier ones, and where it writes what later ones read."""
        context = self.context
        self.phase = with_made_data(context.prepared, self.phase, context.folder)
        if self.phase.pipeline.written_columns:
            parts = Parts(written_folder(context.folder, self.phase.name))
            if self.progress.step < self.phase.steps:
                parts.begin(self.progress.step)
            prepared = context.prepared
            turns = self.phase.episode is not None
            self.output = Output(parts, self.phase.source, prepared.tokenizer, prepared.reward_names, turns)

    def _enter(self) -> None:
        phase, budget = self.phase, self.phase.config.train.micro_batch_tokens
        self.roles.activity.phase = phase.name
        seed, vocabulary = self.context.config.seed, self.context.prepared.vocabulary
        self.roles.enter(
            PhaseSettings(
                phase.pipeline,
                budget,
                phase.temperature,
                seed,
                phase.sampling,
                vocabulary,
                phase.episode,
                self.output,
                self.context.prepared.other_tokenizers(phase.pipeline),
            )
        )

    async def _precompute(self) -> None:
        """Columns that frozen roles compute of the whole data set, read from the cache or computed now. Roles that no
        later stage needs are ended afterwards."""
        context, phase, roles = self.context, self.phase, self.roles
        passed = {stage.role for stage in phase.pipeline.precomputed}

        def announce(column: str, detail: dict[str, Any]) -> None:
            context.event("precomputed", {"phase": phase.name, "column": column, **detail})
            context.console.precomputed(phase.name, column, detail)

        with context.watchdog.waiting(f"the columns that {phase.name} computes before its first step"):
            self.phase = await precompute(
                context.config,
                context.prepared.model,
                phase,
                roles,
                began_with=str(reference_folder(context.folder, phase)),
                announce=announce,
                progress=lambda column, share: context.console.progress(phase.name, column, share),
            )
        self._enter()
        later = (self.phase, *context.prepared.phases[phase.index + 1 :])
        needed = {role for each in later for role in each.pipeline.roles}
        for role in passed & roles.groups.keys() - needed:
            await roles.release(role)
            context.event("released", {"role": role})

    def _collector(self) -> Collector:
        context, phase, roles = self.context, self.phase, self.roles
        train_config = phase.config.train
        if not phase.pipeline.row_sources:
            last = (phase.first_version + phase.steps - 1, phase.schedule.last)
            items, overlaps = train_config.batch_size, context.plan.overlaps
            return RowCollector(phase.source, roles, self.cursor, items, overlaps=overlaps, last=last)
        return GroupCollector(
            phase.source,
            roles,
            phase.pipeline,
            self.cursor,
            Contract(
                train_config.max_staleness,
                train_config.batch_size,
                phase.first_version,
                phase.steps,
                phase.schedule.last,
            ),
            run=phase.name,
            seed=context.config.seed + phase.index,
            version=self.progress.version,
            ledger=context.ledger,
            watchdog=context.watchdog,
        )

    async def _before_step(self) -> None:
        """Carries out requests from outside: saves a checkpoint, and waits while the run is paused. Generation goes on
        during a pause, as far as it may run ahead. Before the first step of a run there is nothing to save; the
        checkpoint is written after that step."""
        context, progress = self.context, self.progress
        while True:
            await self.saving.raise_error()
            if (progress.step or self.phase.index) and self.saving.asked:
                await self._save()
            if asked := context.requests.pauses:
                kind = "paused" if context.requests.paused else "unpaused"
                context.requests.answered(asked)
                context.event(kind, {"step": self.phase.first_version + progress.step, "asked": asked})
                context.console.note(kind)
            if not context.requests.paused:
                return
            await self.saving.ended()
            await context.ending.stop.before(context.requests.changed())

    async def _after_step(self, record: StepRecord) -> None:
        """Logs the step, and saves and evaluates where it is due."""
        context, phase = self.context, self.phase
        config, account = context.config, context.account
        step, last = record.step, record.step == phase.steps
        sampled = rollout_metrics(record.collected, record.version - 1)
        metrics = {**sampled, **record.metrics, **phase.source.report.metrics()}
        total = phase.first_version + step
        account.step(phase.name, phase.pipeline, metrics)
        await context.autoscaler.stepped(metrics["time/collect"] / metrics["step_time"], self._ahead())
        with context.write_errors_as_warnings(f"metrics of step {total}"):
            if last or step % config.logging.every == 0:
                context.console.step(phase.name, step, phase.steps, metrics)
                context.log.write(total, phase.name, metrics)
        with context.write_errors_as_warnings(f"completions of step {total}"):
            await self._show_completions(record, last)
        if last and self.output is not None:  # before the checkpoint, from which the step would not be made again
            records = await asyncio.to_thread(self.output.parts.finish)
            context.event("written", {"phase": phase.name, "records": records, "folder": str(self.output.parts.folder)})
        # A phase that trains nothing has no weights to save: its checkpoints are small.
        every = config.checkpoint.every or (None if phase.pipeline.trained else 1)
        if last or (every and step % every == 0):
            with account.spending("save"):
                await self._save()
        with account.spending("evaluation"), self.roles.activity.working("evaluation"):
            await context.ending.stop.before(context.evaluations.at(phase, self.roles, self.progress))

    def _ahead(self) -> float | None:
        """Share of the groups that `max_staleness` allows to be ready beyond a step's batch that are; None: none may
        be."""
        settings = self.phase.config.train
        allowed = settings.max_staleness * settings.batch_size
        return len(self.collector.finished) / allowed if self.collector and allowed else None

    async def _show_completions(self, record: StepRecord, last: bool) -> None:
        logging = self.context.config.logging
        groups = [group for group in record.collected.groups if group.texts]
        if not groups or logging.completions_every is None:
            return
        scored = await asyncio.gather(*(self.roles.fetch(group.texts) for group in groups))
        rows = [
            row
            for group, (texts, *logged) in zip(groups, scored, strict=True)
            for row in completion_rows(group, texts.with_extra(logged))
        ]
        total = self.phase.first_version + record.step
        self.context.log.write_completions(total, rows)
        await self.tokens.record(total, record.learned, groups)
        if last or record.step % logging.completions_every == 0:
            shown = rows[:: max(1, len(rows) // logging.completions_shown)]
            self.context.console.completions(shown[: logging.completions_shown])

    async def _set_replay_buffer(self) -> None:
        """If the phase is resumed and replays groups, those that the checkpoint has. After a change of what scores them
        none: how much a group teaches was worked out from the rewards that it had."""
        buffer = self.roles.batch_stages.replay_buffer
        if buffer is None or self.found is None:
            return
        before, now = self._before(self.found), self.context.config
        if changed := differing(scored_by(before, self.phase.name), scored_by(now, self.phase.name)):
            self._leave_out("the replay buffer of the checkpoint is left out", changed)
            return
        found = await replay_buffer.load(self.roles.objects, self.found.path, self._written_by_groups)
        if found.warning:
            self.context.console.warn(found.warning)
        buffer.groups = found.groups

    def _before(self, found: Checkpoint) -> RunConfig:
        """The configuration with which a checkpoint was written."""
        return RunConfig.model_validate(found.state.config)

    def _leave_out(self, what: str, changed: list[str]) -> None:
        self.context.console.warn(f"{what}: {', '.join(changed)} changed since; to keep them, resume with what was set")

    @property
    def _written_by_groups(self) -> frozenset[str]:
        """Columns that the group stages write."""
        return frozenset[str]().union(*(stage.writes for stage in self.phase.pipeline.group_stages))

    async def _restore_groups(self, collector: Collector) -> None:
        """If the phase is resumed as it was, the groups that had ended and were not trained on. After a change of what
        samples or scores they are sampled again."""
        if self.found is None or not isinstance(collector, GroupCollector):
            return
        name, pipeline = self.phase.name, self.phase.pipeline
        before, now = self._before(self.found), self.context.config
        if changed := differing(collected_by(before, name, pipeline), collected_by(now, name, pipeline)):
            if (self.found.path / saved_groups.FILE).is_file():
                self._leave_out("the finished prompt groups of the checkpoint are sampled again", changed)
            return
        found = await saved_groups.load(self.roles.objects, self.found.path, collector.drawn, self._written_by_groups)
        if found.warning:
            self.context.console.warn(found.warning)
        collector.restore(found.groups)
        counts = {"groups": len(found.groups), "sampled_again": len(found.unusable)}
        self.context.event("groups_restored", {"phase": self.phase.name, **counts})

    async def _save_parts(self, folder: Path, taken: Callable[[], None]) -> dict[str, Seal]:
        """What a checkpoint of the phase holds, beside where it stands. `taken` is called when training may go on."""
        roles, objects = self.roles, self.roles.objects
        parts = checkpoint_parts(self.context.config, self.phase)
        buffer, finished = roles.batch_stages.replay_buffer, self.collector.finished if self.collector else ()
        replayed = None if buffer is None else replace(buffer, groups=list(buffer.groups))
        with roles.activity.working("checkpoint"):
            await begin_save(parts, roles, folder)
            taken()
            if replayed is not None:
                await replay_buffer.save(replayed, objects, folder)
            if finished:
                await saved_groups.save(finished, objects, folder)
            return await finish_save(parts, roles)

    async def _save_last_step(self) -> None:
        """Saves the last step of a run that was asked to stop, unless a checkpoint has it already."""
        last = self.context.last_checkpoint
        if self.phase.first_version + self.progress.step > (last.state.total_step if last else 0):
            try:
                await self._save()
                await self.saving.ended()
            except RunError as error:
                self.context.console.warn(str(error))

    async def _save(self) -> None:
        """Begins to write a checkpoint of this step, unless there is one; its end answers the requests for one."""
        context, phase, progress = self.context, self.phase, self.progress
        total = phase.first_version + progress.step
        state = RunState(
            phase=phase.name,
            phase_index=phase.index,
            step=progress.step,
            total_step=total,
            version=progress.version,
            cursor=self.cursor.to_json(),
            config=context.config.model_dump(mode="json"),
            data=await asyncio.to_thread(fingerprint, phase),
            scores=dict(context.evaluations.scores),
        )
        await self.saving.begin(state)

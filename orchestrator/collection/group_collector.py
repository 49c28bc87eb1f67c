"""Batches of prompt groups. Each group passes the group-wise stages separately, in the order of the pipeline, so that a
slow reward or a dead engine delays one group and not the batch. It may run ahead of learning:

    cursor ─► admit ─► generate ─► score ─► keep ... ─► ready ─┐ a batch's worth
      ▲         ▲ the staleness contract                       ├─► batch stages ─► next()
      └─────────┴──── dropped, filtered or too old: draw another

Samples that are lost with the node that held them are drawn again, from the same seeds. One batch is assembled ahead.
What is trained on is settled in the cursor only after the step.
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from actors.batch import Batch
from actors.errors import BlockLost, BudgetExhausted, Dropped, RunError
from orchestrator.batches.row_table import RowTable
from orchestrator.cluster.failures import Kind, Ledger, Watchdog, classify
from orchestrator.collection.collected import Collected, RoleClient, cancel
from orchestrator.collection.cursor import Cursor
from orchestrator.collection.group_stages import PromptGroup
from orchestrator.collection.staleness import Contract
from orchestrator.pipeline import Pipeline, Verb
from rollout.sampling import sample_seed

TIMES_LOST = 3  # of one group, before it is dropped


class GroupCollector:
    """Batches of prompt groups under the staleness contract."""

    def __init__(
        self,
        source: Any,
        roles: RoleClient,
        pipeline: Pipeline,
        cursor: Cursor,
        contract: Contract,
        *,
        run: str,
        seed: int,
        version: int,
        ledger: Ledger,
        watchdog: Watchdog,
    ) -> None:
        self._source, self._roles, self._pipeline, self._cursor = source, roles, pipeline, cursor
        self._contract, self._run, self._seed = contract, run, seed
        self._ledger, self._watchdog = ledger, watchdog
        self._version, self._accepted = version, (version - contract.first_version) * contract.batch
        self._restored = set[int]()  # positions of groups that a checkpoint had
        self._drawing = (position for position in cursor.unsettled() if position not in self._restored)
        self._redraw: list[int] = []
        self._running: dict[int, asyncio.Task[None]] = {}
        self._started: dict[int, int] = {}  # position -> version when it was admitted
        self._ready: dict[int, PromptGroup] = {}
        self._assembled: tuple[PromptGroup, ...] = ()  # of the batch that is assembled ahead
        self._settled: list[int] = []  # dropped or filtered since the last step
        self._filtered = self._filtered_in_a_row = self._expired = self._kept = 0
        self._lost = Counter[int]()  # position -> how many times its samples were lost with a node
        self._wasted = Waste()
        self._changed = asyncio.Event()
        self._failure: BaseException | None = None
        self._closed = False
        self._ahead: asyncio.Task[Collected] | None = None

    async def next(self, version: int) -> Collected:
        self._admit()
        with self._watchdog.waiting(self._what_is_waited_for):
            collected = await (self._ahead or asyncio.ensure_future(self._assemble(version)))
            while await self._make_again(collected.groups):
                collected = await self._assemble(version)
        self._contract.check((group.oldest_version for group in collected.groups), version=version)
        self._assembled = ()
        self._ahead = asyncio.ensure_future(self._assemble(version + 1))
        return collected

    async def expire(self, next_version: int) -> None:
        under_way = {p: task for p, task in self._running.items() if not task.done()}  # others are ready, if at all
        slow = [p for p in under_way if self._contract.too_old(self._started[p], next_version=next_version)]
        await cancel([under_way[p] for p in slow])
        late = [p for p in slow if under_way[p].cancelled()]
        stale = [
            p for p, g in self._ready.items() if self._contract.too_old(g.oldest_version, next_version=next_version)
        ]
        for position in stale:
            del self._ready[position]
            self._accepted -= 1
        self._expired += len(late) + len(stale)
        self._redraw = sorted([*self._redraw, *late, *stale])

    def advance(self, version: int, trained: Collected) -> None:
        self._version = version
        self._cursor.settle([*trained.positions, *self._settled])
        self._settled.clear()
        self._admit()
        self._changed.set()  # who waits for a batch of this version learns whether there can be one

    async def close(self) -> None:
        self._closed = True  # a group that finishes meanwhile makes no room for another
        await cancel([*self._running.values(), *([self._ahead] if self._ahead else [])])

    @property
    def finished(self) -> tuple[PromptGroup, ...]:
        """Between two steps: the groups that have passed their stages and were not trained on."""
        return tuple(sorted([*self._ready.values(), *self._assembled], key=lambda group: group.position))

    def drawn(self, position: int) -> PromptGroup:
        """The group of a position before its first stage."""
        epoch, index = self._source.order.at(position)
        name = "/".join([f"{self._run}/{position}/v{self._version}", *["again"] * self._lost[position]])
        return PromptGroup(name, position, self._source.item(index), sample_seed(self._seed, position), epoch)

    def restore(self, groups: Sequence[PromptGroup]) -> None:
        """Go on with groups that another process collected, before the first batch. One that is too old by now is
        sampled again."""
        for group in groups:
            if not self._contract.too_old(group.oldest_version, next_version=self._version):
                self._restored.add(group.position)
                self._accept(group)

    def _admit(self) -> None:
        while (
            not self._closed
            and self._failure is None
            and self._contract.may_admit(accepted=self._accepted, running=len(self._running), version=self._version)
        ):
            position = self._redraw.pop(0) if self._redraw else next(self._drawing)
            self._started[position] = self._version
            task = asyncio.ensure_future(self._collect(position))
            self._running[position] = task
            task.add_done_callback(lambda done, position=position: self._ended(position, done))

    def _ended(self, position: int, task: asyncio.Task[None]) -> None:
        if self._running.get(position) is task:  # else it is drawn again already
            del self._running[position], self._started[position]
        if not task.cancelled():
            self._failure = self._failure or task.exception()
            self._admit()
        self._changed.set()

    async def _collect(self, position: int) -> None:
        """One group's way through the group-wise stages. It ends in `_ready`, or settled and replaced by another."""
        group = self.drawn(position)
        try:
            for stage in self._pipeline.group_stages:
                after = await self._roles.run_group(stage, group)
                if after is None:
                    self._filter(group)
                    return
                group = after
        except BlockLost as error:
            self._lose(group, error)
            return
        except RunError as error:
            if classify(error) is Kind.BUG:
                raise
            self._drop(group, error.reason if isinstance(error, Dropped) else str(classify(error)), str(error))
            return
        self._ledger.accepted()
        self._filtered_in_a_row = 0
        self._kept += 1
        self._accept(group)

    def _accept(self, group: PromptGroup) -> None:
        self._accepted += 1
        self._ready[group.position] = group

    def _lose(self, group: PromptGroup, error: BlockLost) -> None:
        """What was sampled is gone with its node: sample it again, from the same seed, within reason."""
        position = group.position
        self._lost[position] += 1
        if self._lost[position] > TIMES_LOST:
            self._drop(group, str(Kind.INFRA), f"lost {self._lost[position]} times, the last time: {error}")
        else:
            self._redraw = sorted([*self._redraw, position])

    async def _make_again(self, groups: Sequence[PromptGroup]) -> bool:
        """Whether some of the groups of a batch are lost, and the batch must be assembled again. The others are as
        ready as they were."""
        lost = await self._roles.lost([group.rows for group in groups])
        if not any(lost):
            return False
        self._assembled = ()
        for group, gone in zip(groups, lost, strict=True):
            if gone:
                self._accepted -= 1
                self._lose(group, BlockLost("its node is gone"))
            else:
                self._ready[group.position] = group
        self._admit()
        return True

    def _leave_out(self, group: PromptGroup) -> None:
        """Another prompt takes the place of the group; or none does, and it stays in its batch without a row."""
        if self._pipeline.draws_again:
            self._settled.append(group.position)
        else:
            self._accept(replace(group, rows=RowTable(Batch.empty()), oldest_version=None))

    def _drop(self, group: PromptGroup, reason: str, detail: str) -> None:
        self._leave_out(group)
        self._ledger.drop(reason, detail)

    def _filter(self, group: PromptGroup) -> None:
        """The group taught nothing (all rewards equal, say): leave it out, within reason."""
        self._leave_out(group)
        self._wasted = self._wasted.and_of(group)
        self._filtered += 1
        if not self._pipeline.draws_again:
            return
        self._filtered_in_a_row += 1
        bound = 50 * self._contract.batch
        if self._filtered_in_a_row > bound:
            raise BudgetExhausted(
                f"{bound} prompt groups in a row were filtered out: no prompt tells good from bad samples"
            )

    async def _assemble(self, version: int) -> Collected:
        """A batch that may be trained at `version`: the oldest groups first, then in the order of their prompts."""
        while True:
            await self._until_enough(version)
            positions = sorted(self._usable(version)[: self._contract.size(version)])
            groups = self._assembled = tuple(self._ready.pop(position) for position in positions)
            assembled = time.perf_counter()
            try:
                table = await self._roles.run_batch_stages(RowTable.concat([group.rows for group in groups]))
            except BlockLost:
                if not await self._make_again(groups):
                    raise  # a block that is none of the groups': made by a role whose node is gone
                continue
            seconds = {**_seconds(groups), "time/batch_stages": time.perf_counter() - assembled}
            return Collected(table, tuple(positions), groups, {**self._metrics(), **seconds})

    def _usable(self, version: int) -> list[int]:
        ages = {position: group.oldest_version for position, group in self._ready.items()}
        fresh = [position for position, age in ages.items() if not self._contract.too_old(age, next_version=version)]
        return sorted(fresh, key=lambda position: (_or_newest(ages[position]), position))

    async def _until_enough(self, version: int) -> None:
        """Until a batch may be trained at `version`. Ended by `_ended` of the groups under way; each of those has
        deadlines of its own, which count while it is worked on. So this one has none: it lasts as long as a step, or as
        long as a pool is paused."""
        wanted = self._contract.size(version)
        while len(self._ready) < wanted or len(self._usable(version)) < wanted:  # each group that ends looks here
            if self._failure is not None:
                raise self._failure
            if self._version == version and not self._running:  # all was admitted that may be
                raise RunError(
                    f"{len(self._usable(version))} of {self._contract.size(version)} prompt groups are ready for "
                    f"version {version}, none is under way, and none may be admitted ({self._accepted} accepted)"
                )
            self._changed.clear()
            await self._changed.wait()

    def _what_is_waited_for(self) -> str | None:
        if self._roles.paused:
            return None
        return f"{self._contract.batch} prompt groups ({len(self._ready)} ready, {len(self._running)} under way)"

    def _metrics(self) -> dict[str, float]:
        counts = {f"dropped/{reason}": float(count) for reason, count in self._ledger.dropped.items()}
        found = {"groups/filtered": float(self._filtered), "groups/expired": float(self._expired)}
        found["groups/lost"] = float(self._lost.total())
        if any(stage.verb in (Verb.KEEP, Verb.REGROUP) for stage in self._pipeline.group_stages):
            found |= {"groups/kept": float(self._kept), **self._wasted.metrics()}
        return {**counts, **found}


@dataclass(frozen=True)
class Waste:
    """What was spent on groups that taught nothing, since the run or its resumption began. `seconds` are those of their
    requests in the engines, all together: requests that ran at the same time count each."""

    samples: int = 0
    tokens: int = 0
    seconds: float = 0.0

    def and_of(self, group: PromptGroup) -> Waste:
        lengths = [length for meta in group.metas for length in meta.lengths]
        seconds = sum(meta.seconds for meta in group.metas)
        return Waste(self.samples + len(lengths), self.tokens + sum(lengths), self.seconds + seconds)

    def metrics(self) -> dict[str, float]:
        return {f"groups/filtered_{name}": float(value) for name, value in asdict(self).items()}


def _or_newest(version: int | None) -> int:
    """Groups that do not grow old come after all that do."""
    return sys.maxsize if version is None else version


def _seconds(groups: Sequence[PromptGroup]) -> dict[str, float]:
    """Wall time of a batch's generation, and of the scoring that generation did not hide."""
    began = min(group.admitted for group in groups)
    generated = max(group.ended.get(Verb.GENERATE, began) for group in groups)
    seconds = {"time/generate": generated - began}
    scored = [group.ended[Verb.SCORE] for group in groups if Verb.SCORE in group.ended]
    return {**seconds, "time/score": max(scored) - generated} if scored else seconds

"""Collection: everything that happens to data before a role that is trained touches it. It may run ahead of learning.

Items that need no sampling come in rows, batch by batch (`RowCollector`). Prompts come as groups, and each group flows
by itself, so that a slow reward or a dead engine delays one group and not the batch (`GroupCollector`):

    cursor ─► admit ─► generate ─► score ─► keep? ─► ready ─┐ a batch's worth
      ▲         ▲ the staleness contract                    ├─► batch stages ─► next()
      └─────────┴──── dropped, filtered or too old: draw another

Both assemble one batch ahead. What is trained on is settled in the cursor only after the step.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol

import numpy as np

from actors.batch import Batch
from actors.errors import BudgetExhausted, DataFailure, InfraFailure, RunError
from actors.worker import Ref
from orchestrator.cursor import Cursor
from orchestrator.pipeline import Pipeline, Verb
from orchestrator.staleness import Contract
from orchestrator.supervision import Kind, Ledger, Watchdog, classify, enough_survive
from rewards.actor import ScoreResult
from rollout.sampling import GroupMeta, Request, Sampling, sample_seed


@dataclass(frozen=True)
class Group:
    """A prompt with its finished, scored samples; the tokens stay in the object store."""

    position: int
    prompt: Any  # orchestrator.source.Prompt
    meta: GroupMeta
    tokens: Ref
    score: ScoreResult
    times: tuple[float, float, float]  # admitted, generated, scored; seconds on the driver's clock


@dataclass(frozen=True)
class Collected:
    """What one training step learns from."""

    batch: Batch
    positions: tuple[int, ...]
    groups: tuple[Group, ...] = ()
    metrics: dict[str, float] = field(default_factory=dict)


class Collector(Protocol):
    """Where the loop's batches come from."""

    async def next(self, version: int) -> Collected:
        """The next batch, for a policy at `version`."""
        ...

    async def expire(self, next_version: int) -> None:
        """Weights of `next_version` are about to be published: give up what would be too old under them."""
        ...

    def advance(self, version: int, trained: Collected) -> None:
        """The policy is at `version` now, having trained on that batch."""
        ...

    async def close(self) -> None: ...


class Company(Protocol):
    """What collection asks of the roles (`orchestrator.roles.Roles`)."""

    async def run_batch_stages(self, batch: Batch) -> Batch: ...

    async def generate(self, request: Request) -> tuple[GroupMeta, Ref]: ...

    async def score(self, prompt: Any, tokens: Ref) -> ScoreResult: ...

    async def fetch(self, refs: list[Ref]) -> list[Batch]: ...

    @property
    def paused(self) -> bool:
        """Whether groups wait because somebody wants no workers."""
        ...


class RowCollector:
    """Batches of rows that are complete from the start: supervised, paired and unpaired data. The next batch is read
    ahead; with `overlaps`, the stages that it passes before learning run ahead, too."""

    def __init__(
        self,
        source: Any,
        company: Company,
        cursor: Cursor,
        items: int,
        *,
        overlaps: bool = True,
        last: tuple[int, int] | None = None,
    ) -> None:
        """`last`: the version that the last batch is trained at, and its items; without, batches have no end."""
        self._source, self._company, self._cursor, self._items = source, company, cursor, items
        self._overlaps, self._last = overlaps, last
        self._drawing = cursor.unsettled()
        self._ahead: asyncio.Task[Collected] | None = None

    async def next(self, version: int) -> Collected:
        ahead = self._ahead or asyncio.ensure_future(self._assemble(version))
        collected = await ahead
        if not self._overlaps:
            collected = await self._pass_stages(collected)
        ended = self._last is not None and version >= self._last[0]
        self._ahead = None if ended else asyncio.ensure_future(self._assemble(version + 1))
        return collected

    async def _assemble(self, version: int) -> Collected:
        items = self._last[1] if self._last is not None and version == self._last[0] else self._items
        positions = [next(self._drawing) for _ in range(items)]
        read = Collected(await asyncio.to_thread(self._source.batch, positions), tuple(positions))
        return await self._pass_stages(read) if self._overlaps else read

    async def _pass_stages(self, read: Collected) -> Collected:
        return replace(read, batch=await self._company.run_batch_stages(read.batch))

    async def expire(self, next_version: int) -> None:
        pass  # rows do not age

    def advance(self, version: int, trained: Collected) -> None:
        self._cursor.settle(trained.positions)

    async def close(self) -> None:
        await _cancel([self._ahead] if self._ahead else [])


class GroupCollector:
    """Batches of prompt groups under the staleness contract."""

    def __init__(
        self,
        source: Any,
        company: Company,
        pipeline: Pipeline,
        cursor: Cursor,
        contract: Contract,
        sampling: Sampling,
        *,
        run: str,
        seed: int,
        version: int,
        ledger: Ledger,
        watchdog: Watchdog,
        on_reward_failure: Literal["drop", "abort"],
    ) -> None:
        self._on_reward_failure = on_reward_failure
        self._source, self._company, self._pipeline, self._cursor = source, company, pipeline, cursor
        self._contract, self._sampling, self._run, self._seed = contract, sampling, run, seed
        self._ledger, self._watchdog = ledger, watchdog
        self._version, self._accepted = version, (version - contract.first_version) * contract.batch
        self._samples = _samples_per_prompt(pipeline)
        self._keeps = [stage for stage in pipeline.group_stages if stage.verb is Verb.KEEP]
        self._drawing = cursor.unsettled()
        self._redraw: list[int] = []
        self._running: dict[int, asyncio.Task[None]] = {}
        self._started: dict[int, int] = {}  # position -> version when it was admitted
        self._ready: dict[int, Group] = {}
        self._settled: list[int] = []  # dropped or filtered since the last step
        self._filtered = self._filtered_in_a_row = self._expired = 0
        self._changed = asyncio.Event()
        self._failure: BaseException | None = None
        self._closed = False
        self._ahead: asyncio.Task[Collected] | None = None

    async def next(self, version: int) -> Collected:
        self._admit()
        with self._watchdog.waiting(self._what_is_waited_for):
            collected = await (self._ahead or asyncio.ensure_future(self._assemble(version)))
        oldest = [group.meta.oldest_version for group in collected.groups]
        self._contract.check(oldest, version=version)
        self._ahead = asyncio.ensure_future(self._assemble(version + 1))
        return collected

    async def expire(self, next_version: int) -> None:
        late = [p for p, started in self._started.items() if self._contract.too_old(started, next_version=next_version)]
        await _cancel([self._running[p] for p in late if p in self._running])
        for position in late:
            self._forget(position)
        stale = [
            p
            for p, g in self._ready.items()
            if self._contract.too_old(g.meta.oldest_version, next_version=next_version)
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

    async def close(self) -> None:
        self._closed = True  # a group that finishes meanwhile makes no room for another
        await _cancel([*self._running.values(), *([self._ahead] if self._ahead else [])])

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

    def _forget(self, position: int) -> None:
        self._running.pop(position, None)
        self._started.pop(position, None)

    def _ended(self, position: int, task: asyncio.Task[None]) -> None:
        self._forget(position)
        if not task.cancelled():
            self._failure = self._failure or task.exception()
            self._admit()
        self._changed.set()

    async def _collect(self, position: int) -> None:
        """One group's way through the row-wise stages. It ends in `_ready`, or settled and replaced by another."""
        _, index = self._source.order.at(position)
        prompt = self._source.item(index)
        admitted = time.perf_counter()
        try:
            meta, tokens = await self._company.generate(self._request(position, prompt.tokens))
            generated = time.perf_counter()
            if not enough_survive(len(meta.lengths), self._samples):
                self._drop(position, "too few samples survived", "; ".join(meta.failures))
                return
            score = await self._score(prompt, tokens)
        except RunError as error:
            if classify(error) is Kind.BUG:
                raise
            self._drop(position, str(classify(error)), str(error))
            return
        if np.isnan(score.total).all():
            self._drop(position, "no opinion", f"no reward has an opinion on any sample: {_silent(score, prompt)}")
            return
        if not all(stage.call(score.total, **stage.options) for stage in self._keeps if stage.call):
            self._filter(position)
            return
        self._ledger.accepted()
        self._filtered_in_a_row = 0
        self._accepted += 1
        times = (admitted, generated, time.perf_counter())
        self._ready[position] = Group(position, prompt, meta, tokens, score, times)

    async def _score(self, prompt: Any, tokens: Ref) -> ScoreResult:
        """Raises BudgetExhausted for a group that cannot be scored if `roles.reward.on_failure` says so."""
        try:
            return await self._company.score(prompt, tokens)
        except (InfraFailure, DataFailure) as error:
            if self._on_reward_failure == "drop":
                raise
            raise BudgetExhausted(
                f"prompt {prompt.id} could not be scored: {error}\nroles.reward.on_failure=abort ends the run for one; "
                "with drop the group is dropped, and counted"
            ) from error

    def _request(self, position: int, tokens: tuple[int, ...]) -> Request:
        seed = sample_seed(self._seed, position)
        return Request(
            f"{self._run}/{position}/v{self._version}", tokens, self._samples, self._sampling, seed, group=position
        )

    def _drop(self, position: int, reason: str, detail: str) -> None:
        self._settled.append(position)
        self._ledger.drop(reason, detail)

    def _filter(self, position: int) -> None:
        """The group taught nothing (all rewards equal, say): draw another, within reason."""
        self._settled.append(position)
        self._filtered += 1
        self._filtered_in_a_row += 1
        bound = 50 * self._contract.batch
        if self._filtered_in_a_row > bound:
            raise BudgetExhausted(
                f"{bound} prompt groups in a row were filtered out: no prompt tells good from bad samples"
            )

    async def _assemble(self, version: int) -> Collected:
        """A batch that may be trained at `version`: the oldest groups first, then in the order of their prompts."""
        await self._until_enough(version)
        positions = sorted(self._usable(version)[: self._contract.size(version)])
        groups = tuple(self._ready.pop(position) for position in positions)
        parts = await self._company.fetch([group.tokens for group in groups])
        scored = [part.with_columns(reward=group.score.total) for part, group in zip(parts, groups, strict=True)]
        assembled = time.perf_counter()
        batch = await self._company.run_batch_stages(Batch.concat(scored))
        seconds = {**_seconds(groups), "time/batch_stages": time.perf_counter() - assembled}
        return Collected(batch, tuple(positions), groups, {**self._metrics(), **seconds})

    def _usable(self, version: int) -> list[int]:
        ages = {position: group.meta.oldest_version for position, group in self._ready.items()}
        fresh = [position for position, age in ages.items() if not self._contract.too_old(age, next_version=version)]
        return sorted(fresh, key=lambda position: (ages[position], position))

    async def _until_enough(self, version: int) -> None:
        """Until a batch may be trained at `version`. Ended by `_ended` of the groups under way; each of those has
        deadlines of its own, which count while it is worked on. So this one has none: it lasts as long as a step, or as
        long as nobody wants workers."""
        while len(self._usable(version)) < self._contract.size(version):
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
        if self._company.paused:
            return None
        return f"{self._contract.batch} prompt groups ({len(self._ready)} ready, {len(self._running)} under way)"

    def _metrics(self) -> dict[str, float]:
        counts = {f"dropped/{reason}": float(count) for reason, count in self._ledger.dropped.items()}
        return {**counts, "groups/filtered": float(self._filtered), "groups/expired": float(self._expired)}


def _seconds(groups: tuple[Group, ...]) -> dict[str, float]:
    """Wall time of a batch's generation, and of the scoring that generation did not hide."""
    admitted, generated, scored = zip(*(group.times for group in groups), strict=True)
    return {"time/generate": max(generated) - min(admitted), "time/score": max(scored) - max(generated)}


def _samples_per_prompt(pipeline: Pipeline) -> int:
    stage = pipeline.generates
    assert stage is not None, "a pipeline of prompts generates"
    return int(stage.options["n"])


def _silent(score: ScoreResult, prompt: Any) -> str:
    names = ", ".join(score.names)
    return f"{names} returned None for each of the {len(score.total)} of prompt {prompt.id}; is the right column read?"


async def _cancel(tasks: list[asyncio.Task[Any]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)

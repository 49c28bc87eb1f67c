"""A collector of prompt groups over stages that answer at once, except where a test says that one is slow, fails or is
lost."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, Literal

import numpy as np

from actors.batch import Batch
from actors.worker import LocalObjects, Ref
from orchestrator.batches.row_table import RowTable
from orchestrator.cluster.failures import Ledger, Watchdog
from orchestrator.collection.cursor import Cursor
from orchestrator.collection.group_collector import GroupCollector
from orchestrator.collection.group_stages import GroupStages, PromptGroup
from orchestrator.collection.scoring import Scored, ToScore
from orchestrator.collection.staleness import Contract
from orchestrator.pipeline import Pipeline, Prompts, Stage, generate, keep, score
from rewards.worker import ScoreResult
from rollout.sampling import Finish, GroupMeta, Request, Sampling

SAMPLES = 2


@dataclass
class Endless:
    """A source whose item i is the prompt [i]."""

    order: Any = field(default_factory=lambda: SimpleNamespace(at=lambda position: (0, position)))

    def item(self, index: int) -> Any:
        return SimpleNamespace(
            id=index, tokens=(index,), prompt=str(index), columns={}, row_values={}, teacher_prompt=None
        )

    def batch(self, positions: list[int]) -> Batch:
        return Batch.build([1] * len(positions), tokens=positions, mask=[False] * len(positions), group=positions)


@dataclass
class Stages(GroupStages):
    """Group-wise stages over workers that answer at once, except for what they are told to be slow with or to fail."""

    version: int = 0
    slow: set[int] = field(default_factory=set)
    failing: dict[int, Exception] = field(default_factory=dict)
    unscorable: dict[int, Exception] = field(default_factory=dict)
    scorable_again: bool = False  # what is unscorable is so once
    rewards: dict[int, list[float]] = field(default_factory=dict)
    samples: dict[int, int] = field(default_factory=dict)
    on_failure: Literal["drop", "abort"] = "drop"
    seen: list[int] = field(default_factory=list)
    seeds: dict[int, int] = field(default_factory=dict)
    all_seeds: dict[int, list[int]] = field(default_factory=dict)
    gone: set[int] = field(default_factory=set)  # positions whose blocks are lost once they were collected
    gone_again: bool = False
    staged: int = 0  # batches that passed the stages before learning
    paused: bool = False

    def __post_init__(self) -> None:
        policy = SimpleNamespace(abort_on_failure=self.on_failure == "abort")
        scorers: dict[str, Any] = {"reward": SimpleNamespace(policy=policy)}
        super().__init__({}, scorers, {}, LocalObjects())

    async def sample(self, role: str, request: Request, sampler: int = 0) -> tuple[GroupMeta, RowTable]:
        position = request.group
        self.seen.append(position)
        self.seeds[position] = request.seed
        self.all_seeds.setdefault(position, []).append(request.seed)
        started = self.version
        while position in self.slow:
            await asyncio.sleep(0.001)
        await asyncio.sleep(0)
        if position in self.failing:
            raise self.failing[position]
        n = self.samples.get(position, request.n)
        block = Batch.build([2] * n, tokens=[position, 7] * n, mask=[False, True] * n)
        meta = GroupMeta(request.id, "w", (1,) * n, (Finish.STOP,) * n, started, self.version, 0.25)
        of_row = {"sampler": np.full(n, sampler, np.int8), "completion_tokens": np.ones(n, np.int32)}
        rows = Batch.build([2] * n, group=[position] * n, **of_row)
        return meta, RowTable.of_block(rows, Ref(block), {"tokens", "mask"})

    async def score(self, role: str, asked: ToScore) -> Scored:
        prompt, rows = asked.prompt, asked.rows
        if prompt.id in self.unscorable:
            raise self.unscorable.pop(prompt.id) if self.scorable_again else self.unscorable[prompt.id]
        total = np.array(self.rewards.get(prompt.id, [0.0, 1.0][: len(rows)]), dtype=np.float32)
        parts, weights = total[:, None], np.ones(1, np.float32)
        return Scored(ScoreResult(names=("r",), rewards=parts, total=total, weights=weights), (Ref(None),))

    async def run_group(self, stage: Stage, group: PromptGroup) -> PromptGroup | None:
        return await self.run(stage, group, Sampling(max_tokens=4))

    async def run_batch_stages(self, table: RowTable) -> RowTable:
        self.staged += 1
        return table

    async def lost(self, tables: Sequence[RowTable]) -> list[bool]:
        found = [bool(len(table)) and int(table["group"][0]) in self.gone for table in tables]
        self.gone = self.gone if self.gone_again else set()
        return found


def spread(rewards: np.ndarray) -> bool:
    return bool(np.ptp(rewards) > 0)


def collector(
    stages: Stages,
    *,
    batch: int = 3,
    staleness: int = 0,
    version: int = 0,
    cursor: Cursor | None = None,
    keeps: bool = True,
    pipeline: Pipeline | None = None,
    source: Any = None,
    **ledger: Any,
) -> GroupCollector:
    stages.version = version
    return GroupCollector(
        source or Endless(),
        stages,
        pipeline or Pipeline(Prompts, generate(n=SAMPLES), score(), *([keep(spread)] if keeps else [])),
        cursor or Cursor(),
        Contract(staleness, batch, batches=ledger.get("batches")),
        run="test",
        seed=3,
        version=version,
        ledger=Ledger(ledger.get("allowed", 100)),
        watchdog=ledger.get("watchdog", Watchdog()),
    )


async def settled() -> None:
    """Until everything has happened that nobody waits for. In turns of the event loop, because on a busy machine a time
    may pass without a single one."""
    for _ in range(50):
        await asyncio.sleep(0.0005)


async def step(feed: GroupCollector, stages: Stages, version: int) -> tuple[int, ...]:
    """One turn of the loop, without a policy."""
    collected = await feed.next(version)
    await feed.expire(version + 1)
    stages.version = version + 1
    feed.advance(version + 1, collected)
    return collected.positions

"""What a checkpoint holds of the driver's tables is read beside the event loop: the run's other tasks go on."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from actors.worker import LocalObjects
from orchestrator.batches import replay_buffer, saved_tables
from orchestrator.batches.replay_buffer import ReplayBuffer
from orchestrator.collection import saved_groups
from orchestrator.collection.group_stages import PromptGroup

SOON_S = 60.0


async def written(folder: Path) -> None:
    """A file of each kind."""
    await saved_tables.write(folder / "tables.npz", {"numbers": np.arange(3)})
    await saved_groups.save([], LocalObjects(), folder)
    await replay_buffer.save(ReplayBuffer(1), LocalObjects(), folder)


def nobody(position: int) -> PromptGroup:
    raise AssertionError(f"no group of position {position} was saved")


READERS: dict[str, Callable[[Path], Awaitable[Any]]] = {
    "table": lambda folder: saved_tables.read(folder / "tables.npz"),
    "groups": lambda folder: saved_groups.load(LocalObjects(), folder, nobody),
    "buffer": lambda folder: replay_buffer.load(LocalObjects(), folder),
}


@pytest.mark.parametrize("read", READERS.values(), ids=READERS)
async def test_a_slow_disk_does_not_stop_the_other_tasks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, read: Callable[[Path], Awaitable[Any]]
) -> None:
    """The disk answers when another task has gone on, after the file was asked for."""
    asked, gone_on, load = threading.Event(), threading.Event(), np.load

    def slow(*args: Any, **options: Any) -> Any:
        asked.set()
        assert gone_on.wait(SOON_S), "no other task went on while the file was read"
        return load(*args, **options)

    async def another() -> None:
        while not asked.is_set():
            await asyncio.sleep(0.001)
        gone_on.set()

    await written(tmp_path)
    monkeypatch.setattr(np, "load", slow)
    async with asyncio.timeout(2 * SOON_S):
        await asyncio.gather(read(tmp_path), another())
    assert gone_on.is_set()


async def test_what_is_read_is_what_was_written(tmp_path: Path) -> None:
    await written(tmp_path)
    found = await saved_tables.read(tmp_path / "tables.npz")
    assert found.keys() == {"numbers"} and found["numbers"].tolist() == [0, 1, 2]

"""A trainer whose transfers of weights stop half-way, for what may happen in the middle of one. In a module of its own,
because an actor's process imports the module of its class, and that of a test imports transformers."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from actors.worker import WorkerInfo

TENSORS, ELEMENTS = 40, 2**19  # 2 MiB each: more in all than the sockets between two processes hold


class HalfWay:
    """Where a transfer stops until the test has done what it does in the middle of it. Files, because the trainer's
    process is in the transfer and answers no other call."""

    def __init__(self, folder: Path) -> None:
        self._hold, self._held = folder / "hold", folder / "held"

    def stop_here(self) -> None:
        """In the trainer's process: until the test lets it go on, if it asked for a stop."""
        while self._hold.exists():  # ended by the test, or with its Ray
            self._held.touch()
            time.sleep(0.01)

    def hold(self) -> None:
        self._held.unlink(missing_ok=True)
        self._hold.touch()

    async def until_held(self, timeout_s: float) -> None:
        deadline = time.monotonic() + timeout_s
        while not self._held.exists():
            assert time.monotonic() < deadline, "the transfer did not begin"
            await asyncio.sleep(0.01)

    def go_on(self) -> None:
        self._hold.unlink(missing_ok=True)


class Large:
    """A trainer with 40 tensors of 2 MiB."""

    def __init__(self, half_way: HalfWay) -> None:
        self._half_way = half_way

    def ready(self) -> WorkerInfo:
        return WorkerInfo("large", os.getpid(), "", "", {})

    def ping(self) -> None: ...

    def run(self, task: Callable[[], Any]) -> Any:
        return task()

    def export(self, consumer: Callable[[Iterable[tuple[str, Tensor]]], Any], bucket_bytes: int) -> Any:
        return consumer(self._weights())

    def _weights(self) -> Iterator[tuple[str, Tensor]]:
        for index in range(TENSORS):
            if index == TENSORS // 2:  # every member has joined, and has its first buckets
                self._half_way.stop_here()
            yield f"w{index}", torch.full((ELEMENTS,), float(index))

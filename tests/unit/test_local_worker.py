"""A worker in the driver's own process: one sync call at a time, as of an actor, whatever becomes of the caller."""

from __future__ import annotations

import asyncio
import threading

import pytest

from actors.errors import NoAnswer
from actors.worker import LocalWorker

LONG_S = 60.0


class Noting:
    """`slow` takes as long as the test wants."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.begun, self.go_on = threading.Event(), threading.Event()

    def slow(self) -> None:
        self.log.append("slow begins")
        self.begun.set()
        assert self.go_on.wait(LONG_S)
        self.log.append("slow ends")

    def quick(self) -> str:
        self.log.append("quick")
        return "done"

    def ping(self) -> str:
        return "alive"


@pytest.mark.parametrize("given_up", ["cancelled", "too late"])
async def test_a_call_that_is_given_up_goes_on_and_the_next_one_waits_for_its_end(given_up: str):
    """Else two threads would change one model."""
    target = Noting()
    worker = LocalWorker("policy", target)
    slow = asyncio.ensure_future(worker.call("slow", timeout_s=LONG_S if given_up == "cancelled" else 0.2))
    assert await asyncio.to_thread(target.begun.wait, LONG_S)
    if given_up == "cancelled":
        slow.cancel()
    with pytest.raises(asyncio.CancelledError if given_up == "cancelled" else NoAnswer):
        await slow
    quick = asyncio.ensure_future(worker.call("quick", timeout_s=LONG_S))
    assert await worker.call("ping", timeout_s=LONG_S) == "alive" and target.log == ["slow begins"]
    target.go_on.set()
    assert await quick == "done" and target.log == ["slow begins", "slow ends", "quick"]


async def test_a_call_that_waits_for_another_one_and_is_cancelled_never_begins():
    target = Noting()
    worker = LocalWorker("policy", target)
    slow = asyncio.ensure_future(worker.call("slow", timeout_s=LONG_S))
    assert await asyncio.to_thread(target.begun.wait, LONG_S)
    with pytest.raises(NoAnswer):
        await worker.call("quick", timeout_s=0.1)
    target.go_on.set()
    await slow
    assert await worker.call("ping", timeout_s=LONG_S) == "alive" and target.log == ["slow begins", "slow ends"]

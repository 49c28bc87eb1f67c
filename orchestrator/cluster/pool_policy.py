"""The limits of an elastic pool of workers."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class PoolPolicy:
    """Limits of a pool. With `kill_on_timeout`, a worker whose call passes its deadline is killed (a hung reward)."""

    slots: int  # calls that one worker carries at the same time
    max_attempts: int
    call_timeout_s: float
    start_timeout_s: float
    max_restarts: int
    kill_on_timeout: bool = False
    abort_on_failure: bool = False  # a group whose attempts are used up ends the run
    alone_after: int = 1  # worker deaths with several calls; after that many a call gets a worker to itself
    ping_every_s: float = 1.0
    ping_timeout_s: float = 15.0
    at_a_time: int | None = None  # calls that one worker works on at a time; the rest of its slots wait in it

    @property
    def places(self) -> int:
        return self.slots if self.at_a_time is None else self.at_a_time

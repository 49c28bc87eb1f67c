"""Work for a client that may go away: neither the server nor Starlette ends a route for that.

route ──► work ──► its answer
      └─► the client's connection: when it closes, the work is cancelled
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from starlette.requests import Request

from orchestrator.service.errors import Problem

T = TypeVar("T")
GONE = 499  # nobody reads it; what web servers write into their logs for this


async def while_it_waits(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """What the work returns. If the client goes away, the work is cancelled, and this waits until it has ended. The
    body of the request must have been read. Raises Problem GONE."""
    doing, leaving = asyncio.create_task(work), asyncio.create_task(_left(request))
    try:
        await asyncio.wait((doing, leaving), return_when=asyncio.FIRST_COMPLETED)
        if doing.done():
            return doing.result()
        raise Problem(GONE, "the client has gone")
    finally:
        for task in (doing, leaving):
            task.cancel()
        await asyncio.gather(doing, leaving, return_exceptions=True)


async def _left(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass

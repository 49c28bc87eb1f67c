"""The events of a run as they happen: a list, or a stream of server-sent events that can be taken up again.

    RUN/events.jsonl ── line by line ──► id: 7              the number of the line: `Last-Event-ID: 7` goes on with 8
                                         event: checkpoint
                                         data: {"time": ..., "step": 20, ...}

A stream ends with an event `end` (it has no id) once the run is over and all of its lines were sent. Each wait is one
look at the file every POLL_S; the stream's client ends it otherwise.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from sse_starlette import ServerSentEvent

from orchestrator.cluster.control import events
from orchestrator.service.run_folders import RunFolders
from orchestrator.service.schemas import EventLine

POLL_S = 0.5
# In the schema of a route: what one event of its stream is.
EVENT = {"type": "object", "properties": {name: {"type": "string"} for name in ("id", "event", "data")}}
EVENT_STREAM: dict[str, Any] = {"text/event-stream": {"schema": EVENT}}
PING_S = 15.0  # a comment in a silent stream, so that nothing between us and the client closes it


class EventReader:
    """The events of a run from the one after `last` on, each given once."""

    def __init__(self, folder: Path, last: int) -> None:
        self._folder, self._last = folder, last

    def new(self) -> list[EventLine]:
        found = [_line(number, event) for number, event in enumerate(events(self._folder), 1) if number > self._last]
        self._last += len(found)
        return found


def _line(number: int, event: dict[str, Any]) -> EventLine:
    data = {name: value for name, value in event.items() if name != "event"}
    return EventLine(id=number, event=str(event.get("event", "event")), data=data)


async def event_stream(runs: RunFolders, run: str, last: int) -> AsyncIterator[ServerSentEvent]:
    reader = EventReader(runs.folder(run), last)
    while True:
        state = (await asyncio.to_thread(runs.summary, run)).state  # before reading: the last lines must be read
        for line in await asyncio.to_thread(reader.new):
            yield ServerSentEvent(json.dumps(line.data), id=str(line.id), event=line.event)
        if state.over:
            yield ServerSentEvent(json.dumps({"state": state}), event="end")
            return
        await asyncio.sleep(POLL_S)

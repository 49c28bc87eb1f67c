"""A live policy without a run: the door of a driver, with an engine in this process that says what a test wants."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any

import numpy as np

from orchestrator.cluster.chat_door import chat_door
from orchestrator.collection.live_chat import LiveChat
from rollout.sampling import Finish, Request, Sampling


class Engine:
    """What `LiveChat` asks of a run's roles: samples, which are the next of `says`."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer, self.says, self.asked = tokenizer, list[str](), list[str]()
        self.engines = {"rollout": SimpleNamespace(paused=False)}
        self.phase = SimpleNamespace(sampling=Sampling(max_tokens=400))
        self.group_stages = self

    async def sample(self, role: str, request: Request) -> tuple[Any, Any]:
        self.asked.append(self.tokenizer.decode(request.prompt))
        said = self.tokenizer.encode(self.says.pop(0))
        return SimpleNamespace(finishes=[Finish.STOP]), [*request.prompt, *said]

    async def column(self, name: str, rows: Sequence[int]) -> Any:
        return np.array(rows)


@asynccontextmanager
async def door_of(engine: Engine, model: str = "run") -> AsyncIterator[str]:
    """The address behind which the model answers."""
    roles: Any = engine
    async with chat_door(LiveChat({model: "rollout"}, engine.tokenizer, roles), "127.0.0.1") as door:
        yield f"{door.url}/v1"

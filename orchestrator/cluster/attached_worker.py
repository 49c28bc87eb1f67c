"""A handle on an engine that was started elsewhere and speaks HTTP: a `Worker` like any other.

    driver ── POST ADDRESS/v1/generate, behind a token ──► `rollout/attached/server.py`, around a RolloutWorker
           ◄── samples, which the driver puts into the object store

What travels passes the driver: samples, and the weights of every publish.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Mapping
from typing import Any

import aiohttp
from yarl import URL

from actors.errors import InfraFailure, NoAnswer, WorkerDied
from actors.worker import Objects, Place, Ref, WorkerInfo
from rollout.attached.wire import KINDS, PROTOCOL, SESSION, Malformed, decode, encode
from rollout.engine import EngineSpec

FETCH_TIMEOUT_S = 600.0  # of weights from the object store, before they are sent
SHOWN = 300  # characters of an answer that is none


class AttachedWorker:
    """Used from one event loop. `attach` before any other call."""

    def __init__(self, name: str, address: str, token: str, objects: Objects) -> None:
        """`address`: a URL without a path."""
        self.name, self._address, self._objects = name, URL(address), objects
        self._headers = {"Authorization": f"Bearer {token}"}
        self._http: aiohttp.ClientSession | None = None
        self._dead = False

    @property
    def where(self) -> str:
        return str(self._address.origin())

    @property
    def place(self) -> Place | None:
        return None

    async def attach(self, spec: EngineSpec, *, timeout_s: float) -> None:
        """Make it this run's. Raises InfraFailure if it serves another one, or does not answer."""
        said = {"protocol": PROTOCOL, "name": self.name, "spec": spec}
        found = await self._post("attach", said, timeout_s)
        self._headers[SESSION] = found["session"]

    async def call(self, method: str, *args: Any, timeout_s: float, task_name: str | None = None, **kwargs: Any) -> Any:
        assert not kwargs, "an attached engine is called with positional arguments"
        values = [
            await self._objects.get(each, timeout_s=FETCH_TIMEOUT_S) if isinstance(each, Ref) else each for each in args
        ]
        result = await self._post(method, values, timeout_s)
        if isinstance(result, WorkerInfo):
            result.detail["address"] = self.where
        return result

    async def call_split(
        self, method: str, *args: Any, timeout_s: float, task_name: str | None = None, refs: int = 1
    ) -> tuple[Any, *tuple[Ref, ...]]:
        first, *others = await self.call(method, *args, timeout_s=timeout_s, task_name=task_name)
        return first, *[await self._objects.put(each) for each in others]

    async def kill(self) -> None:
        """Give the engine back; its process goes on. Calls in flight raise InfraFailure."""
        if self._dead:
            return
        self._dead = True
        with contextlib.suppress(InfraFailure):  # it may be gone
            await self._post("detach", None, 10.0, last=True)
        if self._http is not None:
            await self._http.close()

    async def _post(self, method: str, value: Any, timeout_s: float, *, last: bool = False) -> Any:
        if self._dead and not last:
            raise WorkerDied(f"{self.name}.{method}: the engine was detached")
        if self._http is None:
            self._http = aiohttp.ClientSession()
        try:
            parts = b"".join(await asyncio.to_thread(encode, value))
        except TypeError as error:
            raise InfraFailure(f"{self.name}.{method}: an attached engine cannot be told this: {error}") from None
        limit = aiohttp.ClientTimeout(total=timeout_s, sock_connect=min(timeout_s, 10.0))
        url = self._address / "v1" / method
        try:
            async with self._http.post(
                url, data=parts, headers=self._headers, timeout=limit, allow_redirects=False
            ) as answer:
                body, status = await answer.read(), answer.status
        except TimeoutError:
            raise NoAnswer(f"{self.name}.{method}: {self.where} did not answer within {timeout_s:g} s") from None
        except (aiohttp.ClientError, RuntimeError, OSError) as error:
            raise NoAnswer(f"{self.name}.{method}: {self.where}: {type(error).__name__}: {error}") from None
        if status != 200:
            said = body[:SHOWN].decode(errors="replace")
            raise InfraFailure(f"{self.name}.{method}: {self.where} answered {status}: {said}")
        return self._result(method, body)

    def _result(self, method: str, body: bytes) -> Any:
        try:
            found: Any = decode(body)
        except Malformed as error:
            raise InfraFailure(f"{self.name}.{method}: {self.where} sent no answer of an engine: {error}") from None
        if not isinstance(found, Mapping) or ("value" in found) is ("failed" in found):
            raise InfraFailure(f"{self.name}.{method}: {self.where} sent no answer of an engine")
        if "failed" in found:
            raise KINDS.get(found["failed"], InfraFailure)(f"{self.name} at {self.where}: {found['why']}")
        return found["value"]

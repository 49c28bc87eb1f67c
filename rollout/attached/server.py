"""`troupe engine`: an engine that waits for a run to attach it, serves that run, and waits for the next one.

    POST /v1/attach    EngineSpec, name ─► builds the engine: WorkerInfo, and the session's name
    POST /v1/METHOD    arguments ────────► what the worker's method returns
    POST /v1/detach    ──────────────────► the engine ends; the process waits

Messages are those of `wire.py`, behind a bearer token; 401 without it. The session that attached it is the only one it
serves; a session that was silent for LEASE_S (its run was killed, say) is over. A request whose client goes away is
aborted. Errors of a method are answers, too: they say whether the engine or the request is at fault.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import secrets
import signal
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import Any

from aiohttp import web

from actors.errors import ConfigError, DataFailure, InfraFailure, TroupeError
from rollout.attached.wire import PROTOCOL, SESSION, Malformed, decode, encode
from rollout.engine import ENGINES, EngineSpec
from rollout.worker import RolloutWorker

METHODS = frozenset({"ready", "generate", "generate_all", "abort", "receive", "ping"})
LEASE_S = 60.0  # a run pings every second


@dataclass(frozen=True)
class Offer:
    """What this process gives to runs. `model`: in the place of the run's folder or hub name, which may not be here;
    `threads`, `gpus`: of the engine."""

    token: str
    model: str | None = None
    threads: int = 1
    gpus: float = 0.0
    max_body_bytes: int = 16 * 2**30

    def applied(self, spec: EngineSpec) -> EngineSpec:
        """The specification of the run, with what is here. Raises ConfigError for one that could run its code."""
        if spec.kind not in ENGINES or spec.trust_remote_code or (spec.options and spec.kind != "scripted"):
            raise ConfigError(
                f"an attached engine runs no code of its run: the engine must be one of {', '.join(ENGINES)}, without "
                "engine_options and without model.trust_remote_code"
            )
        return replace(spec, model=self.model or spec.model, threads=self.threads, gpus=self.gpus)


class EngineServer:
    """One engine, of one session at a time. Used from one event loop."""

    def __init__(self, offer: Offer, say: Callable[[str], None] = lambda _: None) -> None:
        self._offer, self._say = offer, say
        self._worker: RolloutWorker | None = None
        self._last: RolloutWorker | None = None  # was closed, and may not have ended yet
        self._session, self._heard = "", 0.0
        self._attaching = asyncio.Lock()

    def application(self) -> web.Application:
        application = web.Application(client_max_size=self._offer.max_body_bytes)
        application.router.add_post("/v1/attach", self._guarded(self._attach))
        application.router.add_post("/v1/detach", self._guarded(self._detach))
        application.router.add_post("/v1/{method}", self._guarded(self._call))
        return application

    async def close(self) -> None:
        """End the engine. Calls in flight raise InfraFailure."""
        worker, self._worker, self._session = self._worker, None, ""
        if worker is not None:
            self._last = worker
            await asyncio.to_thread(worker.close)
            if worker.has_ended:
                self._last = None

    def _guarded(self, handle: Callable[[web.Request], Awaitable[Any]]) -> Any:
        """The handler behind the token, with its errors as answers."""

        async def guarded(request: web.Request) -> web.Response:
            given = request.headers.get("Authorization", "").removeprefix("Bearer ")
            if not hmac.compare_digest(given.encode(), self._offer.token.encode()):
                return web.Response(status=401, text="this needs the token that `troupe engine` was started with")
            try:
                return _answer({"value": await handle(request)})
            except Malformed as error:
                return web.Response(status=400, text=f"no message of protocol {PROTOCOL}: {error}")
            except TroupeError as error:
                kind = "data" if isinstance(error, DataFailure) else "infra"
                return _answer({"failed": kind, "why": str(error)})

        return guarded

    async def _attach(self, request: web.Request) -> dict[str, Any]:
        said = decode(await request.read())
        if not isinstance(said, dict) or said.get("protocol") != PROTOCOL:
            raise InfraFailure(f"this engine speaks protocol {PROTOCOL}: install the same version of Troupe")
        name, spec = str(said.get("name")), said.get("spec")
        if not isinstance(spec, EngineSpec):
            raise Malformed("no specification of an engine")
        async with self._attaching:
            if self._worker is not None and time.monotonic() - self._heard < LEASE_S:
                raise InfraFailure(f"this engine serves another run ({self._worker.name})")
            await self.close()
            if self._last is not None and not self._last.has_ended:  # two would not fit into the memory
                raise InfraFailure(
                    f"this engine is still ending the engine of its last run ({self._last.name}): try again, and "
                    "restart `troupe engine` if that takes minutes"
                )
            self._worker = RolloutWorker(name, self._offer.applied(spec))
            self._session, self._heard = secrets.token_urlsafe(16), time.monotonic()
            self._say(f"attached as {name}: {spec.kind}, {self._offer.model or spec.model}")
            return {"session": self._session}

    async def _detach(self, request: web.Request) -> None:
        self._of_session(request)
        async with self._attaching:  # who attaches it now waits until it has ended
            self._of_session(request)
            await self.close()
        self._say("detached")

    async def _call(self, request: web.Request) -> Any:
        worker, method = self._of_session(request), request.match_info["method"]
        if method not in METHODS:
            raise InfraFailure(f"an attached engine does not know {method}; it knows {', '.join(sorted(METHODS))}")
        arguments = decode(await request.read())
        found = getattr(worker, method)(*arguments)
        return await found if asyncio.iscoroutine(found) else found

    def _of_session(self, request: web.Request) -> RolloutWorker:
        if self._worker is None or not hmac.compare_digest(
            request.headers.get(SESSION, "").encode(), self._session.encode()
        ):
            raise InfraFailure("this engine is attached to another run, or to none")
        self._heard = time.monotonic()
        return self._worker


def _answer(value: dict[str, Any]) -> web.Response:
    return web.Response(body=b"".join(encode(value)), content_type="application/octet-stream")


def serve(offer: Offer, host: str, port: int, say: Callable[[str], None]) -> None:
    """Until SIGINT or SIGTERM. Raises ConfigError for an address that cannot be listened at."""

    async def until_told() -> None:
        told = asyncio.Event()
        for each in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(each, told.set)
        async with served(offer, host, port, say) as (_, at):
            say(f"an engine waits at {host}:{at}")
            await told.wait()

    try:
        asyncio.run(until_told())
    except OSError as error:
        raise ConfigError(f"cannot listen at {host}:{port}: {error}") from None


@asynccontextmanager
async def served(offer: Offer, host: str, port: int, say: Callable[[str], None]) -> AsyncIterator[tuple[str, int]]:
    """While the block runs an engine can be attached at that address; port 0: a free one."""
    server = EngineServer(offer, say)
    runner = web.AppRunner(server.application(), access_log=None, handle_signals=False, handler_cancellation=True)
    await runner.setup()
    try:
        await web.TCPSite(runner, host, port, shutdown_timeout=1.0).start()
        yield host, runner.addresses[0][1]
    finally:
        with contextlib.suppress(InfraFailure):
            await server.close()
        await runner.cleanup()

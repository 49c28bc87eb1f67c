"""The service as a process: the socket is bound first, so that its port is known and a taken one is refused at once."""

from __future__ import annotations

import socket
from collections.abc import Callable

import uvicorn
from fastapi import FastAPI

from actors.errors import ConfigError
from orchestrator.service.settings import Settings

GRACE_S = 5  # for requests in progress when the service is told to end; streams are cut


def bound(settings: Settings) -> socket.socket:
    """A socket at the address of the settings; with port 0, at a free one. Raises ConfigError if it is taken."""
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    taken = socket.socket(family, socket.SOCK_STREAM)
    taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        taken.bind((settings.host, settings.port))
    except OSError as error:
        taken.close()
        raise ConfigError(f"cannot listen at --host {settings.host} --port {settings.port}: {error.strerror}") from None
    return taken


def url_of(taken: socket.socket) -> str:
    host, port = taken.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


def serve(app: FastAPI, taken: socket.socket, started: Callable[[], None]) -> None:
    """Until SIGTERM or Ctrl-C. `started` is called once connections are accepted."""
    config = uvicorn.Config(
        app, log_level="warning", access_log=False, server_header=False, timeout_graceful_shutdown=GRACE_S
    )
    _Announced(config, started).run(sockets=[taken])


class _Announced(uvicorn.Server):
    def __init__(self, config: uvicorn.Config, started: Callable[[], None]) -> None:
        super().__init__(config)
        self._then = started

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets=sockets)
        self._then()

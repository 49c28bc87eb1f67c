"""When a Ray that `troupe up` has started is said to be there. `tests/ray/test_service.py` starts one."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from actors.errors import ConfigError
from orchestrator.cluster.run_lock import Driver
from orchestrator.service.private_ray import Up, answers, up


@contextmanager
def dashboard(status: int, body: str) -> Iterator[tuple[str, list[Any]]]:
    """(URL, what it was asked for with which token) of a server that gives one answer to everything."""
    asked: list[Any] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append((self.path, self.headers["Authorization"]))
            self.send_response(status)
            self.end_headers()
            self.wfile.write(body.encode())

        def log_message(self, *_: Any) -> None: ...

    server = HTTPServer(("127.0.0.1", 0), Handler)
    looks_every_s = 0.01  # whether it is to end; 0.5 otherwise
    threading.Thread(target=server.serve_forever, args=(looks_every_s,), daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", asked
    finally:
        server.shutdown()
        server.server_close()


def listed(*states: str) -> str:
    """As Ray's State API lists nodes."""
    nodes = [{"node_id": "18a0", "state": state} for state in states]
    return json.dumps({"result": True, "msg": "", "data": {"result": {"total": len(nodes), "result": nodes}}})


@pytest.mark.parametrize(
    ("status", "body", "there"),
    [
        (200, listed("ALIVE"), True),
        (200, listed("DEAD", "ALIVE"), True),
        (200, listed("DEAD"), False),
        (200, listed(), False),
        (200, "not yet", False),
        (200, '{"data": null}', False),
        (500, listed("ALIVE"), False),
    ],
)
def test_a_ray_is_there_once_a_node_lives(status: int, body: str, there: bool):
    with dashboard(status, body) as (url, asked):
        assert answers(url, "a-token") is there
    assert [token for _, token in asked] == ["Bearer a-token"]


def test_a_dashboard_that_does_not_listen_yet_is_no_ray():
    assert not answers("http://127.0.0.1:9", "a-token")


def test_a_service_whose_ray_has_died_is_not_taken_for_both_and_not_for_none(tmp_path: Path):
    here = Driver.here()
    gone = replace(here, started=here.started - 1000)
    Up(gone, here, "127.0.0.1:1", "http://127.0.0.1:2", "http://127.0.0.1:3").write(tmp_path)
    with pytest.raises(ConfigError, match=r"its Ray at 127.0.0.1:1 has died: `troupe down` ends the service"):
        up(tmp_path, cpus=None, object_store_mib=None, serve=[])

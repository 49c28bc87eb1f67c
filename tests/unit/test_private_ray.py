"""When a Ray and a service that `troupe up` has started are said to be there, and who may start them. In place of a Ray
is a process that sleeps; `tests/ray/test_service.py` starts a real one."""

from __future__ import annotations

import json
import os
import platform
import socket
import subprocess
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from actors.errors import ConfigError, NotDone
from orchestrator.cluster.run_lock import Driver
from orchestrator.service.private_ray import UP_FILE, UP_LOCK, Up, answers, down, end, environment_of, up
from orchestrator.service.service_folder import ADDRESS_FILE, service_folder
from tests.full_disk import without_room
from tests.waiting import until


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


@pytest.fixture
def ray(tmp_path: Path) -> Iterator[Driver]:
    """What stands for a Ray whose service has died; the folder of the runs is `tmp_path`."""
    with subprocess.Popen(["sleep", "600"], start_new_session=True) as process:
        lives = Driver.of(process.pid)
        gone = replace(Driver.here(), started=Driver.here().started - 1000)
        Up(lives, gone, "127.0.0.1:1", "http://127.0.0.1:9", "http://127.0.0.1:3").write(tmp_path)
        yield lives
        process.kill()


def start(runs: Path, *serve: str) -> Up:
    return up(runs, cpus=None, object_store_mib=None, serve=serve)[0]


def test_while_an_up_is_at_work_another_one_and_a_down_are_refused_and_afterwards_it_runs_already(
    tmp_path: Path, ray: Driver
):
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(start, tmp_path, "--port", "0")
        try:
            until((service_folder(tmp_path) / "service.log").exists, "start of the service")
            at_work = f"process {os.getpid()} .* is at work for {tmp_path}: wait for it"
            for other in (start, down):
                with pytest.raises(ConfigError, match=at_work):
                    other(tmp_path)
            assert not first.done() and ray.may_live
            server = first.result().server
            with pytest.raises(ConfigError, match="run already"):  # what has started does not hold the lock
                start(tmp_path)
        finally:
            wait([first])
            ended = down(tmp_path)
    assert ended and not server.may_live and not ray.may_live and not down(tmp_path)


def test_an_up_of_another_host_may_be_at_work_and_the_file_to_delete_is_named(tmp_path: Path):
    lock = service_folder(tmp_path) / UP_LOCK
    for host in ("elsewhere", platform.node()):
        lock.write_text(json.dumps({"host": host, "pid": os.getpid(), "started": 0.0}))
        if host == "elsewhere":
            with pytest.raises(ConfigError, match=f"on elsewhere, .* if it is gone, delete {lock}"):
                down(tmp_path)
    assert not down(tmp_path), "one of this host is seen to be gone"


def test_the_address_that_another_service_of_the_folder_writes_is_not_taken_for_that_of_the_one_that_was_started(
    tmp_path: Path, ray: Driver
):
    address, ended = service_folder(tmp_path) / ADDRESS_FILE, threading.Event()

    def announce() -> None:
        while not ended.wait(0.01):
            for content in ({"url": "http://127.0.0.1:8"}, {"url": "http://127.0.0.1:8", "pid": os.getpid()}):
                address.with_suffix(".other").write_text(json.dumps(content))
                address.with_suffix(".other").replace(address)

    other = threading.Thread(target=announce)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        other.start()
        try:
            with pytest.raises(NotDone, match=r"(?s)the service ended with exit code 2; .*cannot listen at"):
                end(start(tmp_path, "--port", str(taken.getsockname()[1])).server.pid)
        finally:
            ended.set()
            other.join(60)
    assert ray.may_live


def test_what_runs_is_known_also_if_what_has_started_next_cannot_be_written_down(tmp_path: Path):
    here = Driver.here()
    before = Up(here, here, "127.0.0.1:1", "http://127.0.0.1:2", "http://127.0.0.1:3")
    before.write(tmp_path)
    file = service_folder(tmp_path) / UP_FILE
    said = without_room(
        "from orchestrator.service.private_ray import Up; from dataclasses import replace; runs = Path(sys.argv[1]); "
        "replace(Up.read(runs), service='http://127.0.0.1:4').write(runs)",
        tmp_path,
    )
    assert "File too large" in said
    assert Up.read(tmp_path) == before and os.listdir(file.parent) == [file.name]
    replace(before, service="http://127.0.0.1:4").write(tmp_path)
    assert Up.read(tmp_path) != before


def test_rays_token_is_made_once_for_this_user_alone_and_an_empty_one_is_refused(tmp_path: Path):
    file = Path(environment_of(tmp_path)["RAY_AUTH_TOKEN_PATH"])
    token = file.read_text()
    assert len(token) == 64 and file.stat().st_mode & 0o777 == 0o600
    assert environment_of(tmp_path)["RAY_AUTH_TOKEN_PATH"] == str(file) and file.read_text() == token
    file.write_text("")
    with pytest.raises(ConfigError, match=f"no token in {file}: .* delete the file"):
        environment_of(tmp_path)
    file.unlink()
    assert "File too large" in without_room(
        "from orchestrator.service.private_ray import environment_of; environment_of(Path(sys.argv[1]))", tmp_path
    )
    assert os.listdir(tmp_path) == []
    environment_of(tmp_path)
    assert file.read_text() not in ("", token)

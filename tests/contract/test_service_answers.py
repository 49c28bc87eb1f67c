"""Answers to reads are kept for a moment, and what the service answers takes nothing from the runs beside it."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from orchestrator.service import answers
from orchestrator.service.answers import Answers
from orchestrator.service.priority import NICENESS, preempt_nobody, yield_to_runs
from tests.service_client import client, write_run


class Routes:
    """An application that counts what reaches it. `/big` is large, `/stream` comes in parts, `/lost` is a 404."""

    def __init__(self) -> None:
        self.reached: list[str] = []
        self.meanwhile: Callable[[], Awaitable[Any]] | None = None

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        path = scope["path"]
        self.reached.append(path)
        number = str(len(self.reached)).encode()
        if self.meanwhile is not None:
            meanwhile, self.meanwhile = self.meanwhile, None
            await meanwhile()
        await send({"type": "http.response.start", "status": 404 if path == "/lost" else 200, "headers": []})
        body = number.ljust(answers.LARGEST_BYTES) if path == "/big" else number
        if path == "/stream":
            await send({"type": "http.response.body", "body": b"first ", "more_body": True})
        await send({"type": "http.response.body", "body": body, "more_body": False})


class Asked:
    """`Answers` before `Routes`, with a clock that stands still."""

    def __init__(self, fresh_s: float = 1.0) -> None:
        self.routes, self.now = Routes(), 100.0
        self.answers = Answers(self.routes, fresh_s, lambda: self.now)

    def __call__(self, path: str, method: str = "GET", query: bytes = b"", **headers: str) -> bytes:
        return asyncio.run(self.call(path, method, query, **headers))

    async def call(self, path: str, method: str = "GET", query: bytes = b"", **headers: str) -> bytes:
        sent: list[Any] = []

        async def send(message: Any) -> None:
            sent.append(message)

        given = [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
        scope = {"type": "http", "method": method, "path": path, "query_string": query, "headers": given}
        await self.answers(scope, _nothing, send)
        return b"".join(message.get("body", b"") for message in sent)


async def _nothing() -> Any:
    raise AssertionError("no route of these reads a body")


def test_an_answer_is_given_again_until_it_is_too_old():
    ask = Asked(fresh_s=1.0)
    assert ask("/v1/runs") == b"1"
    ask.now += 0.99
    assert ask("/v1/runs") == b"1"
    ask.now += 0.02
    assert ask("/v1/runs") == b"2"
    assert ask.routes.reached == ["/v1/runs"] * 2


def test_another_question_has_another_answer():
    ask = Asked()
    given = [ask("/a"), ask("/b"), ask("/a", query=b"limit=1"), ask("/a", last_event_id="7"), ask("/a", accept="x")]
    assert given == [b"1", b"2", b"3", b"4", b"5"]
    assert ask("/a", query=b"limit=1") == b"3"


@pytest.mark.parametrize("path", ["/stream", "/big", "/lost"])
def test_streams_large_answers_and_errors_are_made_anew(path: str):
    ask = Asked()
    assert ask(path) != ask(path)
    assert ask.routes.reached == [path] * 2


@pytest.mark.parametrize("method", ["POST", "PATCH", "PUT", "DELETE"])
def test_who_changes_something_reads_what_it_has_become(method: str):
    ask = Asked()
    assert (ask("/a"), ask("/a")) == (b"1", b"1")
    ask("/a", method)
    assert ask("/a") == b"3"


def test_an_answer_that_was_begun_before_a_change_is_not_kept():
    ask = Asked()
    ask.routes.meanwhile = lambda: ask.call("/a", "PATCH")
    ask("/a")
    assert ask("/a") == b"3", "the routes made the first answer before they knew of the change"


def test_answers_take_no_more_memory_than_they_may(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(answers, "KEPT_BYTES", 4 * 2**10)
    ask = Asked()
    first = [ask(f"/{number}") for number in range(10)]
    again = [ask(f"/{number}") for number in range(9, -1, -1)][::-1]
    kept = [before == after for before, after in zip(first, again)]
    assert kept[-1] and not kept[0]


def test_nobody_without_the_token_gets_an_answer_that_was_kept(tmp_path: Path):
    write_run(tmp_path, "t-1")
    http = client(tmp_path, fresh_s=60.0)
    assert http.get("/v1/runs/t-1").status_code == 200
    assert http.get("/v1/runs/t-1", headers={"Authorization": "Bearer another"}).status_code == 401


def test_the_service_yields_to_the_runs_beside_it():
    """Nice values of sessions, where the kernel has them: those of processes do not count between sessions."""
    groups = Path("/proc/self/autogroup")
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, start_new_session=True)
    try:
        own = groups.read_text() if groups.exists() else ""
        yield_to_runs(process.pid)
        assert os.getpriority(os.PRIO_PROCESS, process.pid) == NICENESS
        if groups.exists():
            assert Path(f"/proc/{process.pid}/autogroup").read_text().endswith(f"nice {NICENESS}\n")
            assert groups.read_text() == own, "of its session only"
    finally:
        process.communicate()


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such policy")
def test_a_service_that_has_started_preempts_nobody_with_any_of_its_threads():
    code = "import threading as t; e = t.Event(); t.Thread(target=e.wait).start(); print(); input(); e.set()"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        threads = [int(each.name) for each in Path(f"/proc/{process.pid}/task").iterdir()]
        before = [os.sched_getscheduler(each) for each in threads]
        preempt_nobody(process.pid)
        assert [os.sched_getscheduler(each) for each in threads] == [os.SCHED_IDLE] * 2 != before
        process.communicate(b"\n")

"""A driver that has finished its run, given it back, and has not exited yet: that takes an interpreter a second."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

import pytest

from actors.errors import NotDone
from orchestrator.cluster.control import REQUESTS, RunFile
from orchestrator.cluster.run_lock import LOCK, Driver
from orchestrator.run_handle import NoAnswerInTime, RunHandle
from tests.service_client import add_events, write_run
from tests.waiting import until

pytestmark = pytest.mark.timeout(120)

CHECKPOINT = {"event": "checkpoint", "step": 3, "path": "/checkpoints/step-00000003"}
FINISHED = {"event": "finished", "scores": {}}


class Ending:
    """A run whose driver is a process that does nothing, until it is told to exit."""

    def __init__(self, runs: Path) -> None:
        self.folder = write_run(runs, "one")
        self.process = subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL)
        driver = Driver.of(self.process.pid)
        (self.folder / LOCK).write_text(json.dumps(asdict(driver)))
        RunFile("one", None, driver).write(self.folder)
        self.handle = RunHandle(self.folder, self.process)

    def gives_back(self) -> None:
        (self.folder / LOCK).write_text("")

    def exits(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(60)


@pytest.fixture
def ending(tmp_path: Path) -> Iterator[Ending]:
    ending = Ending(tmp_path)
    try:
        yield ending
    finally:
        ending.process.kill()
        ending.process.wait(60)


def test_a_run_that_has_finished_says_so_while_its_driver_exits(ending: Ending):
    assert ending.handle.status().kind == "running"
    add_events(ending.folder, FINISHED)
    ending.gives_back()
    assert ending.handle.running and ending.handle.status().kind == "finished"
    assert not ending.handle.over, "its process holds what it had"
    ending.exits()
    assert ending.handle.over and ending.handle.status().kind == "finished"


def test_a_driver_that_has_said_nothing_yet_is_starting_whatever_its_predecessor_said(ending: Ending):
    add_events(ending.folder, FINISHED, {"event": "prepared"})
    ending.gives_back()
    assert ending.handle.status().kind == "starting"
    add_events(ending.folder, {"event": "failed", "error": "ValueError: mine"})
    assert (ending.handle.status().kind, ending.handle.status().state) == ("failed", "failed: ValueError: mine")


def ends_once_asked(ending: Ending) -> None:
    until(lambda: list((ending.folder / REQUESTS).glob("*.json")), "request", every_s=0.001)
    add_events(ending.folder, CHECKPOINT, FINISHED)
    ending.gives_back()


@pytest.mark.parametrize(
    "ask",
    [lambda run: run.checkpoint(timeout_s=2.0), lambda run: run.pause(timeout_s=2.0)],
    ids=["checkpoint", "pause"],
)
def test_while_the_own_driver_of_a_handle_exits_who_has_asked_it_waits_to_the_deadline(
    ending: Ending, ask: Callable[[RunHandle], object]
):
    with ThreadPoolExecutor() as others:
        ended = others.submit(ends_once_asked, ending)
        with pytest.raises(NoAnswerInTime):
            ask(ending.handle)
        ended.result(60)
    assert ending.handle.running and ending.handle.status().kind == "finished"


def test_who_has_asked_a_driver_that_finishes_its_run_gets_the_last_checkpoint_and_no_pause(ending: Ending):
    with ThreadPoolExecutor() as others:
        checkpoint = others.submit(ending.handle.checkpoint, timeout_s=60.0)
        pause = others.submit(ending.handle.pause, timeout_s=60.0)
        until(lambda: len(list((ending.folder / REQUESTS).glob("*.json"))) == 2, "two requests")
        add_events(ending.folder, CHECKPOINT, FINISHED)
        ending.gives_back()
        ending.exits()
        assert checkpoint.result(60) == Path(CHECKPOINT["path"])
        with pytest.raises(NotDone, match="run one has ended: finished"):
            pause.result(60)


def test_a_driver_that_the_handle_has_not_started_and_that_has_ended_has_not_done_what_it_was_asked(ending: Ending):
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL) as other:
        handle = RunHandle(ending.folder, other)
        with ThreadPoolExecutor() as others:
            checkpoint = others.submit(handle.checkpoint, timeout_s=60.0)
            until(lambda: list((ending.folder / REQUESTS).glob("*.json")), "request")
            ending.gives_back()
            with pytest.raises(NotDone, match="ended before it did what was asked"):
                checkpoint.result(60)
        assert other.poll() is None

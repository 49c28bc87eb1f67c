"""What the page offers for a run: only what can be done to it as it stands."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from orchestrator.queueing import entry as entries
from orchestrator.queueing.entry import Entry, Stage
from tests.browser_page import enter
from tests.service_client import client, write_run

api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: requirements/browser.txt")
pytestmark = pytest.mark.timeout(300)
LONG = 1e12  # seconds: this run does not start during a test


def offered(page: Any) -> set[str]:
    buttons = page.get_by_role("group", name="Control").get_by_role("button")
    return {each.inner_text() for each in buttons.all() if each.is_visible()}


def test_a_run_that_waits_can_be_taken_from_the_queue_or_moved_in_it_and_no_more(
    page: Any, address: str, tmp_path: Path
):
    folder = write_run(tmp_path / "runs", "waits")
    entries.write(folder, Entry(3, time.time(), (), reason="waits for 1 place", not_before=LONG))
    enter(page, f"{address}/#/runs/waits")
    api.expect(page.locator("section .state").first).to_have_text("queued")
    assert offered(page) == {"Prioritise", "Stop"}
    assert page.get_by_label("priority").input_value() == "3"
    assert not page.get_by_label("Message to the policy").is_visible()
    assert page.get_by_text("The run is queued: its policy can be chatted with while it runs.").is_visible()
    page.get_by_label("priority").fill("8")
    page.get_by_role("button", name="Prioritise").click()
    page.get_by_text("priority 8:").wait_for()
    assert client(tmp_path / "runs").get("/v1/runs/waits").json()["priority"] == 8
    page.get_by_role("button", name="Stop").click()
    page.get_by_role("button", name="Stop it").click()
    api.expect(page.locator("section .state").first).to_have_text("stopped")
    page.get_by_role("button", name="Resume").wait_for()
    assert offered(page) == {"Resume"}


def test_a_run_that_is_over_can_be_resumed_and_one_that_starts_can_be_stopped(page: Any, address: str, tmp_path: Path):
    write_run(tmp_path / "runs", "over", events=[{"event": "finished", "time": 1010.0}])
    starting = write_run(tmp_path / "runs", "starts")
    entries.write(starting, Entry(0, time.time(), (), stage=Stage.STARTED, started=LONG, events_from=10**6))
    enter(page, f"{address}/#/runs/over")
    page.get_by_role("button", name="Resume").wait_for()
    assert offered(page) == {"Resume"}
    page.goto(f"{address}/#/runs/starts")
    api.expect(page.locator("section .state").first).to_have_text("starting")
    assert offered(page) == {"Prioritise", "Stop"}

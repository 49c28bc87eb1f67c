"""The page of the service in Chromium, with a run of real processes behind it: submit, watch, control, read, stop."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from orchestrator.reporting.metrics import MetricsLog
from orchestrator.service.app import create_app
from orchestrator.service.settings import Settings
from tests.runs import ARITHMETIC, merged
from tests.service_client import TOKEN, client, listening, write_run

api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: requirements/browser.txt")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
QUIET = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
RECIPE: dict[str, Any] = merged(
    ARITHMETIC,
    {
        "train": {"steps": 100_000},
        "roles": {"rollout": {"engine": "hf", "workers": 1}},
        "logging": {"completions_every": 1},
        "checkpoint": {"every": 1000},
    },
)
WAIT_MS = 240_000  # for a run to start on a busy machine
pytestmark = [
    pytest.mark.timeout(900),
    pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium here; `apt-get install chromium`"),
]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=QUIET)
        yield browser
        browser.close()


@pytest.fixture
def page(browser: Any) -> Iterator[Any]:
    """A page in which no script fails."""
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    context.set_default_timeout(WAIT_MS)
    page, errors = context.new_page(), []
    page.on("pageerror", lambda error: errors.append(str(error)))
    yield page
    context.close()
    assert errors == []


@pytest.fixture
def address(tmp_path: Path) -> Iterator[str]:
    """The service over an empty folder; what was submitted is ended with it."""
    runs = tmp_path / "runs"
    runs.mkdir()
    try:
        with listening(create_app(Settings(runs, token=TOKEN))) as url:
            yield url
    finally:
        http = client(runs)
        for run in http.get("/v1/runs").json()["runs"]:
            http.post(f"/v1/runs/{run['id']}/stop", params={"now": True})


def enter(page: Any, url: str) -> None:
    page.goto(url)
    page.get_by_label("Token of the service").fill(TOKEN)
    page.get_by_role("button", name="Continue").click()


def step(page: Any) -> int:
    return int(page.get_by_text("step ", exact=False).first.inner_text().split()[-1])


def test_a_run_is_submitted_watched_controlled_and_stopped_in_the_page(page: Any, address: str, tmp_path: Path):
    enter(page, address)
    page.get_by_role("link", name="Submit", exact=True).click()
    page.get_by_label("recipe").fill(json.dumps(RECIPE))
    page.get_by_label("overrides").fill("name=paged\ntrain.batch_size=4")
    page.get_by_role("button", name="Submit").click()
    page.get_by_role("heading", name="paged").wait_for()
    state = page.locator("section .state").first
    api.expect(state).to_have_text("running", timeout=WAIT_MS)

    reward = page.locator(".chart", has_text="Reward")
    reward.locator("canvas").wait_for()
    seen = step(page)
    page.wait_for_function(
        "seen => Number(document.querySelector('section .row span:nth-child(2)').innerText.split(' ')[1]) > seen",
        arg=seen,
    )
    assert page.get_by_text("rollout.generate").count() == 1, "the pipeline is drawn"

    page.get_by_label("workers").fill("2")
    page.get_by_role("button", name="Scale").click()
    page.get_by_text("2 of 2 serve").wait_for()

    page.get_by_role("button", name="Pause").click()
    api.expect(state).to_have_text("paused", timeout=WAIT_MS)
    held = step(page)
    page.get_by_role("button", name="Checkpoint").click()
    page.get_by_role("cell", name=f"step-{held:08d}").wait_for()
    page.get_by_role("button", name="Continue").click()
    api.expect(state).to_have_text("running", timeout=WAIT_MS)

    page.get_by_label("order").select_option("-reward")
    page.get_by_role("button", name="Open this sample").first.click()
    dialog = page.get_by_role("dialog", name="Sample")
    assert "+" in dialog.inner_text() and "exact_match" in dialog.inner_text()
    dialog.get_by_role("button", name="Close").click()

    if folder := os.environ.get("TROUPE_SCREENSHOTS"):  # for docs/
        page.screenshot(path=Path(folder) / "page.png", full_page=True)
    page.get_by_role("button", name="Stop").click()
    page.get_by_role("button", name="Stop it").click()
    api.expect(state).to_have_text("stopped", timeout=WAIT_MS)
    page.get_by_role("cell", name="checkpoint", exact=True).first.wait_for()  # an event, told without a reload


def test_what_a_sample_says_is_text_and_never_part_of_the_page(page: Any, address: str, tmp_path: Path):
    folder = write_run(tmp_path / "runs", "hostile", metrics=[{"step": 1, "reward": 0.5}])
    log = MetricsLog(folder)
    log.write_completions(
        1, [{"prompt": "<b id=bold>x</b>", "completion": "<img src=x onerror='window.hit = 1'>", "reward": 1.0}]
    )
    log.close()
    enter(page, f"{address}/#/runs/hostile")
    page.get_by_text("<img src=x").first.wait_for()
    page.get_by_role("button", name="Open this sample").click()
    page.get_by_role("dialog", name="Sample").wait_for()
    assert page.evaluate("window.hit") is None and page.locator("#bold").count() == 0


def test_two_runs_are_drawn_beside_each_other_and_a_wrong_token_is_asked_for_again(
    page: Any, address: str, tmp_path: Path
):
    for name, rewards in (("first", (0.1, 0.2, 0.3)), ("second", (0.2, 0.4))):
        lines = [{"step": 1 + index, "reward": value} for index, value in enumerate(rewards)]
        write_run(tmp_path / "runs", name, metrics=lines)
    page.goto(address)
    page.get_by_label("Token of the service").fill("not-the-token-of-the-service")
    page.get_by_role("button", name="Continue").click()
    enter(page, f"{address}/#/runs/first")
    page.get_by_label("beside").select_option("second")
    page.get_by_text("reward · second").wait_for()
    assert page.get_by_text("reward · first").count() == 1
    page.set_viewport_size({"width": 390, "height": 800})
    page.wait_for_function("document.documentElement.scrollWidth <= innerWidth")  # no sideways scrolling on a phone

"""Chromium with the page of a service that a test has filled. Each test needs `CHROMIUM`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from orchestrator.service.app import create_app
from orchestrator.service.settings import Settings
from tests.browser_page import CHROMIUM, QUIET, WAIT_MS
from tests.service_client import TOKEN, client, listening


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: requirements/browser.txt")
    if CHROMIUM is None:
        pytest.skip("there is no Chromium here; `apt-get install chromium`")
    api.expect.set_options(timeout=WAIT_MS)
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

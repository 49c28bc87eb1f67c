"""What tests of the page do in Chromium."""

from __future__ import annotations

import shutil
from typing import Any

from tests.service_client import TOKEN

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
QUIET = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
WAIT_MS = 240_000  # for a run to start on a busy machine


def enter(page: Any, url: str) -> None:
    page.goto(url)
    page.get_by_label("Token of the service").fill(TOKEN)
    page.get_by_role("button", name="Continue").click()

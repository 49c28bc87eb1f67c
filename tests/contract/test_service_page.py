"""The page's files: served to everyone, complete, and nothing else with them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from orchestrator.service.page_routes import FOLDER
from tests.service_client import client

FILES = [file.relative_to(FOLDER).as_posix() for file in sorted(FOLDER.rglob("*")) if file.is_file()]


def test_the_page_needs_no_token_and_allows_scripts_of_this_service_only(tmp_path: Path):
    page = client(tmp_path)
    page.headers.pop("Authorization")
    answer = page.get("/")
    assert answer.status_code == 200 and answer.text.startswith("<!doctype html>")
    assert "default-src 'self'" in answer.headers["Content-Security-Policy"]
    assert page.get("/v1/runs").status_code == 401, "what the page shows is not open"


@pytest.mark.parametrize("name", FILES)
def test_whatever_a_file_of_the_page_names_is_there(name: str, tmp_path: Path):
    page = client(tmp_path)
    page.headers.pop("Authorization")
    answer = page.get(f"/page/{name}")
    assert answer.status_code == 200 and answer.content == (FOLDER / name).read_bytes()
    assert "://" not in re.sub(r"^//.*|/\*.*?\*/", "", answer.text, flags=re.MULTILINE | re.DOTALL) or "vendor" in name
    for named in re.findall(r'from "\./([^"]+)"', answer.text):
        assert page.get(f"/page/{named}").status_code == 200, named
    if name == "index.html":
        named = re.findall(r'(?:href|src)="(page/[^"]+)"', answer.text)
        assert len(named) == 3 and all(page.get(f"/{each}").status_code == 200 for each in named)


@pytest.mark.parametrize(
    "path",
    ["/page/../app.py", "/page/%2e%2e/app.py", "/page/..%2fapp.py", "/page/vendor/../../app.py", "/page", "/page/"],
)
def test_nothing_beside_the_page_is_served_with_it(path: str, tmp_path: Path):
    page = client(tmp_path)
    page.headers.pop("Authorization")
    answer = page.get(path)
    assert answer.status_code in (401, 404, 405) and "create_app" not in answer.text

"""The token that is kept with the runs."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from actors.errors import ConfigError
from orchestrator.service.service_folder import TOKEN_FILE, TOKEN_VARIABLE, service_folder, token_of
from tests.full_disk import without_room


@pytest.fixture(autouse=True)
def no_token_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(TOKEN_VARIABLE, raising=False)


def test_services_that_start_at_the_same_time_have_the_same_token(tmp_path: Path):
    with ThreadPoolExecutor(8) as pool:
        tokens = set(pool.map(lambda _: token_of(tmp_path, None), range(8)))
    [token] = tokens
    file = service_folder(tmp_path) / TOKEN_FILE
    assert len(token) >= 40 and file.read_text() == token and file.stat().st_mode & 0o777 == 0o600
    assert os.listdir(file.parent) == [TOKEN_FILE]
    assert token_of(tmp_path / "others", None) != token


def test_a_process_that_ends_before_it_has_written_the_token_leaves_none(tmp_path: Path):
    said = without_room(
        "from orchestrator.service.service_folder import token_of; token_of(Path(sys.argv[1]), None)", tmp_path
    )
    assert "File too large" in said and os.listdir(service_folder(tmp_path)) == []
    assert len(token_of(tmp_path, None)) >= 40


def test_an_empty_token_is_refused_with_the_file_to_delete(tmp_path: Path):
    file = service_folder(tmp_path) / TOKEN_FILE
    for content in ("", "\n"):
        file.write_text(content)
        with pytest.raises(ConfigError, match=f"no token in {file}: .* delete the file"):
            token_of(tmp_path, None)
    file.unlink()
    assert len(token_of(tmp_path, None)) >= 40


def test_a_token_is_made_also_where_the_file_system_has_no_hard_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def refused(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refused)
    token = token_of(tmp_path, None)
    assert len(token) >= 40 and token_of(tmp_path, None) == token
    assert os.listdir(service_folder(tmp_path)) == [TOKEN_FILE]

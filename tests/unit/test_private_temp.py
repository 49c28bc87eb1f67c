"""Ray's sessions are in a folder of this user alone, also where somebody else was there first."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from orchestrator.cluster.private_temp import private_temp


def mode(folder: Path) -> int:
    return folder.stat().st_mode & 0o777


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    return tmp_path / f"troupe-{os.getuid()}"


def test_the_folder_is_made_once_and_closed_to_others(temporary: Path):
    assert private_temp() == private_temp() == temporary / "ray"
    assert mode(temporary) == 0o700


def test_each_head_has_a_folder_of_its_own_and_the_same_one_again(temporary: Path, tmp_path: Path):
    """Short, too: Ray puts Unix sockets into it."""
    first, second = private_temp(tmp_path / "a"), private_temp(tmp_path / "b")
    assert first != second and {first.parent, second.parent} == {temporary}
    assert private_temp(tmp_path / "b" / ".." / "a") == first
    assert len(first.name) <= len("head-12345678")


def test_a_folder_that_is_open_to_others_is_not_used(temporary: Path):
    temporary.mkdir()
    temporary.chmod(0o755)
    found = private_temp()
    assert found.parent != temporary and found.parent.parent == temporary.parent and mode(found.parent) == 0o700


def test_a_link_to_somewhere_else_is_not_followed(temporary: Path, tmp_path: Path):
    (elsewhere := tmp_path / "elsewhere").mkdir(mode=0o700)
    temporary.symlink_to(elsewhere)
    found = private_temp()
    assert not found.is_relative_to(temporary) and mode(found.parent) == 0o700

"""A user's own `rewards.py` or `rewards/` never takes the place of ours."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from orchestrator.import_pin import PACKAGES, ROOT

FOREIGN = "raise RuntimeError('the user\\'s module was imported')\n"


@pytest.fixture
def foreign_folder(tmp_path: Path) -> Path:
    """A folder with modules and packages of our names."""
    (tmp_path / "rewards.py").write_text(FOREIGN)
    for name in ("rewards", "actors", "rollout"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(FOREIGN)
    return tmp_path


def run_python(code: str, cwd: Path, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, env={**os.environ, **env}, capture_output=True, text=True, timeout=60
    )


PIN_FROM_ELSEWHERE = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
from orchestrator.import_pin import pin
pin()
sys.path.remove({str(ROOT)!r})
sys.path.insert(0, "")
"""


def test_all_four_packages_are_ours_from_a_folder_with_modules_of_the_same_names(foreign_folder: Path):
    code = PIN_FROM_ELSEWHERE + f"import {', '.join(PACKAGES)}\nprint(rewards.__file__, rollout.__file__)"
    done = run_python(code, foreign_folder, PYTHONPATH=str(foreign_folder))
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [str(ROOT / "rewards" / "__init__.py"), str(ROOT / "rollout" / "__init__.py")]


def test_submodules_are_ours_too(foreign_folder: Path):
    (foreign_folder / "actors" / "errors.py").write_text(FOREIGN)
    done = run_python(PIN_FROM_ELSEWHERE + "import rollout.sampling, actors.batch\n", foreign_folder)
    assert done.returncode == 0, done.stderr


def test_other_modules_of_the_users_folder_stay_importable(foreign_folder: Path):
    (foreign_folder / "theirs.py").write_text("value = 7\n")
    done = run_python(PIN_FROM_ELSEWHERE + "import theirs\nprint(theirs.value)", foreign_folder)
    assert done.stdout.strip() == "7", done.stderr


def test_a_foreign_package_that_was_imported_first_is_refused_with_both_places_named(tmp_path: Path):
    (tmp_path / "rewards.py").write_text("")
    code = f"""
import rewards, sys
sys.path.insert(1, {str(ROOT)!r})
from orchestrator.import_pin import pin
pin()
"""
    done = run_python(code, tmp_path)
    assert done.returncode == 1
    assert str(tmp_path / "rewards.py") in done.stderr
    assert str(ROOT / "rewards") in done.stderr


def test_pinning_twice_installs_one_finder(tmp_path: Path):
    code = PIN_FROM_ELSEWHERE + "pin()\nprint(sum(type(f).__name__ == 'Pinned' for f in sys.meta_path))"
    assert run_python(code, tmp_path).stdout.strip() == "1"

"""A user's own `rewards.py`, `rewards/` and `orchestrator/` do not take the place of ours in Ray's workers."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from orchestrator.import_pin import ROOT

FOREIGN = "raise RuntimeError('the user\\'s module was imported')\n"

DRIVER = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
from orchestrator.import_pin import pin, worker_setup
pin()
sys.path.remove({str(ROOT)!r})
import ray

@ray.remote(num_cpus=0)
def where():
    import gc, rewards, rollout, actors, orchestrator
    assert gc.get_threshold()[0] > 10_000, "imports would be slow"
    return [module.__file__ for module in (rewards, rollout, actors, orchestrator)]

class Asked:
    def where(self):
        import rewards
        return rewards.__file__

hook = worker_setup()
ray.init(address="local", num_cpus=1, include_dashboard=False, object_store_memory=100_000_000, log_to_driver=False,
         runtime_env={{"worker_process_setup_hook": hook}})
print(*ray.get(where.remote(), timeout=200))
# An actor with an environment of its own inherits the hook.
actor = ray.remote(Asked).options(num_cpus=0, runtime_env={{"env_vars": {{"A": "1"}}}}).remote()
print(ray.get(actor.where.remote(), timeout=200))
"""


@pytest.fixture
def foreign_folder(tmp_path: Path) -> Path:
    (tmp_path / "rewards.py").write_text(FOREIGN)
    for name in ("rewards", "actors", "orchestrator"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(FOREIGN)
    (tmp_path / "main.py").write_text(DRIVER)
    return tmp_path


def test_workers_import_our_packages_although_the_drivers_folder_holds_others(foreign_folder: Path):
    done = subprocess.run(
        [sys.executable, "main.py"],
        cwd=foreign_folder,
        env={**os.environ, "PYTHONPATH": str(foreign_folder), "RAY_ADDRESS": ""},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    places = {Path(place).parent.parent for place in done.stdout.split()}
    assert places == {ROOT}
    assert len(done.stdout.split()) == 5

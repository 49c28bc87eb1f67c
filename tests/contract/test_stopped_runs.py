"""A signal while a phase's last checkpoint is awaited. Whole runs of a tiny model, in a process of their own."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

from orchestrator.config.loading import load_run
from orchestrator.import_pin import ROOT
from orchestrator.run import run
from tests.unit.source_stub import write_rows
from tests.unit.tiny import tiny_model_folder

STEPS = 2  # of each phase
RUN = """
import asyncio, os, signal, sys
from orchestrator.cli import main
from orchestrator.phases import phase_run

class Recorder(phase_run.TokenRecorder):  # is left after a phase's last step, before its last checkpoint is awaited
    async def __aexit__(self, *error):
        await super().__aexit__(*error)
        if self._roles.activity.phase == phase:
            os.kill(os.getpid(), signal.SIGTERM)
            while self._context.ending.signal is None:
                await asyncio.sleep(0)

phase_run.TokenRecorder = Recorder
phase = sys.argv.pop()
main()
"""


def stopped(where: Path, phase: str) -> tuple[int, str, Path]:
    """(exit code, standard error, folder) of a run of two phases that gets SIGTERM at the end of one. The second phase
    begins by asking its reference about all of its rows, which is an event."""
    made = ({"prompt": f"a{i}", "completion": f"b{i}", "chosen": f"b{i}", "rejected": "c"} for i in range(12))
    common = {
        "data": {"path": str(write_rows(where / "rows.jsonl", made)), "cache_dir": str(where / "cache")},
        "train": {"steps": STEPS, "batch_size": 2, "learning_rate": 0.01},
    }
    recipe: dict[str, Any] = {
        "phases": {
            "one": {"method": "sft", **common},
            "two": {"method": "dpo", "options": {"precompute_ref_log_probs": True}, **common},
        },
        "model": {"path": str(tiny_model_folder(where, hidden=32))},
        "output": str(where / "runs"),
        "logging": {"trackers": [], "curves": False},
    }
    (where / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    command = [sys.executable, "-c", RUN, "run", str(where / "recipe.yaml"), "--local", phase]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=Path(ROOT))
    (folder,) = (where / "runs").iterdir()
    return done.returncode, done.stderr, folder


def events(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]


def steps(folder: Path) -> list[tuple[int, str]]:
    lines = (json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines())
    return [(line["step"], line["phase"]) for line in lines]


def test_a_run_that_is_stopped_while_a_phases_last_checkpoint_is_awaited_does_not_begin_the_next_phase(tmp_path: Path):
    code, said, folder = stopped(tmp_path, "one")
    assert code == 128 + signal.SIGTERM, said
    assert [each for each in events(folder) if each.get("phase") == "two"] == []
    assert [each["step"] for each in events(folder) if each["event"] == "checkpoint"] == [STEPS]
    assert steps(folder) == [(1, "one"), (2, "one")]
    assert said.splitlines()[-1].startswith(f"troupe: stopped by SIGTERM: last checkpoint {folder}")
    again = run(load_run(folder, []), local=True, resume=folder)
    assert again.checkpoint is not None and again.checkpoint.name == f"step-{2 * STEPS:08d}"
    assert steps(folder) == [(1, "one"), (2, "one"), (3, "two"), (4, "two")]


def test_a_run_that_is_told_to_stop_while_its_last_checkpoint_is_awaited_finishes(tmp_path: Path):
    code, said, folder = stopped(tmp_path, "two")
    assert code == 0, said
    assert [each["event"] for each in events(folder)][-1] == "finished"
    assert [each["phase"] for each in events(folder) if each["event"] == "precomputed"] == ["two"]
    assert steps(folder) == [(1, "one"), (2, "one"), (3, "two"), (4, "two")]

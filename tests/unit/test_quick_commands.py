"""Commands that only look something up import neither torch nor transformers, Ray or vLLM, which takes seconds."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from actors.imports import OnUse
from orchestrator.cluster.control import RunFile
from orchestrator.cluster.run_lock import Driver
from orchestrator.import_pin import ROOT

HEAVY = ("torch", "transformers", "ray", "vllm")
AND_SAY_WHAT_IS_HEAVY = f"""
import atexit, sys
atexit.register(lambda: print('heavy:', *(name for name in {HEAVY} if name in sys.modules)))
"""
TROUPE = "sys.argv[0] = 'troupe'; from orchestrator.cli import main; main()"


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    """Of a run that has taken two steps, in the folder where runs are by default."""
    folder = tmp_path / "runs" / "t-1"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text('{"method": "sft", "data": {"path": "example:arithmetic_sft"}}')
    (folder / "events.jsonl").write_text('{"event": "prepared"}\n{"event": "finished"}\n')
    (folder / "metrics.jsonl").write_text('{"step": 2, "phase": "sft", "loss": 2.5}\n')
    RunFile("t-1", "10.0.0.1:6379", Driver.here()).write(folder)
    return folder


def output(code: str, *arguments: str, cwd: Path) -> list[str]:
    """The lines that a process prints which runs this code with these arguments."""
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.mark.parametrize(
    ("command", "part"),
    [
        ("--help", "Post-training of language models"),
        ("recipes", "grpo_arithmetic"),
        ("methods", "rollout, reward"),
        ("methods --papers", "arXiv:2402.03300"),
        ("methods dpo", "label_smoothing"),
        ("keys train", "train.learning_rate"),
        ("keys --all", "cluster.placement_timeout_s"),
        ("schema", '"importance_sampling_level"'),
        ("ls", "t-1"),
        ("status runs/t-1", "loss 2.5"),
        ("metrics runs/t-1", "loss"),
    ],
)
def test_a_command_that_looks_something_up_imports_nothing_heavy(command: str, part: str, run_folder: Path):
    *said, heavy = output(AND_SAY_WHAT_IS_HEAVY + TROUPE, *command.split(), cwd=run_folder.parent.parent)
    assert part in "\n".join(said)
    assert heavy.strip() == "heavy:"


def test_a_loss_imports_torch_when_it_is_called_and_its_module_does_not(tmp_path: Path):
    code = """
import sys
from orchestrator.losses.pairwise import smoothed_logistic
print('torch' in sys.modules)
import torch
print(f'{smoothed_logistic(torch.zeros(1), 0.0).item():.4f}')
"""
    assert output(code, cwd=tmp_path) == ["False", "0.6931"]


def test_what_stands_for_a_module_gives_what_the_module_has_and_is_pickled_as_that():
    stands_for = OnUse("torch.nn.functional")
    assert stands_for.logsigmoid is torch.nn.functional.logsigmoid
    assert pickle.loads(pickle.dumps(stands_for)) is torch.nn.functional
    with pytest.raises(AttributeError, match="sigmoyd"):
        _ = stands_for.sigmoyd

"""`import troupe`: the public names, a run inside a running event loop, and the command that a finished run shows."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from pathlib import Path

import pytest

import troupe
from orchestrator.import_pin import ROOT

SHORT = ("train.steps=2", "logging.every=2", "logging.trackers=[]", "evaluation=null", "cluster.num_cpus=4")


def test_importing_troupe_imports_nothing_heavy_and_every_public_name_exists():
    code = "import sys, troupe; print([name for name in ('torch', 'ray', 'pydantic') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=200, cwd=ROOT)
    assert done.stdout.strip() == "[]", done.stderr
    assert {name for name in troupe.__all__ if callable(getattr(troupe, name))} == set(troupe.__all__)
    with pytest.raises(AttributeError, match="there are ConfigError"):
        troupe.nothing  # noqa: B018


async def test_a_run_works_inside_a_running_loop_and_the_command_that_it_ends_with_prints_an_answer(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    """As in a notebook, whose cells are executed by a running loop."""
    monkeypatch.setenv("COLUMNS", "80")
    assert asyncio.get_running_loop().is_running()
    config = troupe.load_config("sft_arithmetic", [*SHORT, f"output={tmp_path / 'my runs'}"])
    result = troupe.run(config, local=True)
    assert result.model is not None and (result.model / "model.safetensors").is_file()
    assert result.picture == result.folder / "curves.png" and result.picture.is_file()
    [gain] = result.gains
    assert (gain.phase, gain.steps, gain.measure) == ("sft", 2, "loss in training")
    assert gain.tokens > 0 and result.seconds["update"] > 0 and result.seconds["save"] > 0
    said = capfd.readouterr().out
    assert "2/2" in said and "1/2" not in said  # logging.every
    pasted = said[said.index("  python -c") : said.index("    ask the model")]
    done = subprocess.run(
        ["bash", "-c", pasted.replace("python", sys.executable, 1)], capture_output=True, text=True, timeout=250
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("12+34="), "two steps teach little: the answer after that may be empty"


async def test_an_error_of_a_run_inside_a_running_loop_reaches_the_caller(tmp_path: Path):
    config = troupe.load_config("sft_arithmetic", [*SHORT, f"output={tmp_path}", "roles.policy.ranks=2"])
    with pytest.raises(troupe.ConfigError, match=r"roles\.policy\.ranks=2"):
        troupe.run(config, local=True)

"""What a run's surroundings lack is refused before its data is read, in a few lines."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from actors.errors import ConfigError, PlacementError
from orchestrator.cli import main
from orchestrator.config.schema import PhaseConfig, RunConfig
from orchestrator.planning.preconditions import refuse_surroundings


def run_to(output: Path, **cluster: str) -> RunConfig:
    return RunConfig.model_validate({"phases": {"sft": PhaseConfig()}, "output": output, "cluster": cluster})


@pytest.mark.parametrize("below", ["", "runs", "a/b"])
def test_an_output_that_is_a_file_or_lies_below_one_is_refused_with_the_files_name(below: str, tmp_path: Path):
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(ConfigError, match=f"{file} is a file, not a folder"):
        refuse_surroundings(run_to(file / below), local=True)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_an_output_that_may_not_be_written_to_is_refused(tmp_path: Path):
    tmp_path.chmod(0o500)
    with pytest.raises(ConfigError, match="may not be written to"):
        refuse_surroundings(run_to(tmp_path / "runs"), local=True)


def test_an_output_that_is_made_if_need_be_is_accepted_and_not_made_yet(tmp_path: Path):
    refuse_surroundings(run_to(tmp_path / "a" / "b"), local=True)
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_is_resumed_needs_its_own_folder_and_not_the_output_that_it_was_started_with(tmp_path: Path):
    (tmp_path / "gone").write_text("")
    refuse_surroundings(run_to(tmp_path / "gone"), local=True, resume=tmp_path)


def test_an_address_without_a_ray_is_refused_unless_the_run_needs_none(tmp_path: Path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        config = run_to(tmp_path, address=f"127.0.0.1:{taken.getsockname()[1]}")
        with pytest.raises(PlacementError, match=r"no Ray answers at cluster\.address="):
            refuse_surroundings(config)
        refuse_surroundings(config, local=True)


@pytest.mark.parametrize("command", ["run", "plan"])
def test_the_command_refuses_such_an_output_in_one_line(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit) as ended:
        main([command, "sft_arithmetic", f"output={tmp_path / 'file'}"])
    assert ended.value.code == 2
    assert capsys.readouterr().err.splitlines() == [
        f"troupe: refused: output={tmp_path / 'file'}: {tmp_path / 'file'} is a file, not a folder; name a folder; "
        "it is created if it does not exist"
    ]

"""A run that is started again after a failure, with small processes in its place."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from orchestrator.import_pin import ROOT
from orchestrator.restarts import folder_of, may_restart, supervise

ATTEMPT = """
import os, sys, time
from pathlib import Path

where, code = Path(sys.argv[1]), int(sys.argv[2])
folder = Path(sys.argv[3]) if len(sys.argv) > 3 else where / f"t-20260101-000000-{os.getpid()}"
(folder / "checkpoints" / "step-00000004").mkdir(parents=True, exist_ok=True)
with (where / "log").open("a") as log:
    log.write(f"{'resumed' if len(sys.argv) > 3 else 'began'} {folder.name}\\n")
if code < 0:
    os.kill(os.getpid(), -code)
sys.exit(code)
"""


def attempts(where: Path, codes: tuple[int, int], restarts: int) -> tuple[int, list[str]]:
    first, later = ([sys.executable, "-c", ATTEMPT, str(where), str(code)] for code in codes)
    code = supervise(first, later, lambda pid: folder_of(where, pid, ()), restarts)
    return code, [line.split()[0] for line in (where / "log").read_text().splitlines()]


@pytest.mark.parametrize("failure", [1, -signal.SIGKILL, -signal.SIGSEGV])
def test_a_run_that_fails_goes_on_in_its_own_folder_until_it_is_done(tmp_path: Path, failure: int):
    assert attempts(tmp_path, (failure, 0), 3) == (0, ["began", "resumed"])
    assert len({line.split()[1] for line in (tmp_path / "log").read_text().splitlines()}) == 1


def test_a_run_that_fails_again_and_again_ends_when_its_restarts_are_used_up(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    assert attempts(tmp_path, (1, 1), 2) == (1, ["began", "resumed", "resumed"])
    (folder,) = tmp_path.glob("t-*")
    assert f"troupe: restart 2 of 2, from the last checkpoint of {folder}" in capsys.readouterr().err


@pytest.mark.parametrize("code", [2, 130, 143, 129, 141, -signal.SIGTERM])
def test_a_run_that_was_refused_or_told_to_stop_is_not_started_again(tmp_path: Path, code: int):
    assert not may_restart(code)
    found, lines = attempts(tmp_path, (code, 0), 3)
    assert found == code and lines == ["began"]


def test_a_run_that_left_no_checkpoint_begins_again(tmp_path: Path):
    without = ATTEMPT.replace('(folder / "checkpoints" / "step-00000004")', "folder")
    command = [sys.executable, "-c", without, str(tmp_path), "1"]
    assert supervise(command, command, lambda pid: folder_of(tmp_path, pid, ()), 1) == 1
    lines = (tmp_path / "log").read_text().splitlines()
    assert [line.split()[0] for line in lines] == ["began", "began"]
    assert len({line.split()[1] for line in lines}) == 2


WAITS = """
import sys
from pathlib import Path
from orchestrator.restarts import supervise

child = "import signal, sys, time; signal.signal(signal.SIGTERM, lambda *_: sys.exit(143)); print('up', flush=True)"
child += "; time.sleep(60)"
sys.exit(supervise([sys.executable, "-c", child], [sys.executable, "-c", child], lambda pid: None, 3))
"""


def test_a_signal_reaches_the_run_and_nothing_is_started_after_it():
    command = [sys.executable, "-c", WAITS]
    parent = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=Path(ROOT))
    assert parent.stdout is not None and parent.stdout.readline() == "up\n"
    children = psutil.Process(parent.pid).children()
    parent.send_signal(signal.SIGTERM)
    out, err = parent.communicate(timeout=30)
    assert (parent.returncode, out, err) == (143, "", "")
    assert len(children) == 1 and not children[0].is_running()


def test_a_run_that_a_signal_ends_like_a_failure_is_not_started_again():
    """While Ray starts, its handler ends the process with exit code 1 or 15."""
    command = [sys.executable, "-c", WAITS.replace("143", "1")]
    parent = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=Path(ROOT))
    assert parent.stdout is not None and parent.stdout.readline() == "up\n"
    parent.send_signal(signal.SIGTERM)
    try:
        out, err = parent.communicate(timeout=30)
    finally:
        parent.terminate()  # if it did start another
    assert (parent.returncode, out) == (1, "")
    assert err.splitlines()[1:] == ["troupe: SIGTERM told it to stop, so it is not started again"]


STARTS = """
import os, signal, subprocess
from orchestrator import restarts

class Interrupted(subprocess.Popen):
    def __init__(self, command, **settings):
        super().__init__(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, **settings)
        print(self.pid, flush=True)
        os.kill(os.getpid(), signal.SIGTERM)  # before the supervisor has its process

subprocess.Popen = Interrupted
print(restarts.supervise(["sleep", "60"], ["sleep", "60"], lambda pid: None, 3))
"""


def test_a_signal_while_the_run_is_being_started_reaches_it_too():
    done = subprocess.run([sys.executable, "-c", STARTS], capture_output=True, text=True, timeout=30, cwd=Path(ROOT))
    pid, *code = done.stdout.split()
    left = psutil.pid_exists(int(pid))
    if left:
        psutil.Process(int(pid)).kill()
    assert (done.returncode, code, left) == (0, [str(-signal.SIGTERM)], False), done.stderr


def test_a_folder_of_an_earlier_process_with_the_same_id_is_not_the_runs(tmp_path: Path):
    earlier = tmp_path / "t-20260101-000000-77"
    earlier.mkdir()
    others = set(tmp_path.glob("*"))
    assert folder_of(tmp_path, 77, others) is None
    own = tmp_path / "t-20260102-000000-77"
    own.mkdir()
    assert folder_of(tmp_path, 77, others) == own

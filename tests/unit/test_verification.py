"""Mathematics compared in a process that may be ended: what it costs, it costs one answer."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from actors.errors import InfraFailure
from rewards.functions import accuracy_reward
from rewards.verification import Verifier

SLOW = "+".join(
    ["(-x-99i)!"] * 98
)  # inside the grammar: a twentieth of a second of work, where 4 takes a five-thousandth


@pytest.fixture(scope="module")
def hasty() -> Iterator[Verifier]:
    verifier = Verifier(cpu_limit_s=0.005)
    yield verifier
    verifier.close()


@pytest.fixture
def patient() -> Iterator[Verifier]:
    verifier = Verifier(cpu_limit_s=60)
    yield verifier
    verifier.close()


def test_verdicts_are_those_of_the_grammar(patient: Verifier) -> None:
    pairs = [("it\nis $0.5$", r"\frac12"), ("3", "4"), ("3", "no idea"), ("\ud800", "4"), (SLOW, SLOW)]
    assert [patient.accuracy(*pair) for pair in pairs] == [1.0, 0.0, None, 0.0, 1.0]


def test_an_answer_that_takes_too_long_is_wrong_and_the_next_one_is_judged(hasty: Verifier) -> None:
    assert hasty.accuracy("\\boxed{" + SLOW + "}", "x") == 0.0
    assert hasty.accuracy("4", "4") == 1.0


def test_a_solution_that_takes_too_long_is_no_solution(hasty: Verifier) -> None:
    assert hasty.accuracy("4", SLOW) is None
    assert hasty.accuracy("4", "4") == 1.0


def test_a_process_that_dies_of_something_else_is_no_verdict(patient: Verifier) -> None:
    assert patient.accuracy("4", "4") == 1.0
    assert patient._process is not None
    os.kill(patient._process.pid, signal.SIGKILL)
    patient._process.wait(timeout=10)
    with pytest.raises(InfraFailure, match=r"died \(exit code -9\)"):
        patient.accuracy("4", "4")
    assert patient.accuracy("4", "4") == 1.0


def test_the_process_is_ours_whatever_lies_in_the_working_directory(tmp_path: Path) -> None:
    (tmp_path / "rewards.py").write_text("raise RuntimeError('not this one')")
    code = (
        f"import sys; sys.path.insert(0, {str(Path(__file__).parents[2])!r}); "
        "from rewards.verification import verifier; print(verifier().accuracy('1/2', '0.5'))"
    )
    found = subprocess.run([sys.executable, "-P", "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert (found.stdout, found.stderr) == ("1.0\n", "")


def test_the_reward_judges_hostile_answers_beside_honest_ones() -> None:
    answers = [r"\boxed{\cos{9^{9^{9}}}}", "\\(" * 100_000, "2", [{"role": "assistant", "content": "so $2$"}]]
    assert accuracy_reward(answers, ["2"] * 4) == [0.0, 0.0, 1.0, 1.0]  # pyright: ignore[reportArgumentType]

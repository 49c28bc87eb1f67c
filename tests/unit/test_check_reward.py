"""`troupe check-reward`: what a reward returns, how long it takes, and what is wrong with it."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
from typer.testing import CliRunner

from actors.errors import UserError
from orchestrator.cli import REFUSED, app
from tests.runs import TROUPE, plain_environment

MINE = """
import time

def length(prompts, completions, factor=1):
    return [factor * (len(prompt) + len(text)) for prompt, text in zip(prompts, completions)]

def gold(completions, gold):
    return [float(text == right) for text, right in zip(completions, gold)]

def short(completions):
    return [1.0]

def nan(completions):
    return (float("nan") for _ in completions)

def words(completions):
    return ["good"] * len(completions)

def same(completions, log_metric):
    log_metric("seen", len(completions))
    return [1.0] * len(completions)

def silent(completions):
    return [None] * len(completions)

def raises(completions):
    raise KeyError("rubric")

def slow(completions):
    time.sleep(1.1)
    return [1.0, 0.0, 0.0, 0.0]

def hangs(completions):
    time.sleep(600)
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "mine.py"
    path.write_text(MINE)
    return path


def check(*arguments: str) -> tuple[int, str]:
    """(exit code, output), or the refusal as `troupe` shows it."""
    result = CliRunner().invoke(app, ["check-reward", *arguments], env={"COLUMNS": "160"})
    if isinstance(result.exception, UserError):
        return REFUSED, str(result.exception)
    return result.exit_code, result.output


def test_a_reward_is_shown_with_what_it_returned_for_the_examples(file: Path) -> None:
    code, said = check(f"{file}:length", "options.factor=2")
    assert code == 0
    assert "length: 4 completions, examples" in said
    assert ["12+34=", "46", "16"] in [line.split() for line in said.splitlines()]
    assert "s; the deadline is 60 s" in said and "!" not in said


def test_rows_of_a_file_are_scored_in_the_column_that_is_named(file: Path, tmp_path: Path) -> None:
    data = tmp_path / "rows.jsonl"
    rows = [{"prompt": f"{n}?", "completion": "no", "gold": str(n)} for n in range(6)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    code, said = check(f"{file}:gold", "--data", str(data), "--rows", "3")
    assert code == 0 and [line.split()[-1] for line in said.splitlines() if "?" in line] == ["0", "0", "0"]
    assert "! all rewards are the same" in said
    code, said = check(f"{file}:gold", "--data", str(data), "--rows", "2", "--completions", "gold")
    assert code == 0 and [line.split()[-1] for line in said.splitlines() if "?" in line] == ["1", "1"]


@pytest.mark.parametrize(
    ("function", "said"),
    [
        ("short", "no rewards: reward short: returned 1 rewards for 4 completions\nreturned: [1.0]"),
        ("nan", "returned NaN for completion 0; None says that it has no opinion\nreturned: [nan, nan, nan, nan]"),
        ("words", "'good' is text\nreturned: ['good', 'good', 'good', 'good']"),
        ("raises", "no rewards: reward raises raised KeyError: 'rubric'"),
    ],
)
def test_an_answer_that_is_none_is_shown_with_what_is_wrong_and_what_would_follow(
    file: Path, function: str, said: str
) -> None:
    code, output = check(f"{file}:{function}", "on_failure=drop")
    assert code == 1 and said in output
    assert "on_failure=drop: the prompt group would be dropped" in output


def test_a_reward_that_is_too_slow_is_told_and_one_that_hangs_ends_at_its_deadline(file: Path) -> None:
    code, said = check(f"{file}:slow", "timeout_s=2")
    assert code == 0 and "! it took more than half of its deadline" in said
    command = [TROUPE, "check-reward", f"{file}:hangs", "timeout_s=0.5", "on_failure=-1"]
    done = subprocess.run(command, capture_output=True, text=True, env=plain_environment(), timeout=120)
    assert done.returncode == 1 and "no rewards: reward hangs: no answer within 0.5 s" in done.stdout
    assert "would be -1.0, as on_failure says" in done.stdout


def test_opinions_that_say_nothing_are_told(file: Path) -> None:
    assert "! all rewards are the same" in check(f"{file}:same")[1]
    code, said = check(f"{file}:silent")
    assert code == 0 and "! no opinion on any of them" in said


def test_programs_get_the_same_as_json(file: Path) -> None:
    code, said = check(f"{file}:length", "--json")
    found = json.loads(said)
    assert (code, [row["reward"] for row in found["rows"]]) == (0, [8, 6, 4, 29])
    assert found["rows"][0] == {"prompt": "12+34=", "completion": "46", "reward": 8, "logged": {}}
    assert found["failure"] is None and found["warnings"] == [] and 0 <= found["seconds"] < found["deadline_s"] == 60
    found = json.loads(check(f"{file}:same", "--json")[1])
    assert found["metrics"] == {"seen": 4} and "all rewards are the same" in found["warnings"][0]
    assert [row["reward"] for row in json.loads(check(f"{file}:silent", "--json")[1])["rows"]] == [None] * 4
    code, said = check(f"{file}:short", "on_failure=drop", "--json")
    found = json.loads(said)
    assert (code, found["rows"], found["returned"]) == (1, [], "[1.0]")
    assert "returned 1 rewards for 4" in found["failure"] and "on_failure=drop" in found["follows"]


def test_what_cannot_be_called_is_refused_with_what_to_do(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    for arguments, said in (
        ((f"{file}:lenght",), "did you mean length?"),
        ((f"{file}:gold",), "needs the column 'gold', which the example data does not have; it has answer, solution"),
        ((f"{file}:length", "timeout=5"), "did you mean rewards.0.timeout_s?"),
        (("ray://judges/math",), "say which by --address HOST:PORT, or set RAY_ADDRESS"),
        (("http://127.0.0.1/score",), "set allow_private=true"),
    ):
        code, output = check(*arguments)
        assert code == 2 and said in output

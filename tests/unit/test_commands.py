"""What holds for each command of `troupe`, whichever there are."""

from __future__ import annotations

import ast
import importlib
import inspect
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

import pytest
import typer

from orchestrator.cli import main
from orchestrator.cli.application import REFUSED, app
from orchestrator.reporting.terminal_tables import Rows
from tests.service_client import write_run, write_samples

COMMANDS = typer.main.get_command(app).commands  # pyright: ignore[reportAttributeAccessIssue]
GIVEN = {"target": "rollout=2", "priority": "1", "address": "a-host:1"}  # beside a run's folder
OF_A_RUN = {
    name: [GIVEN[each.name] for each in command.params if each.required and each.name in GIVEN]
    for name, command in COMMANDS.items()
    if any(each.name == "folder" and each.param_type_name == "argument" for each in command.params)
}


def refusal(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """What a command prints that is refused. An error that it does not expect is not SystemExit, and fails the test."""
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    shown = capsys.readouterr()
    assert (ended.value.code, shown.out) == (REFUSED, ""), shown
    assert shown.err.startswith("troupe: refused: "), shown.err
    return shown.err


def test_the_commands_that_take_a_run_are_found():
    assert {"logs", "samples", "metrics", "status", "stop", "attach", "chat"} <= OF_A_RUN.keys()


@pytest.mark.parametrize("command", OF_A_RUN)
def test_a_run_that_is_not_there_is_refused_by_its_name(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    follow = ["--follow"] if any("--follow" in each.opts for each in COMMANDS[command].params) else []
    monkeypatch.setenv("TROUPE_ENGINE_TOKEN", "a-token-of-an-engine")
    for folder in (tmp_path / "nope", tmp_path):  # what is not there, and a folder that is no run's
        said = refusal([command, *follow, str(folder), *OF_A_RUN[command]], capsys)
        assert str(folder) in said, said


def test_a_step_without_samples_is_refused_with_the_steps_that_have_some(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    folder = write_run(tmp_path, "t-1", metrics=[{"step": 1}])
    assert "has no samples of step 1; it has none yet" in refusal(["samples", str(folder), "--step", "1"], capsys)
    for step in (2, 4):
        write_samples(folder, step, [0.5])
    said = refusal(["samples", str(folder), "--step", "999"], capsys)
    assert "run t-1 has no samples of step 999; it has those of 2 steps, 2 to 4" in said


def named_in(what: Any) -> Iterator[Any]:
    """What the code of a function or a class names: globals of its module, what it imports, and parts of modules."""
    module = sys.modules[what.__module__]
    known: dict[str, Any] = {**vars(module)}
    tree = ast.parse(textwrap.dedent(inspect.getsource(what)))
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            source = importlib.import_module(node.module or "")
            known |= {each.asname or each.name: getattr(source, each.name, None) for each in node.names}
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and node.id in known:
            yield known[node.id]
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            of = known.get(node.value.id)
            yield getattr(of, node.attr, None) if isinstance(of, ModuleType) else None


def prints_a_table(callback: Any) -> bool:
    """Whether a command comes to `Rows`, through the rooms of commands and of reports."""
    seen, left = set[Any](), [callback]
    while left:
        for found in named_in(left.pop()):
            if found is Rows:
                return True
            ours = isinstance(found, FunctionType | type) and found.__module__.startswith(
                ("orchestrator.cli", "orchestrator.reporting")
            )
            if ours and found not in seen:
                seen.add(found)
                left.append(found)
    return False


def test_a_command_that_prints_a_table_prints_json_for_programs():
    tables = {name for name, command in COMMANDS.items() if prints_a_table(inspect.unwrap(command.callback))}
    assert {"plan", "methods", "recipes", "ls", "check-reward"} <= tables, "those that are found"
    without = {name for name in tables if not any("--json" in each.opts for each in COMMANDS[name].params)}
    assert without == set()

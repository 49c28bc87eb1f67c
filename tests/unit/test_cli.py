"""The command as a user meets it: exit codes, a few lines instead of a traceback, quick answers."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import pytest
from typer.testing import CliRunner

from orchestrator.cli import app, main
from orchestrator.import_pin import ROOT
from orchestrator.methods import METHODS
from orchestrator.reporting.tables import PREVIEW_LIMIT, coloured

TROUPE = (
    f"import sys; sys.path.insert(0, {str(ROOT)!r}); sys.argv[0] = 'troupe'; from orchestrator.cli import main; main()"
)
AND_SAY_WHAT_WAS_IMPORTED = """
import atexit, sys
atexit.register(lambda: print('imported', *(name for name in ('torch', 'ray', 'vllm') if name in sys.modules)))
"""


Troupe = Callable[..., "Done"]


@dataclass(frozen=True)
class Done:
    returncode: int
    stdout: str
    stderr: str


@pytest.fixture
def troupe(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Troupe:
    """The command in this process: as quick as its answers are."""
    monkeypatch.setenv("COLUMNS", "200")

    def call(*arguments: str) -> Done:
        with pytest.raises(SystemExit) as ended:
            main(arguments)
        out, err = capsys.readouterr()
        return Done(int(ended.value.code or 0), out, err)

    return call


def troupe_process(*arguments: str, cwd: Path, prelude: str = "") -> subprocess.CompletedProcess[str]:
    """The command as a process, from any folder."""
    command = [sys.executable, "-c", prelude + TROUPE, *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=60)


def assert_refused(done: Done | subprocess.CompletedProcess[str], *parts: str) -> None:
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert len(done.stderr.splitlines()) <= 10
    for part in parts:
        assert part in done.stderr


def test_help_names_every_command_and_imports_nothing_heavy(tmp_path: Path):
    done = troupe_process("--help", cwd=tmp_path, prelude=AND_SAY_WHAT_WAS_IMPORTED)
    assert done.returncode == 0
    for command in ("run", "plan", "methods", "recipes", "resume", "scale", "status", "check", "doctor"):
        assert f" {command} " in done.stdout
    assert done.stdout.splitlines()[-1].strip() == "imported"


def test_a_misspelt_key_is_refused_before_anything_heavy_is_imported(tmp_path: Path):
    done = troupe_process("run", "grpo_arithmetic", "sed=1", cwd=tmp_path, prelude=AND_SAY_WHAT_WAS_IMPORTED)
    assert_refused(done, "did you mean seed?")
    assert done.stdout.splitlines()[-1].strip() == "imported"


def test_methods_lists_every_method_with_its_roles(troupe: Troupe):
    done = troupe("methods")
    assert done.returncode == 0, done.stderr
    said = (line for line in done.stdout.splitlines() if line.strip())
    listed = {line.split()[0]: line for line in said if line.split()[0] in METHODS}
    assert set(METHODS) == set(listed)
    assert "policy, rollout, reward" in listed["grpo"]


def test_methods_with_their_papers_name_each_methods_source(troupe: Troupe):
    listed = troupe("methods", "--papers").stdout
    [grpo] = re.findall(r"^grpo +data.*\n(?: .*\n)+", listed, re.MULTILINE)
    assert "arXiv:2402.03300" in grpo


def test_a_methods_page_shows_stages_options_defaults_and_ranges(troupe: Troupe):
    done = troupe("methods", "grpo")
    assert "rollout.generate" in done.stdout
    [line] = [line for line in done.stdout.splitlines() if line.startswith("num_generations ")]
    assert line.split() == ["num_generations", "8", "int", ">=", "2"]


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (("run", "grpo_arithmetik"), "did you mean grpo_arithmetic?"),
        (("run", "nowhere/recipe.yaml"), "nowhere/recipe.yaml"),
        (("methods", "gropo"), "did you mean grpo?"),
        (("resume", "."), "not a run's folder"),
        (("scale", ".", "rollout=many"), "rollout=many"),
        (("scale", ".", "rollout=2"), "not a run's folder"),
        (("status", "."), "not a run's folder"),
        (("check", "example:arithmetic", "--method", "dpo"), "no column 'chosen'"),
    ],
)
def test_bad_input_is_a_few_lines_and_exit_code_2(arguments: tuple[str, ...], part: str, troupe: Troupe):
    assert_refused(troupe(*arguments), part)


def test_what_is_printed_as_a_table_is_printed_as_json_too(troupe: Troupe):
    methods = json.loads(troupe("methods", "--json").stdout)
    assert [each["name"] for each in methods] == list(METHODS)
    assert json.loads(troupe("methods", "sft", "--json").stdout) == next(
        each for each in methods if each["name"] == "sft"
    )
    assert "papers/dpo" in {each["recipe"] for each in json.loads(troupe("methods", "--papers", "--json").stdout)}
    assert "grpo_arithmetic" in {each["recipe"] for each in json.loads(troupe("recipes", "--json").stdout)}
    [seed] = [key for key in json.loads(troupe("keys", "--json").stdout) if key["key"] == "seed"]
    assert (seed["default"], "seed" in seed["help"].lower()) == ("0", True)


def test_data_that_fits_a_method_is_reported(troupe: Troupe):
    done = troupe("check", "example:arithmetic", "--method", "grpo")
    assert done.returncode == 0, done.stderr
    assert "rows read as prompt" in done.stdout


def test_a_valid_plan_shows_stages_roles_and_placement_and_no_refusal(troupe: Troupe):
    done = troupe("plan", "grpo_arithmetic", "cluster.num_cpus=4", "phases.sft.data.limit=64")
    assert done.returncode == 0, done.stderr
    for part in (
        "rollout.generate",
        "64 prompts x 8 samples = 512 rows",
        "4 CPU on 1 node",
        "nothing would be refused",
    ):
        assert part in done.stdout


def test_trained_tokens_are_coloured_and_the_middle_of_a_long_row_is_left_out():
    text = coloured(f"37+58=⟦95<eos>⟧{'x' * PREVIEW_LIMIT}")
    (learned,) = text.spans
    assert (text.plain[learned.start : learned.end], str(learned.style)) == ("⟦95<eos>⟧", "green")
    assert f"… {len('37+58=⟦95<eos>⟧')} characters …" in text.plain


def test_a_plan_that_does_not_fit_the_machine_names_role_and_resource_and_exits_with_2(troupe: Troupe):
    done = troupe(
        "plan", "grpo_arithmetic", "roles.policy.gpus=80", "weights.transport=object_store", "phases.sft.data.limit=64"
    )
    assert done.returncode == 2
    assert "policy: no place for 1 of 1, each needs 80 GPU" in done.stdout


def test_the_version_is_that_of_the_distribution(troupe: Troupe):
    assert troupe("--version").stdout == f"troupe {metadata.version('troupe')}\n"


def test_a_command_that_does_not_exist_is_a_usage_error(troupe: Troupe):
    assert_refused(troupe("trian"), "No such command")


def test_a_folder_with_modules_of_our_names_does_not_disturb_the_command(tmp_path: Path):
    (tmp_path / "rewards.py").write_text("raise RuntimeError('the user\\'s module was imported')\n")
    (tmp_path / "actors").mkdir()
    (tmp_path / "actors" / "__init__.py").write_text("raise RuntimeError('the user\\'s package was imported')\n")
    done = troupe_process("keys", cwd=tmp_path)  # which reads settings of all four packages
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        ("run grpo_a", {"grpo_arithmetic"}),
        ("run x train.warmup_", {"train.warmup_steps="}),
        ("keys train.max_s", {"train.max_staleness"}),
        ("methods rl", {"rloo"}),
        ("che", {"check", "check-reward", "checkpoint"}),
    ],
)
def test_a_shell_is_offered_recipes_keys_methods_and_commands(words: str, offered: set[str]):
    line = f"troupe {words}"
    environment = {"_TROUPE_COMPLETE": "complete_bash", "COMP_WORDS": line, "COMP_CWORD": str(len(line.split()) - 1)}
    done = CliRunner().invoke(app, [], prog_name="troupe", env=environment)
    assert set(done.stdout.split()) == offered, done.output

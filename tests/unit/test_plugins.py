"""A user's own method, loss and engine, from files outside of the repository: found, checked, refused by name."""

from __future__ import annotations

import pickle
import subprocess
import sys
from pathlib import Path

import pytest

from actors.errors import ConfigError
from orchestrator.config.loading import config_of
from orchestrator.import_pin import worker_setup
from orchestrator.methods import build
from orchestrator.plugins import carried, importable
from tests.plugin_files import written


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return written(tmp_path / "home of a user")


def test_a_method_of_a_users_file_makes_its_pipeline_and_its_options_are_checked(file: Path):
    pipeline = build(f"{file}:my_method", {"beta": 0.3})
    assert [stage.verb for stage in pipeline] == ["infer", "update"]
    assert pipeline != build(f"{file}:my_method", {})
    with pytest.raises(ConfigError, match=r"mine\.py:my_method: options\.beta='much'"):
        build(f"{file}:my_method", {"beta": "much"})
    with pytest.raises(ConfigError, match=r"has no option 'bta'; did you mean beta\?"):
        build(f"{file}:my_method", {"bta": 1.0})


def test_a_phase_of_a_users_method_is_called_as_the_method_is_in_its_file(file: Path):
    config = config_of({"method": f"{file}:my_method", "data": {"path": "example:arithmetic_pairs"}}, [], "test")
    assert list(config.phases) == ["my_method"]


def test_dpo_takes_a_contrast_of_a_users_file_with_the_options_that_it_names(file: Path):
    plain = build("dpo", {"loss_type": f"{file}:squared"})
    assert plain != build("dpo", {})
    assert build("dpo", {"loss_type": f"{file}:squared", "label_smoothing": 0.1}) != plain
    mixed = build("dpo", {"loss_type": ["sft", f"{file}:squared"]})
    assert len(mixed.stages[-1].call.terms) == 2


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nowhere.py:my_method", r"cannot read /.*/nowhere\.py: .*No such file.*\nrelative paths start at"),
        ("mine.py", r"names a file but nothing in it: write .*mine\.py:NAME"),
        ("mine.py:my_methd", r"no name 'my_methd'; did you mean my_method\?"),
        ("mine.py:NUMBER", r"NUMBER in /.*/mine\.py cannot be called: it is a int"),
        ("mine.py:no_pipeline", r"mine\.py:no_pipeline returned a str; it must return a Pipeline"),
        ("mine.py:any_options", r"mine\.py:any_options: its parameter \*\*options is no option"),
        ("mine.py:broken", r"mine\.py:broken failed: NameError: name 'undefined_name'"),
        ("wrong.py:my_method", r"running /.*/wrong\.py failed: SyntaxError"),
        ("raises.py:my_method", r"running /.*/raises\.py failed: ZeroDivisionError"),
    ],
)
def test_a_file_that_is_no_method_is_refused_by_its_name(
    file: Path, monkeypatch: pytest.MonkeyPatch, name: str, message: str
):
    (file.parent / "wrong.py").write_text("def my_method(:\n")
    (file.parent / "raises.py").write_text("1 / 0\n")
    monkeypatch.chdir(file.parent)
    with pytest.raises(ConfigError, match=message):
        build(name, {})


def test_an_engine_that_is_not_in_the_users_file_is_refused_under_its_key(file: Path):
    with pytest.raises(ConfigError, match=r"roles\.rollout\.engine .*mine\.py:Engine: no name 'Engine'"):
        importable(f"{file}:Engine", "roles.rollout.engine")
    assert importable("vllm", "roles.rollout.engine") == "vllm"


def test_a_loss_of_a_users_file_reaches_a_process_that_knows_nothing_of_the_file(file: Path, tmp_path: Path):
    import cloudpickle

    update = build(f"{file}:my_method", {}).stages[-1]
    sent = tmp_path / "sent.pickle"
    sent.write_bytes(cloudpickle.dumps(worker_setup(carried())) + pickle.dumps(update))
    for each in file.parent.iterdir():
        each.unlink()
    code = f"import pickle; f = open({str(sent)!r}, 'rb'); pickle.load(f)(); print(pickle.load(f).call.terms[0].loss)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, cwd=tmp_path)
    assert "squared_hinge" in done.stdout, done.stderr

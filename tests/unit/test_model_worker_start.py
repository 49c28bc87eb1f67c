"""How a worker starts, what it refuses, and what it says of itself."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from actors.columns import Head
from actors.errors import ConfigError, ModelError, RunError
from actors.model import ModelSpec
from actors.model_worker import ModelWorker
from actors.specs import BackendSpec, LoraSpec
from tests.unit.model_worker_stage import OPTIM, assert_equal_bits, batch, folder, logps, part, trainable, weights

__all__ = ["folder"]  # a fixture


def test_roles_that_load_at_once_in_one_process_draw_the_head_that_each_would_draw_alone(folder: Path) -> None:
    alone = weights(trainable(folder, head=Head.TOKEN_SCALAR))
    with ThreadPoolExecutor(6) as threads:
        loaded = list(threads.map(lambda _: trainable(folder, head=Head.TOKEN_SCALAR), range(6)))
    for other in loaded:
        assert_equal_bits(weights(other), alone)
    another = weights(trainable(folder, head=Head.TOKEN_SCALAR, seed=1))
    assert not torch.equal(another["score.weight"], alone["score.weight"])


def test_two_roles_of_one_process_may_load_at_once(folder: Path) -> None:
    with ThreadPoolExecutor(4) as threads:
        loaded = list(threads.map(lambda _: trainable(folder, optim=None), range(4)))
    for other in loaded[1:]:
        assert_equal_bits(weights(loaded[0]), weights(other))


def test_ready_reports_the_worker(folder: Path) -> None:
    target = ModelWorker("policy", ModelSpec(str(folder)), BackendSpec("single", OPTIM), threads=1)
    with pytest.raises(RunError, match="not ready"):
        logps(target, part(batch()))
    info = target.ready()
    assert info.name == "policy"
    assert info.packages.endswith("actors")
    assert info.detail["parameters"] == sum(tensor.numel() for tensor in weights(target).values())
    assert (info.detail["dtype"], info.detail["backend"], info.detail["device"]) == ("float32", "single", "cpu")
    assert target.ping() == {"verb": None, "busy_s": 0.0, "steps_done": 0, "asleep": False}
    target.close()
    target.close()


def test_ping_reports_the_verb_that_a_worker_executes(folder: Path) -> None:
    target = trainable(folder)
    seen = target.run(target.ping)
    assert seen["verb"] == "run"
    assert seen["busy_s"] >= 0


@pytest.mark.parametrize(
    ("backend", "model", "ranks", "error", "message"),
    [
        (BackendSpec("singel"), {}, 1, ConfigError, "'singel' does not exist; there are deepspeed, single"),
        (BackendSpec("single"), {}, 2, ConfigError, "2 ranks; use 'deepspeed'"),
        (BackendSpec("single", OPTIM), {"dtype": "float16"}, 1, ConfigError, "use bfloat16 or float32"),
        (BackendSpec("single", OPTIM), {"lora": LoraSpec(target_modules=("lm_head",))}, 1, ModelError, "lm_head"),
        (BackendSpec("single", OPTIM), {"lora": LoraSpec(target_modules=("qproj",))}, 1, ModelError, "qproj"),
    ],
)
def test_an_invalid_specification_is_refused_with_a_remedy(
    folder: Path, backend: BackendSpec, model: dict[str, Any], ranks: int, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        ModelWorker("policy", ModelSpec(str(folder), **model), backend, threads=1, world_size=ranks).ready()


def test_a_deterministic_worker_restores_torch_s_setting_after_each_verb(folder: Path) -> None:
    seen: list[bool] = []
    worker = ModelWorker("policy", ModelSpec(str(folder)), BackendSpec(deterministic=True), threads=1)
    worker.ready()
    worker.run(lambda: seen.append(torch.are_deterministic_algorithms_enabled()))
    other = ModelWorker("policy", ModelSpec(str(folder)), BackendSpec(), threads=1)
    other.ready()
    other.run(lambda: seen.append(torch.are_deterministic_algorithms_enabled()))
    assert seen == [True, False] and not torch.are_deterministic_algorithms_enabled()

"""Averages of the weights on tiny models, beside the formula written down once more without anything of ours."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from actors.backends.single import SoloWorld
from actors.batch import Batch
from actors.errors import ConfigError, RunError
from actors.model import ModelSpec
from actors.model_worker import ModelWorker
from actors.sharding import shard
from actors.specs import BackendSpec, LoraSpec, OptimSpec
from actors.weight_averaging import Average, AverageSpec
from orchestrator.config.schema import TrainConfig
from orchestrator.losses.likelihood import nll
from orchestrator.losses.objective import LossObjective
from orchestrator.losses.reduce import token_mean
from tests.unit.tiny import tiny_model_folder
from tests.unit.trainer_stub import ThreadWorld

OPTIM = OptimSpec(learning_rate=1e-2, total_steps=20)
SPEC = AverageSpec(
    update_freq=2, ema_power=0.5, bias_power=0.2, lag=10, multiplier=1, update_after=0, min_ema_multiplier=0.0
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model_folder(tmp_path_factory.mktemp("model"), hidden=32)


def trainable(folder: Path, spec: AverageSpec | None, **model: Any) -> ModelWorker:
    made = ModelWorker("policy", ModelSpec(str(folder), **model), BackendSpec("single", OPTIM), threads=1)
    made.ready()
    made.reset(OPTIM, spec)
    return made


def step(target: ModelWorker, seed: int) -> None:
    random = np.random.default_rng(seed)
    lengths = random.integers(3, 12, 4)
    mask = np.concatenate([np.arange(length) > 0 for length in lengths])
    batch = Batch.build(lengths, tokens=random.integers(2, 64, lengths.sum()), mask=mask)
    target.update(shard(batch, 1, 64)[0][1], LossObjective(nll, token_mean, {}), 1.0, "policy.update")


def stepped(target: ModelWorker) -> dict[str, Tensor]:
    """What the optimizer steps: float32, whatever the model computes in."""
    return {name: weight.clone() for name, weight in target.backend.trained_weights()}


def naive(path: list[dict[str, Tensor]], spec: AverageSpec) -> dict[str, Tensor]:
    """`path[t]` are the weights after t steps. In float64, so that nothing rounds on the way."""
    start = {name: weight.double() for name, weight in path[spec.update_after].items()}
    ema, average = dict(start), dict(start)
    for t in range(spec.update_after + 1, len(path)):
        if (t - spec.update_after) % spec.update_freq:
            continue
        beta = max((spec.lag + spec.multiplier * t) ** -spec.ema_power, spec.min_ema_multiplier)
        alpha = (spec.lag + spec.multiplier * t) ** -spec.bias_power
        for name, theta in path[t].items():
            ema[name] = (1 - beta) * ema[name] + beta * theta.double()
            average[name] = ema[name] + alpha * (theta.double() - start[name])
    return average


def averages(target: ModelWorker) -> dict[str, Tensor]:
    state = target._average.state()  # pyright: ignore[reportOptionalMemberAccess]
    return {name: average for name, (_, _, average) in state["shares"].items()}


SPECS = {
    "every second step": SPEC,
    "every step from the third on": replace(SPEC, update_freq=1, update_after=3),
    "other powers": replace(SPEC, ema_power=0.9, bias_power=0.7, lag=3, multiplier=2),
    "a floor": replace(SPEC, min_ema_multiplier=0.5),
}
VARIANTS: dict[str, dict[str, Any]] = {
    "full": {},
    "bfloat16": {"dtype": "bfloat16"},
    "adapters": {"lora": LoraSpec(r=4)},
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_the_average_is_the_papers(folder: Path, spec: AverageSpec, variant: str) -> None:
    target = trainable(folder, spec, **VARIANTS[variant])
    path = [stepped(target)]
    for number in range(7):
        step(target, number)
        path.append(stepped(target))
    expected = naive(path, spec)
    found = averages(target)
    assert found.keys() == expected.keys() == path[0].keys()
    for name, average in found.items():
        torch.testing.assert_close(average.double(), expected[name].flatten(), atol=1e-6, rtol=1e-6)
    assert any(not torch.allclose(average, path[-1][name].flatten(), atol=1e-3) for name, average in found.items())


def test_an_average_that_was_never_taken_is_where_it_started_from(folder: Path) -> None:
    target = trainable(folder, replace(SPEC, update_freq=100, update_after=2))
    start = stepped(target)
    step(target, 0)
    assert all(torch.equal(average, start[name].flatten()) for name, average in averages(target).items())
    step(target, 1)
    second = stepped(target)
    step(target, 2)
    assert all(torch.equal(average, second[name].flatten()) for name, average in averages(target).items())


def test_adapters_alone_are_averaged_and_saved_merged_into_the_frozen_weights(folder: Path, tmp_path: Path) -> None:
    target = trainable(folder, SPEC, lora=LoraSpec(r=4, alpha=8))
    for number in range(4):
        step(target, number)
    assert all(".lora_" in name for name in averages(target))
    target.save_model(str(tmp_path), True)
    saved = dict(AutoModelForCausalLM.from_pretrained(tmp_path).named_parameters())
    base = dict(AutoModelForCausalLM.from_pretrained(folder).named_parameters())
    name = "model.layers.0.self_attn.q_proj"
    a, b = (averages(target)[f"{name}.lora_{which}.default.weight"] for which in "AB")
    merged = base[f"{name}.weight"] + 8 / 4 * b.view(-1, 4) @ a.view(4, -1)
    torch.testing.assert_close(saved[f"{name}.weight"], merged)
    assert torch.equal(saved["model.embed_tokens.weight"], base["model.embed_tokens.weight"])


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_a_saved_average_opens_in_transformers_and_leaves_the_model_as_it_was(tmp_path: Path, tied: bool) -> None:
    target = trainable(tiny_model_folder(tmp_path, hidden=32, tied=tied), SPEC)
    for number in range(4):
        step(target, number)
    before = stepped(target)
    target.save_model(str(tmp_path / "averaged"), True)
    target.save_model(str(tmp_path / "model"))
    opened = dict(AutoModelForCausalLM.from_pretrained(tmp_path / "averaged").named_parameters())
    plain = dict(AutoModelForCausalLM.from_pretrained(tmp_path / "model").named_parameters())
    assert opened.keys() == averages(target).keys()
    assert all(torch.equal(opened[name].flatten(), average) for name, average in averages(target).items())
    assert all(torch.equal(weight, before[name]) for name, weight in {**stepped(target), **plain}.items())


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_resumed_average_equals_an_uninterrupted_one_bit_for_bit(folder: Path, tmp_path: Path, variant: str) -> None:
    straight = trainable(folder, SPEC, **VARIANTS[variant])
    for number in range(3):
        step(straight, number)
    straight.save_state(str(tmp_path))
    resumed = trainable(folder, SPEC, **VARIANTS[variant])
    resumed.load_state(str(tmp_path))
    for target in (straight, resumed):
        step(target, 3)
    found, expected = averages(resumed), averages(straight)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], average) for name, average in expected.items())


def test_a_new_phase_averages_anew_or_not_at_all(folder: Path, tmp_path: Path) -> None:
    target = trainable(folder, SPEC)
    step(target, 0)
    target.reset(OPTIM, SPEC)
    assert all(torch.equal(average, stepped(target)[name].flatten()) for name, average in averages(target).items())
    target.reset(OPTIM)
    step(target, 1)
    with pytest.raises(RunError, match="no average of its weights is taken in this phase"):
        target.save_model(str(tmp_path), True)


def test_a_checkpoint_without_an_average_is_refused_with_what_to_do(folder: Path, tmp_path: Path) -> None:
    trainable(folder, None).save_state(str(tmp_path))
    with pytest.raises(ConfigError, match=r"holds no average.*resume without train\.bema"):
        trainable(folder, SPEC).load_state(str(tmp_path))


def test_ranks_hold_a_part_of_each_weight_and_together_all_of_it() -> None:
    weights = [("a", torch.arange(7.0).view(7, 1)), ("b", torch.tensor(5.0))]
    alone = Average(SPEC, SoloWorld())
    alone.begin(weights)
    ranks = [Average(SPEC, ThreadWorld(rank, 2, [], None)) for rank in range(2)]  # pyright: ignore[reportArgumentType]
    for rank in ranks:
        rank.begin(weights)
    parts = [rank.state()["shares"] for rank in ranks]
    for name, _ in weights:
        together = torch.cat([part[name][2] for part in parts])
        assert torch.equal(together, alone.whole(name))
        assert len(parts[0][name][2]) - len(parts[1][name][2]) == 1


def test_the_configuration_has_the_papers_settings_as_defaults() -> None:
    assert TrainConfig().bema is None
    bema = TrainConfig.model_validate({"bema": {}}).bema
    assert bema is not None
    assert AverageSpec(**bema.model_dump()) == replace(SPEC, update_freq=400)

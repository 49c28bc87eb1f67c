"""A checkpoint of two ranks, real ones: its models are folders of several files, of which each rank writes its own,
while training goes on; transformers opens them."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from actors.batch import Batch
from actors.checkpoint_parts import Part
from actors.model import ModelSpec
from actors.sharding import shard
from actors.specs import BackendSpec, OptimSpec
from actors.weight_averaging import AverageSpec
from tests.masked_nll import MaskedNll
from tests.trainer_ranks import START_S, Gangs, whole
from tests.unit.tiny import tiny_model_folder

RANKS, BUDGET, VERB_S = 2, 100, 300.0
OPTIM = OptimSpec(learning_rate=1e-2, total_steps=8, adam_eps=1e-3)
AVERAGE = AverageSpec(
    update_freq=1, ema_power=0.5, bias_power=0.2, lag=10.0, multiplier=1.0, update_after=0, min_ema_multiplier=0.0
)
PARTITION_ALL = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}
MODEL, AVERAGED = "model", "bema"
Weights = dict[str, np.ndarray]


class Role:
    """Two ranks that train the same batch."""

    def __init__(self, gang: Any, model: Path, stage: int) -> None:
        self._gang = gang
        lengths = np.array([13, 9, 17, 11, 21, 8])
        mask = np.ones(lengths.sum(), bool)
        mask[np.cumsum(lengths) - lengths] = False
        tokens = np.random.default_rng(0).integers(2, 64, lengths.sum()).astype(np.int32)
        self._batch = Batch.build(lengths, tokens=tokens, mask=mask)
        spec = BackendSpec("deepspeed", OPTIM, PARTITION_ALL, stage)
        self._call("start", ModelSpec(str(model)), spec, timeout_s=START_S)
        self.act("reset", OPTIM, AVERAGE)

    def act(self, verb: str, *args: Any) -> list[Any]:
        return self._call("act", verb, *args)

    def step(self) -> None:
        objective = MaskedNll()
        dealt = shard(self._batch, RANKS, BUDGET, statistics_rows=objective.statistics_rows)
        self._call("act_on", "update", objective, 1.0, "u", per_rank=[part for _, part in dealt])

    def weights(self) -> Weights:
        return self.act("export", whole, 20_000)[0]

    def _call(self, method: str, *args: Any, timeout_s: float = VERB_S, **options: Any) -> list[Any]:
        return asyncio.run(self._gang.call(method, *args, timeout_s=timeout_s, **{"per_rank": None, **options}))


def opened(folder: Path) -> Weights:
    """As transformers reads them."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return {name: weight.detach().numpy() for name, weight in model.named_parameters()}


def averaged(start: Weights, later: list[Weights]) -> Weights:
    """By the formula of arXiv:2508.00180."""
    ema = average = start
    for step, theta in enumerate(later, 1):
        beta, alpha = AVERAGE.beta(step), AVERAGE.alpha(step)
        ema = {name: (1 - beta) * ema[name] + beta * theta[name] for name in start}
        average = {name: ema[name] + alpha * (theta[name] - start[name]) for name in start}
    return average


def furthest(one: Weights, other: Weights) -> float:
    assert one.keys() == other.keys()
    return max(float(np.abs(one[name] - other[name]).max()) for name in one)


@pytest.mark.parametrize("stage", [1, 3], ids="zero{}".format)
def test_two_ranks_write_a_model_and_its_average_as_files_of_each_which_transformers_opens(
    gangs: Gangs, tmp_path: Path, stage: int
) -> None:
    """In stage 1 a rank has whole weights and copies them beside training, in stage 3 they are gathered before."""
    base = tiny_model_folder(tmp_path / "base", hidden=32, tied=False)
    role = Role(gangs(RANKS), base, stage)
    start, steps, folder = role.weights(), list[Weights](), tmp_path / "checkpoint"
    for _ in range(2):
        role.step()
        steps.append(role.weights())
    (folder / "policy").mkdir(parents=True)
    models = [Part("model", name, averaged=name == AVERAGED, smallest_file=1) for name in (MODEL, AVERAGED)]
    parts = [Part("state", "policy"), *models]
    role.act("begin_save", str(folder), parts)
    role.step()
    seals = role.act("finish_save", VERB_S)

    ours, theirs = (set(each) for each in seals)
    assert ours.isdisjoint(theirs), "each file is one rank's"
    expected = {MODEL: steps[-1], AVERAGED: averaged(start, steps)}
    for name, weights in expected.items():
        told = {file for file in ours | theirs if file.startswith(f"{name}/")}
        assert told == {f"{name}/{file}" for file in files(folder / name)}, "all that was written is told"
        assert [len(weights_of(name, own)) for own in (ours, theirs)] == [1, 1], "each rank has written a part"
        sizes = [load_bytes(folder / file) for file in weights_of(name, ours | theirs)]
        assert max(sizes) < 2 * sum(sizes) / RANKS, "one rank writes about as much as another"
        assert furthest(opened(folder / name), weights) <= (0 if name == MODEL else 1e-6)
    apart = furthest(expected[MODEL], expected[AVERAGED]), furthest(expected[MODEL], role.weights())
    assert min(apart) > 1e-3, "the average, and the weights after the save began, are others: or this shows nothing"


def files(folder: Path) -> set[str]:
    return {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()}


def weights_of(model: str, names: set[str]) -> list[str]:
    return sorted(name for name in names if name.startswith(f"{model}/") and name.endswith(".safetensors"))


def load_bytes(file: Path) -> int:
    return sum(tensor.nbytes for tensor in load_file(file).values())

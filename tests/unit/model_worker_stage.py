"""A worker of a tiny model in this process, an objective that counts its steps, and what a worker has computed."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from actors.batch import Batch
from actors.columns import Head
from actors.model import ModelSpec
from actors.model_worker import ModelWorker, UpdateReport
from actors.objective import Counts, MicroBatch, Outputs, Stat, World
from actors.sharding import Shard, shard
from actors.specs import BackendSpec, LoraSpec, OptimSpec
from tests.unit.tiny import tiny_model_folder

OPTIM = OptimSpec(learning_rate=3e-3, total_steps=10, weight_decay=0.1)


@dataclass
class Nll:
    """Mean negative log-likelihood of the masked tokens; counts its steps if told to couple rows."""

    needs: frozenset[str] = frozenset({"entropy"})
    columns: frozenset[str] = frozenset({"mask"})
    head: Head = Head.VOCABULARY
    keep_groups: bool = False
    coupled: bool = False
    statistics_rows: str | None = None
    of_logits: Any = None
    seen: list[float] = field(default_factory=list)

    def counts(self, micro: MicroBatch) -> Counts:
        return {"tokens": float(micro["mask"].sum())}

    def statistics(
        self, micros: list[MicroBatch], outputs: list[Outputs], world: World, state: dict[str, Any]
    ) -> dict[str, Any]:
        assert not any(output.logps.requires_grad for output in outputs)
        state["steps"] = state.get("steps", 0) + 1
        return {"nll": -sum(output.logps.sum() for output in outputs), "steps": state["steps"]}

    def loss(
        self, micro: MicroBatch, outputs: Outputs, counts: Counts, statistics: dict[str, Any]
    ) -> tuple[Tensor, dict[str, Stat]]:
        loss = -(outputs.logps * micro["mask"]).sum() / counts["tokens"]
        stats = {
            "loss": Stat(loss.detach(), combine="sum"),
            "entropy": Stat(outputs.extra["entropy"].sum(), micro["mask"].sum()),
            "longest": Stat(micro.lengths.max(), combine="max"),
            "unmeasured": Stat(0.0, 0.0),
        }
        if self.coupled:
            stats |= {"steps": Stat(statistics["steps"]), "nll": Stat(statistics["nll"])}
        return loss, stats


def batch(seed: int = 0, rows: int = 12) -> Batch:
    generator = np.random.default_rng(seed)
    lengths = generator.integers(2, 24, rows)
    mask = np.concatenate([np.arange(length) >= max(1, length // 3) for length in lengths])
    return Batch.build(lengths, tokens=generator.integers(2, 64, lengths.sum()), mask=mask)


def part(of: Batch, token_budget: int = 64) -> Shard:
    return shard(of, 1, token_budget)[0][1]


def trainable(folder: Path, *, optim: OptimSpec | None = OPTIM, seed: int = 0, **model: Any) -> ModelWorker:
    made = ModelWorker("policy", ModelSpec(str(folder), **model), BackendSpec("single", optim), threads=1, seed=seed)
    made.ready()
    return made


def train(target: ModelWorker, steps: range, objective: Nll | None = None) -> list[UpdateReport]:
    """Steps that learn something: each has a gradient and a rate, or what is compared after them was never trained."""
    reports = [target.update(part(batch(step)), objective or Nll(), 1.0, "policy.update") for step in steps]
    assert all(report.grad_norm > 1e-3 and report.learning_rate > 0 for report in reports)
    return reports


def logps(target: ModelWorker, shard: Shard, *, adapters: bool = True) -> Any:
    """[T]: log-probabilities of the shard's rows."""
    return target.infer(shard, ("ref_logps",), Head.VOCABULARY, 1.0, adapters)[1]["ref_logps"]


def weights(target: ModelWorker) -> dict[str, Tensor]:
    return target.export(lambda tensors: {name: tensor.clone() for name, tensor in tensors}, 1 << 20)


def assert_equal_bits(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    assert differing(one, other) == []


def differing(one: dict[str, Tensor], other: dict[str, Tensor]) -> list[str]:
    return [name for name in one if not torch.equal(one[name], other[name])]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tiny_model_folder(tmp_path)


VARIANTS: dict[str, dict[str, Any]] = {
    "float32": {},
    "bfloat16": {"dtype": "bfloat16"},
    "lora": {"lora": LoraSpec(r=4, dropout=0.1)},
    "noise": {"neftune_noise_alpha": 5.0},
}

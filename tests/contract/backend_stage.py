"""Roles of every trainer backend, driven as the driver does it. A user's own backend joins as a `Case`.

The ranks are real Ray actors; a gang of each size is started once, and holds one `ModelWorker` after the other.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from actors.batch import Batch
from actors.checkpoint_parts import Part
from actors.columns import Head
from actors.model import ModelSpec
from actors.model_worker import UpdateReport
from actors.objective import Objective
from actors.sharding import shard
from actors.specs import BackendKind, BackendSpec, LoraSpec, OptimSpec
from tests.masked_nll import MaskedNll
from tests.trainer_ranks import START_S, Gangs, whole
from tests.unit.tiny import tiny_model_folder

VERB_S = 300.0
BUDGET = 100  # tokens per micro-batch: several of them, with any number of ranks

# Adam divides by the root of the second moment; `adam_eps` is large enough not to blow up what is rounding noise.
OPTIM = OptimSpec(
    learning_rate=1e-2,
    total_steps=8,
    warmup_steps=2,
    weight_decay=0.1,
    adam_eps=1e-3,
    scheduler="cosine",
    max_grad_norm=0.7,
)
PARTITION_ALL = {
    "zero_optimization": {"stage3_param_persistence_threshold": 0}
}  # stage 3 spares small weights otherwise
LORA = LoraSpec(r=4, alpha=8)


@dataclass(frozen=True)
class Case:
    kind: BackendKind
    stage: int
    ranks: int

    def __str__(self) -> str:
        return self.kind if self.kind == "single" else f"zero{self.stage}-{self.ranks}ranks"


SINGLE = Case("single", 0, 1)
DEEPSPEED = [Case("deepspeed", stage, ranks) for ranks in (1, 2) for stage in (0, 1, 2, 3)]
ZERO3 = Case("deepspeed", 3, 2)
every_backend = pytest.mark.parametrize("case", [SINGLE, *DEEPSPEED], ids=str)


@dataclass(frozen=True)
class Role:
    """A role under test, driven as the driver does it."""

    gang: Any
    batch: Batch

    def call(self, method: str, *args: Any, per_rank: list[Any] | None = None) -> list[Any]:
        timeout_s = START_S if method == "start" else VERB_S
        return asyncio.run(self.gang.call(method, *args, per_rank=per_rank, timeout_s=timeout_s))

    def act(self, verb: str, *args: Any) -> list[Any]:
        return self.call("act", verb, *args)

    def update(
        self, steps: int = 1, *, batch: Batch | None = None, budget: int = BUDGET, objective: Objective | None = None
    ) -> list[UpdateReport]:
        learned: Any = objective or MaskedNll()
        dealt = shard(batch or self.batch, len(self.gang.workers), budget, statistics_rows=learned.statistics_rows)
        parts = [part for _, part in dealt]
        reports = [self.call("act_on", "update", learned, 1.0, "u", per_rank=parts)[0] for _ in range(steps)]
        assert all(report.grad_norm > 1e-3 and report.learning_rate > 0 for report in reports), "nothing was learned"
        return reports

    def evaluate(self) -> dict[str, float]:
        parts = [part for _, part in shard(self.batch, len(self.gang.workers), BUDGET)]
        return self.call("act_on", "evaluate", MaskedNll(), 1.0, "u", per_rank=parts)[0]

    def logps(self, *, adapters: bool = True) -> np.ndarray:
        dealt = shard(self.batch, len(self.gang.workers), BUDGET)
        parts = [part for _, part in dealt]
        found = self.call("act_on", "infer", ("ref_logps",), Head.VOCABULARY, 1.0, adapters, per_rank=parts)
        column = np.zeros(self.batch.num_tokens, np.float32)
        for (rows, _), (_, block) in zip(dealt, found, strict=True):
            column[self.batch.token_index(np.asarray(rows))] = block["ref_logps"]
        return column

    def weights(self, bucket_bytes: int = 20_000) -> dict[str, np.ndarray]:
        return self.act("export", whole, bucket_bytes)[0]


@dataclass
class Run:
    """What four steps of a case left behind: after the second its state was saved, at the end its weights."""

    reports: list[UpdateReport]
    weights: dict[str, np.ndarray]
    state: str
    model: str
    losses: list[float] = field(init=False)

    def __post_init__(self) -> None:
        self.losses = [report.metrics["loss"] for report in self.reports]


Start = Callable[..., Role]
Train = Callable[[Case], Run]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> ModelSpec:
    return ModelSpec(str(tiny_model_folder(tmp_path_factory.mktemp("base"), hidden=32)))


@pytest.fixture(scope="module")
def batch() -> Batch:
    """Ragged: rows of 3 to 30 tokens, of which some two thirds are learned from."""
    random = np.random.default_rng(0)
    lengths = random.integers(3, 30, 16)
    mask = random.random(lengths.sum()) < 0.7
    mask[np.cumsum(lengths) - lengths] = False
    return Batch.build(lengths, tokens=random.integers(2, 64, lengths.sum()).astype(np.int32), mask=mask)


@pytest.fixture
def start(gangs: Gangs, base: ModelSpec, batch: Batch) -> Start:
    return starting(gangs, base, batch)


def starting(gangs: Gangs, base: ModelSpec, batch: Batch) -> Start:
    def start(
        case: Case,
        *,
        optim: OptimSpec | None = OPTIM,
        config: dict[str, Any] | None = PARTITION_ALL,
        **model: Any,
    ) -> Role:
        role = Role(gangs(case.ranks), batch)
        role.call("start", replace(base, **model), BackendSpec(case.kind, optim, config, case.stage))
        return role

    return start


@pytest.fixture(scope="module")
def train(gangs: Gangs, base: ModelSpec, batch: Batch, tmp_path_factory: pytest.TempPathFactory) -> Train:
    """Each case's four steps, made once for all files of this folder, which one process runs."""
    start = starting(gangs, base, batch)

    def four_steps(case: Case) -> Run:
        role = start(case)
        state, model = (str(tmp_path_factory.mktemp(f"{name}-{case}")) for name in ("state", "model"))
        reports = role.update(2)
        role.act("begin_save", state, [Part("state")])  # which is written while the next steps are done
        reports += role.update(2)
        role.act("finish_save", VERB_S)
        role.act("save_model", model)
        return Run(reports, role.weights(), state, model)

    return lambda case: expected_once(f"four steps of {case}", lambda: four_steps(case))


def assert_same_weights(
    weights: dict[str, np.ndarray], expected: dict[str, np.ndarray], tolerance: float = 0.0
) -> None:
    assert list(weights) == list(expected)
    for name, tensor in weights.items():
        np.testing.assert_allclose(tensor, expected[name], rtol=0, atol=tolerance, err_msg=name)


def furthest(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> float:
    """The largest difference of any weight."""
    return max(float(np.abs(tensor - other[name]).max()) for name, tensor in one.items())


def plain_model(path: str) -> dict[str, np.ndarray]:
    """Weights as transformers reads them, tied ones once."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    return {name: weight.detach().numpy() for name, weight in model.named_parameters()}


def plain_logps(path: str, batch: Batch) -> np.ndarray:
    """By transformers' own forward pass, row by row, without anything of ours."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    column = np.zeros(batch.num_tokens, np.float32)
    for row in range(len(batch)):
        tokens = torch.tensor(batch.row("tokens", row), dtype=torch.int64)[None]
        with torch.no_grad():
            logps = model(tokens).logits[:, :-1].float().log_softmax(-1).gather(2, tokens[:, 1:, None])
        column[batch.offsets[row] + 1 : batch.offsets[row + 1]] = logps.flatten().numpy()
    return column * batch["mask"]


_EXPECTED: dict[str, Any] = {}


def expected_once(key: str, compute: Callable[[], Any]) -> Any:
    """A result that several tests compare with: what `single` makes of a scenario, or the steps of a case."""
    if key not in _EXPECTED:
        _EXPECTED[key] = compute()
    return _EXPECTED[key]

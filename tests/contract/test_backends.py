"""The contract of a trainer backend, on every one: what a role computes must not depend on who computes it.

The ranks are real Ray actors; a gang of each size is started once, and holds one `ModelWorker` after the other.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import AutoPeftModelForCausalLM
from transformers import AutoModelForCausalLM

from actors.batch import Batch
from actors.checkpoint_parts import Part
from actors.columns import Head
from actors.errors import ConfigError, InfraFailure, RunError
from actors.model import ModelSpec
from actors.model_worker import UpdateReport
from actors.objective import Objective
from actors.sharding import shard
from actors.specs import BackendSpec, LoraSpec, OptimSpec
from actors.weight_averaging import AverageSpec
from orchestrator.losses.objective import LossObjective
from orchestrator.losses.reduce import item_mean
from orchestrator.losses.unpaired import bco, kto
from orchestrator.publishing.transfer import mix_towards
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
    kind: str
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
        objective = objective or MaskedNll()
        dealt = shard(batch or self.batch, len(self.gang.workers), budget, statistics_rows=objective.statistics_rows)
        parts = [part for _, part in dealt]
        reports = [self.call("act_on", "update", objective, 1.0, "u", per_rank=parts)[0] for _ in range(steps)]
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
    """Each case's four steps, made once."""
    start = starting(gangs, base, batch)

    @cache
    def train(case: Case) -> Run:
        role = start(case)
        state, model = (str(tmp_path_factory.mktemp(f"{name}-{case}")) for name in ("state", "model"))
        reports = role.update(2)
        role.act("begin_save", state, [Part("state")])  # which is written while the next steps are done
        reports += role.update(2)
        role.act("finish_save", VERB_S)
        role.act("save_model", model)
        return Run(reports, role.weights(), state, model)

    return train


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


@every_backend
def test_the_loss_curve_is_that_of_single(train: Train, case: Case) -> None:
    run, expected = train(case), train(SINGLE)
    assert expected.losses[-1] < 0.9 * expected.losses[0], "four steps must move the loss, or nothing is compared"
    np.testing.assert_allclose(run.losses, expected.losses, rtol=1e-5)


@every_backend
def test_gradient_norms_and_learning_rates_are_those_of_single(train: Train, case: Case) -> None:
    run, expected = train(case), train(SINGLE)
    assert all(report.grad_norm > 0.7 for report in expected.reports[:2]), "clipping must be at work"
    np.testing.assert_allclose(
        [report.grad_norm for report in run.reports], [report.grad_norm for report in expected.reports], rtol=1e-4
    )
    rates = [report.learning_rate for report in run.reports]
    assert rates == [report.learning_rate for report in expected.reports]
    assert rates[0] == pytest.approx(0.5e-2), "the first of two warm-up steps"


@every_backend
def test_weights_leave_whole_under_the_same_names_and_in_the_same_order(train: Train, case: Case) -> None:
    assert_same_weights(train(case).weights, train(SINGLE).weights, tolerance=2e-6)


@every_backend
def test_a_saved_model_reopens_with_the_weights_that_were_trained(train: Train, case: Case) -> None:
    assert_same_weights(plain_model(train(case).model), train(case).weights)


@every_backend
def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(start: Start, train: Train, case: Case) -> None:
    run = train(case)
    role = start(case)
    untrained = role.weights()
    role.act("load_state", run.state)
    at_resume = role.weights()
    resumed = role.update(2)
    assert [report.metrics["loss"] for report in resumed] == run.losses[2:]
    assert [report.grad_norm for report in resumed] == [report.grad_norm for report in run.reports[2:]]
    assert_same_weights(role.weights(), run.weights)
    assert furthest(untrained, at_resume) > 1e-3 and furthest(at_resume, run.weights) > 1e-3


@every_backend
def test_a_resumed_run_trains_as_it_is_configured_now(start: Start, train: Train, case: Case) -> None:
    now = OptimSpec(2e-3, total_steps=8, weight_decay=0.5, adam_betas=(0.5, 0.9), max_grad_norm=0.1)

    def two_more(case: Case) -> tuple[list[UpdateReport], dict[str, np.ndarray]]:
        state = train(case).state  # before the role starts: it may be trained only now, by the same gang
        role = start(case)
        role.act("reset", now)
        role.act("load_state", state)
        return role.update(2), role.weights()

    reports, weights = two_more(case)
    assert [report.learning_rate for report in reports] == pytest.approx([2e-3 * 6 / 8, 2e-3 * 5 / 8])
    expected, single = expected_once("changed", lambda: two_more(SINGLE))
    assert [report.grad_norm for report in reports] == pytest.approx(
        [report.grad_norm for report in expected], rel=1e-5
    )
    assert_same_weights(weights, single, tolerance=5e-6)
    assert furthest(single, train(SINGLE).weights) > 1e-3, "the changed settings must show, or nothing is compared"


class Planted:
    """Runs when it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.trace),)


@pytest.mark.parametrize("stage", range(4))
def test_a_state_of_deepspeed_that_holds_code_is_refused_and_the_code_does_not_run(
    start: Start, train: Train, tmp_path: Path, stage: int
) -> None:
    case = Case("deepspeed", stage, 1)
    files = sorted(Path(train(case).state).rglob("*states.pt"))
    assert len(files) == (1 if stage == 0 else 2)
    for number, file in enumerate(files):
        state = Path(shutil.copytree(train(case).state, tmp_path / str(number)))
        planted, trace = state / file.relative_to(train(case).state), tmp_path / f"ran-{number}"
        torch.save({**torch.load(planted, weights_only=False), "planted": Planted(trace)}, planted)
        with pytest.raises(RunError, match=r"is not data \(.*mkdir.*not loaded"):
            start(case).act("load_state", str(state))
        assert not trace.exists()


@every_backend
def test_a_new_phase_has_fresh_moments_and_schedule_on_the_same_weights(start: Start, case: Case) -> None:
    second = replace(OPTIM, learning_rate=2e-3, scheduler="constant", warmup_steps=0, max_grad_norm=0.3)

    def two_phases(case: Case) -> list[float]:
        role = start(case)
        role.update(2)
        role.act("reset", second)
        reports = role.update(3)
        assert {report.learning_rate for report in reports} == {2e-3}
        return [report.metrics["loss"] for report in reports]

    np.testing.assert_allclose(two_phases(case), expected_once("phases", lambda: two_phases(SINGLE)), rtol=1e-5)


@every_backend
def test_adapters_train_alike_and_switch_off_to_the_base(start: Start, tmp_path: Path, case: Case) -> None:
    base = expected_once("base logps", lambda: start(SINGLE).logps())
    expected = expected_once("adapters", lambda: [r.metrics["loss"] for r in start(SINGLE, lora=LORA).update(3)])
    role = start(case, lora=LORA)
    untouched = role.logps(adapters=False)
    np.testing.assert_allclose(untouched, base, atol=1e-5)
    reports = role.update(2)
    role.act("save_state", str(tmp_path))
    losses = [report.metrics["loss"] for report in reports + role.update(1)]
    np.testing.assert_allclose(losses, expected, rtol=1e-5)
    np.testing.assert_array_equal(role.logps(adapters=False), untouched)
    assert np.abs(role.logps() - untouched).max() > 1e-3, "the adapters must have learned something"
    assert_merged_export(role, tmp_path / "merged")
    resumed = start(case, lora=LORA)
    resumed.act("load_state", str(tmp_path))
    assert resumed.update(1)[0].metrics["loss"] == losses[-1]


def assert_merged_export(role: Role, folder: Path) -> None:
    """A plain model with the exported weights computes what the adapted one does; no trace of the adapters is left."""
    learned = role.logps()
    role.act("save_model", str(folder))
    merged = plain_model(str(folder))
    assert_same_weights(merged, role.weights())
    assert not [name for name in merged if "lora" in name or "base_layer" in name]
    np.testing.assert_allclose(plain_logps(str(folder), role.batch), learned, atol=1e-5)


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


@every_backend
def test_an_evaluation_is_the_loss_of_the_next_step_and_changes_nothing(start: Start, train: Train, case: Case) -> None:
    role = start(case)
    losses: list[float] = []
    for _ in range(2):
        losses.append(role.evaluate()["loss"])
        role.update()
    np.testing.assert_allclose(losses, train(SINGLE).losses[:2], rtol=1e-5)


@every_backend
def test_bfloat16_trains_to_nearly_the_same_losses(start: Start, train: Train, case: Case) -> None:
    reports, exact = start(case, dtype="bfloat16").update(4), train(SINGLE)
    losses = [report.metrics["loss"] for report in reports]
    np.testing.assert_allclose(losses, exact.losses, rtol=0.02)
    assert losses != exact.losses
    norms = [report.grad_norm for report in reports]
    np.testing.assert_allclose(norms, [report.grad_norm for report in exact.reports], rtol=0.1)


@pytest.mark.parametrize("case", [SINGLE, Case("deepspeed", 1, 2), ZERO3], ids=str)
@pytest.mark.parametrize("budget", [35, 400])
def test_losses_do_not_depend_on_how_rows_are_cut_into_micro_batches(
    start: Start, train: Train, case: Case, budget: int
) -> None:
    losses = [report.metrics["loss"] for report in start(case).update(4, budget=budget)]
    np.testing.assert_allclose(losses, train(SINGLE).losses, rtol=1e-5)


@pytest.mark.parametrize("case", [SINGLE, Case("deepspeed", 2, 2), ZERO3], ids=str)
@pytest.mark.parametrize("budget", [BUDGET, 1000], ids=["several micro-batches", "one micro-batch"])
@pytest.mark.parametrize("loss", [kto, bco], ids=["over rows set aside", "over all rows"])
def test_losses_that_look_across_rows_are_those_of_single(
    start: Start, batch: Batch, case: Case, budget: int, loss: Callable[..., Any]
) -> None:
    every_other = np.arange(len(batch)) % 2 == 1
    columns = {"ref_logps": -4.0 * batch["mask"], "label": np.arange(len(batch)) % 4 < 2, "mismatched": every_other}
    objective = LossObjective(loss, item_mean, {"beta": 0.1})
    data = batch.with_columns(**columns)

    def losses(case: Case, budget: int) -> list[float]:
        reports = start(case).update(3, batch=data, budget=budget, objective=objective)
        return [x for r in reports for x in (r.metrics["loss"], r.grad_norm, r.metrics["rewards/chosen"])]

    expected = expected_once(f"coupled by {loss.__name__}", lambda: losses(SINGLE, 60))
    np.testing.assert_allclose(losses(case, budget), expected, rtol=1e-4)


@pytest.mark.parametrize("case", [SINGLE, Case("deepspeed", 2, 1), ZERO3], ids=str)
def test_gradient_checkpointing_changes_no_loss(start: Start, train: Train, case: Case) -> None:
    losses = [report.metrics["loss"] for report in start(case, gradient_checkpointing=True).update(4)]
    np.testing.assert_allclose(losses, train(SINGLE).losses, rtol=1e-5)


@pytest.mark.parametrize("case", [Case("deepspeed", stage, 2) for stage in range(4)], ids=str)
def test_a_rank_without_rows_takes_part(start: Start, batch: Batch, case: Case) -> None:
    row = batch.select([3])
    alone = expected_once("one row", lambda: [r.metrics["loss"] for r in start(SINGLE).update(2, batch=row)])
    np.testing.assert_allclose([r.metrics["loss"] for r in start(case).update(2, batch=row)], alone, rtol=1e-5)


@pytest.mark.parametrize("case", [SINGLE, *(Case("deepspeed", stage, 2) for stage in range(4))], ids=str)
def test_a_frozen_role_needs_no_optimizer(start: Start, base: ModelSpec, batch: Batch, case: Case) -> None:
    role = start(case, optim=None)
    np.testing.assert_allclose(role.logps(), plain_logps(base.path, batch), atol=1e-5)
    assert_same_weights(role.weights(), plain_model(base.path))


AVERAGE = AverageSpec(
    update_freq=2, ema_power=0.5, bias_power=0.2, lag=10, multiplier=1, update_after=0, min_ema_multiplier=0.0
)
VARIANTS: dict[str, dict[str, Any]] = {"full": {}, "adapters": {"lora": LORA}, "bfloat16": {"dtype": "bfloat16"}}
AVERAGED = [("full", case) for case in (SINGLE, *DEEPSPEED)]
AVERAGED += [(variant, case) for variant in ("adapters", "bfloat16") for case in (SINGLE, *DEEPSPEED[4:])]


@pytest.mark.parametrize(("variant", "case"), AVERAGED, ids=str)
def test_an_average_is_that_of_single_and_a_resumed_one_that_of_an_uninterrupted_run(
    start: Start, tmp_path: Path, case: Case, variant: str
) -> None:
    def saved(role: Role, name: str) -> dict[str, np.ndarray]:
        role.act("save_model", str(tmp_path / name), True)
        return plain_model(str(tmp_path / name))

    def averaged(case: Case, name: str) -> dict[str, np.ndarray]:
        role = start(case, **VARIANTS[variant])
        role.act("reset", OPTIM, AVERAGE)
        role.update(3)
        (state := tmp_path / f"state-{name}").mkdir()
        role.act("save_state", str(state))
        role.update(1)
        own = role.weights()
        average = saved(role, name)
        assert_same_weights(role.weights(), own)  # saving the average has left them alone
        moved = max(np.abs(average[name] - weight).max() for name, weight in own.items())
        assert moved > 1e-3, "the average must differ from the weights, or nothing is compared"
        return average

    average = averaged(case, "average")
    tolerance = 2**-7 if variant == "bfloat16" else 2e-6  # one unit of half precision at 1: it is saved in that
    expected = expected_once(f"average {variant}", lambda: averaged(SINGLE, "expected"))
    assert_same_weights(average, expected, tolerance)
    resumed = start(case, **VARIANTS[variant])
    resumed.act("reset", OPTIM, AVERAGE)
    resumed.act("load_state", str(tmp_path / "state-average"))
    resumed.update(1)
    assert_same_weights(saved(resumed, "resumed"), average)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize(
    ("source", "case"), [(SINGLE, Case("deepspeed", stage, 2)) for stage in range(4)] + [(ZERO3, SINGLE)], ids=str
)
def test_a_frozen_role_takes_in_a_share_of_the_trained_ones_weights(
    start: Start, tmp_path: Path, source: Case, case: Case, tied: bool
) -> None:
    folder = str(tiny_model_folder(tmp_path, hidden=32, tied=tied))
    policy, reference = start(source, path=folder), start(case, optim=None, path=folder)
    expected = reference.weights()
    for share in (0.25, 0.6):
        policy.update()
        asyncio.run(mix_towards(policy.gang, reference.gang, share, timeout_s=VERB_S, task_name="mix"))
        new = policy.weights()
        expected = {name: (1 - share) * own + share * new[name] for name, own in expected.items()}
        assert_same_weights(reference.weights(), expected, tolerance=3e-7)
    reference.act("save_model", str(tmp_path / "mixed"))
    np.testing.assert_allclose(plain_logps(str(tmp_path / "mixed"), reference.batch), reference.logps(), atol=1e-5)
    kept = reference.weights()
    reference.act("load_model", str(tmp_path / "mixed"))
    assert_same_weights(reference.weights(), kept)  # what a checkpoint does


@every_backend
def test_what_is_parked_between_two_steps_comes_back_to_the_bit(start: Start, train: Train, case: Case) -> None:
    small = {"zero_optimization": {**PARTITION_ALL["zero_optimization"], "reduce_bucket_size": 100_000}}
    run = train(case)
    role = start(case, config=small)  # DeepSpeed's own buffers have half a billion numbers
    reports = role.update(2)
    held = sum(role.call("park_and_take_back"))
    reports += role.update(2)
    assert [report.metrics["loss"] for report in reports] == run.losses
    assert_same_weights(role.weights(), run.weights)
    numel = sum(weight.size for weight in run.weights.values())
    assert held > 0.99 * numel * (4 + 8), "weights and Adam's two moments, of all ranks together"


@pytest.mark.parametrize("case", [SINGLE, Case("deepspeed", 2, 1), ZERO3], ids=str)
def test_adapters_are_saved_alone_and_open_with_peft(start: Start, tmp_path: Path, case: Case) -> None:
    role = start(case, lora=LORA)
    base = role.logps()
    role.update(2)
    role.act("save_adapter", str(tmp_path / "adapter"))
    opened: Any = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    opened.merge_and_unload().save_pretrained(tmp_path / "merged")
    np.testing.assert_allclose(plain_logps(str(tmp_path / "merged"), role.batch), role.logps(), atol=1e-4)
    assert np.abs(role.logps() - base).max() > 1e-2


@pytest.mark.parametrize("case", [SINGLE, Case("deepspeed", 0, 1), ZERO3], ids=str)
def test_an_untied_head_is_trained_and_leaves_too(start: Start, tmp_path: Path, case: Case) -> None:
    folder = tiny_model_folder(tmp_path, hidden=32, tied=False)

    def two_steps(case: Case) -> tuple[list[float], dict[str, np.ndarray]]:
        role = start(case, path=str(folder))
        return [report.metrics["loss"] for report in role.update(2)], role.weights()

    losses, weights = two_steps(case)
    expected_losses, expected = expected_once("untied", lambda: two_steps(SINGLE))
    assert "lm_head.weight" in weights
    np.testing.assert_allclose(losses, expected_losses, rtol=1e-5)
    assert_same_weights(weights, expected, tolerance=2e-6)


@pytest.mark.parametrize("case", [SINGLE, Case("deepspeed", 0, 1), Case("deepspeed", 1, 2)], ids=str)
def test_the_world_sums_and_gathers_over_ranks(start: Start, case: Case) -> None:
    own = [[float(rank), 10.0][: rank + 1] for rank in range(case.ranks)]  # one value on rank 0, two on rank 1
    flat = [value for values in own for value in values]
    answers = start(case).call("combine", per_rank=own)
    assert answers == [([len(flat), sum(flat)], flat)] * case.ranks


@pytest.mark.parametrize("name", ["zero2", "zero3", "zero3_offload"])
def test_the_shipped_deepspeed_configurations_train(start: Start, train: Train, name: str) -> None:
    path = Path(__file__).parents[2] / "deploy" / "deepspeed" / f"{name}.json"
    losses = [report.metrics["loss"] for report in start(ZERO3, config=path).update(2)]
    np.testing.assert_allclose(losses, train(SINGLE).losses[:2], rtol=1e-5)


def test_an_optimizer_of_deepspeeds_configuration_takes_its_settings_from_the_run(start: Start, train: Train) -> None:
    config = {"optimizer": {"type": "AdamW", "params": {"torch_adam": True, "lr": "auto"}}}
    losses = [report.metrics["loss"] for report in start(Case("deepspeed", 2, 2), config=config).update(4)]
    np.testing.assert_allclose(losses, train(SINGLE).losses, rtol=1e-5)


def test_a_state_of_another_gang_is_refused_with_what_to_do(start: Start, train: Train) -> None:
    state = train(Case("deepspeed", 2, 1)).state
    with pytest.raises(
        ConfigError, match=r"saved by 1 rank\(s\) in ZeRO stage 2.*resume with ranks=1 and zero_stage=2"
    ):
        start(Case("deepspeed", 2, 2)).act("load_state", state)


def test_a_state_of_another_backend_is_refused(start: Start, train: Train) -> None:
    deepspeed = Case("deepspeed", 2, 1)
    saved = {case: train(case).state for case in (SINGLE, deepspeed)}  # first: the ranks hold one worker at a time
    with pytest.raises(ConfigError, match="resume with the backend that saved it"):
        start(deepspeed).act("load_state", saved[SINGLE])
    with pytest.raises(ConfigError, match="no state of backend 'single'; resume with the backend that saved it"):
        start(SINGLE).act("load_state", saved[deepspeed])


def test_single_refuses_more_than_one_rank(start: Start) -> None:
    with pytest.raises(ConfigError, match="deepspeed"):
        start(Case("single", 0, 2))


def test_the_death_of_a_rank_ends_the_update_with_an_infra_failure(gangs: Gangs, base: ModelSpec, batch: Batch) -> None:
    """The last test of all that share the gangs: it kills one."""
    role = Role(gangs.given_away(2), batch)
    role.call("start", base, BackendSpec("deepspeed", OPTIM, None, 2))
    role.update()
    os.kill(role.call("ready")[1].pid, signal.SIGKILL)
    began = time.monotonic()
    with pytest.raises(InfraFailure, match=f"{role.gang.name}/1"):
        role.update()
    assert time.monotonic() - began < VERB_S / 2, "far from the deadline of the call"


_EXPECTED: dict[str, Any] = {}


def expected_once(key: str, compute: Callable[[], Any]) -> Any:
    """What `single` makes of a scenario that several cases are compared with."""
    if key not in _EXPECTED:
        _EXPECTED[key] = compute()
    return _EXPECTED[key]

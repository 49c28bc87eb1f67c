from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, MixtralConfig, MixtralForCausalLM

from actors.batch import Batch
from actors.columns import Head
from actors.errors import ConfigError, ModelError, RunError
from actors.model import ModelSpec
from actors.model_worker import ModelWorker, UpdateReport
from actors.objective import Counts, MicroBatch, Outputs, Stat, World
from actors.sharding import Shard, shard
from actors.specs import BackendSpec, LoraSpec, OptimSpec
from actors.train_step import infer
from tests.unit.tiny import tiny_model_folder

OPTIM = OptimSpec(learning_rate=3e-3, total_steps=10, weight_decay=0.1)


@dataclass(frozen=True)
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


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_same_seed_gives_the_same_bits(folder: Path, variant: str) -> None:
    one, other = (trainable(folder, seed=3, **VARIANTS[variant]) for _ in range(2))
    for step in range(3):  # by turns, in one process: neither may draw from the other's random numbers
        train(one, range(step, step + 1))
        train(other, range(step, step + 1))
    assert_equal_bits(weights(one), weights(other))


def test_another_seed_draws_other_noise(folder: Path) -> None:
    one, other = (trainable(folder, seed=seed, neftune_noise_alpha=5.0) for seed in (1, 2))
    assert train(one, range(1))[0].metrics["loss"] != train(other, range(1))[0].metrics["loss"]


@pytest.mark.parametrize("variant", VARIANTS)
def test_training_lowers_the_loss(folder: Path, variant: str) -> None:
    target = trainable(folder, **VARIANTS[variant], optim=replace(OPTIM, learning_rate=1e-2))
    data = part(batch())
    losses = [target.update(data, Nll(), 1.0, "policy.update").metrics["loss"] for _ in range(8)]
    assert losses[-1] < losses[0] - 0.5


def test_a_result_does_not_depend_on_how_the_batch_was_cut(folder: Path) -> None:
    reports, results = [], []
    for token_budget in (24, 64, 1000):
        target = trainable(folder)
        reports.append(target.update(part(batch(), token_budget), Nll(), 1.0, "policy.update"))
        results.append(weights(target))
    for report, result in zip(reports[1:], results[1:], strict=True):
        assert report.metrics == pytest.approx(reports[0].metrics, rel=1e-5)
        assert report.grad_norm == pytest.approx(reports[0].grad_norm, rel=1e-5)
        for name, tensor in result.items():
            torch.testing.assert_close(tensor, results[0][name], rtol=1e-3, atol=1e-5)


def test_an_empty_micro_batch_changes_nothing(folder: Path) -> None:
    plain, padded = trainable(folder), trainable(folder)
    data = part(batch())
    with_empty = Shard(data.batch, ((), *data.micro_batches, ()))
    expected = plain.update(data, Nll(coupled=True), 1.0, "policy.update")
    found = padded.update(with_empty, Nll(coupled=True), 1.0, "policy.update")
    assert_equal_bits(weights(plain), weights(padded))
    assert found.metrics.pop("padding_share") == pytest.approx(2 / (data.batch.num_tokens + 2))
    assert expected.metrics.pop("padding_share") == 0.0
    assert found.metrics == expected.metrics
    np.testing.assert_array_equal(logps(plain, data), logps(padded, with_empty))


def test_the_balancing_loss_of_experts_weighs_each_micro_batch_by_its_tokens(tmp_path: Path) -> None:
    config = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 16, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "num_local_experts": 4}
    torch.manual_seed(0)
    MixtralForCausalLM(MixtralConfig(**config, **heads)).save_pretrained(tmp_path)
    data = batch(rows=1).select([0, 0, 0])  # equal rows are routed alike, so that the cut cannot change the formula
    reports = []
    for micro_batches in (((0, 1, 2),), ((0,), (1, 2))):
        target = trainable(tmp_path, router_aux_loss_coef=10.0)
        reports.append(target.update(Shard(data, micro_batches), Nll(), 1.0, "policy.update"))
    plain = trainable(tmp_path, router_aux_loss_coef=0.0)
    without = plain.update(Shard(data, ((0, 1, 2),)), Nll(), 1.0, "policy.update")
    assert reports[0].metrics["aux_loss"] == pytest.approx(reports[1].metrics["aux_loss"], rel=1e-4)
    assert reports[0].grad_norm == pytest.approx(reports[1].grad_norm, rel=1e-4)
    assert reports[0].grad_norm != pytest.approx(without.grad_norm, rel=1e-2)
    assert "aux_loss" not in without.metrics


def passes(target: ModelWorker, of: Shard, objective: Nll) -> tuple[list[tuple[int, bool]], UpdateReport]:
    """(tokens, with gradient) of each forward pass of an update, and its report."""
    seen: list[tuple[int, bool]] = []
    hook = target.backend.model.register_forward_hook(
        lambda _, args, __: seen.append((len(args[0]), torch.is_grad_enabled()))
    )
    report = target.update(of, objective, 1.0, "policy.update")
    hook.remove()
    return seen, report


def test_statistics_rows_pass_once_without_gradient_and_only_enter_the_statistics(folder: Path) -> None:
    data = batch()
    marked = np.arange(len(data)) % 3 == 0
    data = data.with_columns(mismatched=marked)
    kept, left = (data.select(np.flatnonzero(rows)) for rows in (~marked, marked))
    target, plain = trainable(folder), trainable(folder)
    ((_, dealt),) = shard(data, 1, 1000, statistics_rows="mismatched")
    seen, report = passes(target, dealt, Nll(coupled=True, statistics_rows="mismatched"))
    assert seen == [(left.num_tokens, False), (kept.num_tokens, True)]
    expected = plain.update(part(kept, 1000), Nll(), 1.0, "policy.update")
    assert report.metrics["nll"] == pytest.approx(-float(plain_logps(folder, left).sum()), rel=1e-5)
    assert report.metrics["loss"] == expected.metrics["loss"]
    assert report.metrics["num_tokens"] == data.num_tokens
    assert_equal_bits(weights(target), weights(plain))


def plain_logps(folder: Path, data: Batch) -> np.ndarray:
    return logps(trainable(folder, optim=None), part(data, 1000))


def test_one_micro_batch_passes_once_even_if_its_rows_are_coupled_and_several_twice(folder: Path) -> None:
    data = batch()
    once, one = passes(trainable(folder), part(data, 1000), Nll(coupled=True))
    assert once == [(data.num_tokens, True)]
    ((_, cut),) = shard(data, 1, 64)
    twice, several = passes(trainable(folder), cut, Nll(coupled=True))
    sizes = [int(cut.batch.lengths[list(rows)].sum()) for rows in cut.micro_batches]
    assert len(sizes) > 1
    assert sorted(twice) == sorted([(size, grad) for size in sizes for grad in (False, True)])
    assert several.metrics["nll"] == pytest.approx(one.metrics["nll"], rel=1e-5)
    assert several.grad_norm == pytest.approx(one.grad_norm, rel=1e-5)


@pytest.mark.parametrize("token_budget", [64, 1000])
def test_statistics_use_the_same_noisy_outputs_as_the_loss(folder: Path, token_budget: int) -> None:
    data = batch()
    quiet, noisy = trainable(folder), trainable(folder, neftune_noise_alpha=5.0)
    of_quiet, of_noisy = (
        target.update(part(data, token_budget), Nll(coupled=True), 1.0, "policy.update").metrics
        for target in (quiet, noisy)
    )
    assert of_noisy["nll"] == pytest.approx(of_noisy["loss"] * data["mask"].sum(), rel=1e-6)
    assert of_noisy["nll"] != pytest.approx(of_quiet["nll"], rel=1e-4)


def test_a_batch_of_statistics_rows_only_is_refused(folder: Path) -> None:
    data = batch().with_columns(mismatched=np.ones(12, bool))
    ((_, dealt),) = shard(data, 1, 1000, statistics_rows="mismatched")
    with pytest.raises(RunError, match="empty batch"):
        trainable(folder).update(dealt, Nll(coupled=True, statistics_rows="mismatched"), 1.0, "policy.update")


def test_metrics_are_combined_over_micro_batches_in_their_own_way(folder: Path) -> None:
    data = batch()
    report = trainable(folder).update(part(data), Nll(), 1.0, "policy.update")
    whole = trainable(folder).update(part(data, 10_000), Nll(), 1.0, "policy.update")
    assert report.metrics["longest"] == data.lengths.max()
    assert report.metrics["num_tokens"] == report.tokens == data.num_tokens
    assert report.metrics["entropy"] == pytest.approx(whole.metrics["entropy"], rel=1e-5)
    assert "unmeasured" not in report.metrics
    assert report.seconds.keys() == {"forward", "backward", "step"}
    coupled = trainable(folder).update(part(data), Nll(coupled=True), 1.0, "policy.update")
    assert coupled.seconds.keys() == {"forward", "backward", "step", "statistics"}
    assert all(seconds > 0 for seconds in report.seconds.values())


def test_logps_come_back_in_the_rows_own_order_with_zeros_off_the_mask(folder: Path) -> None:
    data = batch()
    target = trainable(folder, optim=None)
    found = logps(target, Shard(data, ((5, 3), (0, 1, 2, 4), tuple(range(6, 12)))))
    whole = logps(target, Shard(data, (tuple(range(12)),)))
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, whole, rtol=1e-4, atol=1e-6)
    np.testing.assert_array_equal(found != 0, data["mask"])


def test_logps_draw_no_noise_and_leave_the_random_state_alone(folder: Path) -> None:
    target = trainable(folder, neftune_noise_alpha=5.0)
    state = torch.get_rng_state()
    data = part(batch())
    np.testing.assert_array_equal(logps(target, data), logps(target, data))
    assert torch.equal(torch.get_rng_state(), state)


def test_a_thread_computes_gradients_again_after_log_probabilities_whose_frame_is_held(
    folder: Path,
) -> None:
    """As a debugger or the traceback of an error does."""
    held: list[Any] = []
    target = trainable(folder)
    sys.setprofile(lambda frame, event, arg: held.append(frame) if frame.f_code is infer.__code__ else None)
    try:
        logps(target, part(batch()))
    finally:
        sys.setprofile(None)
    assert held and torch.is_grad_enabled()
    assert target.backend.model.training


@pytest.mark.parametrize("coupled", [False, True])
def test_an_evaluation_reports_what_an_update_would_without_noise_or_learning(folder: Path, coupled: bool) -> None:
    noisy = {"lora": LoraSpec(r=4, dropout=0.5), "neftune_noise_alpha": 50.0}
    target, plain = trainable(folder, **noisy), trainable(folder, lora=LoraSpec(r=4))
    data, objective = part(batch()), Nll(coupled=coupled)
    found = [target.evaluate(data, objective, 1.0, "policy.update") for _ in range(2)]
    report = plain.update(data, objective, 1.0, "policy.update")
    assert found[0] == found[1]
    assert found[0] == pytest.approx({name: report.metrics[name] for name in found[0]}, rel=1e-5)
    assert set(report.metrics) - set(found[0]) == {"num_tokens", "padding_share"}


def test_an_evaluation_between_updates_changes_nothing(folder: Path) -> None:
    plain, evaluated = (trainable(folder, **VARIANTS["lora"]) for _ in range(2))
    objective = Nll(coupled=True)  # its state counts steps
    expected = train(plain, range(3), objective)
    found = train(evaluated, range(1), objective)
    evaluated.evaluate(part(batch(7)), objective, 1.0, "policy.update")
    found += train(evaluated, range(1, 3), objective)
    assert [report.metrics for report in found] == [report.metrics for report in expected]
    assert_equal_bits(weights(evaluated), weights(plain))


def test_a_frozen_role_evaluates_too_and_an_empty_batch_is_refused(folder: Path) -> None:
    frozen = trainable(folder, optim=None)
    assert frozen.evaluate(part(batch()), Nll(), 1.0, "u")["loss"] > 0
    with pytest.raises(RunError, match="empty batch"):
        frozen.evaluate(Shard(batch().select([]), ((),)), Nll(), 1.0, "u")


def test_adapters_off_is_the_base_model_exactly(folder: Path) -> None:
    adapted, base = trainable(folder, lora=LoraSpec(r=4)), trainable(folder, optim=None)
    data = part(batch())
    train(adapted, range(2))
    np.testing.assert_array_equal(logps(adapted, data, adapters=False), logps(base, data))
    assert not np.array_equal(logps(adapted, data), logps(base, data))
    with pytest.raises(RuntimeError, match="no LoRA adapters"):
        logps(base, data, adapters=False)


def test_adapters_still_train_after_they_were_off(folder: Path) -> None:
    target = trainable(folder, lora=LoraSpec(r=4))
    train(target, range(1))
    logps(target, part(batch()), adapters=False)
    before = weights(target)
    train(target, range(1, 2))
    assert any(not torch.equal(before[name], tensor) for name, tensor in weights(target).items())


def test_a_new_phase_starts_schedule_moments_and_states_afresh_on_the_same_weights(
    folder: Path, tmp_path: Path
) -> None:
    target = trainable(folder)
    train(target, range(3), Nll(coupled=True))
    target.save_model(str(tmp_path / "phase"))
    target.reset(replace(OPTIM, learning_rate=1e-3))
    fresh = trainable(tmp_path / "phase", optim=replace(OPTIM, learning_rate=1e-3))
    found, expected = (train(each, range(3, 5), Nll(coupled=True)) for each in (target, fresh))
    assert [r.metrics for r in found] == [r.metrics for r in expected]
    assert found[0].learning_rate == 1e-3
    assert found[0].metrics["steps"] == 1
    assert_equal_bits(weights(target), weights(fresh))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    "model", [{}, {"dtype": "bfloat16"}, {"lora": LoraSpec(r=4)}], ids=["full", "bfloat16", "lora"]
)
def test_a_saved_model_opens_in_transformers_with_equal_weights(
    tmp_path: Path, tied: bool, model: dict[str, Any]
) -> None:
    target = trainable(tiny_model_folder(tmp_path, tied=tied), **model)
    train(target, range(2))
    target.save_model(str(tmp_path / "saved"))
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    held = dict(opened.named_parameters())
    assert_equal_bits(weights(target), {name: held[name].detach() for name in held})
    assert opened.generation_config.eos_token_id == 1
    assert AutoTokenizer.from_pretrained(tmp_path / "saved").encode("1 + 2=3") == [3, 12, 13, 12, 4, 17, 5]


def test_a_saved_model_has_the_configuration_of_its_base_and_the_chat_template_of_the_training(
    folder: Path, tmp_path: Path
) -> None:
    template = "{% for message in messages %}{{ message.content }}{% endfor %}"
    target = trainable(folder, chat_template=template, gradient_checkpointing=True)
    train(target, range(1))
    target.save_model(str(tmp_path / "saved"))
    base, saved = (json.loads((at / "config.json").read_text()) for at in (folder, tmp_path / "saved"))
    assert saved == base and saved["use_cache"] is True
    assert AutoTokenizer.from_pretrained(tmp_path / "saved").chat_template == template
    assert AutoTokenizer.from_pretrained(folder).chat_template is None


def test_export_yields_every_weight_under_its_hugging_face_name(folder: Path) -> None:
    target = trainable(folder, lora=LoraSpec(r=4))
    expected = dict(AutoModelForCausalLM.from_pretrained(folder).named_parameters())
    small, large = (target.export(lambda tensors: [name for name, _ in tensors], size) for size in (1, 1 << 30))
    assert small == large
    assert set(small) == set(expected)
    assert_equal_bits(
        weights(target), {name: expected[name].detach() for name in small}
    )  # a fresh adapter adds nothing


def test_an_export_completes_even_if_its_consumer_fails(folder: Path) -> None:
    target = trainable(folder)
    drawn = []

    def fail(tensors: Iterator[tuple[str, Tensor]]) -> None:
        drawn.append(tensors)
        next(tensors)
        raise ConnectionError("the receiver went away")

    with pytest.raises(ConnectionError):
        target.export(fail, 1)
    assert next(drawn[0], None) is None
    assert target.ping()["verb"] is None


def test_a_frozen_role_computes_but_does_not_train(folder: Path) -> None:
    frozen = trainable(folder, optim=None)
    assert not any(parameter.requires_grad for parameter in frozen.backend.model.parameters())
    with pytest.raises(RunError, match="frozen"):
        frozen.update(part(batch()), Nll(), 1.0, "policy.update")


def test_a_frozen_role_takes_the_weights_of_a_folder_and_a_trained_one_refuses(folder: Path, tmp_path: Path) -> None:
    policy, reference = trainable(folder), trainable(folder, optim=None)
    train(policy, range(1))
    policy.save_model(str(tmp_path / "kept"))
    reference.load_model(str(tmp_path / "kept"))
    assert_equal_bits(weights(reference), weights(policy))
    with pytest.raises(RunError, match="is trained"):
        policy.load_model(str(folder))


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


def test_a_gradient_that_is_not_finite_ends_the_run(folder: Path) -> None:
    class Broken(Nll):
        def loss(self, *args: Any) -> tuple[Tensor, dict[str, Stat]]:
            loss, stats = super().loss(*args)
            return loss * math.nan, stats

    with pytest.raises(RunError, match="gradient norm of step 1 is nan"):
        trainable(folder).update(part(batch()), Broken(), 1.0, "policy.update")


def test_an_empty_batch_is_refused(folder: Path) -> None:
    with pytest.raises(RunError, match="empty batch"):
        trainable(folder).update(Shard(Batch.empty(), ()), Nll(), 1.0, "policy.update")


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


def test_sleep_and_wake_do_not_change_training(folder: Path) -> None:
    rested, restless = trainable(folder, dtype="bfloat16"), trainable(folder, dtype="bfloat16")
    train(rested, range(1))
    rested.sleep()
    rested.wake()
    train(rested, range(1, 3))
    train(restless, range(3))
    assert_equal_bits(weights(rested), weights(restless))


def test_half_precision_weights_follow_float32_masters(folder: Path, tmp_path: Path) -> None:
    """Steps far below bfloat16's resolution must add up: 10 steps of 1e-5 move weights of about 0.1."""
    small = replace(OPTIM, learning_rate=1e-5, scheduler="constant", weight_decay=0.0)
    half, full = (trainable(folder, optim=small, dtype=dtype) for dtype in ("bfloat16", "float32"))
    start = weights(full)
    for target in (half, full):
        for _ in range(10):
            target.update(part(batch()), Nll(), 1.0, "policy.update")
    moved = {name: (tensor - start[name]) for name, tensor in weights(full).items()}
    half.save_state(str(tmp_path))
    masters = torch.load(tmp_path / "single.pt")["weights"]
    for name, movement in moved.items():
        if movement.ndim == 2:
            found = masters[name] - start[name].bfloat16().float()
            assert torch.cosine_similarity(found.flatten(), movement.flatten(), dim=0) > 0.9


def counting(of: Batch, world: World, state: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Stat]]:
    """A credit call that says at every token how often it was called."""
    state["calls"] = state.get("calls", 0) + 1
    return {"advantages": np.full(of.num_tokens, state["calls"], np.float32)}, {"calls": Stat(state["calls"])}


def test_what_a_credit_call_keeps_is_there_after_a_resume_and_stays_as_it_is_in_an_evaluation(
    folder: Path, tmp_path: Path
) -> None:
    def calls(target: ModelWorker, *, learning: bool = True) -> float:
        metrics, block = target.credit(part(batch()), counting, {}, "driver.credit counting", learning)
        assert set(block["advantages"]) == {metrics["calls"]}
        return metrics["calls"]

    target = trainable(folder)
    assert [calls(target), calls(target), calls(target, learning=False), calls(target)] == [1, 2, 3, 3]
    target.save_state(str(tmp_path))
    resumed = trainable(folder, seed=5)
    resumed.load_state(str(tmp_path))
    assert calls(resumed) == 4
    resumed.reset(OPTIM)
    assert calls(resumed) == 1

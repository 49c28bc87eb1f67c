"""Our losses against the numbers of `losses.json`: what another implementation computed on fixed inputs (its `source`).

The inputs are padded; here every padded row becomes a ragged row of the same width whose mask leaves the padding out,
after one token that nothing predicts. Cases in which we differ on purpose are in `DEPARTURES`, with the reason.
"""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from actors.backends.single import SoloWorld
from actors.batch import Batch
from actors.lora import resident
from actors.objective import MicroBatch
from actors.weight_averaging import Average, AverageSpec
from actors.weight_swap import mix_in
from orchestrator.advantages import mask_truncated, zscore_by_group
from orchestrator.data.density_ratio import density_ratio_weights
from orchestrator.data.mismatched_rows import with_mismatches
from orchestrator.losses.objective import LossObjective
from orchestrator.losses.pairwise import odds_ratio
from orchestrator.losses.policy_gradient import engine_correction, policy_gradient
from orchestrator.losses.reduce import item_mean, token_mean
from orchestrator.losses.surrogates import clipped
from orchestrator.losses.views import PolicyTokens
from orchestrator.methods import build
from orchestrator.row_table import RowTable
from tests.unit.trainer_stub import Result, Rows, optimise

FILE = json.loads((Path(__file__).parent / "losses.json").read_text())
CASES: dict[str, dict[str, Any]] = {case["id"]: case for case in FILE["cases"]}

DEPARTURES = {"dpo/sigmoid_ls0.1_IGNORED": "the peer ignores label smoothing here; ours applies it"}


def cases(prefix: str, *, without: tuple[str, ...] = ()) -> Any:
    names = [name for name in CASES if name.startswith(prefix) and name not in DEPARTURES and name not in without]
    return pytest.mark.parametrize("case", [CASES[name] for name in names], ids=names)


def padded(values: list[list[float]]) -> Tensor:
    """[R, C] -> flat [R * (C + 1)], a zero before each row."""
    matrix = torch.tensor(values, dtype=torch.float64)
    return torch.cat([torch.zeros(len(matrix), 1, dtype=torch.float64), matrix], dim=1).flatten()


def unpadded(flat: Tensor, rows: int) -> Tensor:
    return flat.view(rows, -1)[:, 1:]


def rows_of(
    logps: list[list[float]], mask: list[list[int]], extra: dict[str, Any] | None = None, **columns: Tensor
) -> Rows:
    """Ragged rows of one width; extras are padded like the log-probabilities."""
    lengths = torch.full((len(logps),), len(logps[0]) + 1)
    columns = {"mask": padded(mask).bool(), **columns}
    found = {name: padded(values) for name, values in (extra or {}).items()}
    return Rows(MicroBatch(lengths, columns), padded(logps), found)


def objective_of(method: str, options: dict[str, Any]) -> LossObjective:
    stage = build(method, options).updates[0]
    assert stage.call is not None
    return LossObjective(stage.call, stage.options["reduce"], stage.options["loss_options"])


def assert_equal(result: Result, case: dict[str, Any], gradient: str, mask: list[list[int]]) -> None:
    """Value and gradient, the latter where the mask is 1: elsewhere the peer's inputs are not differentiable at all."""
    assert result.value == pytest.approx(case["outputs"]["loss"], abs=1e-6)
    expected = torch.tensor(case["outputs"][gradient]) * torch.tensor(mask)
    torch.testing.assert_close(unpadded(result.gradient, len(mask)), expected.double(), atol=1e-6, rtol=1e-6)


# DPO


def preference_rows(case: dict[str, Any]) -> tuple[Rows, list[list[int]]]:
    inputs = case["inputs"]
    mask = [row[1:] for row in inputs["completion_mask"]]
    pairs = len(mask) // 2
    ref = torch.zeros(len(mask), len(mask[0]) + 1, dtype=torch.float64)
    for row, total in enumerate([*inputs["ref_chosen_logps"], *inputs["ref_rejected_logps"]]):
        ref[row, 1 + mask[row].index(1)] = total  # on the first completion token, which no length weighs down
    extra = {"log_sum_sq_probs": inputs["log_sum_sq_probs"]} if "log_sum_sq_probs" in inputs else {}
    rows = rows_of(
        inputs["per_token_logps"],
        mask,
        extra,
        ref_logps=ref.flatten(),
        group=torch.arange(pairs).repeat(2),
        preferred=torch.arange(2 * pairs) < pairs,
    )
    return rows, mask


def dpo_options(config: dict[str, Any]) -> dict[str, Any]:
    options = dict(config)
    if not {"exo_pair", "aot", "aot_unpaired"} & set(config["loss_type"]):
        options["label_smoothing"] = 0.0
    return options


@cases("dpo/")
def test_dpo_equals_the_peer(case: dict[str, Any]) -> None:
    rows, mask = preference_rows(case)
    result = optimise(objective_of("dpo", dpo_options(case["config"])), rows)
    assert_equal(result, case, "grad_per_token_logps", mask)


def test_label_smoothing_of_dpo_acts_where_the_peer_ignores_it() -> None:
    case = CASES["dpo/sigmoid_ls0.1_IGNORED"]
    rows, _ = preference_rows(case)
    assert case["outputs"]["loss"] == CASES["dpo/sigmoid"]["outputs"]["loss"]
    smoothed = optimise(objective_of("dpo", case["config"]), rows).value
    plain = case["outputs"]["loss"]
    assert smoothed != pytest.approx(plain, abs=1e-4)
    flipped = optimise(objective_of("dpo", case["config"] | {"label_smoothing": 0.0}), _swapped(rows)).value
    assert smoothed == pytest.approx(0.9 * plain + 0.1 * flipped, abs=1e-9)


def _swapped(rows: Rows) -> Rows:
    columns = {**rows.micro.columns, "preferred": ~rows.micro["preferred"]}
    return Rows(MicroBatch(rows.micro.lengths, columns), rows.logps, rows.extra)


# SFT


@cases("sft/")
def test_sft_equals_the_peer(case: dict[str, Any]) -> None:
    inputs = case["inputs"]
    rows = rows_of(inputs["per_token_logps"], inputs["label_mask"])
    result = optimise(objective_of("sft", case["config"]), rows)
    tokens = float(rows.micro["mask"].sum())
    share = tokens / (inputs["num_items_in_batch"] or tokens)  # the peer's count spans micro-batches that are not here
    assert result.value * share == pytest.approx(case["outputs"]["loss"], abs=1e-6)
    expected = torch.tensor(case["outputs"]["grad_per_token_logps"]) * torch.tensor(inputs["label_mask"])
    gradient = unpadded(result.gradient, len(inputs["label_mask"])) * share
    torch.testing.assert_close(gradient, expected.double(), atol=1e-6, rtol=1e-6)


# KTO and BCO


@cases("kto/", without=("kto/kl_pairs",))
def test_kto_equals_the_peer(case: dict[str, Any]) -> None:
    inputs = case["inputs"]
    real, other = inputs["per_token_logps"], inputs["KL_per_token_logps"]
    width = max(len(real[0]), len(other[0]))
    logps = [row + [0.0] * (width - len(row)) for row in [*real, *other]]
    mask = [[int(value != 0) for value in row] for row in logps]
    ref = torch.zeros(len(logps), width + 1, dtype=torch.float64)
    ref[:, 2] = torch.tensor([*inputs["ref_logps"], *inputs["ref_KL_logps"]])  # the first token of every completion
    is_real = torch.arange(len(logps)) < len(real)
    rows = rows_of(
        logps,
        mask,
        ref_logps=ref.flatten(),
        label=torch.tensor(inputs["label"] * 2),
        mismatched=~is_real,
        group=torch.arange(len(real)).repeat(2),
    )
    if case["config"]["loss_type"] != "kto":  # the other loss takes no mismatched rows
        rows = rows.select(range(len(real)))
    result = optimise(objective_of("kto", case["config"]), rows)
    assert result.value == pytest.approx(case["outputs"]["loss"], abs=1e-6)
    gradient = unpadded(result.gradient, len(rows))
    expected = (
        torch.tensor(case["outputs"]["grad_per_token_logps"]) * torch.tensor(mask[: len(real)])[:, : len(real[0])]
    )
    torch.testing.assert_close(gradient[: len(real), : len(real[0])], expected.double(), atol=1e-6, rtol=1e-6)
    assert not gradient[len(real) :].any()
    assert result.metrics.get("kl", 0.0) == pytest.approx(case["outputs"]["kl"], abs=1e-6)


def test_mismatched_rows_pair_prompts_with_the_completions_that_the_peer_pairs_them_with() -> None:
    case = CASES["kto/kl_pairs"]
    completions = case["outputs"]["completion_ids"]
    rows = [[20 + row, *completion] for row, completion in enumerate(completions)]
    batch = Batch.build(
        [len(row) for row in rows],
        tokens=np.concatenate(rows),
        mask=np.concatenate([np.arange(len(row)) > 0 for row in rows]),
        label=[True, False, True, False],
    )
    doubled = with_mismatches(batch)
    found = [doubled.row("tokens", row).tolist() for row in np.flatnonzero(doubled["mismatched"])]
    assert found == [[20 + row, *other] for row, other in enumerate(case["outputs"]["KL_completion_ids"])]


def test_the_deviation_equals_the_peer_where_rewards_are_missing() -> None:
    case = CASES["data/nanstd"]
    rewards = np.array(case["inputs"]["x"], dtype=np.float64)
    group = np.repeat(np.arange(2), rewards.shape[1])
    centred = zscore_by_group(rewards.flatten(), group, scale="none").reshape(rewards.shape)
    scaled = zscore_by_group(rewards.flatten(), group).reshape(rewards.shape)
    assert centred[0, 0] / scaled[0, 0] - 1e-4 == pytest.approx(case["outputs"]["std"][0], abs=1e-5)
    assert case["outputs"]["std"][1] == "nan"
    assert not scaled[1].any()


def test_bco_equals_the_peer_over_two_steps_with_one_running_mean() -> None:
    objective, states = objective_of("bco", CASES["bco/step0"]["config"]), [{}]
    for name in ("bco/step0", "bco/step1"):
        inputs, outputs = CASES[name]["inputs"], CASES[name]["outputs"]
        logps = [*inputs["policy_chosen_logps"], *inputs["policy_rejected_logps"]]
        ref = [*inputs["ref_chosen"], *inputs["ref_rejected"]]
        rows = rows_of(
            [[value] for value in logps],
            [[1]] * len(logps),
            ref_logps=padded([[value] for value in ref]),
            label=torch.arange(len(logps)) < len(inputs["policy_chosen_logps"]),
        )
        result = optimise(objective, rows, states=states)
        assert result.metrics["delta"] == pytest.approx(outputs["delta"], abs=1e-6)
        assert result.value == pytest.approx(np.mean(outputs["losses"]), abs=1e-6)
        expected = torch.tensor(
            [[g] for g in [*outputs["grad_chosen"], *outputs["grad_rejected"]]], dtype=torch.float64
        )
        torch.testing.assert_close(unpadded(result.gradient, len(logps)), expected, atol=1e-6, rtol=1e-6)


def test_density_ratio_weights_equal_the_peer() -> None:
    case = CASES["bco/udm_weight"]
    weights = density_ratio_weights(np.array(case["inputs"]["prob_desirable"]))
    np.testing.assert_allclose(weights, case["outputs"]["weight"], atol=1e-6)


# Pairs without a reference


@pytest.mark.parametrize(
    "case", [c for n, c in CASES.items() if n.startswith("cpo/") and "full" not in n], ids=lambda c: c["id"]
)
def test_a_contrast_without_reference_equals_the_peer(case: dict[str, Any]) -> None:
    config, inputs = case["config"], case["inputs"]
    method = "simpo" if config["loss_type"] == "simpo" else "cpo"
    options = {"beta": config["beta"], "label_smoothing": config["label_smoothing"], "cpo_alpha": 0.0}
    options |= {"simpo_gamma": config["simpo_gamma"]} if method == "simpo" else {"loss_type": config["loss_type"]}
    result = optimise(objective_of(method, options), single_token_pairs(inputs))
    assert result.value == pytest.approx(np.mean(case["outputs"]["losses"]), abs=1e-6)
    gradients = torch.tensor([*case["outputs"]["grad_chosen"], *case["outputs"]["grad_rejected"]], dtype=torch.float64)
    torch.testing.assert_close(unpadded(result.gradient, len(gradients)).flatten(), gradients, atol=1e-6, rtol=1e-6)


def single_token_pairs(inputs: dict[str, Any]) -> Rows:
    """The peer's function takes sequence scores: a completion of one token has its sum and its mean as the same
    number."""
    logps = [[value] for value in [*inputs["policy_chosen_logps"], *inputs["policy_rejected_logps"]]]
    pairs = len(logps) // 2
    return rows_of(
        logps, [[1]] * len(logps), group=torch.arange(pairs).repeat(2), preferred=torch.arange(2 * pairs) < pairs
    )


def test_the_odds_ratio_equals_the_peer() -> None:
    case = CASES["orpo/odds_b0.1"]
    rows = single_token_pairs(case["inputs"])
    result = optimise(LossObjective(odds_ratio, item_mean, {"beta": case["config"]["beta"]}), rows)
    assert result.value == pytest.approx(-np.mean(case["outputs"]["losses"]), abs=1e-6)
    expected = [*case["outputs"]["grad_chosen_of_neg_mean"], *case["outputs"]["grad_rejected_of_neg_mean"]]
    gradient = unpadded(result.gradient, len(expected)).flatten()
    torch.testing.assert_close(gradient, torch.tensor(expected, dtype=torch.float64), atol=1e-6, rtol=1e-6)


def from_logits(logits: Tensor, tokens: Tensor) -> Tensor:
    """[R, L, V], [R, L] -> [R, L - 1]: log-probabilities of the tokens after the first."""
    log_probs = logits[:, :-1].log_softmax(-1)
    return log_probs.gather(-1, tokens[:, 1:, None]).squeeze(-1)


def through_logits(
    objective: LossObjective, logits: Tensor, tokens: Tensor, attended: Tensor, **columns: Tensor
) -> tuple[float, float, dict[str, float]]:
    """(value, norm of the gradient with respect to the logits, metrics): all that the peer's functions report.
    `attended` [R, L] says where rows end; `mask` is given as [R, L], too."""
    logits = logits.clone().requires_grad_()
    logps = torch.cat([torch.zeros(len(tokens), 1, dtype=torch.float64), from_logits(logits, tokens)], dim=1)[attended]
    columns["mask"] = columns["mask"][attended]
    result = optimise(objective, Rows(MicroBatch(attended.sum(1), columns), logps))
    logps.backward(result.gradient)
    assert logits.grad is not None
    return result.value, float(logits.grad.norm()), result.metrics


@pytest.mark.parametrize("name", [name for name in CASES if name.startswith(("cpo/full", "orpo/full"))])
def test_a_whole_reference_free_loss_equals_the_peer(name: str) -> None:
    config, inputs, outputs = (CASES[name][part] for part in ("config", "inputs", "outputs"))
    method = "orpo" if name.startswith("orpo") else {"sigmoid": "cpo", "simpo": "simpo"}[config["loss_type"]]
    options = {key: value for key, value in config.items() if key != "loss_type" and (value or key == "beta")}
    tokens = torch.tensor([*inputs["chosen_input_ids"], *inputs["rejected_input_ids"]])
    labels = torch.tensor([*inputs["chosen_labels"], *inputs["rejected_labels"]])
    attended = torch.tensor([*inputs["chosen_attention_mask"], *inputs["rejected_attention_mask"]]).bool()
    pairs = len(tokens) // 2
    value, norm, metrics = through_logits(
        objective_of(method, options),
        torch.tensor(inputs["logits"], dtype=torch.float64),
        tokens,
        attended,
        mask=labels != -100,
        group=torch.arange(pairs).repeat(2),
        preferred=torch.arange(2 * pairs) < pairs,
    )
    assert (value, norm) == (pytest.approx(outputs["loss"], abs=1e-6), pytest.approx(outputs["grad_norm"], abs=1e-6))
    of_tokens = ("logps/", "logits/")  # the peer calls a reference-free score `logps`; ours are sums for every method
    expected = {name: value for name, value in outputs["metrics"].items() if not name.startswith(of_tokens)}
    assert {name: metrics[name] for name in expected} == pytest.approx(expected, abs=1e-5)


@cases("tpo/")
def test_tpo_equals_the_peer(case: dict[str, Any]) -> None:
    inputs, config = case["inputs"], case["config"]
    tokens = torch.tensor(inputs["input_ids"])
    mask = torch.tensor(inputs["completion_mask"]).bool()
    triples = len(tokens) // 3
    side = torch.arange(len(tokens)) // triples
    value, norm, _ = through_logits(
        objective_of("tpo", {**config, "loss_type": case["id"].removeprefix("tpo/")}),
        torch.tensor(inputs["logits"], dtype=torch.float64),
        tokens,
        torch.ones_like(mask),
        mask=mask,
        group=torch.arange(triples).repeat(3),
        preferred=side == 0,
        gold=side == 2,
    )
    assert (value, norm) == (
        pytest.approx(case["outputs"]["loss"], abs=1e-6),
        pytest.approx(case["outputs"]["grad_norm"], abs=1e-6),
    )


# Policy gradient


def grpo_options(config: dict[str, Any]) -> dict[str, Any]:
    """The quantile of these entropies is one of them, and whether a token equals it is a matter of rounding: the peer's
    float32 says that it does not reach it."""
    return {
        "loss_type": config["loss_type"],
        "importance_sampling_level": config["level"],
        "epsilon": config["eps"],
        "epsilon_high": config["epsh"],
        "delta": config["delta"],
        "beta": config["beta"],
        "use_bias_correction_kl": config["bias"],
        "top_entropy_quantile": config["tq"] - 1e-6 if config["tq"] < 1 else 1.0,
        "off_policy_mask_threshold": config["opm"],
        "entropy_coef": config["ecoef"],
        "updates_per_batch": 2,  # the old log-probabilities are given
    }


def sampled_rows(inputs: dict[str, Any]) -> tuple[Rows, list[list[int]]]:
    mask = torch.tensor(inputs["completion_mask"])
    mask = mask * torch.tensor(inputs["tool_mask"]) if inputs["tool_mask"] is not None else mask
    old = torch.tensor(inputs["old_per_token_logps"], dtype=torch.float64)
    columns = {
        "old_logps": padded(inputs["old_per_token_logps"]),
        "ref_logps": padded(inputs["ref_per_token_logps"]),
        "advantages": torch.tensor(inputs["advantages"], dtype=torch.float64).repeat_interleave(mask.shape[1] + 1),
    }
    if inputs["importance_sampling_ratio"] is not None:
        # The peer takes rows' sums, padding included (its trainer has zeros there): put them on the first token.
        sums = torch.tensor(inputs["importance_sampling_ratio"], dtype=torch.float64).log().sum(1)
        difference = torch.zeros_like(old)
        difference[:, 0] = sums
        columns["sample_logps"] = padded((old - difference).tolist())
    else:
        columns["sample_logps"] = columns["old_logps"]
    return rows_of(inputs["per_token_logps"], mask.tolist(), {"entropy": inputs["entropies"]}, **columns), mask.tolist()


@cases("grpo/", without=("grpo/mask_truncated",))
def test_grpo_equals_the_peer(case: dict[str, Any]) -> None:
    config, inputs = case["config"], case["inputs"]
    options = grpo_options(config)
    if inputs["importance_sampling_ratio"] is not None and config["loss_type"] != "vespo":
        options |= {"correction": "sequence_truncate", "correction_max": 1e6}  # the given ratios are clamped already
    rows, mask = sampled_rows(inputs)
    result = optimise(objective_of("grpo", options), rows)
    factor = _denominator(config, inputs)
    assert_equal(result, {"outputs": _times(case["outputs"], factor)}, "grad_per_token_logps", mask)
    if case["outputs"]["grad_entropies"] is not None:
        expected = torch.tensor(case["outputs"]["grad_entropies"], dtype=torch.float64) * config["ga"]
        torch.testing.assert_close(
            unpadded(result.extra_gradients["entropy"], len(mask)), expected, atol=1e-6, rtol=1e-6
        )


def _denominator(config: dict[str, Any], inputs: dict[str, Any]) -> float:
    """By how much the peer's denominator exceeds ours: it counts micro-batches, or tokens, of a batch that is not
    here."""
    if config["loss_type"] not in ("dapo", "cispo", "vespo"):
        return config["ga"]
    expected = inputs["num_items_in_batch"] * config["ga"] / config.get("spg", config["ga"])
    return expected / np.sum(inputs["completion_mask"])


def _times(outputs: dict[str, Any], factor: float) -> dict[str, Any]:
    return {
        "loss": outputs["loss"] * factor,
        "grad_per_token_logps": (torch.tensor(outputs["grad_per_token_logps"]).double() * factor).tolist(),
    }


def test_gmpo_equals_the_peer() -> None:
    for name in ("gmpo/eps0.2_beta0.0", "gmpo/eps0.4_beta0.04"):
        case = CASES[name]
        result = optimise(
            objective_of("grpo", _plain(case, loss_type="gmpo", use_bias_correction_kl=False)), _simple(case)
        )
        assert_equal(result, case, "grad", case["inputs"]["mask"])


@cases("gspo_token/")
def test_token_level_gspo_equals_the_peer(case: dict[str, Any]) -> None:
    loss_type = case["id"].removeprefix("gspo_token/")
    objective = objective_of("grpo", _plain(case, loss_type=loss_type, importance_sampling_level="sequence_token"))
    assert_equal(optimise(objective, _simple(case)), case, "grad", case["inputs"]["mask"])


def _plain(case: dict[str, Any], **options: Any) -> dict[str, Any]:
    return {**case["config"], "updates_per_batch": 2, **options}


def _simple(case: dict[str, Any]) -> Rows:
    inputs = case["inputs"]
    advantages = torch.tensor(inputs["advantages"], dtype=torch.float64)
    width = len(inputs["mask"][0])
    per_token = advantages if advantages.dim() == 2 else advantages[:, None].expand(-1, width)
    columns = {"old_logps": padded(inputs["old"]), "advantages": padded(per_token.tolist())}
    columns |= {"ref_logps": padded(inputs["ref"])} if "ref" in inputs else {}
    return rows_of(inputs["per_token_logps"], inputs["mask"], **columns)


@cases("dppo/")
def test_dppo_masks_the_tokens_that_the_peer_masks(case: dict[str, Any]) -> None:
    inputs = case["inputs"]
    mask = [[1] * len(row) for row in inputs["logps"]]
    width = len(mask[0])
    rows = rows_of(
        inputs["logps"],
        mask,
        sample_logps=padded(inputs["sampling_logps"]),
        advantages=padded([row * width for row in inputs["advantages"]]),
    )
    options = {
        "loss_type": "dppo",
        "dppo_distance": case["id"].removeprefix("dppo/mask_"),
        "dppo_threshold": case["config"]["delta"],
    }
    learned = unpadded(optimise(objective_of("grpo", options), rows).gradient, len(mask)) != 0
    assert learned.double().tolist() == case["outputs"]["mask"]


def test_the_ratio_against_the_sampler_equals_the_peer() -> None:
    """Its asynchronous trainer clips against the sampler's log-probabilities and divides by global tokens."""
    case = CASES["async_grpo/loss"]
    inputs, config = case["inputs"], case["config"]
    mask = [[1] * len(inputs["log_probs"])]
    rows = rows_of(
        [inputs["log_probs"]],
        mask,
        sample_logps=padded([inputs["old_log_probs"]]),
        advantages=padded([inputs["advantages"]]),
    )
    surrogate = partial(clipped, epsilon=config["epsilon"], epsilon_high=config["epsilon_high"])
    result = optimise(LossObjective(policy_gradient, token_mean, {"surrogate": surrogate, "old": "sampler"}), rows)
    outputs = _times({"loss": case["outputs"]["loss"], "grad_per_token_logps": [case["outputs"]["grad"]]}, config["ga"])
    assert_equal(result, {"outputs": outputs}, "grad_per_token_logps", mask)


@cases("grpo_vllm_is/")
def test_the_engine_correction_equals_the_peer(case: dict[str, Any]) -> None:
    old, sampler = case["inputs"]["old_per_token_logps"], case["inputs"]["sampling_per_token_logps"]
    lengths = torch.tensor([len(row) for row in old])
    logps, sample_logps = (
        torch.tensor([x for row in rows for x in row], dtype=torch.float64) for rows in (old, sampler)
    )
    everything = torch.ones(len(logps), dtype=torch.bool)
    view = PolicyTokens(
        micro=MicroBatch(lengths, {}),
        logps=logps,
        mask=everything,
        shared={},
        advantages=torch.ones_like(logps),
        sample_logps=sample_logps,
    )
    config = case["config"]
    weight, _ = engine_correction(view, logps, config["mode"], config["clip_min"], config["clip_max"])
    expected = [row if len(row) > 1 else row * int(n) for row, n in zip(case["outputs"]["ratio"], lengths, strict=True)]
    flat = torch.tensor([x for row, n in zip(expected, lengths, strict=True) for x in row[:n]], dtype=torch.float64)
    torch.testing.assert_close(weight, flat, atol=1e-6, rtol=1e-6)


def test_truncated_completions_are_masked_as_the_peer_masks_them() -> None:
    case = CASES["grpo/mask_truncated"]
    completions = case["inputs"]["completion_ids"]
    lengths = [len(completion) for completion in completions]
    batch = Batch.build(lengths, mask=np.ones(sum(lengths), bool), truncated=[c[-1] != 1 for c in completions])
    rows = RowTable(batch)
    mask = rows.with_values(**mask_truncated(rows)).whole().shard.fetched([]).batch["mask"]
    assert int(mask.sum()) == case["outputs"]["num_items_in_batch"]
    expected = np.array(case["outputs"]["completion_mask"])
    assert batch.sum_by_row(mask).tolist() == expected.sum(axis=1).tolist()


@cases("grpo_adv/")
def test_advantages_equal_the_peer(case: dict[str, Any]) -> None:
    inputs = case["inputs"]
    rewards = np.array([[np.nan if r is None else float(r) for r in row] for row in inputs["rewards_per_func"]])
    scored = ~np.isnan(rewards).all(axis=1)
    total = np.where(scored, np.nansum(rewards * np.array(inputs["weights"]), axis=1), np.nan)
    group = np.arange(len(total)) // inputs["num_generations"]
    found = zscore_by_group(total, group, scale=case["config"]["scale_rewards"])
    np.testing.assert_allclose(found, case["outputs"]["advantages"], atol=1e-4)


# Weights that move besides training


def test_an_average_of_weights_equals_the_peer() -> None:
    case = CASES["callback/bema"]
    spec = AverageSpec(update_freq=1, update_after=0, min_ema_multiplier=0.0, **case["config"])
    theta = torch.tensor(case["inputs"]["theta0"])
    average = Average(spec, SoloWorld())
    average.begin([("weight", theta)])
    for increment, expected in zip(case["inputs"]["increments"], case["outputs"]["running"], strict=True):
        theta = theta + increment
        average.after_step(partial(list, [("weight", theta)]))
        torch.testing.assert_close(average.whole("weight").view(1, -1), torch.tensor(expected), atol=1e-6, rtol=1e-6)


def test_a_reference_that_follows_equals_the_peer() -> None:
    case = CASES["callback/sync_ref"]
    reference = nn.Linear(2, 1, bias=False).requires_grad_(False)
    reference.weight.copy_(torch.tensor(case["inputs"]["ref"]))
    policy = iter([("weight", torch.tensor(case["inputs"]["policy"]))])
    mix_in(reference, policy, case["config"]["alpha"], 1, resident)
    torch.testing.assert_close(reference.weight.data, torch.tensor(case["outputs"]["ref"]), atol=1e-7, rtol=1e-6)

"""Policy gradient losses, and the log-probabilities and entropies that they take, against the numbers of another
implementation."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from actors.batch import Batch
from actors.heads import VocabularyHead
from actors.logits import LogitScaling
from actors.objective import MicroBatch
from orchestrator.batches.row_table import RowTable
from orchestrator.credit.advantages import mask_truncated
from orchestrator.losses.objective import LossObjective
from orchestrator.losses.policy_gradient import engine_correction, policy_gradient
from orchestrator.losses.reduce import token_mean
from orchestrator.losses.surrogates import clipped
from orchestrator.losses.views import PolicyTokens
from tests.golden.cases import CASES, assert_equal, cases, objective_for, padded, rows_of, unpadded
from tests.golden.peer import ours
from tests.unit.loss_rows import objective_of
from tests.unit.trainer_stub import Result, Rows, optimise


def sampled_rows(inputs: dict[str, Any]) -> tuple[Rows, list[list[int]]]:
    mask = torch.tensor(inputs["completion_mask"])
    mask = mask * torch.tensor(inputs["tool_mask"]) if inputs["tool_mask"] is not None else mask
    old = torch.tensor(inputs["old_per_token_logps"], dtype=torch.float64)
    columns = {
        "old_logps": padded(inputs["old_per_token_logps"]),
        "ref_logps": padded(inputs["ref_per_token_logps"]),
        "advantages": torch.tensor(inputs["advantages"], dtype=torch.float64).repeat_interleave(mask.shape[1] + 1),
        "sample_logps": padded((old - _log_of_ratio(inputs, mask)).tolist()),
    }
    return rows_of(inputs["per_token_logps"], mask.tolist(), {"entropy": inputs["entropies"]}, **columns), mask.tolist()


def _log_of_ratio(inputs: dict[str, Any], mask: Tensor) -> Tensor:
    """By how much each token's old log-probability exceeds the sampler's: as given, or a row's one number on its first
    token."""
    if inputs["importance_sampling_ratio"] is None:
        return torch.zeros(mask.shape, dtype=torch.float64)
    given = torch.tensor(inputs["importance_sampling_ratio"], dtype=torch.float64).log()
    if given.shape == mask.shape:
        return given
    spread = torch.zeros(mask.shape, dtype=torch.float64)
    spread[torch.arange(len(mask)), mask.argmax(1)] = given[:, 0]
    return spread


@cases("grpo/", without=("grpo/mask_truncated",))
def test_grpo_equals_the_peer(case: dict[str, Any]) -> None:
    assert_policy_gradient_equals(case, *policy_gradient_of(case))


def policy_gradient_of(case: dict[str, Any]) -> tuple[Result, Result]:
    """The whole loss, and without its entropy bonus."""
    (method, options), inputs = ours(case), case["inputs"]
    rows, mask = sampled_rows(inputs)
    if options["loss_type"] == "vespo" and inputs["importance_sampling_ratio"] is not None:
        rows = _summed_over_padding(rows, inputs, mask)
    without = {**options, "entropy_coef": 0.0}
    whole, plain = (optimise(objective_of(method, each), rows) for each in (options, without))
    return whole, plain


def assert_policy_gradient_equals(case: dict[str, Any], whole: Result, plain: Result) -> None:
    """The peer divides the bonus by its number of micro-batches, and the rest by something else for some losses."""
    config, outputs, (_, mask) = case["config"], case["outputs"], sampled_rows(case["inputs"])
    factor, bonus = _denominator(config, case["inputs"], mask), whole.value - plain.value
    assert plain.value / factor + bonus / config["ga"] == pytest.approx(outputs["loss"], abs=1e-6)
    found = unpadded(whole.gradient, len(mask)) / factor
    expected = torch.tensor(outputs["grad_per_token_logps"]).double() * torch.tensor(mask)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)
    if outputs["grad_entropies"] is not None:
        of_entropies = unpadded(whole.extra_gradients["entropy"], len(mask)) / config["ga"]
        expected = torch.tensor(outputs["grad_entropies"], dtype=torch.float64)
        torch.testing.assert_close(of_entropies, expected, atol=1e-6, rtol=1e-6)


def _summed_over_padding(rows: Rows, inputs: dict[str, Any], mask: list[list[int]]) -> Rows:
    """The peer sums a row's ratios over its padding, too (where its trainer has zeros): on the first token, here."""
    moved = dict(inputs, importance_sampling_ratio=None)
    total = torch.tensor(inputs["importance_sampling_ratio"], dtype=torch.float64).log().sum(1)
    moved["importance_sampling_ratio"] = total.exp()[:, None].tolist()
    return sampled_rows(moved)[0]


def _denominator(config: dict[str, Any], inputs: dict[str, Any], mask: list[list[int]]) -> float:
    """By how much the peer's denominator exceeds ours: it counts micro-batches, or tokens of a batch that is not here;
    and rows without a token, which are in no count of ours."""
    learned = [sum(row) for row in mask]
    match config["loss_type"]:
        case "dapo" | "cispo" | "vespo":
            return inputs["num_items_in_batch"] * config["ga"] / config.get("spg", config["ga"]) / sum(learned)
        case "bnpo":
            return config["ga"]
        case _:
            return config["ga"] * len(mask) / sum(map(bool, learned))


def variant(name: str, inputs: dict[str, Any] | None = None, **config: Any) -> dict[str, Any]:
    """A case with other settings: its numbers are not the peer's."""
    case = CASES[name]
    return {**case, "config": {**case["config"], **config}, "inputs": {**case["inputs"], **(inputs or {})}}


def test_the_constant_that_dr_grpo_divides_by_is_the_peers() -> None:
    rows, mask = sampled_rows(CASES["grpo/bnpo"]["inputs"])
    found, tokens = (policy_gradient_of(variant("grpo/bnpo", loss_type=name))[0].value for name in ("dr_grpo", "bnpo"))
    longest = CASES["grpo/bnpo"]["inputs"]["max_completion_length"]
    assert longest == 10
    assert found * len(rows) * longest == pytest.approx(tokens * np.sum(mask), abs=1e-9)


def test_a_correction_per_token_is_told_from_one_per_row() -> None:
    per_token = CASES["grpo/vespo_isr"]["inputs"]["importance_sampling_ratio"]
    case = variant("grpo/dapo", {"importance_sampling_ratio": per_token})
    assert ours(case)[1]["correction"] == "token_truncate"
    assert ours(CASES["grpo/dapo_tis_seq"])[1]["correction"] == "sequence_truncate"
    corrected, plain = (policy_gradient_of(each)[0].gradient for each in (case, CASES["grpo/dapo"]))
    rows = len(per_token)
    torch.testing.assert_close(
        unpadded(corrected, rows), unpadded(plain, rows) * torch.tensor(per_token, dtype=torch.float64)
    )


def test_tokens_of_a_tool_are_in_no_sum_and_in_no_count() -> None:
    """The peer's number of items leaves them out; the same rows without a tool's tokens are the same batch."""
    tools = CASES["grpo/grpo_toolmask_seq"]["inputs"]["tool_mask"]
    both = np.array(tools) * np.array(CASES["grpo/dapo"]["inputs"]["completion_mask"])
    assert both.sum() < np.sum(CASES["grpo/dapo"]["inputs"]["completion_mask"])
    masked = policy_gradient_of(variant("grpo/dapo", {"tool_mask": tools}))[0]
    absent = policy_gradient_of(variant("grpo/dapo", {"completion_mask": both.tolist()}))[0]
    assert masked.value == pytest.approx(absent.value, abs=1e-12) and masked.value != 0
    torch.testing.assert_close(masked.gradient, absent.gradient)


def _times(outputs: dict[str, Any], factor: float) -> dict[str, Any]:
    return {
        "loss": outputs["loss"] * factor,
        "grad_per_token_logps": (torch.tensor(outputs["grad_per_token_logps"]).double() * factor).tolist(),
    }


@cases("gmpo/", "gspo_token/")
def test_its_relatives_equal_the_peer(case: dict[str, Any]) -> None:
    assert_equal(optimise(objective_for(case), _simple(case)), case, "grad", case["inputs"]["mask"])


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
    learned = unpadded(optimise(objective_for(case), rows).gradient, len(mask)) != 0
    assert learned.double().tolist() == case["outputs"]["mask"]


@cases("async_grpo/loss")
def test_the_ratio_against_the_sampler_equals_the_peer(case: dict[str, Any]) -> None:
    """Its asynchronous trainer clips against the sampler's log-probabilities and divides by global tokens."""
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


@cases("grpo/mask_truncated")
def test_truncated_completions_are_masked_as_the_peer_masks_them(case: dict[str, Any]) -> None:
    completions = case["inputs"]["completion_ids"]
    lengths = [len(completion) for completion in completions]
    batch = Batch.build(lengths, mask=np.ones(sum(lengths), bool), truncated=[c[-1] != 1 for c in completions])
    rows = RowTable(batch)
    mask = rows.with_values(**mask_truncated(rows)).whole().shard.fetched([]).batch["mask"]
    assert int(mask.sum()) == case["outputs"]["num_items_in_batch"]
    expected = np.array(case["outputs"]["completion_mask"])
    assert batch.sum_by_row(mask).tolist() == expected.sum(axis=1).tolist()


@cases("rloo/")
def test_the_ratio_of_whole_completions_equals_the_peer(case: dict[str, Any]) -> None:
    """Its old log-probabilities are sums over a row: on the first token, here."""
    inputs = case["inputs"]
    mask = inputs["completion_mask"]
    old = [[total, *([0.0] * (len(row) - 1))] for total, row in zip(inputs["old_logps"], mask, strict=True)]
    advantages = padded([[value] * len(row) for value, row in zip(inputs["advantages"], mask, strict=True)])
    rows = rows_of(inputs["per_token_logps"], mask, old_logps=padded(old), advantages=advantages)
    assert_equal(optimise(objective_for(case), rows), case, "grad_per_token_logps", mask)


@cases("utils/entropy_logsoftmax")
def test_log_probabilities_and_entropies_of_a_head_equal_the_peer(case: dict[str, Any]) -> None:
    """The head's input are the logits: its projection is the identity. Entropies are at temperature 1 in the peer."""
    logits = torch.tensor(case["inputs"]["logits"]).flatten(0, 1)
    expected = {name: torch.tensor(values).flatten() for name, values in case["outputs"].items()}
    projection = nn.Linear(logits.shape[1], logits.shape[1], bias=False)
    projection.weight = nn.Parameter(torch.eye(logits.shape[1]))
    head = VocabularyHead(projection, LogitScaling())
    wanted = (logits / 0.7).log_softmax(-1)
    tokens = (wanted - expected["logp"][:, None]).abs().argmin(1)  # which ones the peer took
    found = head(logits, tokens, 0.7, frozenset(), None)["main"]
    torch.testing.assert_close(found, expected["logp"], atol=1e-6, rtol=1e-6)
    entropies = head(logits, tokens, 1.0, frozenset({"entropy"}), None)["entropy"]
    torch.testing.assert_close(entropies, expected["entropy"], atol=1e-6, rtol=1e-6)

"""Losses that need no reference model (SFT, CPO, SimPO, ORPO, TPO) against the numbers of another implementation."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from actors.objective import MicroBatch
from orchestrator.losses.objective import LossObjective
from orchestrator.losses.pairwise import odds_ratio
from orchestrator.losses.reduce import item_mean
from tests.golden.cases import CASES, cases, objective_for, rows_of, unpadded
from tests.golden.peer import Inexpressible, ours
from tests.unit.trainer_stub import Rows, optimise


@cases("sft/")
def test_sft_equals_the_peer(case: dict[str, Any]) -> None:
    inputs = case["inputs"]
    rows = rows_of(inputs["per_token_logps"], inputs["label_mask"])
    result = optimise(objective_for(case), rows)
    tokens = float(rows.micro["mask"].sum())
    share = tokens / (inputs["num_items_in_batch"] or tokens)  # the peer's count spans micro-batches that are not here
    assert result.value * share == pytest.approx(case["outputs"]["loss"], abs=1e-6)
    expected = torch.tensor(case["outputs"]["grad_per_token_logps"]) * torch.tensor(inputs["label_mask"])
    gradient = unpadded(result.gradient, len(inputs["label_mask"])) * share
    torch.testing.assert_close(gradient, expected.double(), atol=1e-6, rtol=1e-6)


@cases("cpo/", without=("cpo/full",))
def test_a_contrast_without_reference_equals_the_peer(case: dict[str, Any]) -> None:
    result = optimise(objective_for(case), single_token_pairs(case["inputs"]))
    assert result.value == pytest.approx(np.mean(case["outputs"]["losses"]), abs=1e-6)
    gradients = torch.tensor([*case["outputs"]["grad_chosen"], *case["outputs"]["grad_rejected"]], dtype=torch.float64)
    torch.testing.assert_close(unpadded(result.gradient, len(gradients)).flatten(), gradients, atol=1e-6, rtol=1e-6)


def test_the_peers_shape_of_a_reward_is_alphapo_and_nothing_else_of_ours() -> None:
    case = CASES["cpo/simpo_b2.5_g1.375_a0_ls0"]
    shaped = {**case, "config": {**case["config"], "alpha": 0.3}}
    assert ours(shaped) == (
        "alphapo",
        {"beta": 2.5, "cpo_alpha": 0.0, "simpo_gamma": 1.375, "alpha": 0.3},
    )
    scores = torch.tensor([case["inputs"]["policy_chosen_logps"], case["inputs"]["policy_rejected_logps"]]).double()
    chosen, rejected = (1 - (-0.3 * scores).exp()) / 0.3
    expected = -torch.nn.functional.logsigmoid(2.5 * (chosen - rejected) - 1.375).mean()
    found = optimise(objective_for(shaped), single_token_pairs(case["inputs"]))
    assert found.value == pytest.approx(float(expected), abs=1e-6)
    with pytest.raises(Inexpressible, match=r"alpha=0\.3 with loss_type=hinge"):
        ours({**case, "config": {**case["config"], "alpha": 0.3, "loss_type": "hinge"}})


def single_token_pairs(inputs: dict[str, Any]) -> Rows:
    """The peer's function takes sequence scores: a completion of one token has its sum and its mean as the same
    number."""
    logps = [[value] for value in [*inputs["policy_chosen_logps"], *inputs["policy_rejected_logps"]]]
    pairs = len(logps) // 2
    return rows_of(
        logps, [[1]] * len(logps), group=torch.arange(pairs).repeat(2), preferred=torch.arange(2 * pairs) < pairs
    )


@cases("orpo/odds_b0.1")
def test_the_odds_ratio_equals_the_peer(case: dict[str, Any]) -> None:
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


@cases("cpo/full", "orpo/full")
def test_a_whole_reference_free_loss_equals_the_peer(case: dict[str, Any]) -> None:
    inputs, outputs = case["inputs"], case["outputs"]
    tokens = torch.tensor([*inputs["chosen_input_ids"], *inputs["rejected_input_ids"]])
    labels = torch.tensor([*inputs["chosen_labels"], *inputs["rejected_labels"]])
    attended = torch.tensor([*inputs["chosen_attention_mask"], *inputs["rejected_attention_mask"]]).bool()
    pairs = len(tokens) // 2
    value, norm, metrics = through_logits(
        objective_for(case),
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
    inputs = case["inputs"]
    tokens = torch.tensor(inputs["input_ids"])
    mask = torch.tensor(inputs["completion_mask"]).bool()
    triples = len(tokens) // 3
    side = torch.arange(len(tokens)) // triples
    value, norm, _ = through_logits(
        objective_for(case),
        torch.tensor(inputs["logits"], dtype=torch.float64),
        tokens,
        torch.ones_like(mask),
        mask=mask,
        group=torch.arange(triples).repeat(3),
        preferred=side == 0,
        imitated=side == 2,
    )
    assert (value, norm) == (
        pytest.approx(case["outputs"]["loss"], abs=1e-6),
        pytest.approx(case["outputs"]["grad_norm"], abs=1e-6),
    )

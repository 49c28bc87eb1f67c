"""Divergences of a student from its teacher, and what is learned from them, against the numbers of another
implementation."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

from actors.distributions import Asked
from actors.distributions import of_logits as of_logits_of
from actors.heads import VocabularyHead
from actors.logits import LogitScaling, Vocabulary
from actors.objective import Outputs
from orchestrator.losses.views import Taught
from orchestrator.methods import build
from tests.golden.cases import cases, objective_for, padded, rows_of, unpadded
from tests.golden.peer import ours
from tests.unit.trainer_stub import optimise


@cases("gkd/")
def test_a_divergence_of_distributions_equals_the_peer(case: dict[str, Any]) -> None:
    """Temperature 1 is the identity of a projection, so that hidden states are logits."""
    config, inputs, outputs = case["config"], case["inputs"], case["outputs"]
    student, teacher = (torch.tensor(inputs[f"{name}_logits"]) for name in ("student", "teacher"))
    mask = torch.tensor(inputs["labels"]) != -100
    of_logits = objective_for(case).of_logits
    assert of_logits is not None and of_logits.companion
    student = student.requires_grad_()
    identity = Vocabulary(torch.eye(student.shape[-1]), None, LogitScaling())
    asked = Asked(partial(of_logits.call, **of_logits.options), (), (identity, teacher[mask]))
    tokens = int(mask.sum())
    anything = torch.zeros(tokens, dtype=torch.int64)
    total = of_logits_of(identity, student[mask], anything, asked, chunk_rows=2)[1].sum()
    divisor = config["num_items_in_batch"] or {"sum": 1, "batchmean": tokens}[config["reduction"]]
    (total / divisor).backward()
    assert float(total.detach()) / divisor == pytest.approx(outputs["loss"], abs=1e-6)
    assert student.grad is not None
    torch.testing.assert_close(student.grad, torch.tensor(outputs["grad_student_logits"]), atol=1e-6, rtol=1e-5)


@cases("distillation/")
def test_a_divergence_of_projected_states_of_two_widths_equals_the_peer(case: dict[str, Any]) -> None:
    """The peer's is the mean over the completions' tokens, and it sums their entropies."""
    inputs, outputs = case["inputs"], case["outputs"]
    mask = torch.tensor(inputs["mask"]).bool()
    hidden, weight = (torch.tensor(inputs[f"student_{name}"]).requires_grad_() for name in ("hidden", "w"))
    teacher = Vocabulary(torch.tensor(inputs["teacher_w"]), None, LogitScaling())
    objective, temperature = objective_for(case), case["config"]["temperature"]
    assert objective.of_logits is not None
    asked = Asked(objective.of_logits.at(temperature), (), (teacher, torch.tensor(inputs["teacher_hidden"])[mask]))
    anything = torch.zeros(int(mask.sum()), dtype=torch.int64)
    own = Vocabulary(weight, None, LogitScaling())
    mean = of_logits_of(own, hidden[mask], anything, asked, chunk_rows=2)[1].mean()
    mean.backward()
    assert float(mean.detach()) == pytest.approx(outputs["loss"], abs=1e-6)
    for found, name in ((hidden.grad, "grad_hidden"), (weight.grad, "grad_w")):
        assert found is not None
        torch.testing.assert_close(found, torch.tensor(outputs[name]), atol=1e-6, rtol=1e-4)
    head = VocabularyHead(nn.Linear(*reversed(weight.shape), bias=False), LogitScaling())
    head.weight.data = weight.detach()
    entropy = head(hidden[mask].detach(), anything, temperature, frozenset({"entropy"}), 2)["entropy"]
    assert float(entropy.sum()) == pytest.approx(outputs["entropy_sum"], abs=1e-5)


@cases("iw_opd/")
def test_tokens_that_weigh_less_the_further_the_student_has_drifted_equal_the_peer(case: dict[str, Any]) -> None:
    inputs, outputs = case["inputs"], case["outputs"]
    logits = torch.tensor(inputs["student_logits"], dtype=torch.float64).requires_grad_()
    logps = logits.log_softmax(-1).gather(-1, torch.tensor(inputs["ids"])[..., None]).squeeze(-1)
    mask = (torch.tensor(inputs["labels"]) != -100).int().tolist()
    rows = rows_of(logps.tolist(), mask, teacher_logps=padded(inputs["teacher_logps"]))
    result = optimise(objective_for(case), rows)
    assert result.value == pytest.approx(outputs["loss"], abs=1e-6)
    logps.backward(unpadded(result.gradient, len(mask)))
    torch.testing.assert_close(logits.grad, torch.tensor(outputs["grad"]).double(), atol=1e-6, rtol=1e-5)


@cases("gold/")
def test_a_distance_of_sorted_probabilities_of_two_vocabularies_equals_the_peer(case: dict[str, Any]) -> None:
    """The mean over the tokens that both answers have, of each row; then over rows. (The peer's case reads the logits
    at the answer's tokens, and not those that predict them; what is compared with what is the same here.)"""
    inputs, of_logits = case["inputs"], objective_for(case).of_logits
    assert of_logits is not None
    of_rows: list[float] = []
    for row in range(len(inputs["student_logits"])):
        student, teacher = (
            torch.tensor(inputs[f"{name}_logits"][row])[torch.tensor(inputs[f"{name}_labels"][row]) != -100]
            for name in ("student", "teacher")
        )
        count = min(len(student), len(teacher))
        logps, ids = teacher[:count].log_softmax(-1).sort(-1, descending=True)
        tail = torch.full((count, 1), -torch.inf)
        of_rows.append(float(of_logits.at(1.0)(student[:count], ids.int(), logps, tail).mean()))
    assert sum(of_rows) / len(of_rows) == pytest.approx(case["outputs"]["loss"], abs=1e-6)


@cases("sdft/")
def test_what_a_policy_learns_of_itself_under_another_prompt_equals_the_peer(case: dict[str, Any]) -> None:
    """The peer's k tokens are the student's, and without a tail it renormalises them: a teacher with a tail of 0."""
    student, teacher = (torch.tensor(case["inputs"][f"{name}_logits"]).flatten(0, 1) for name in ("student", "teacher"))
    expected, (_, options) = torch.tensor(case["outputs"]["per_token"]).flatten(), ours(case)
    update = build("sdft", options).updates[0]
    assert update.call is not None
    own, other = student.log_softmax(-1), teacher.log_softmax(-1)
    if options["teacher_top_k"] is None:
        ids = torch.tensor(case["inputs"]["ids"]).flatten()[:, None]
        logps, said = (each.gather(1, ids).squeeze(1) for each in (own, other))
        rows = rows_of([logps.tolist()], [[1] * len(logps)], teacher_logps=padded([said.tolist()]))
        view = Taught.of(rows.micro, Outputs(rows.logps), frozenset({"mask", "teacher_logps"}), {})
        values, _ = update.call(view, **update.options["loss_options"])
        found = unpadded(values, 1).flatten().float()
    else:
        ids = student.topk(min(options["teacher_top_k"], student.shape[1])).indices
        top, tail = other.gather(1, ids).log_softmax(-1), torch.full((len(ids), 1), -torch.inf)
        of_logits = objective_for(case).of_logits
        assert of_logits is not None
        found = of_logits.at(1.0)(student, ids.int(), top, tail)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@cases("minillm/adv")
def test_returns_of_the_log_ratio_equal_the_peer(case: dict[str, Any]) -> None:
    """The peer's powers of gamma begin at the row's first token: a quotient of two such sums is the same from any. To
    the sum of weights that it divides by, its padding adds 1e-4 each."""
    inputs, (method, options) = case["inputs"], ours(case)
    returns = build(method, {**options, "single_step_decomposition": False}).updates[0]
    rows = rows_of(inputs["student_logps"], inputs["mask"], teacher_logps=padded(inputs["teacher_logps"]))
    view = Taught.of(rows.micro, Outputs(rows.logps), frozenset({"mask", "teacher_logps"}), {})
    assert returns.call is not None
    values, _ = returns.call(view, **returns.options["loss_options"])
    expected = torch.tensor(case["outputs"]["advantages"]).double()
    torch.testing.assert_close(
        -unpadded(values, len(expected)) * torch.tensor(inputs["mask"]),
        expected,
        atol=1e-6,
        rtol=2e-4 if options["gamma"] else 1e-6,
    )


@cases("minillm/single_step")
def test_the_exact_divergence_of_each_step_equals_the_peer(case: dict[str, Any]) -> None:
    """The peer's function takes the mean over the mask, as ours does; its trainer hands it one that is 1 on padding."""
    student, teacher = (
        torch.tensor(case["inputs"][f"{name}_log_probs"]).flatten(0, 1) for name in ("student", "teacher")
    )
    of_logits = objective_for(case).of_logits
    assert of_logits is not None and of_logits.width == 2
    ids = torch.arange(len(student)) % 7
    sampled, divergence = of_logits.at(1.0)(student, teacher, ids).unbind(-1)
    learned = torch.tensor(case["inputs"]["mask"]).flatten()
    assert float(divergence[learned].mean()) == pytest.approx(case["outputs"]["loss"], abs=1e-6)
    torch.testing.assert_close(sampled, teacher.log_softmax(-1)[torch.arange(len(ids)), ids])

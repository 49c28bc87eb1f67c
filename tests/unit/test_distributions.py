"""Divergences of whole distributions: computed a chunk of tokens at a time, as if all logits were there at once."""

from __future__ import annotations

import re
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Gemma2Config, Gemma2ForCausalLM

from actors.distributions import TOP_K, TopK
from actors.errors import ConfigError, RunError
from actors.forward import forward
from actors.model import LanguageModel
from actors.objective import MicroBatch, OfLogits
from orchestrator.config.loading import load_config
from orchestrator.losses.declare import Sum, Term
from orchestrator.losses.distillation import distil, jensen_shannon, top_k_jensen_shannon
from orchestrator.losses.likelihood import nll
from orchestrator.losses.objective import LossObjective
from orchestrator.losses.reduce import token_mean
from orchestrator.pipeline import Completions, Pipeline, update
from orchestrator.planning.machine import Machine
from orchestrator.planning.plan import draft_plan
from orchestrator.planning.resolve import build_pipeline
from tests.unit.forward_stage import FLOAT32, Largest, language_model, plain_logits, rows
from tests.unit.tiny import tiny_model

LENGTHS = [6, 1, 9]


def of_logits(beta: float = 0.3, temperature: float = 1.7) -> OfLogits:
    return OfLogits(jensen_shannon, {"beta": beta, "temperature": temperature}, companion=True)


def gemma(vocab: int = 64) -> Any:
    """Its logits have a softcap."""
    config = Gemma2Config(
        vocab_size=vocab, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, final_logit_softcapping=2.0, initializer_range=0.5,
    )  # fmt: skip
    torch.manual_seed(3)
    return Gemma2ForCausalLM(config)


def plain(student: Any, teacher: Any, micro: MicroBatch, vocabulary: int = 64, **options: float) -> Tensor:
    """[T]: from all logits of both models."""
    parts = []
    for own, other in zip(plain_logits(student, micro), plain_logits(teacher, micro), strict=True):
        found = jensen_shannon(own[:-1, :vocabulary], other[:-1, :vocabulary], **options)
        parts.append(torch.cat([found.new_zeros(1), found]))
    return torch.cat(parts)


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("chunk_rows", [None, 4])
@pytest.mark.parametrize("softcapped", [False, True])
def test_a_divergence_by_chunks_has_the_value_and_gradient_of_the_plain_formula(
    beta: float, chunk_rows: int | None, softcapped: bool
) -> None:
    student = gemma() if softcapped else tiny_model(hidden=32, tied=False)
    teacher = tiny_model(hidden=64, seed=1)
    micro, weights = rows(LENGTHS), torch.linspace(0.5, 1.5, sum(LENGTHS))
    expected = plain(student, teacher, micro, beta=beta, temperature=1.7)
    (expected * weights).sum().backward()
    gradients = {name: weight.grad.clone() for name, weight in student.named_parameters()}
    student.zero_grad()
    teacher.zero_grad()
    companion = language_model(teacher).eval()
    found = forward(
        language_model(student), micro, chunk_rows=chunk_rows, of_logits=of_logits(beta), companion=companion
    ).extra["divergence"]
    torch.testing.assert_close(found, expected, **FLOAT32)
    (found * weights).sum().backward()
    for name, weight in student.named_parameters():
        torch.testing.assert_close(weight.grad, gradients[name], **FLOAT32)
    assert all(weight.grad is None for weight in companion.parameters())


@pytest.mark.parametrize("used", [("logps",), ("divergence",), ("logps", "divergence")], ids="+".join)
@pytest.mark.parametrize(("softcapped", "vocabulary"), [(False, 64), (True, 64), (False, 48)], ids=str)
def test_a_loss_of_log_probabilities_beside_a_divergence_has_the_plain_formula_s_gradient(
    used: tuple[str, ...], softcapped: bool, vocabulary: int
) -> None:
    """They come from the same logits; the teacher's padded vocabulary may be the smaller one. A loss may use either."""
    student = gemma() if softcapped else tiny_model(hidden=32, tied=False)
    teacher = tiny_model(vocab=vocabulary, hidden=64, seed=1)
    micro = rows(LENGTHS, vocab=vocabulary)
    weights = {"logps": torch.linspace(0.5, 1.5, sum(LENGTHS)), "divergence": torch.linspace(2, 1, sum(LENGTHS))}
    own = [logits[:-1].div(1.7).log_softmax(-1) for logits in plain_logits(student, micro)]
    targets = [row[1:, None] for row in micro["tokens"].split(LENGTHS)]
    logps = [torch.cat([each.new_zeros(1), each.gather(1, row)[:, 0]]) for each, row in zip(own, targets, strict=True)]
    expected = {
        "logps": torch.cat(logps),
        "divergence": plain(student, teacher, micro, vocabulary, beta=0.3, temperature=1.7),
    }
    sum((expected[name] * weights[name]).sum() for name in used).backward()
    gradients = {name: weight.grad.clone() for name, weight in student.named_parameters()}
    student.zero_grad()
    companion = language_model(teacher).eval()
    outputs = forward(
        language_model(student), micro, temperature=1.7, chunk_rows=4, of_logits=of_logits(), companion=companion
    )
    found = {"logps": outputs.logps, "divergence": outputs.extra["divergence"]}
    for name in found:
        torch.testing.assert_close(found[name], expected[name], **FLOAT32)
    sum((found[name] * weights[name]).sum() for name in used).backward()
    for name, weight in student.named_parameters():
        torch.testing.assert_close(weight.grad, gradients[name], **FLOAT32)
    assert max(float(grad.abs().max()) for grad in gradients.values()) > 0.1


@pytest.mark.parametrize(("own", "other"), [(64, 72), (72, 64)])
def test_padded_rows_of_the_larger_vocabulary_are_in_neither_distribution(own: int, other: int) -> None:
    student, teacher = tiny_model(vocab=own, hidden=32), tiny_model(vocab=other, seed=1)
    micro = rows(LENGTHS)
    expected = plain(student, teacher, micro, beta=0.3, temperature=1.7)
    model = language_model(student)
    found = forward(model, micro, of_logits=of_logits(), companion=language_model(teacher)).extra["divergence"]
    torch.testing.assert_close(found, expected, **FLOAT32)
    found.sum().backward()
    assert torch.isfinite(model.head.weight.grad).all()


def test_neither_model_s_logits_of_all_tokens_ever_exist_at_once() -> None:
    vocab, tokens, chunk = 4096, 256, 16
    student = language_model(tiny_model(vocab=vocab, hidden=16, layers=1))
    teacher = language_model(tiny_model(vocab=vocab, hidden=16, layers=2))
    with Largest() as largest:
        found = forward(
            student, rows([tokens], vocab=vocab), chunk_rows=chunk, of_logits=of_logits(), companion=teacher
        )
        found.extra["divergence"].sum().backward()
    assert largest.numel == vocab * chunk < vocab * tokens


@pytest.mark.parametrize("beta", [0.0, 0.1, 0.5, 1.0])
def test_a_divergence_is_zero_of_equals_positive_of_others_and_its_gradient_is_its_slope(beta: float) -> None:
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 3, 7, dtype=torch.float64).unbind()
    divergence = partial(jensen_shannon, beta=beta, temperature=1.3)
    torch.testing.assert_close(divergence(teacher, teacher), torch.zeros(3, dtype=torch.float64))
    assert (divergence(student, teacher) > 1e-3).all()
    assert torch.autograd.gradcheck(lambda logits: divergence(logits, teacher), student.requires_grad_())


def test_an_empty_micro_batch_has_a_divergence_of_zero_and_needs_no_companion() -> None:
    found = forward(language_model(), rows([1]), of_logits=of_logits())
    assert found.extra["divergence"].tolist() == [0.0]
    with pytest.raises(RunError, match="started without one"):
        forward(language_model(), rows([3]), of_logits=of_logits())


# The most likely tokens of a model in other processes

TEACHER = ("teacher_topk_ids", "teacher_topk_logps", "teacher_tail_logps")


def said_by(teacher: Any, micro: MicroBatch, k: int, temperature: float, vocabulary: int | None = None) -> MicroBatch:
    """The micro-batch with what a teacher says of its tokens."""
    with torch.no_grad():
        found = forward(language_model(teacher), micro, top_k=TopK(k, temperature, vocabulary), chunk_rows=4).extra
    columns = dict(zip(TEACHER, (found[name] for name in TOP_K[: len(TEACHER)]), strict=True))
    return MicroBatch(micro.lengths, {**micro.columns, **columns})


def from_top_k(beta: float, temperature: float = 1.7) -> OfLogits:
    return OfLogits(top_k_jensen_shannon, {"beta": beta, "temperature": temperature}, TEACHER)


def divergences(count: int = 400) -> tuple[Tensor, Tensor]:
    """[n, 9], [n, 9]: logits of students that are near their teachers, far from them, and nearly sure of a token."""
    torch.manual_seed(0)
    teacher = torch.randn(count, 9) * torch.logspace(-1, 1.5, count)[:, None]
    return teacher + torch.randn(count, 9) * torch.logspace(-3, 1.3, count).flip(0)[:, None], teacher


def top_k_of(logits: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    log_probs = logits.log_softmax(-1)
    logps, ids = log_probs.topk(k)
    return ids.int(), logps, log_probs.scatter(1, ids, -torch.inf).logsumexp(-1, keepdim=True)


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize(("own", "other"), [(64, 64), (72, 64)])
def test_with_all_tokens_over_the_wire_it_is_the_whole_divergence_and_its_gradient(
    beta: float, own: int, other: int
) -> None:
    student, teacher = tiny_model(vocab=own, hidden=32, tied=False), tiny_model(vocab=other, seed=1)
    micro, weights = rows(LENGTHS), torch.linspace(0.5, 1.5, sum(LENGTHS))
    expected = plain(student, teacher, micro, beta=beta, temperature=1.7)
    (expected * weights).sum().backward()
    gradients = {name: weight.grad.clone() for name, weight in student.named_parameters()}
    student.zero_grad()
    micro = said_by(teacher, micro, other, 1.7)
    assert micro["teacher_tail_logps"][1:6].isneginf().all()
    found = forward(language_model(student), micro, chunk_rows=4, of_logits=from_top_k(beta)).extra["divergence"]
    torch.testing.assert_close(found, expected, **FLOAT32)
    (found * weights).sum().backward()
    for name, weight in student.named_parameters():
        torch.testing.assert_close(weight.grad, gradients[name], **FLOAT32)


@pytest.mark.parametrize("beta", [0.0, 0.1, 0.5, 1.0])
def test_with_the_tail_as_one_outcome_it_is_never_negative_and_grows_with_k_to_the_whole(beta: float) -> None:
    student, teacher = divergences()
    found = torch.stack([top_k_jensen_shannon(student, *top_k_of(teacher, k), beta=beta) for k in (1, 2, 4, 8, 9)])
    assert found.min() > -1e-6
    assert (found.diff(dim=0) > -1e-5).all()
    torch.testing.assert_close(found[-1], jensen_shannon(student, teacher, beta=beta))
    assert (found[-1] - found[0]).max() > 0.05


def test_without_the_tail_the_same_numbers_would_be_negative() -> None:
    student, teacher = divergences()
    ids, logps, _ = top_k_of(teacher, 2)
    without = (logps.exp() * (logps - student.log_softmax(-1).gather(1, ids.long()))).sum(-1)
    assert without.min() < -0.1


@pytest.mark.parametrize("k", [1, 3, 7])
def test_a_divergence_from_the_most_likely_tokens_is_zero_of_equals_and_its_gradient_is_its_slope(k: int) -> None:
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 3, 7, dtype=torch.float64).unbind()
    divergence = partial(top_k_jensen_shannon, beta=0.3)
    torch.testing.assert_close(divergence(teacher, *top_k_of(teacher, k)), torch.zeros(3, dtype=torch.float64))
    assert (divergence(student, *top_k_of(teacher, k)) > 1e-3).all()
    assert torch.autograd.gradcheck(lambda logits: divergence(logits, *top_k_of(teacher, k)), student.requires_grad_())


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_several_teachers_side_by_side_teach_the_weighted_sum_of_what_each_teaches(beta: float) -> None:
    student, one = divergences()
    other = one.roll(1, dims=1)
    said = top_k_of(one, 3), top_k_of(other, 3)
    together = [torch.cat(parts, dim=1) for parts in zip(*said, strict=True)]
    each = [top_k_jensen_shannon(student, *parts, beta=beta) for parts in said]
    found = top_k_jensen_shannon(student, *together, beta=beta, weights=(0.25, 0.75))
    torch.testing.assert_close(found, 0.25 * each[0] + 0.75 * each[1])
    assert (found - each[0]).abs().max() > 0.1


@pytest.mark.parametrize("vocabulary", [None, 40])
def test_the_most_likely_tokens_are_those_of_all_logits_by_chunks_without_padded_entries(
    vocabulary: int | None,
) -> None:
    teacher, mask = tiny_model(seed=1), torch.tensor([False, True, False, True] * 4)
    micro = rows(LENGTHS, vocab=40, mask=mask.numpy())
    found = said_by(teacher, micro, 5, 0.7, vocabulary)
    for row, logits in zip(range(3), plain_logits(teacher, micro), strict=True):
        at = slice(int(micro.offsets[row]), int(micro.offsets[row + 1]))
        log_probs = torch.log_softmax(logits[:-1, : vocabulary or 64] / 0.7, -1)[mask[at][1:]]
        logps, ids = log_probs.topk(5)
        learned = mask[at] & (torch.arange(len(logits)) > 0)
        torch.testing.assert_close(found["teacher_topk_logps"][at][learned], logps, **FLOAT32)
        assert torch.equal(found["teacher_topk_ids"][at][learned], ids.int())
        tail = (1 - logps.exp().sum(-1, keepdim=True)).log()
        torch.testing.assert_close(found["teacher_tail_logps"][at][learned], tail, rtol=1e-3, atol=1e-4)
        assert not found["teacher_topk_logps"][at][~learned].any()


def test_the_teacher_s_logits_of_all_tokens_never_exist_at_once_either() -> None:
    vocab, tokens, chunk = 4096, 256, 16
    teacher = language_model(tiny_model(vocab=vocab, hidden=16, layers=1))
    with torch.no_grad(), Largest() as largest:
        found = forward(teacher, rows([tokens], vocab=vocab), chunk_rows=chunk, top_k=TopK(8)).extra
    assert largest.numel == vocab * chunk < vocab * tokens
    assert sum(values.numel() for values in found.values()) == tokens * 17


def test_a_teacher_that_says_its_most_likely_tokens_is_a_role_with_a_model_of_its_own() -> None:
    config = load_config("gkd_arithmetic", ["phases.gkd.options.teacher_top_k=4"])
    pipelines = {name: build_pipeline(phase) for name, phase in config.phases.items()}
    plan = draft_plan(config, pipelines, parameters=10**9, own_parameters={"teacher": 10**9}, machine=Machine(2))
    assert plan.warnings == plan.refusals == () and set(plan.roles) == {"tutor", "policy", "teacher"}
    policy, teacher = (plan.roles[role].memory for role in ("policy", "teacher"))
    assert policy and teacher and policy.companion == 0 and teacher.weights > 3 and teacher.optimizer == 0
    gkd = pipelines["gkd"]
    assert gkd.companions == {} and [stage.name for stage in gkd.batch_stages] == ["teacher.infer"]
    own = config.roles.model_copy(update={"teacher": config.roles.teacher.model_copy(update={"model": None})})
    (said,) = draft_plan(config.model_copy(update={"roles": own}), pipelines, machine=Machine(2)).refusals
    assert "learns from the distributions of teacher" in said and "roles.teacher.model is not set" in said


def test_a_sum_has_one_comparison_and_hands_the_options_that_it_names() -> None:
    both = Sum(Term(distil, token_mean, options={"beta": 0.2}), Term(nll, token_mean, 0.1))
    objective = LossObjective(both, None, {})
    assert objective.of_logits == OfLogits(jensen_shannon, {"beta": 0.2, "temperature": 1.0}, companion=True)
    assert "divergence" not in objective.needs
    with pytest.raises(ConfigError, match="in several ways"):
        LossObjective(Sum(Term(distil, token_mean), Term(distil, token_mean)), None, {})


def test_a_loss_that_compares_names_its_companion_and_no_other_loss_does() -> None:
    pipeline = Pipeline(Completions, update("policy", distil, reduce=token_mean, companion="teacher"))
    assert pipeline.companions == {"policy": "teacher"} and pipeline.roles == ("policy",)
    with pytest.raises(ConfigError, match="compares with a companion"):
        update("policy", distil, reduce=token_mean)
    with pytest.raises(ConfigError, match="names teacher"):
        update("policy", nll, reduce=token_mean, companion="teacher")


def test_a_companion_s_states_have_its_own_width() -> None:
    teacher: LanguageModel = language_model(tiny_model(hidden=128))
    projection, states = teacher.states(rows([4])["tokens"], (4,), torch.tensor([1, 3]))
    assert states.shape == (2, 128) and projection.weight.shape == (64, 128)


def test_a_recipe_with_a_companion_is_planned_without_warnings_and_sizes_nothing_for_it() -> None:
    config = load_config("gkd_arithmetic")
    pipelines = {name: build_pipeline(phase) for name, phase in config.phases.items()}
    plan = draft_plan(config, pipelines, machine=Machine(2))
    assert plan.warnings == plan.refusals == () and set(plan.roles) == {"tutor", "policy"}
    teacher = config.roles.teacher
    for changed, said in (({"ranks": 2}, r"teacher\.ranks: .* leave it out"), ({"model": None}, "is not set")):
        roles = config.roles.model_copy(update={"teacher": teacher.model_copy(update=changed)})
        found = draft_plan(config.model_copy(update={"roles": roles}), pipelines, machine=Machine(2)).refusals
        assert any(re.search(said, refusal) for refusal in found), found

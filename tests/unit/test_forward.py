"""The packed forward pass against that of transformers, row by row: log-probabilities, other outputs, gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from actors.attention import VARLEN
from actors.errors import ModelError
from actors.forward import forward
from actors.model import ModelSpec, load_model
from tests.unit.forward_stage import (
    FLOAT32,
    LENGTHS,
    assert_same_gradients,
    gradients,
    language_model,
    plain_log_probs,
    plain_logits,
    plain_logps,
    rows,
    tiny_mixtral,
)
from tests.unit.tiny import tiny_model, tiny_model_folder


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logps_equal_those_of_each_row_by_itself(tied: bool, temperature: float) -> None:
    causal = tiny_model(tied=tied)
    micro = rows()
    found = forward(language_model(causal), micro, temperature=temperature)
    torch.testing.assert_close(found.logps, plain_logps(causal, micro, temperature), **FLOAT32)


@pytest.mark.parametrize("lengths", [[9], [5, 5, 5], [30, 3], [64, 60, 33, 31, 8, 8, 1]])
def test_every_layout_of_documents_gives_the_same_logps(lengths: list[int]) -> None:
    causal = tiny_model()
    micro = rows(lengths)
    torch.testing.assert_close(forward(language_model(causal), micro).logps, plain_logps(causal, micro), **FLOAT32)


def test_later_tokens_do_not_change_earlier_predictions() -> None:
    model = language_model()
    micro = rows([12, 12])
    with torch.no_grad():
        before = forward(model, micro).logps.clone()
        micro["tokens"][8] = (micro["tokens"][8] + 1) % 64
        after = forward(model, micro).logps
    assert torch.equal(before[:8], after[:8])
    assert not torch.isclose(before[8:12], after[8:12]).any()


def test_a_row_s_first_token_and_unmasked_tokens_have_logp_zero() -> None:
    mask = torch.zeros(sum(LENGTHS), dtype=torch.bool)
    mask[[0, 3, 4, 25]] = True  # 0 is a row's first: it must be ignored
    micro = rows(mask=mask.numpy())
    model = language_model()
    masked, everything = forward(model, micro).logps, forward(model, micro, all_tokens=True).logps
    assert masked.nonzero().squeeze(1).tolist() == [3, 4, 25]
    torch.testing.assert_close(masked[[3, 4, 25]], everything[[3, 4, 25]])
    starts = micro.offsets[:-1]
    assert (everything[starts] == 0).all()
    assert (everything != 0).sum() == sum(LENGTHS) - len(LENGTHS)


def test_without_a_token_to_predict_outputs_and_gradient_are_zero() -> None:
    model = language_model()
    outputs = forward(model, rows([1]), needs=frozenset({"entropy"}))
    outputs.logps.sum().backward()
    assert outputs.logps.tolist() == [0.0]
    assert outputs.extra["entropy"].tolist() == [0.0]
    assert all(p.grad is not None and (p.grad == 0).all() for p in model.parameters())


def test_extras_equal_their_definitions() -> None:
    causal = tiny_model()
    micro = rows()
    needs = frozenset({"entropy", "log_sum_sq_probs", "mean_logits", "is_top1"})
    with torch.no_grad():
        found = forward(language_model(causal), micro, temperature=0.8, needs=needs)
        log_probs = plain_log_probs(causal, micro, 0.8)
        logits = [torch.cat([part.new_zeros(1, 64), part[:-1]]) for part in plain_logits(causal, micro)]
    real = found.logps != 0
    expected = {
        "entropy": -(log_probs.exp() * log_probs).sum(-1),
        "log_sum_sq_probs": log_probs.exp().square().sum(-1).log(),
        "mean_logits": torch.cat(logits).mean(-1) / 0.8,
        "is_top1": (log_probs.argmax(-1) == micro["tokens"]).float(),
    }
    assert found.extra.keys() == expected.keys()
    for name, values in expected.items():
        torch.testing.assert_close(found.extra[name][real], values[real], **FLOAT32, msg=lambda m, n=name: f"{n}: {m}")
        assert (found.extra[name][~real] == 0).all()


def test_entropy_has_a_gradient_only_on_request() -> None:
    model = language_model()
    assert not forward(model, rows(), needs=frozenset({"entropy"})).extra["entropy"].requires_grad
    assert forward(model, rows(), needs=frozenset({"entropy_grad"})).extra["entropy"].requires_grad


@pytest.mark.parametrize("chunk_rows", [None, 7])
@pytest.mark.parametrize("tied", [True, False])
def test_gradients_equal_those_of_plain_autograd(chunk_rows: int | None, tied: bool) -> None:
    causal = tiny_model(tied=tied)
    model = language_model(causal)
    micro = rows()
    weights = torch.linspace(-1, 1, sum(LENGTHS))

    log_probs = plain_log_probs(causal, micro, 0.9)
    entropy = -(log_probs.exp() * log_probs).sum(-1)
    entropy = entropy.where(plain_logps(causal, micro) != 0, 0.0)
    logps = log_probs.gather(1, micro["tokens"][:, None]).squeeze(1)
    expected = gradients(model, (weights * logps).sum() + 0.3 * (weights * entropy).sum())

    found = forward(model, micro, temperature=0.9, needs=frozenset({"entropy_grad"}), chunk_rows=chunk_rows)
    loss = (weights * found.logps).sum() + 0.3 * (weights * found.extra["entropy"]).sum()
    assert_same_gradients(expected, gradients(model, loss))


def test_experts_are_balanced_by_the_model_s_own_loss() -> None:
    causal = tiny_mixtral()
    micro = rows([16])
    found = forward(language_model(causal), micro).aux_loss
    causal.config._attn_implementation = "eager"
    own = causal(input_ids=micro["tokens"][None], output_router_logits=True).aux_loss
    assert found is not None
    torch.testing.assert_close(found, 0.02 * own)
    causal.config._attn_implementation = VARLEN
    assert forward(language_model(causal, router_aux_loss_coef=0.0), micro).aux_loss is None


def test_embedding_noise_is_drawn_in_training_only() -> None:
    model = language_model(neftune_noise_alpha=5.0)
    micro = rows()
    assert not torch.equal(forward(model, micro).logps, forward(model, micro).logps)
    quiet = forward(model.eval(), micro).logps
    assert torch.equal(quiet, forward(model, micro).logps)
    torch.testing.assert_close(quiet, plain_logps(model.causal, micro), **FLOAT32)


def test_gradient_checkpointing_changes_no_gradient() -> None:
    micro = rows()
    plain, checkpointed = language_model(), language_model(gradient_checkpointing=True)
    assert checkpointed.causal.is_gradient_checkpointing
    expected = gradients(plain, forward(plain, micro).logps.sum())
    found = gradients(checkpointed, forward(checkpointed, micro).logps.sum())
    assert_same_gradients(expected, found)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [({"temperature": 0.0}, "temperature above 0"), ({"needs": frozenset({"logits"})}, r"\['logits'\].*entropy")],
)
def test_invalid_arguments_of_the_forward_pass_are_refused(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        forward(language_model(), rows(), **wrong)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: folder / "absent", "there is no folder"),
        (lambda folder: folder, r"not a model folder\n.*notes.txt\n.*config.json"),
    ],
)
def test_a_folder_without_a_model_is_an_error_of_a_few_lines(
    tmp_path: Any, make: Callable[..., Any], message: str
) -> None:
    (tmp_path / "notes.txt").write_text("nothing")
    with pytest.raises(ModelError, match=message) as caught:
        load_model(ModelSpec(str(make(tmp_path))), trainable=False)
    assert len(str(caught.value).splitlines()) <= 4


def test_a_model_of_another_kind_is_refused(tmp_path: Any) -> None:
    folder = tiny_model_folder(tmp_path)
    (folder / "config.json").write_text('{"model_type": "vit"}')
    with pytest.raises(ModelError, match=r"cannot load a model with a vocabulary head.*ViTConfig") as caught:
        load_model(ModelSpec(str(folder)), trainable=False)
    assert len(str(caught.value)) < 500

"""Packed attention: documents keep apart, windows, capped scores and sinks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import Qwen2Config, Qwen2ForCausalLM

from actors.attention import Documents, varlen_attention
from actors.batch import Batch
from actors.errors import ModelError
from actors.forward import forward
from actors.model import LanguageModel, ModelSpec, load_model
from actors.objective import MicroBatch
from actors.scored_attention import scored_attention
from tests.unit.forward_stage import (
    FLOAT32,
    assert_same_gradients,
    gradients,
    language_model,
    plain_logps,
    rows,
    tiny_gemma2,
    tiny_gpt_oss,
)
from tests.unit.tiny import tiny_model, tiny_model_folder


def test_attention_in_half_precision_rounds_only_queries_keys_and_values() -> None:
    causal, micro = tiny_model(), rows()
    exact = forward(language_model(causal), micro).logps
    half = forward(LanguageModel(causal, attention_dtype="bfloat16"), micro).logps
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, exact, rtol=0.05, atol=0.05)
    assert not torch.equal(half, exact)


def test_packed_documents_never_attend_to_one_another() -> None:
    model = language_model()
    with torch.no_grad():
        before = forward(model, rows([10, 20, 15], seed=1))
        other = rows([10, 20, 15], seed=2)
        other["tokens"][10:30] = rows([10, 20, 15], seed=1)["tokens"][10:30]  # the middle one stays
        after = forward(model, other)
    assert torch.equal(before.logps[10:30], after.logps[10:30])
    assert not torch.equal(before.logps[:10], after.logps[:10])


def test_a_sliding_window_masks_tokens_further_back() -> None:
    config = Qwen2Config(
        vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, use_sliding_window=True, sliding_window=4, max_window_layers=0, initializer_range=0.3,
    )  # fmt: skip
    torch.manual_seed(0)
    causal = Qwen2ForCausalLM(config)
    micro = rows([3, 20, 9])
    found = forward(language_model(causal), micro).logps
    torch.testing.assert_close(found, plain_logps(causal, micro), **FLOAT32)
    for layer in causal.model.layers:
        layer.self_attn.sliding_window = None
    assert not torch.allclose(found, forward(language_model(causal), micro).logps, atol=1e-2)


@pytest.mark.parametrize("make", [tiny_gemma2, tiny_gpt_oss])
def test_capped_scores_and_sinks_are_computed_packed_as_transformers_does_row_by_row(make: Callable[[], Any]) -> None:
    causal = make()
    micro = rows([3, 20, 9, 1])
    model = language_model(causal, router_aux_loss_coef=0.0)
    found, expected = forward(model, micro).logps, plain_logps(causal, micro)
    torch.testing.assert_close(found, expected, **FLOAT32)
    ours, theirs = (gradients(model, logps.sum()) for logps in (found, expected))
    assert_same_gradients(theirs, ours)
    for layer in causal.model.layers:
        layer.self_attn.attn_logit_softcapping = None
        layer.self_attn.sinks = None
    assert not torch.allclose(found, forward(model, micro).logps, atol=1e-2)


def test_rows_that_begin_alike_share_their_computation_under_capped_scores_too() -> None:
    causal = tiny_gemma2()
    prompt = torch.randint(2, 64, (1, 9), generator=torch.Generator().manual_seed(0)).expand(3, 9)
    tokens = rows([14, 14, 14])["tokens"].view(3, 14)
    tokens[:, :9] = prompt
    micro = MicroBatch.of(Batch.build([14, 14, 14], tokens=tokens.flatten().numpy()))
    found = forward(language_model(causal), micro)
    assert found.rows < 3 * 14
    torch.testing.assert_close(found.logps, plain_logps(causal, micro), **FLOAT32)


@pytest.mark.parametrize("window", [None, 1, 4, 50])
@pytest.mark.parametrize("block_scores", [1, 100, 2**24])
def test_scored_attention_without_cap_and_sinks_is_the_kernel_s_whatever_the_blocks(
    window: int | None, block_scores: int
) -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, heads, 13, 8) for heads in (4, 2, 2)]
    inputs = [torch.randn(shape, generator=generator, requires_grad=True) for shape in shapes]
    distance = torch.arange(13)[:, None] - torch.arange(13)
    mask = (distance >= 0) & (distance < (window or 13))
    expected = F.scaled_dot_product_attention(*inputs, mask, scale=0.3, enable_gqa=True)
    options: dict[str, Any] = {"scaling": 0.3, "softcap": None, "sinks": None, "window": window}
    found = scored_attention(*inputs, **options, block_scores=block_scores)
    torch.testing.assert_close(found, expected, **FLOAT32)
    ours, theirs = (torch.autograd.grad(out.square().sum(), inputs) for out in (found, expected))
    torch.testing.assert_close(ours, theirs, **FLOAT32)


@pytest.mark.parametrize("option", ["position_bias", "head_mask"])
def test_features_that_packed_attention_does_not_support_are_refused(option: str) -> None:
    states = torch.zeros(1, 2, 4, 8)
    documents = Documents([4], states.device)
    options: dict[str, Any] = {option: torch.zeros(1)}
    with pytest.raises(ModelError, match=option):
        varlen_attention(torch.nn.Identity(), states, states, states, None, documents=documents, **options)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_the_attentions_of_transformers_keep_documents_apart_too(tmp_path: Any, attention: str) -> None:
    folder = str(tiny_model_folder(tmp_path))
    ours = load_model(ModelSpec(folder), trainable=False)
    theirs = load_model(ModelSpec(folder, attn_implementation=attention), trainable=False)
    micro = rows()
    torch.testing.assert_close(forward(theirs, micro).logps, forward(ours, micro).logps, **FLOAT32)

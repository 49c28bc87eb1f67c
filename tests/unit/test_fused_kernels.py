"""Fused kernels: which layers are replaced, and what is refused where they cannot be used. What the kernels compute is
tested on a GPU (`tests/gpu`)."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.activations import ACT2FN
from transformers.models.cohere import modeling_cohere
from transformers.models.gemma2 import modeling_gemma2
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.llama import modeling_llama
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.phi.modeling_phi import PhiMLP
from transformers.models.phi3.modeling_phi3 import Phi3MLP
from transformers.models.qwen3 import modeling_qwen3
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from actors import fused_kernels
from actors.errors import ConfigError
from actors.model import ModelSpec, load_model
from tests.unit.tiny import tiny_model, tiny_model_folder


def test_norms_by_torch_s_function_compute_the_same_model() -> None:
    plain, fused = tiny_model(), tiny_model()
    for model in (plain, fused):
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if "norm" in name:
                    weight.copy_(torch.linspace(0.5, 2.0, len(weight)))
    ids = torch.arange(2, 30)[None]
    assert fused_kernels.use_fused_norms(fused) == 5  # two in each layer, and the last
    assert "forward" in vars(fused.model.norm) and "forward" not in vars(plain.model.norm)
    torch.testing.assert_close(fused(ids).logits, plain(ids).logits)


@pytest.mark.parametrize(
    ("kind", "alike"), [(LlamaRMSNorm, True), (Qwen3RMSNorm, True), (Gemma2RMSNorm, False), (torch.nn.LayerNorm, False)]
)
def test_a_norm_is_replaced_only_if_it_scales_as_torch_s_does(kind: type[torch.nn.Module], alike: bool) -> None:
    assert fused_kernels._is_plain_norm(kind) == alike


class Unpacks(torch.nn.Module):
    """Its code takes three dimensions, and fails on what the comparison makes of it."""

    def forward(self, x: Tensor) -> Any:
        batch, length, _ = x.shape
        return [batch, length]


class Doubled(torch.nn.Module):
    """Looks like a gated layer, and is none."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


@pytest.mark.parametrize(
    ("kind", "activation", "known"),
    [
        (modeling_llama.LlamaMLP, "silu", 0),
        (modeling_qwen3.Qwen3MLP, "silu", 0),
        (modeling_gemma2.Gemma2MLP, "gelu_pytorch_tanh", 1),
        (modeling_gemma2.Gemma2MLP, "gelu", None),
        (Phi3MLP, "silu", None),
        (PhiMLP, "silu", None),
        (Doubled, "silu", None),
        (Unpacks, "silu", None),
    ],
)
def test_a_layer_is_replaced_only_if_it_multiplies_by_a_known_activation(
    kind: type[torch.nn.Module], activation: str, known: int | None
) -> None:
    assert fused_kernels._gated_activation(kind, ACT2FN[activation]) == known


@pytest.mark.parametrize(
    ("module", "alike"),
    [(modeling_llama, True), (modeling_qwen3, True), (modeling_gemma2, True), (modeling_cohere, False)],
)
def test_a_rotation_is_replaced_only_if_its_pairs_are_halves(module: Any, alike: bool) -> None:
    assert fused_kernels._is_plain_rotation(module.apply_rotary_pos_emb) == alike


def test_a_rotation_of_another_form_is_left_alone() -> None:
    def three(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> Any:
        return query, key, cos

    def fails(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> Any:
        raise AssertionError("on a GPU only")

    assert not fused_kernels._is_plain_rotation(three) and not fused_kernels._is_plain_rotation(fails)


SMALL: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 16,
    "num_key_value_heads": 2, "pad_token_id": 0,
}  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "part", "whole"),
    [
        ("llama", 1.0, True),
        ("phi3", 1.0, True),
        ("phi3", 0.5, False),  # its function cuts queries and keys itself
        ("gpt_neox", 1.0, True),
        ("gpt_neox", 0.25, False),
        ("phi", 0.5, True),  # its attention cuts them before
        ("stablelm", 0.25, True),
    ],
)
def test_a_model_has_the_rotary_kernel_only_if_its_rotation_is_asked_for_whole_heads(
    monkeypatch: pytest.MonkeyPatch, kind: str, part: float, whole: bool
) -> None:
    rope = {"rope_type": "default", "rope_theta": 10_000.0, "partial_rotary_factor": part}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, rope_parameters=rope, **SMALL))
    module = sys.modules[type(model).__module__]
    plain, widths = getattr(module, fused_kernels.ROTARY), []

    def recorded(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, *args: Any, **kwargs: Any) -> Any:
        widths.append((query.shape[-1], cos.shape[-1]))
        return plain(query, key, cos, sin, *args, **kwargs)

    monkeypatch.setattr(module, fused_kernels.ROTARY, recorded)
    assert fused_kernels.use_rotation(model) == whole
    widths.clear()
    model(torch.arange(2, 10)[None])
    assert len(widths) == 2 and all((query == rotated) == whole for query, rotated in widths)


def test_layers_are_found_in_a_whole_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "actors.layer_kernels", cast(Any, Stand))
    module = sys.modules[type(tiny_model()).__module__]
    monkeypatch.setattr(module, fused_kernels.ROTARY, getattr(module, fused_kernels.ROTARY))  # put back at the end
    plain, fused = tiny_model(), tiny_model()
    ids = torch.arange(2, 30)[None]
    expected = plain(ids).logits
    assert fused_kernels.use_gated_activations(fused) == 2 and fused_kernels.use_rotation(fused)
    Stand.calls = 0
    torch.testing.assert_close(fused(ids).logits, expected)
    assert Stand.calls == 2, "one in each layer"
    torch.testing.assert_close(plain(ids).logits, expected)
    assert Stand.calls == 2, "the other model keeps its layers; on a CPU, both keep the rotation"
    before = getattr(module, fused_kernels.ROTARY)
    assert fused_kernels.use_rotation(fused) and getattr(module, fused_kernels.ROTARY) is before


class Stand:
    """In place of the kernels, which a CPU does not have."""

    calls = 0

    @staticmethod
    def gated(gate: Tensor, up: Tensor, activation: int) -> Tensor:
        Stand.calls += 1
        return fused_kernels.ACTIVATIONS[activation](gate) * up

    @staticmethod
    def rotate(*tensors: Tensor) -> None:
        raise AssertionError("on a CPU")


def test_on_a_cpu_nothing_is_replaced_and_demanding_it_is_refused(tmp_path: Path) -> None:
    folder = str(tiny_model_folder(tmp_path))
    model = load_model(ModelSpec(folder), trainable=False)
    assert model.kernels == "" and "forward" not in vars(model.causal.model.norm)
    with pytest.raises(ConfigError, match=r"fused_kernels=true, but the kernels are for GPUs.*set it to false"):
        load_model(ModelSpec(folder, fused_kernels=True), trainable=False)

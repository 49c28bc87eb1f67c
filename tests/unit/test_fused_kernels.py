"""Fused kernels: which norms are computed by torch's, and what is refused where they cannot be used."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
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


def test_on_a_cpu_nothing_is_replaced_and_demanding_it_is_refused(tmp_path: Path) -> None:
    folder = str(tiny_model_folder(tmp_path))
    model = load_model(ModelSpec(folder), trainable=False)
    assert model.kernels == "" and "forward" not in vars(model.causal.model.norm)
    with pytest.raises(ConfigError, match=r"fused_kernels=true, but the kernels are for GPUs.*set it to false"):
        load_model(ModelSpec(folder, fused_kernels=True), trainable=False)

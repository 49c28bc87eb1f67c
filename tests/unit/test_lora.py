from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM
from torch import nn
from transformers import AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM

from actors.errors import ModelError
from actors.forward import forward
from actors.lora import (
    LoraSpec,
    adapter_tensors,
    adapter_weights,
    adapters_off,
    attach,
    full_tensors,
    has_adapters,
    merged_tensors,
    set_adapters,
    write_adapter,
)
from actors.model import LanguageModel, ModelSpec, load_model
from actors.objective import MicroBatch
from actors.pretrained import skeleton
from tests.unit.forward_stage import rows
from tests.unit.tiny import tiny_model_folder

VARIANTS = [
    LoraSpec(r=4),
    LoraSpec(r=4, use_rslora=True),
    LoraSpec(r=4, use_dora=True),
    LoraSpec(4, 8.0, 0.0, ("q_proj",)),
]


def adapted(folder: Path, lora: LoraSpec) -> LanguageModel:
    """A model whose adapters are far from nothing."""
    torch.manual_seed(0)
    model = load_model(ModelSpec(str(folder), lora=lora), trainable=True)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.05)
    return model


def logps(model: LanguageModel, micro: MicroBatch) -> torch.Tensor:
    with torch.no_grad():
        return forward(model.eval(), micro).logps


@pytest.mark.parametrize("lora", VARIANTS, ids=str)
def test_merged_weights_compute_what_the_adapters_compute(tmp_path: Path, lora: LoraSpec) -> None:
    folder = tiny_model_folder(tmp_path)
    model, plain = adapted(folder, lora), load_model(ModelSpec(str(folder)), trainable=False)
    base = logps(plain, rows())
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    merged = {name: tensor.clone() for name, tensor in full_tensors(model.causal, 1 << 20)}
    missing, unexpected = plain.causal.load_state_dict(merged, strict=False)
    assert (missing, unexpected) == (["lm_head.weight"], [])  # tied: it leaves once, as the embedding
    torch.testing.assert_close(logps(plain, rows()), logps(model, rows()), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(logps(plain, rows()), base, atol=1e-2)
    assert all(torch.equal(before[name], parameter) for name, parameter in model.named_parameters())


@pytest.mark.parametrize("lora", VARIANTS, ids=str)
def test_adapters_that_were_sent_alone_compute_what_they_compute_at_the_sender(tmp_path: Path, lora: LoraSpec) -> None:
    folder = tiny_model_folder(tmp_path)
    sender = adapted(folder, lora)
    torch.manual_seed(7)
    receiver = load_model(ModelSpec(str(folder), lora=lora), trainable=False)
    before = logps(receiver, rows())
    sent = {name: tensor.clone() for name, tensor in adapter_tensors(sender.causal, 1000)}
    assert sent.keys() == adapter_weights(sender.causal).keys(), "the names are those of a PEFT folder"
    set_adapters(receiver.causal, sent)
    assert torch.equal(logps(receiver, rows()), logps(sender, rows()))
    assert not torch.allclose(logps(receiver, rows()), before, atol=1e-2)


def test_adapters_of_another_shape_or_place_are_refused_and_change_nothing(tmp_path: Path) -> None:
    folder = tiny_model_folder(tmp_path)
    sent = dict(adapter_tensors(adapted(folder, LoraSpec(r=4)).causal, 1000))
    wider, fewer = adapted(folder, LoraSpec(r=8)), adapted(folder, LoraSpec(r=4, target_modules=("q_proj",)))
    for receiver in (wider, fewer):
        before = logps(receiver, rows())
        with pytest.raises(ModelError, match=r"these adapters do not fit the model's: .*lora_A"):
            set_adapters(receiver.causal, sent)
        assert torch.equal(logps(receiver, rows()), before)


@pytest.mark.parametrize("lora", VARIANTS, ids=str)
def test_only_adapters_are_trained(tmp_path: Path, lora: LoraSpec) -> None:
    model = adapted(tiny_model_folder(tmp_path), lora)
    assert has_adapters(model)
    assert {"lora_" in name for name, p in model.named_parameters() if p.requires_grad} == {True}
    assert {"lora_" in name for name, p in model.named_parameters() if not p.requires_grad} == {False}
    with adapters_off(model):
        pass
    assert {"lora_" in name for name, p in model.named_parameters() if p.requires_grad} == {True}


def test_adapters_are_switched_on_again_even_after_an_error(tmp_path: Path) -> None:
    model = adapted(tiny_model_folder(tmp_path), LoraSpec(r=4))
    on = logps(model, rows())
    with pytest.raises(KeyboardInterrupt), adapters_off(model):
        assert not torch.equal(logps(model, rows()), on)
        raise KeyboardInterrupt
    assert torch.equal(logps(model, rows()), on)


def test_parameters_are_gathered_in_buckets_of_the_given_size(tmp_path: Path) -> None:
    model = load_model(ModelSpec(str(tiny_model_folder(tmp_path)), lora=LoraSpec(r=4)), trainable=True)
    limit = 40_000
    gathered: list[list[nn.Parameter]] = []

    @contextmanager
    def gather(parameters: list[nn.Parameter]) -> Generator[None]:
        gathered.append(parameters)
        yield

    found = dict(merged_tensors(model.causal, limit, gather))
    expected = AutoModelForCausalLM.from_pretrained(model.causal.config._name_or_path)
    assert set(found) == {name for name, _ in expected.named_parameters()}
    assert {id(p) for bucket in gathered for p in bucket} == {id(p) for p in model.causal.parameters()}
    assert 1 < len(gathered) < len(found)
    sizes = [sum(p.nbytes for p in bucket if p.requires_grad is False) for bucket in gathered]
    assert all(size <= limit for size in sizes)


def test_experts_leave_under_the_names_they_are_saved_under(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config: dict[str, Any] = {"num_attention_heads": 2, "num_key_value_heads": 1, "num_local_experts": 4}
    config |= {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 16, "num_hidden_layers": 2}
    MixtralForCausalLM(MixtralConfig(**config)).save_pretrained(tmp_path)
    from safetensors.torch import load_file

    saved = load_file(tmp_path / "model.safetensors")
    model = load_model(ModelSpec(str(tmp_path)), trainable=False)
    found = {name: tensor.clone() for name, tensor in full_tensors(model.causal, 1 << 20)}
    assert any("experts.3" in name for name in found)
    assert found.keys() == saved.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in saved.items())


@pytest.mark.parametrize(
    ("targets", "tied", "message"),
    [
        (("q_proj", "embed_tokens"), True, r"model\.embed_tokens cannot.*also that of lm_head"),
        ((".*embed.*"), True, r"model\.embed_tokens cannot.*also that of lm_head"),
        (("lm_head",), False, r"lm_head cannot.*output head"),
        (".*(q_proj|lm_head)", False, r"lm_head cannot.*output head"),
        (".*lm_head", True, r"lm_head cannot.*output head"),
    ],
)
def test_an_adapter_that_a_reader_of_its_weight_would_not_see_is_refused_however_it_is_named(
    tmp_path: Path, targets: Any, tied: bool, message: str
) -> None:
    spec = ModelSpec(str(tiny_model_folder(tmp_path, tied=tied)), lora=LoraSpec(r=4, target_modules=targets))
    with pytest.raises(ModelError, match=rf"model\.lora\.target_modules=.*{message}.*all-linear"):
        load_model(spec, trainable=True)
    with pytest.raises(ModelError, match=message):  # what a plan asks, before any weights are read
        attach(skeleton(spec.path, trust_remote_code=False), spec.lora or LoraSpec())


@pytest.mark.parametrize("dora", [False, True])
def test_an_embedding_with_a_weight_of_its_own_may_have_an_adapter(tmp_path: Path, dora: bool) -> None:
    folder = tiny_model_folder(tmp_path, tied=False)
    model = adapted(folder, LoraSpec(r=4, target_modules=("q_proj", "embed_tokens"), use_dora=dora))
    with torch.no_grad():
        model.causal.model.embed_tokens.lora_embedding_B["default"].normal_(std=0.1)
    plain = load_model(ModelSpec(str(folder)), trainable=False)
    base = logps(plain, rows())
    plain.causal.load_state_dict({name: tensor.clone() for name, tensor in full_tensors(model.causal, 1 << 20)})
    torch.testing.assert_close(logps(plain, rows()), logps(model, rows()), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(logps(plain, rows()), base, atol=1e-2)


@pytest.mark.parametrize("lora", [*VARIANTS, LoraSpec(4, target_modules=("k_proj", "embed_tokens"))], ids=str)
def test_saved_adapters_open_with_peft_on_the_base_model_and_compute_the_same(tmp_path: Path, lora: LoraSpec) -> None:
    folder = tiny_model_folder(tmp_path, tied=False)
    model = adapted(folder, lora)
    write_adapter(model.causal, tmp_path / "adapter", adapter_weights(model.causal))
    tokens = torch.arange(2, 30)[None]
    with torch.no_grad():
        opened = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter").eval()  # finds the base by itself
        expected = AutoModelForCausalLM.from_pretrained(folder)
        base = expected(tokens).logits
        expected.load_state_dict({name: tensor.clone() for name, tensor in full_tensors(model.causal, 1 << 20)})
        torch.testing.assert_close(opened(tokens).logits, expected(tokens).logits, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(opened(tokens).logits, base, atol=1e-2)

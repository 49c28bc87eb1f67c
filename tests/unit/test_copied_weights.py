"""Weights that come one by one, under the names of files, into a model of transformers that keeps experts merged."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any
from weakref import WeakSet

import pytest
import torch
from torch import Tensor
from transformers import MixtralConfig, MixtralForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from actors.errors import InfraFailure
from actors.lora import full_tensors
from rollout.engine import EngineSpec
from rollout.transformers_model import copy_weights, read_model
from tests.unit.tiny import tiny_tokenizer

EXPERTS, LAYERS = 6, 4
SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "num_experts_per_tok": 2,
    "initializer_range": 0.3,
    "eos_token_id": 1,
}
MODELS = {
    "qwen": lambda: Qwen3MoeForCausalLM(Qwen3MoeConfig(**SIZES, moe_intermediate_size=16, num_experts=EXPERTS)),
    "mixtral": lambda: MixtralForCausalLM(MixtralConfig(**SIZES, num_local_experts=EXPERTS)),
}


@pytest.fixture(params=MODELS)
def models(request: pytest.FixtureRequest, tmp_path: Path) -> list[Any]:
    """Two of the same kind, with other weights, each as an engine reads it."""
    read = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        folder = tmp_path / f"{seed}"
        MODELS[request.param]().save_pretrained(folder)
        tiny_tokenizer().save_pretrained(folder)
        read.append(read_model(EngineSpec("hf", str(folder)), str(folder)))
    return read


class Sent:
    """Weights as a trainer sends them, and how many of them are alive at a time."""

    def __init__(self, model: Any) -> None:
        self._model, self._alive = model, WeakSet[Tensor]()
        self.names: list[str] = []
        self.most = 0

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in full_tensors(self._model, 1 << 20):
            copy = tensor.detach().clone()
            self._alive.add(copy)
            self.names.append(name)
            self.most = max(self.most, len(self._alive))
            yield name, copy


def test_experts_are_merged_as_transformers_merges_them_a_layer_at_a_time(models: list[Any]) -> None:
    target, source = models
    expected = {name: tensor.clone() for name, tensor in source.state_dict().items()}
    places = {name: parameter.data_ptr() for name, parameter in target.named_parameters()}
    assert not any(
        torch.equal(target.state_dict()[name], tensor) for name, tensor in expected.items() if "proj" in name
    )
    sent = Sent(source)
    copy_weights(target, sent)
    assert target.state_dict().keys() == expected.keys()
    for name, tensor in target.state_dict().items():
        assert torch.equal(tensor, expected[name]), name
    assert places == {name: parameter.data_ptr() for name, parameter in target.named_parameters()}
    of_experts = [name for name in sent.names if ".experts." in name]
    assert len(of_experts) == LAYERS * EXPERTS * 3, "they come one by one"
    assert sent.most <= EXPERTS * 2 + 1, "of a merged parameter, of gates and ups at most, and the one that comes next"


def test_weights_may_come_in_any_order(models: list[Any]) -> None:
    target, source = models
    copy_weights(target, reversed([(name, tensor.clone()) for name, tensor in Sent(source)]))
    assert all(torch.equal(tensor, source.state_dict()[name]) for name, tensor in target.state_dict().items())


def test_an_expert_that_is_not_sent_and_one_that_the_model_lacks_are_named(models: list[Any]) -> None:
    target, source = models
    sent = dict(Sent(source))
    (lacking, *_) = [name for name in sent if ".experts.3." in name]
    unknown = lacking.replace(".experts.3.", f".experts.{EXPERTS}.")
    sent[unknown] = sent.pop(lacking)
    with pytest.raises(InfraFailure) as caught:
        copy_weights(target, sent.items())
    assert str(caught.value) == f"weights do not fit the model: not sent ['{lacking}'], not in the model ['{unknown}']"

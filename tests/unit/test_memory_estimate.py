"""What the estimate of memory takes for granted of models and of passes, against their code."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.activations import ACT2FN
from transformers.models.llama.modeling_llama import LlamaMLP

from actors import fused_kernels
from actors.batch import Batch
from actors.forward import forward
from actors.model import ModelSpec, prepare
from actors.objective import MicroBatch
from orchestrator.planning.memory_estimate import FUSED_ACTIVATIONS, FUSED_LAYERS, Shape, Training, estimate
from tests.unit.tiny import tiny_model

TINY: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 16,
    "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0,
}  # fmt: skip
LEFT_ALONE = ("phi3", "glm4", "mixtral", "qwen3_moe", "starcoder2", "seed_oss", "phi", "gpt_neox", "jais2")


def replaced_layers(config: Any) -> int:
    with torch.device("meta"):
        return fused_kernels.use_gated_activations(AutoModelForCausalLM.from_config(config))


@pytest.mark.parametrize("kind", [*sorted(FUSED_LAYERS), *LEFT_ALONE])
def test_the_plan_counts_with_the_kernel_of_layers_that_get_it_and_of_no_others(kind: str) -> None:
    config = AutoConfig.for_model(kind, **TINY)
    shape = Shape.of(config)
    assert shape is not None and shape.layers == 2
    assert shape.fusable == (replaced_layers(config) == 2) == (kind in FUSED_LAYERS)


@pytest.mark.parametrize("name", [name for name in ACT2FN if name != "xielu"])
def test_the_plan_knows_the_activations_that_the_kernel_has(name: str) -> None:
    found = fused_kernels._gated_activation(LlamaMLP, ACT2FN[name])
    assert (found is not None) == (name in FUSED_ACTIVATIONS)


@pytest.mark.parametrize(("kind", "key"), [("llama", "hidden_act"), ("gemma2", "hidden_activation")])
def test_another_activation_in_the_configuration_is_not_counted_as_the_kernel_s(kind: str, key: str) -> None:
    plain = AutoConfig.for_model(kind, **TINY, **{key: "relu"})
    shape = Shape.of(plain)
    assert shape is not None and not shape.fusable and replaced_layers(plain) == 0


def test_layers_that_the_kernel_does_not_replace_keep_a_quarter_more_of_the_feed_forward() -> None:
    """Phi3's joined product of gate and other half, on a GPU."""
    joined, apart = (Shape.of(AutoConfig.for_model(kind, **TINY)) for kind in ("phi3", "llama"))
    training = Training(0, 1, None, gradient_checkpointing=False, fused=True)
    kept = [estimate(10**6, "bfloat16", tokens=64, training=training, shape=shape) for shape in (joined, apart)]
    assert (kept[0].activations - kept[1].activations) * 2**30 == pytest.approx(64 * 2 * 48 * 2)


class Allocated(TorchDispatchMode):
    """Bytes of the tensors that operations make and that are still alive; those of `given` are not counted."""

    def __init__(self, given: Iterator[Tensor]) -> None:
        super().__init__()
        self.bytes = 0
        self.known = {each.untyped_storage()._cdata for each in given}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        for each in tree_leaves(found):
            storage = each.untyped_storage() if isinstance(each, Tensor) else None
            if storage is not None and storage._cdata not in self.known:
                self.known.add(storage._cdata)
                self.bytes += storage.nbytes()
                weakref.finalize(storage, self.free, storage._cdata, storage.nbytes())
        return found

    def free(self, place: int, size: int) -> None:
        self.known.discard(place)
        self.bytes -= size


def allocated_by(layers: int, tokens: int, *, checkpointing: bool) -> tuple[int, int]:
    """Bytes after a forward pass, and without gradients after the backward pass, before any garbage is collected."""
    causal = tiny_model(layers=layers)
    model = prepare(causal, ModelSpec("", gradient_checkpointing=checkpointing), trainable=True)
    batch = Batch.build([tokens], tokens=np.full(tokens, 3), mask=np.arange(tokens) > 0)
    micro = MicroBatch.of(batch, torch.device("cpu"))
    gc.collect()
    gc.disable()
    try:
        with Allocated(causal.parameters()) as allocated:
            loss = forward(model, micro).main.sum()
            kept = allocated.bytes
            loss.backward()
            left = allocated.bytes
    finally:
        gc.enable()
    return kept, left - sum(each.grad.nbytes for each in causal.parameters() if each.grad is not None)


def test_a_recomputed_layer_keeps_its_input_until_the_backward_pass_and_nothing_after_it() -> None:
    tokens, hidden = 40, 64
    (two, two_left), (four, four_left) = (allocated_by(layers, tokens, checkpointing=True) for layers in (2, 4))
    assert four - two == 2 * tokens * hidden * 4
    assert four_left == two_left
    stored = allocated_by(4, tokens, checkpointing=False)[0] - allocated_by(2, tokens, checkpointing=False)[0]
    assert stored > 8 * (four - two)

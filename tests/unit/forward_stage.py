"""Tiny models of several kinds, and what transformers computes of each row by itself."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)

from actors.attention import VARLEN, register
from actors.batch import Batch
from actors.model import LanguageModel, ModelSpec, prepare
from actors.objective import MicroBatch
from tests.unit.tiny import tiny_model

LENGTHS = [7, 1, 12, 7, 30, 2]
FLOAT32: dict[str, Any] = {"rtol": 1e-4, "atol": 1e-5}


def language_model(causal: Any = None, **settings: Any) -> LanguageModel:
    register()
    causal = tiny_model() if causal is None else causal
    causal.config._attn_implementation = VARLEN
    return prepare(causal, ModelSpec("in memory", **settings), trainable=True)


def rows(lengths: list[int] = LENGTHS, seed: int = 0, vocab: int = 64, mask: Any = None) -> MicroBatch:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(2, vocab, (sum(lengths),), generator=generator)
    columns = {} if mask is None else {"mask": mask}
    return MicroBatch.of(Batch.build(lengths, tokens=tokens.numpy(), **columns))


def plain_logits(causal: Any, micro: MicroBatch, attention: str = "eager") -> list[Tensor]:
    """Each row by itself through the model as transformers computes it."""
    causal.config._attn_implementation = attention
    logits = [causal(input_ids=row[None]).logits[0] for row in micro["tokens"].split(micro.lengths.tolist())]
    causal.config._attn_implementation = VARLEN
    return logits


def plain_log_probs(causal: Any, micro: MicroBatch, temperature: float = 1.0) -> Tensor:
    """[T, V]: entry t is the distribution that predicts token t; rows' first entries are 0."""
    parts = [torch.log_softmax(logits / temperature, -1)[:-1] for logits in plain_logits(causal, micro)]
    return torch.cat([torch.cat([part.new_zeros(1, part.shape[-1]), part]) for part in parts])


def plain_logps(causal: Any, micro: MicroBatch, temperature: float = 1.0) -> Tensor:
    return plain_log_probs(causal, micro, temperature).gather(1, micro["tokens"][:, None]).squeeze(1)


class Largest(TorchDispatchMode):
    """The element count of the largest tensor that any operation produced."""

    numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        found = result if isinstance(result, tuple | list) else (result,)
        self.numel = max([self.numel, *(each.numel() for each in found if isinstance(each, Tensor))])
        return result


SMALL: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "initializer_range": 0.5, "sliding_window": 5,
}  # fmt: skip


def tiny_gemma2(**settings: Any) -> Any:
    """Its scores are far beyond the cap."""
    torch.manual_seed(0)
    tokens = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2}
    config: dict[str, Any] = {**tokens, **SMALL, "attn_logit_softcapping": 2.0, "query_pre_attn_scalar": 8, **settings}
    return Gemma2ForCausalLM(Gemma2Config(**config))


def tiny_gpt_oss() -> Any:
    torch.manual_seed(0)
    causal: Any = GptOssForCausalLM(GptOssConfig(**SMALL, num_local_experts=4, num_experts_per_tok=2, eos_token_id=1))
    for layer in causal.model.layers:
        torch.nn.init.normal_(layer.self_attn.sinks, mean=2.0)
    return causal


def tiny_mixtral() -> MixtralForCausalLM:
    torch.manual_seed(0)
    return MixtralForCausalLM(
        MixtralConfig(
            vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=1, num_local_experts=4, num_experts_per_tok=2, router_aux_loss_coef=0.02,
        )
    )  # fmt: skip


def gradients(model: LanguageModel, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.causal.named_parameters() if p.grad is not None}


def assert_same_gradients(expected: dict[str, Tensor], found: dict[str, Tensor]) -> None:
    assert expected.keys() == found.keys()
    for name, grad in expected.items():
        torch.testing.assert_close(found[name], grad, rtol=1e-3, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")

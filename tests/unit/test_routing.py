"""Experts are recorded where tokens are sampled, and taken again where they are trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import MixtralConfig, MixtralForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from actors.columns import ROUTES
from actors.errors import ModelError
from actors.forward import forward
from actors.model import ModelSpec, prepare
from actors.objective import MicroBatch
from actors.pretrained import load_config
from actors.routing import Routers, check_routers
from rollout.engine import EngineSpec, build_engine
from rollout.sampling import Request, Sampling, to_batch
from tests.unit.tiny import tiny_model, tiny_tokenizer

SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "num_experts_per_tok": 2,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": 1,
}
MODELS = {
    "qwen": lambda: Qwen3MoeForCausalLM(
        Qwen3MoeConfig(**SIZES, moe_intermediate_size=16, num_experts=6, head_dim=16, norm_topk_prob=False)
    ),
    "mixtral": lambda: MixtralForCausalLM(MixtralConfig(**SIZES, num_local_experts=6)),
}
PROMPT = (5, 9, 14, 20)


def model(kind: str, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    return MODELS[kind]()


@pytest.fixture(params=MODELS)
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    model(request.param).save_pretrained(tmp_path / request.param)
    tiny_tokenizer().save_pretrained(tmp_path / request.param)
    return tmp_path / request.param


def sampled(folder: Path) -> Any:
    """A batch of three samples by the hf engine, with their experts."""
    engine = build_engine(EngineSpec("hf", str(folder), max_model_len=64))
    request = Request("a", PROMPT, 3, Sampling(12, replay_routing=True), seed=3)
    engine.add(request)
    finished = [each for _ in range(40) if engine.busy for each in engine.step()]
    return to_batch(request, finished[0].completions)


def trained(kind: str, seed: int = 0, **settings: Any) -> Any:
    spec = ModelSpec("in memory", router_aux_loss_coef=0.0, **settings)
    causal = model(kind, seed)
    causal.set_attn_implementation("eager")
    return prepare(causal, spec, trainable=True)


def test_the_engine_says_the_experts_that_each_token_was_sent_to(folder: Path) -> None:
    batch = sampled(folder)
    plain = model(folder.name).eval()
    differing = set[tuple[int, ...]]()
    for row in range(len(batch)):
        tokens, routes = batch.row("tokens", row), batch.row(ROUTES, row)
        with torch.no_grad():
            found = plain(torch.tensor([tokens.tolist()]), output_router_logits=True).router_logits
        expected = torch.stack([each.topk(2).indices for each in found], dim=1).flatten(1).numpy()
        np.testing.assert_array_equal(np.sort(routes[:-1].reshape(-1, 2)), np.sort(expected[:-1].reshape(-1, 2)))
        assert (routes[-1] == -1).all(), "the last token was sampled, and never read"
        differing |= {tuple(each) for each in routes[:-1]}
    assert len(differing) > 4


@pytest.mark.parametrize("checkpointing", [False, True])
def test_other_weights_send_tokens_to_the_experts_that_were_recorded(folder: Path, checkpointing: bool) -> None:
    """What is computed is what the model computes if its routers choose so by themselves."""
    batch = sampled(folder)
    other = trained(folder.name, seed=1, gradient_checkpointing=checkpointing)
    micro = MicroBatch.of(batch.only({"tokens", "mask", ROUTES}))
    own = MicroBatch.of(batch.only({"tokens", "mask"}))

    def said(given: MicroBatch) -> tuple[torch.Tensor, torch.Tensor]:
        other.zero_grad()
        logps = forward(other, given).logps
        logps.sum().backward()
        return logps.detach(), other.causal.model.layers[0].mlp.gate.weight.grad.clone()

    free, replayed, again = said(own), said(micro), said(own)
    assert (replayed[0] - free[0]).abs().max() > 1e-3, "the two models choose alike: this shows nothing"
    torch.testing.assert_close(again, free)
    assert replayed[1].abs().max() > 0

    recorder = Routers(other.causal)
    forward(other, own)
    chosen = recorder.chosen.flatten(1)
    assert len(chosen) == batch.num_tokens
    with_own = MicroBatch(own.lengths, {**own.columns, ROUTES: chosen})
    torch.testing.assert_close(said(with_own), free)
    with_own.columns[ROUTES].fill_(-1)
    torch.testing.assert_close(said(with_own), free)


def test_a_model_whose_routers_cannot_be_told_is_refused(folder: Path, tmp_path: Path) -> None:
    check_routers(load_config(str(folder), False), str(folder))
    tiny_model().save_pretrained(tmp_path / "dense")
    with pytest.raises(ModelError, match="dense has no experts"):
        check_routers(load_config(str(tmp_path / "dense"), False), str(tmp_path / "dense"))

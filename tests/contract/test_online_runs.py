"""Every method that samples, three steps each, in this process and with the hf engine. With vLLM and Ray:
`tests/ray/test_online_methods.py`."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from orchestrator.config.loading import config_of
from orchestrator.reporting.grafana import matches, metrics
from orchestrator.reporting.metrics import METRICS_FILE, read
from orchestrator.run import run
from tests.dashboard_metrics import IN_OTHER_RUNS
from tests.online_phases import STEPS, assert_three_steps_of_each, recipe
from tests.unit.tiny import tiny_tokenizer

pytestmark = pytest.mark.timeout(600)


def test_every_method_that_samples_takes_three_steps_from_a_policy_that_is_its_own_reference(tmp_path: Path) -> None:
    result = run(config_of(recipe(tmp_path, {"engine": "hf"}), [], "test"), local=True)
    assert_three_steps_of_each(result.folder, tolerance=1e-5)
    exported = {name for line in read(result.folder / METRICS_FILE) for name in line}
    asked = set(metrics()) - IN_OTHER_RUNS.keys()
    unknown = [name for name in asked if not any(matches(name, each) for each in exported)]
    assert unknown == [], "the Grafana dashboard asks for metrics that no run has"


def test_a_mixture_of_experts_is_trained_with_the_experts_that_its_samples_were_sent_to(tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "head_dim": 16}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "pad_token_id": 0, "bos_token_id": None}
    experts = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "router_aux_loss_coef": 0.0}
    Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes, **heads, **experts, eos_token_id=1)).save_pretrained(tmp_path / "moe")
    tiny_tokenizer().save_pretrained(tmp_path / "moe")
    tree = recipe(tmp_path, {"engine": "hf"}, model={"path": str(tmp_path / "moe")})
    tree["phases"] = {"grpo": tree["phases"]["grpo"]}
    tree["phases"]["grpo"]["sampling"]["replay_routing"] = True
    tree["phases"]["grpo"]["options"] = {**tree["phases"]["grpo"]["options"], "updates_per_batch": 2}
    del tree["roles"]["teacher"], tree["roles"]["reference_rollout"], tree["roles"]["mixture_rollout"]
    result = run(config_of(tree, [], "test"), local=True)
    first, *others = (line for line in read(result.folder / METRICS_FILE) if "loss" in line)
    for line in (first, *others):  # the engine has the weights of each step, though they have other names in its model
        assert line["sampling/importance_sampling_ratio/mean"] == pytest.approx(1, abs=1e-5)
    assert len(others) == STEPS - 1 and all(line["kl"] > 1e-4 and line["grad_norm"] > 0 for line in others)
    assert first["shared_share"] > 0.1, "prompts are computed once, with the experts of their tokens"

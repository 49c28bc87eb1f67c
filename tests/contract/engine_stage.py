"""Engines beside transformers with the same weights, for what every engine must do. A user's own engine joins by a line
in `SUBJECTS`, and by its name in the tests that are to run on it.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch

from actors.specs import LoraSpec
from rollout.engine import Engine, EngineSpec, ShardedEngine, build_engine
from rollout.sampling import Completion, Request
from rollout.weights import ManifestOf, PackBuckets
from rollout.weights.protocol import SyncOrder, receivers
from tests.unit.tiny import tiny_model_folder

EOS = 1
MAX_MODEL_LEN = 256
MAX_CONCURRENCY = 8
PROMPT = (5, 9, 14, 20, 33)
LONG_PROMPT = tuple(2 + (7 * place) % 60 for place in range(200))  # longer than a block of vLLM's prefix cache
SUBJECTS: dict[
    str, tuple[str, bool, dict[str, Any]]
] = {  # kind, whether the model's embeddings are tied, specification
    "vllm-tied": ("vllm", True, {}),
    "vllm-untied": ("vllm", False, {"options": {"max_num_batched_tokens": MAX_MODEL_LEN}}),
    "vllm-bf16": ("vllm", True, {"dtype": "bfloat16"}),
    "vllm-two-ranks": ("vllm", True, {"tensor_parallel": 2}),
    "hf-tied": ("hf", True, {}),
    "hf-untied": ("hf", False, {}),
    "hf-bf16": ("hf", True, {"dtype": "bfloat16"}),
    "scripted": ("scripted", True, {}),
    "vllm-mixing": ("vllm", False, {"mixes": "SECOND"}),
    "hf-mixing": ("hf", False, {"mixes": "SECOND"}),
    "vllm-adapters": ("vllm", True, {"lora": LoraSpec(r=12, alpha=16)}),
    "hf-adapters": ("hf", True, {"lora": LoraSpec(r=12, alpha=16)}),
    "hf-dora": ("hf", True, {"lora": LoraSpec(r=4, use_dora=True)}),
    "vllm-cut": ("vllm", True, {"max_admitted": 64}),
    "vllm-bf16-head": ("vllm", False, {"dtype": "bfloat16", "lm_head_fp32": True}),
    "hf-bf16-head": ("hf", False, {"dtype": "bfloat16", "lm_head_fp32": True}),
}
Weights = list[tuple[str, torch.Tensor]]


@dataclass
class Subject:
    """An engine, and transformers with the same weights."""

    engine: Engine
    spec: EngineSpec
    reference: Any
    original: Weights

    def run(self, *requests: Request) -> dict[str, list[Completion]]:
        for request in requests:
            self.engine.add(request)
        return self.finish()

    def finish(self) -> dict[str, list[Completion]]:
        """Step until nothing is running: samples by request id, in order."""
        results: dict[str, list[Completion]] = {}
        for _ in range(10_000):
            if not self.engine.busy:
                return results
            for finished in self.engine.step():
                samples = sorted(finished.completions, key=lambda completion: completion.index)
                results[finished.request.id] = samples
        raise AssertionError("the engine is busy after 10,000 steps")

    def one(self, request: Request) -> Completion:
        return self.run(request)[request.id][0]

    def load(self, weights: Weights, version: int) -> None:
        self.reference.load_state_dict(dict(weights), strict=False)
        if self.spec.tensor_parallel == 1:
            self.engine.load(weights, version)
        else:
            order = SyncOrder(f"to {version}", version, "object_store", ManifestOf(self.spec.dtype, 1 << 20)(weights))
            _, payload = PackBuckets(order.manifest, version)(weights)
            names = receivers("engine", self.spec.tensor_parallel)
            cast(ShardedEngine, self.engine).receive(names, order, payload)

    def other_weights(self, seed: int) -> Weights:
        torch.manual_seed(seed)
        return [(name, tensor + 0.05 * torch.randn_like(tensor)) for name, tensor in self.original]

    @torch.no_grad()
    def logits(self, prompt: tuple[int, ...], completion: Completion) -> torch.Tensor:
        """[C, V] of the reference: what it would say at each token of the completion."""
        ids = torch.tensor([[*prompt, *completion.tokens]])
        return self.reference(ids).logits[0, len(prompt) - 1 : -1].float()

    def error(self, prompt: tuple[int, ...], completion: Completion, temperature: float = 1.0) -> np.ndarray:
        """[C]: how far the engine's log-probabilities are from the reference's."""
        logps = (self.logits(prompt, completion) / temperature).log_softmax(-1)
        chosen = logps.gather(1, torch.tensor(completion.tokens, dtype=torch.long)[:, None])[:, 0]
        return np.abs(chosen.numpy() - completion.logps)


def build(name: str, root: Path) -> Subject:
    from transformers import AutoModelForCausalLM

    kind, tied, settings = SUBJECTS[name]
    folder = tiny_model_folder(root, hidden=128, tied=tied)
    if settings.get("mixes"):
        settings = dict(settings, mixes=str(tiny_model_folder(root, hidden=64, layers=1, seed=1)))
    spec = EngineSpec(
        kind,
        str(folder),
        max_model_len=MAX_MODEL_LEN,
        max_concurrency=MAX_CONCURRENCY,
        kv_cache_gib=0.05,
        **settings,
    )
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, spec.dtype)).eval()
    original = [(name, parameter.detach().clone()) for name, parameter in reference.named_parameters()]
    return Subject(build_engine(spec), spec, reference, original)


@pytest.fixture(scope="module")
def subjects(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Subject]]:
    """Each engine is built once: vLLM takes seconds."""
    built: dict[str, Subject] = {}

    def get(name: str) -> Subject:
        if name not in built:
            built[name] = build(name, tmp_path_factory.mktemp(name))
        return built[name]

    yield get
    for subject in built.values():
        subject.engine.close()
    gc.freeze()  # vLLM has undone it, and the tests of other files would look at all that it imported again and again


@pytest.fixture
def subject(request: pytest.FixtureRequest, subjects: Callable[[str], Subject]) -> Subject:
    """The engine of this test's parameter with its first weights, as version 0."""
    subject = subjects(request.param)
    assert not subject.engine.busy, "an earlier test left a request"
    if subject.engine.version != 0 and subject.spec.lora is None:
        subject.load(subject.original, 0)
    return subject


def on(*names: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("subject", names, indirect=True)

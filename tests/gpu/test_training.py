"""What a trainer computes on a GPU, beside what it computes on a CPU."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from actors.attention import Documents, varlen_attention
from actors.batch import Batch
from actors.model import ModelSpec
from actors.model_worker import ModelWorker, UpdateReport
from actors.sharding import shard
from actors.specs import BackendSpec, OptimSpec
from tests.masked_nll import MaskedNll
from tests.unit.tiny import tiny_model_folder

pytestmark = pytest.mark.gpu

LENGTHS = [37, 1, 120, 64, 300, 8]
HEADS, HEAD_DIM = 8, 64
HALF = {"rtol": 2e-2, "atol": 2e-2}  # two roundings of a number around 1 to 8 bits
BUDGET = 256  # tokens per micro-batch: several of them
OPTIM = OptimSpec(learning_rate=1e-2, total_steps=8, adam_eps=1e-3, scheduler="constant", max_grad_norm=0.7)


@dataclass(frozen=True)
class Attended:
    out: Tensor
    grads: tuple[Tensor, ...]


def attended(device: str, dtype: torch.dtype, key_heads: int, window: int | None) -> Attended:
    """Attention over the packed documents and its gradients, from the same bfloat16 inputs everywhere."""
    generator = torch.Generator().manual_seed(0)
    total = sum(LENGTHS)
    shapes = [(1, heads, total, HEAD_DIM) for heads in (HEADS, key_heads, key_heads)]
    inputs = [torch.randn(shape, generator=generator).to(torch.bfloat16) for shape in shapes]
    cotangent = torch.randn(1, total, HEADS, HEAD_DIM, generator=generator).to(device, dtype)
    query, key, value = (each.to(device, dtype).requires_grad_() for each in inputs)
    documents = Documents(LENGTHS, torch.device(device))
    module = torch.nn.Module()
    out, _ = varlen_attention(module, query, key, value, None, documents=documents, sliding_window=window)
    grads = torch.autograd.grad(out, (query, key, value), cotangent)
    return Attended(out.detach().float().cpu(), tuple(grad.float().cpu() for grad in grads))


@pytest.mark.parametrize("key_heads", [HEADS, 2])
@pytest.mark.parametrize("window", [None, 16])
def test_the_kernel_for_packed_documents_equals_the_reference_on_the_cpu(key_heads: int, window: int | None):
    expected = attended("cpu", torch.float32, key_heads, window)
    found = attended("cuda", torch.bfloat16, key_heads, window)
    torch.testing.assert_close(found.out, expected.out, **HALF)
    for ours, theirs in zip(found.grads, expected.grads, strict=True):
        assert (ours - theirs).norm() < 0.02 * theirs.norm()


def test_float32_on_the_gpu_equals_the_cpu():
    expected, found = (attended(device, torch.float32, 2, None) for device in ("cpu", "cuda"))
    torch.testing.assert_close(found.out, expected.out, rtol=2e-3, atol=2e-3)  # where a GPU multiplies in TF32


def batch() -> Batch:
    generator = np.random.default_rng(0)
    lengths = generator.integers(8, 90, size=16)
    total = int(lengths.sum())
    mask = generator.random(total) < 0.8
    starts = np.cumsum(lengths) - lengths
    mask[starts] = False  # nothing predicts a row's first token
    return Batch.build(lengths.tolist(), tokens=generator.integers(2, 64, size=total), mask=mask)


def trainer(folder: Path, dtype: str) -> ModelWorker:
    spec = BackendSpec(gpus=1.0, optim=OPTIM)
    trainable = ModelWorker("policy", ModelSpec(str(folder), dtype=dtype), spec, threads=2)
    assert trainable.ready().detail["device"] == "cuda"
    return trainable


def updates(trainable: ModelWorker, steps: int) -> list[UpdateReport]:
    [(_, part)] = shard(batch(), 1, BUDGET)
    return [trainable.update(part, MaskedNll(), 1.0, "u") for _ in range(steps)]


def test_updates_in_bfloat16_follow_those_in_float32(tmp_path: Path):
    folder = tiny_model_folder(tmp_path, hidden=256)
    exact, half = (updates(trainer(folder, dtype), 3) for dtype in ("float32", "bfloat16"))
    assert exact[-1].metrics["loss"] < 0.9 * exact[0].metrics["loss"], "it learns, so there is something to follow"
    for ours, theirs in zip(half, exact, strict=True):
        assert ours.metrics["loss"] == pytest.approx(theirs.metrics["loss"], rel=0.02)
        assert ours.grad_norm == pytest.approx(theirs.grad_norm, rel=0.1)


def test_a_sleeping_trainer_releases_its_memory_and_continues_where_it_stopped(tmp_path: Path):
    folder = tiny_model_folder(tmp_path, hidden=256, layers=8)
    trainable, other = trainer(folder, "bfloat16"), trainer(folder, "bfloat16")
    updates(trainable, 1), updates(other, 1)
    before = torch.cuda.memory_allocated()
    trainable.sleep()
    slept = torch.cuda.memory_allocated()
    weights = sum(p.numel() for p in trainable.backend.model.parameters())
    assert before - slept > 0.9 * weights * (2 + 4 + 8), "weights, master weights and Adam's two moments"
    trainable.wake()
    assert [r.metrics["loss"] for r in updates(trainable, 2)] == pytest.approx(
        [r.metrics["loss"] for r in updates(other, 2)], rel=1e-3
    )

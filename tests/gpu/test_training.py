"""What a trainer computes on a GPU, beside what it computes on a CPU."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from actors.attention import Documents, varlen_attention
from actors.batch import Batch
from actors.columns import Head
from actors.fused_kernels import ACTIVATIONS
from actors.heads import VocabularyHead
from actors.logits import LogitScaling, add_product
from actors.model import ModelSpec
from actors.model_worker import ModelWorker, UpdateReport
from actors.sharding import shard
from actors.specs import BackendSpec, OptimSpec
from actors.train_step import Clock
from tests.masked_nll import MaskedNll
from tests.unit.tiny import tiny_model_folder

pytestmark = pytest.mark.gpu

LENGTHS = [37, 1, 120, 64, 300, 8]
HEADS, HEAD_DIM = 8, 64
HALF = {"rtol": 2e-2, "atol": 2e-2}  # two roundings of a number around 1 to 8 bits
BUDGET = 256  # tokens per micro-batch: several of them
OPTIM = OptimSpec(learning_rate=1e-2, total_steps=8, adam_eps=1e-3, scheduler="constant", max_grad_norm=0.7)


BACKENDS: dict[str, dict[str, Any]] = {
    "single": {"kind": "single"},
    **{f"ZeRO {stage}": {"kind": "deepspeed", "zero_stage": stage} for stage in (0, 1, 2, 3)},
}
on_every_backend = pytest.mark.parametrize("backend", BACKENDS)


def needs_deepspeed(backend: str) -> None:
    if backend != "single":
        pytest.importorskip("deepspeed")


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


def test_float32_with_grouped_heads_never_holds_all_scores():
    lengths, heads, size = [2048] * 4, 14, 64
    inputs = [torch.randn(1, n, sum(lengths), size, device="cuda", requires_grad=True) for n in (heads, 2, 2)]
    documents = Documents(lengths, torch.device("cuda"))
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out, _ = varlen_attention(torch.nn.Module(), *inputs, None, documents=documents)
    out.sum().backward()
    scores = 4 * heads * 2048**2 * 4  # bytes, of all documents
    assert torch.cuda.max_memory_allocated() - before < 0.6 * scores


def test_float32_may_attend_in_bfloat16_by_the_kernel(tmp_path: Path):
    folder = str(tiny_model_folder(tmp_path, hidden=256))
    exact, half = (updates(started(ModelSpec(folder, attention_dtype=dtype)), 2) for dtype in (None, "bfloat16"))
    for ours, theirs in zip(half, exact, strict=True):
        assert ours.metrics["loss"] == pytest.approx(theirs.metrics["loss"], rel=5e-3)
        assert ours.metrics["loss"] != theirs.metrics["loss"]


@pytest.mark.parametrize("chunk_rows", [None, 100])
@pytest.mark.parametrize("needs", [frozenset(), frozenset({"entropy_grad"})])
def test_the_head_in_bfloat16_follows_the_one_in_float32(chunk_rows: int | None, needs: frozenset[str]):
    generator = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(384, 64, generator=generator), torch.randn(1000, 64, generator=generator) / 8
    targets, cotangent = torch.randint(0, 1000, (384,), generator=generator), torch.randn(384, generator=generator)
    found: list[list[Tensor]] = []
    for device, dtype in (("cpu", torch.float32), ("cuda", torch.bfloat16)):
        head = VocabularyHead(torch.nn.Linear(64, 1000, bias=False), LogitScaling())
        head.weight = torch.nn.Parameter(weight.bfloat16().to(device, dtype))
        states = hidden.bfloat16().to(device, dtype).requires_grad_()
        outputs = head(states, targets.to(device), 1.0, needs, chunk_rows)
        total = sum((values * cotangent.to(device)).sum() for values in outputs.values())
        assert isinstance(total, Tensor)
        total.backward()
        assert states.grad is not None and head.weight.grad is not None
        found.append([outputs["main"].detach(), states.grad, head.weight.grad])
    for exact, half in zip(*found, strict=True):
        assert (half.float().cpu() - exact).norm() < 0.01 * exact.norm()


def test_products_of_chunks_are_summed_in_float32():
    generator = torch.Generator("cuda").manual_seed(0)
    parts = [torch.randn(2, 64, 128, device="cuda", generator=generator).bfloat16() for _ in range(64)]
    total = torch.zeros(128, 128, device="cuda")
    for left, right in parts:
        add_product(total, left.t(), right)
    exact = sum(left.double().t() @ right.double() for left, right in parts)
    assert isinstance(exact, Tensor)
    assert (total - exact).norm() < 1e-5 * exact.norm(), "of products rounded to bfloat16 it would be 1e-3"


def batch() -> Batch:
    generator = np.random.default_rng(0)
    lengths = generator.integers(8, 90, size=16)
    total = int(lengths.sum())
    mask = generator.random(total) < 0.8
    starts = np.cumsum(lengths) - lengths
    mask[starts] = False  # nothing predicts a row's first token
    return Batch.build(lengths.tolist(), tokens=generator.integers(2, 64, size=total), mask=mask)


def started(model: ModelSpec, **backend: Any) -> ModelWorker:
    trainable = ModelWorker("policy", model, BackendSpec(**{"gpus": 1.0, "optim": OPTIM, **backend}), threads=2)
    assert trainable.ready().detail["device"] == "cuda"
    return trainable


def trainer(folder: Path, dtype: str) -> ModelWorker:
    return started(ModelSpec(str(folder), dtype=dtype, fused_kernels=False))


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


@on_every_backend
def test_a_sleeping_role_gives_its_memory_to_others_and_wakes_to_the_bit(tmp_path: Path, backend: str):
    needs_deepspeed(backend)
    folder = tiny_model_folder(tmp_path, hidden=256, layers=8)
    deterministic = started(ModelSpec(str(folder), dtype="bfloat16"), deterministic=True, **BACKENDS[backend])
    updates(deterministic, 1)
    state = {name: weight.clone() for name, weight in deterministic.backend.trained_weights()}
    awake = torch.cuda.memory_reserved()
    deterministic.sleep()
    weights = sum(weight.numel() for weight in state.values())
    assert awake - torch.cuda.memory_reserved() > 0.8 * weights * (2 + 4 + 8)
    deterministic.wake()
    for name, weight in deterministic.backend.trained_weights():
        assert torch.equal(weight, state[name])
    again = updates(deterministic, 1)[0]
    assert np.isfinite(again.metrics["loss"]) and again.grad_norm > 0


@on_every_backend
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_deterministic_trainer_resumes_to_the_bit(tmp_path: Path, backend: str, dtype: str):
    needs_deepspeed(backend)
    model = ModelSpec(str(tiny_model_folder(tmp_path, hidden=256)), dtype=dtype)
    settings = {"deterministic": True, **BACKENDS[backend]}
    straight = started(model, **settings)
    updates(straight, 2)
    (tmp_path / "state").mkdir()
    straight.save_state(str(tmp_path / "state"))
    ahead = updates(straight, 3)
    resumed = started(model, **settings)
    resumed.load_state(str(tmp_path / "state"))
    again = updates(resumed, 3)
    assert [(r.metrics["loss"], r.grad_norm) for r in again] == [(r.metrics["loss"], r.grad_norm) for r in ahead]
    assert len({r.metrics["loss"] for r in ahead}) == 3, "it learns, so equality says something"
    for (name, ours), (_, theirs) in zip(
        resumed.backend.trained_weights(), straight.backend.trained_weights(), strict=True
    ):
        assert torch.equal(ours, theirs), name


def rotated_by_torch(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = states.chunk(2, -1)
    return states * cos[:, None] + torch.cat((-second, first), -1) * sin[:, None]


def gradients(outputs: list[Tensor], inputs: list[Tensor]) -> list[Tensor]:
    generator = torch.Generator("cuda").manual_seed(1)
    given = [torch.randn(out.shape, device="cuda", generator=generator).to(out.dtype) for out in outputs]
    return list(torch.autograd.grad(outputs, inputs, given))


@pytest.mark.parametrize(("heads", "key_heads", "size"), [(14, 2, 64), (5, 5, 80), (32, 8, 128)])
def test_the_kernel_for_rotary_positions_equals_torch(heads: int, key_heads: int, size: int):
    from actors.layer_kernels import rotate

    generator = torch.Generator("cuda").manual_seed(0)
    query, key = (
        torch.randn(1, 333, n, size, device="cuda", generator=generator).transpose(1, 2).requires_grad_()
        for n in (heads, key_heads)
    )
    cos, sin = (torch.randn(1, 333, size, device="cuda", generator=generator) for _ in range(2))
    expected = [rotated_by_torch(states, cos, sin) for states in (query, key)]
    found = list(rotate(query, key, cos, sin))
    for ours, theirs in zip(
        found + gradients(found, [query, key]), expected + gradients(expected, [query, key]), strict=True
    ):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("activation", range(len(ACTIVATIONS)))
def test_the_kernel_for_gated_activations_equals_torch(activation: int):
    from actors.layer_kernels import gated

    generator = torch.Generator("cuda").manual_seed(0)
    gate, up = (torch.randn(333, 4864, device="cuda", generator=generator).requires_grad_() for _ in range(2))
    expected = [ACTIVATIONS[activation](gate) * up]
    expected += gradients(expected, [gate, up])
    own = [gate.detach().clone().requires_grad_(), up.detach().clone().requires_grad_()]
    products = [each * 1 for each in own]  # it overwrites what it is given
    found = [gated(products[0], products[1], activation)]
    found += gradients(found, own)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_the_fused_kernels_compute_the_same_model(tmp_path: Path):
    folder = str(tiny_model_folder(tmp_path, hidden=256))
    plain, fused = (started(ModelSpec(folder, dtype="bfloat16", fused_kernels=wanted)) for wanted in (False, True))
    assert plain.ready().detail["kernels"] == ""
    assert fused.ready().detail["kernels"] == "norms, activations, rotary, head"
    for ours, theirs in zip(updates(fused, 3), updates(plain, 3), strict=True):
        assert ours.metrics["loss"] == pytest.approx(theirs.metrics["loss"], rel=5e-3)
        assert ours.grad_norm == pytest.approx(theirs.grad_norm, rel=0.05)
    on_cpu = ModelWorker("reference", ModelSpec(folder), BackendSpec(), threads=2)
    on_cpu.ready()  # in the process in which the kernels are: it must keep its own layers
    [(_, part)] = shard(batch(), 1, BUDGET)
    _, block = on_cpu.infer(part, ("ref_logps",), Head.VOCABULARY, 1.0, True)
    assert np.isfinite(block["ref_logps"]).all() and block["ref_logps"].min() < 0


def test_a_part_of_an_update_lasts_until_the_gpu_is_done_with_it(tmp_path: Path):
    """The GPU spins for a number of its cycles, for which no GPU takes less than this time; the call itself returns at
    once. Compares no two clocks."""
    cycles, fastest_hz = 4 * 10**8, 4e9
    clock = Clock(torch.device("cuda"))
    with clock.measure("forward"):
        torch.cuda._sleep(cycles)  # pyright: ignore[reportPrivateUsage]
    assert clock.seconds["forward"] >= cycles / fastest_hz
    assert clock.seconds["backward"] == 0.0, "of what was not measured"
    trainable = trainer(tiny_model_folder(tmp_path, hidden=256, layers=8), "bfloat16")
    [report] = updates(trainable, 1)
    assert {"forward", "backward", "step"} <= {part for part, seconds in report.seconds.items() if seconds > 0}

"""What a training step costs on one GPU: tokens a second, model FLOPs utilisation and peak memory, case by case.

    python tests/benchmarks/on_gpu.py
    python tests/benchmarks/on_gpu.py --cases '{"batch": 64}' '{"method": "dpo"}' --trl padding-free plain

The model is of Qwen2's 0.5B shape with random weights; lengths are 2048 x Beta(0.9, 2.1). The trainer runs in this
process, without Ray. Each of `BATCHES` batches is seen once before any is timed, because a shape that is new to the
allocator takes longer; a step's time is wall time and ends when its metrics are on the host. `--trl` measures TRL
beside it, in a process of its own: padded, and without padding over the same attention kernel. Prints a table, then
one JSON line per case.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from processes import run
from rich.console import Console
from rich.table import Table

from actors.batch import Batch
from actors.columns import Head
from actors.model import ModelSpec
from actors.model_worker import ModelWorker
from actors.sharding import shard
from actors.specs import BackendSpec, OptimSpec
from orchestrator.losses.objective import LossObjective
from orchestrator.methods import build

SHAPE: dict[str, Any] = {
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32_768,
    "tie_word_embeddings": True,
}
LONGEST, BATCHES, ROUNDS = 2048, 4, 3
GIB = 2**30
TRL_TIMEOUT_S = 300.0
WAYS = ("padding-free", "plain")


@dataclass(frozen=True)
class Case:
    """One line of the table. `batch`: rows of sft, pairs of dpo. `model` and `backend`: further fields of `ModelSpec`
    and `BackendSpec`."""

    method: str = "sft"
    vocabulary: int = 32_000
    batch: int = 16
    budget: int = 32_768
    dtype: str = "bfloat16"
    model: dict[str, Any] = field(default_factory=dict)
    backend: dict[str, Any] = field(default_factory=dict)
    shape: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        extra = {**self.model, **self.backend, **self.shape}
        said = " ".join(f"{key}={value}" for key, value in extra.items())
        return f"{self.method} {self.vocabulary // 1000}k, batch {self.batch}, budget {self.budget:,} {said}".strip()


TABLE = (
    Case(),
    Case(vocabulary=151_936),
    Case(batch=64),
    Case(batch=64, budget=65_536),
    Case(model={"fused_kernels": False}),
    Case(model={"gradient_checkpointing": True}),
    Case(method="dpo"),
    Case(method="dpo", vocabulary=151_936),
    Case(backend={"kind": "deepspeed", "zero_stage": 2}),
)


def lengths_of(case: Case, index: int) -> np.ndarray:
    """Tokens of each row of batch `index`."""
    random = np.random.default_rng(1000 * index + case.batch)
    rows = case.batch * (2 if case.method == "dpo" else 1)
    return np.maximum(8, (LONGEST * random.beta(0.9, 2.1, rows)).astype(np.int64))


def batch_of(case: Case, index: int) -> Batch:
    lengths = lengths_of(case, index)
    random = np.random.default_rng(index)
    mask = np.ones(lengths.sum(), np.bool_)
    mask[np.cumsum(lengths) - lengths] = False
    columns: dict[str, Any] = {"tokens": random.integers(2, case.vocabulary, lengths.sum()), "mask": mask}
    columns["group"] = np.arange(len(lengths)) // (2 if case.method == "dpo" else 1)
    if case.method == "dpo":
        columns["preferred"] = np.arange(len(lengths)) % 2 == 0
    return Batch.build(lengths, **columns)


def folder_of(case: Case, place: Path) -> Path:
    """A model of the shape with random weights, and a tokenizer that nobody asks."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    shape = {**SHAPE, **case.shape}
    folder = place / f"v{case.vocabulary}-{hash(json.dumps(shape)) % 10**6}"
    if not folder.exists():
        torch.manual_seed(0)
        with torch.device("cuda"):
            model = Qwen2ForCausalLM(Qwen2Config(vocab_size=case.vocabulary, **shape))
        model.to(torch.bfloat16).save_pretrained(folder)
        del model
    return folder


def flops(case: Case, lengths: np.ndarray) -> float:
    """Of a step that learns from these rows, forward and backward, each row's causal attention included; what
    checkpointing computes again is not counted, nor is a reference."""
    shape = {**SHAPE, **case.shape}
    hidden, layers, heads = shape["hidden_size"], shape["num_hidden_layers"], shape["num_attention_heads"]
    keys = 2 * shape["num_key_value_heads"] * hidden // heads
    layer = hidden * (2 * hidden + keys + 3 * shape["intermediate_size"])
    per_token = 6 * (layers * layer + hidden * case.vocabulary)
    return float(per_token * lengths.sum() + 6 * layers * hidden * (lengths.astype(np.float64) ** 2).sum())


def gemm_rate() -> float:
    """FLOP/s of a large bfloat16 product."""
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    for _ in range(3):
        a @ b
    torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(20):
        a @ b
    torch.cuda.synchronize()
    return 20 * 2 * 8192**3 / (time.perf_counter() - began)


def measure(case: Case, place: Path) -> dict[str, Any]:
    """Tokens a second over `ROUNDS` passes over the batches."""
    folder = str(folder_of(case, place))
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    optim = OptimSpec(learning_rate=1e-6, total_steps=10_000, scheduler="constant")
    trained = ModelWorker(
        "policy",
        ModelSpec(folder, dtype=case.dtype, **case.model),
        BackendSpec(optim=optim, gpus=1.0, **case.backend),
        1,
    )
    kernels = trained.ready().detail.get("kernels")
    stages = list(build(case.method, {}))
    objective, reference = LossObjective.of(stages[-1]), None
    if case.method == "dpo":
        model = {key: value for key, value in case.model.items() if key != "gradient_checkpointing"}
        reference = ModelWorker("reference", ModelSpec(folder, dtype=case.dtype, **model), BackendSpec(gpus=1.0), 1)
        reference.ready()

    def step(index: int) -> dict[str, float]:
        batch = batch_of(case, index)
        if reference is not None:
            [(rows, part)] = shard(batch, 1, case.budget)
            _, block = reference.infer(part, ("ref_logps",), Head.VOCABULARY, 1.0, True)
            batch = batch.select(rows).with_columns(ref_logps=block["ref_logps"])
        [(_, part)] = shard(batch, 1, case.budget, keep_groups=objective.keep_groups)
        return trained.update(part, objective, 1.0, "u").seconds

    for index in range(BATCHES):
        step(index)
    step(0)
    times: list[float] = []
    parts: list[dict[str, float]] = []
    for _ in range(ROUNDS):
        for index in range(BATCHES):
            began = time.perf_counter()
            parts.append(step(index))
            times.append(time.perf_counter() - began)
    tokens = [int(lengths_of(case, index).sum()) for index in range(BATCHES)]
    work = [flops(case, lengths_of(case, index)) for index in range(BATCHES)]
    by_batch = [statistics.median(times[index::BATCHES]) for index in range(BATCHES)]
    found = {
        "tokens_per_s": sum(tokens) / sum(by_batch),
        "flops_per_s": sum(work) / sum(by_batch),
        "step_ms": 1000 * sum(by_batch) / BATCHES,
        "tokens": sum(tokens) / BATCHES,
        "peak_gib": torch.cuda.max_memory_allocated() / GIB,
        "kernels": kernels,
        "parts_ms": {part: 1000 * statistics.median(each[part] for each in parts) for part in parts[0]},
    }
    trained.close()
    if reference is not None:
        reference.close()
    return found


def of_trl(case: Case, place: Path, way: str) -> dict[str, Any]:
    job = {
        "model": str(folder_of(case, place)),
        "method": case.method,
        "batch": case.batch,
        "vocabulary": case.vocabulary,
        "way": way,
        "rounds": ROUNDS,
        "lengths": [lengths_of(case, index).tolist() for index in range(BATCHES)],
    }
    command = [sys.executable, "-W", "ignore", Path(__file__).with_name("trl_on_gpu.py"), json.dumps(job)]
    output = run(command, {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}, TRL_TIMEOUT_S).output
    found = json.loads(output.strip().splitlines()[-1])
    tokens = [sum(row) for row in job["lengths"]]
    work = [flops(case, np.asarray(row)) for row in job["lengths"]]
    return {
        "tokens_per_s": sum(tokens) / sum(found["seconds"]),
        "flops_per_s": sum(work) / sum(found["seconds"]),
        "step_ms": 1000 * sum(found["seconds"]) / BATCHES,
        "peak_gib": found["peak_gib"],
    }


def main() -> None:
    options = _options()
    cases = [Case(**json.loads(each)) for each in options.cases] or list(TABLE)
    rate = gemm_rate()
    results: list[dict[str, Any]] = []

    def add(name: str, case: Case, found: dict[str, Any]) -> None:
        results.append({"name": name, "case": asdict(case), "mfu": found.get("flops_per_s", 0) / rate, **found})
        print(json.dumps(results[-1]), flush=True)

    print(json.dumps({"card": torch.cuda.get_device_name(), "gemm_tflops": rate / 1e12, "torch": torch.__version__}))
    with tempfile.TemporaryDirectory() as place:
        for case in cases:
            add(f"troupe {case.name}", case, measure(case, Path(place)))
        gc.collect()
        torch.cuda.empty_cache()
        for case in unlike(cases) if options.trl else ():
            for way in options.trl if case.method == "sft" else ("plain",):
                name = f"trl {way}, {case.method} {case.vocabulary // 1000}k, batch {case.batch}"
                add(name, case, of_trl(case, Path(place), way))
    show(results, rate)


def unlike(cases: list[Case]) -> list[Case]:
    """The cases that differ in what TRL is given."""
    found = {(each.method, each.vocabulary, each.batch): replace(each, model={}, backend={}) for each in cases}
    return list(found.values())


def show(results: list[dict[str, Any]], rate: float) -> None:
    table = Table("case", "thousand tokens/s", "MFU", "step ms", "peak GiB", title=torch.cuda.get_device_name())
    for each in results:
        table.add_row(
            each["name"],
            f"{each['tokens_per_s'] / 1000:.1f}",
            f"{each['mfu']:.0%}",
            f"{each['step_ms']:.0f}",
            f"{each['peak_gib']:.1f}",
        )
    Console(width=160).print(table)
    print(f"MFU is of {rate / 1e12:.0f} TFLOP/s, an 8192 x 8192 x 8192 product in bfloat16 on this card")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="*", default=[], help="JSON objects with fields of `Case`; default: the table")
    parser.add_argument(
        "--trl", nargs="*", choices=WAYS, help="measure TRL, too, which must be installed beside Troupe"
    )
    return parser.parse_args()


if __name__ == "__main__":
    main()

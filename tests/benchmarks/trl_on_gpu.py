"""TRL on one GPU, for `on_gpu.py`: one job, one JSON line with the seconds of a step of each batch.

`plain` pads; `padding-free` flattens a batch and attends by PyTorch's kernel for variable lengths, which transformers
does not offer by a name: it is registered here.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface, AutoModelForCausalLM, TrainerCallback
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from tests.unit.tiny import tiny_tokenizer

KERNEL = "torch_varlen"
LETTERS = "abcdefghijklmnopqrstuvwxyz"  # of the tokenizer, which has one token per character
_bounds: tuple[int, Any, int] = (0, None, 0)  # of the batch that is being computed


def packed_attention(module: Any, query: Any, key: Any, value: Any, mask: Any, **options: Any) -> Any:
    global _bounds
    positions = options["position_ids"]
    if _bounds[0] != id(positions):
        starts = (positions[0] == 0).nonzero()[:, 0].int()
        bounds = torch.cat([starts, starts.new_tensor([positions.shape[1]])])
        _bounds = id(positions), bounds, int(bounds.diff().max())
    _, bounds, longest = _bounds
    q, k, v = (each[0].transpose(0, 1) for each in (query, key, value))
    out = varlen_attn(q, k, v, bounds, bounds, longest, longest, window_size=(-1, 0), enable_gqa=True)
    return out[None], None


class Steps(TrainerCallback):
    def __init__(self) -> None:
        self.durations: list[float] = []

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        torch.cuda.synchronize()
        self.began = time.perf_counter()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        torch.cuda.synchronize()
        self.durations.append(time.perf_counter() - self.began)


def rows_of(job: dict[str, Any]) -> Dataset:
    random = np.random.default_rng(0)
    rows: list[dict[str, Any]] = []
    passes = 1 + job["rounds"]
    for lengths in job["lengths"] * passes:
        texts = [random.integers(2, job["vocabulary"], length).tolist() for length in lengths]
        if job["method"] == "sft":
            rows += [{"input_ids": text} for text in texts]
        else:
            spelled = ["".join(LETTERS[token % len(LETTERS)] for token in text) for text in texts]
            rows += [
                {"prompt": a[:4], "chosen": a[4:-1], "rejected": b[4:-1]}  # it appends the end of the sequence
                for a, b in zip(spelled[::2], spelled[1::2], strict=True)
            ]
    return Dataset.from_list(rows)


def main() -> None:
    job = json.loads(sys.argv[1])
    packed = job["way"] == "padding-free"
    attention = KERNEL if packed else "sdpa"
    AttentionInterface.register(KERNEL, packed_attention)
    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.bfloat16, attn_implementation=attention)
    batches, steps, rows = len(job["lengths"]), Steps(), rows_of(job)
    with tempfile.TemporaryDirectory() as output:
        common: dict[str, Any] = {
            "output_dir": output,
            "max_steps": batches * (1 + job["rounds"]),
            "per_device_train_batch_size": job["batch"],
            "gradient_checkpointing": False,
            "learning_rate": 1e-6,
            "bf16": False,  # the model's own dtype is computed in
            "logging_steps": 1000,
            "save_strategy": "no",
            "report_to": [],
            "disable_tqdm": True,
            "train_sampling_strategy": "sequential",
            "max_length": None if packed else 2048,
        }
        given = {
            "model": model, "train_dataset": rows, "processing_class": tiny_tokenizer(), "callbacks": [steps],
        }  # fmt: skip
        if job["method"] == "sft":
            trainer: Any = SFTTrainer(args=SFTConfig(**common, padding_free=packed), **given)
        else:
            trainer = DPOTrainer(args=DPOConfig(**common), **given)
        torch.cuda.reset_peak_memory_stats()
        trainer.train()
    timed = steps.durations[batches:]
    seconds = [statistics.median(timed[index::batches]) for index in range(batches)]
    print(json.dumps({"seconds": seconds, "peak_gib": torch.cuda.max_memory_allocated() / 2**30}))


if __name__ == "__main__":
    main()

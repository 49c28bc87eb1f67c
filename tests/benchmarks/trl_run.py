"""One training by TRL, timed by part; runs inside the environment that `against_trl.py` makes. Prints one JSON line.

The time of a part is the wall time inside TRL's own function for it; `rest` is what no part claims.
"""

from __future__ import annotations

import json
import sys
import time
from collections import defaultdict
from typing import Any

import torch
from datasets import Dataset
from length_reward import length_reward
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer

seconds: dict[str, float] = defaultdict(float)


def timed(owner: type, name: str, part: str) -> None:
    function = getattr(owner, name)

    def wrapper(*args: Any, **kwargs: Any) -> Any:
        began = time.perf_counter()
        try:
            return function(*args, **kwargs)
        finally:
            seconds[part] += time.perf_counter() - began

    setattr(owner, name, wrapper)


class Steps(TrainerCallback):
    """Seconds of each step; the parts are cleared after the warm-up."""

    def __init__(self, warmup: int) -> None:
        self.warmup, self.durations, self.began = warmup, [], 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.warmup:
            seconds.clear()
        self.began = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.durations.append(time.perf_counter() - self.began)


def main() -> None:
    job = json.loads(sys.argv[1])
    torch.set_num_threads(job["threads"])
    dtype = getattr(torch, job["dtype"])
    tokenizer = AutoTokenizer.from_pretrained(job["model"])
    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=dtype, use_cache=True)
    rows = Dataset.from_json(job["data"])
    steps = Steps(job["warmup"])
    common = {
        "output_dir": job["output"],
        "max_steps": job["warmup"] + job["steps"],
        "per_device_train_batch_size": job["rows"],
        "gradient_accumulation_steps": 1,
        "gradient_checkpointing": False,
        "learning_rate": 1e-6,
        "use_cpu": True,
        "bf16": False,  # the model's own dtype is computed in, as on the other side
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "dataloader_num_workers": 0,
        "seed": 0,
    }
    if job["method"] == "sft":
        config = SFTConfig(**common, max_length=job["max_length"])
        trainer = SFTTrainer(model, args=config, train_dataset=rows, processing_class=tokenizer, callbacks=[steps])
    else:
        config = GRPOConfig(
            **common,
            num_generations=job["samples"],
            max_completion_length=job["max_tokens"],
            beta=job["beta"],
            temperature=1.0,
        )
        timed(GRPOTrainer, "_generate", "generate")
        timed(GRPOTrainer, "_calculate_rewards", "score")
        timed(GRPOTrainer, "_get_per_token_logps_and_entropies", "forward")
        trainer = GRPOTrainer(
            model,
            reward_funcs=length_reward,
            args=config,
            train_dataset=rows,
            processing_class=tokenizer,
            callbacks=[steps],
        )
    trainer.train()
    counted = steps.durations[job["warmup"] :]
    history = [entry for entry in trainer.state.log_history if "num_tokens" in entry]
    tokens = (history[-1]["num_tokens"] - history[job["warmup"] - 1]["num_tokens"]) / len(counted)
    lengths = [entry["completions/mean_length"] for entry in history if "completions/mean_length" in entry]
    parts = {part: value / len(counted) for part, value in seconds.items()}
    print(
        json.dumps(
            {
                "step_s": sum(counted) / len(counted),
                "steps_s": counted,
                "tokens": tokens,
                "parts": parts,
                "mean_length": sum(lengths) / len(lengths) if lengths else None,
            }
        )
    )


if __name__ == "__main__":
    main()

"""Trainings by TRL, one after the other, timed by phase; runs inside the environment that `against_trl.py` makes.
Prints one JSON line, with a result for each.

The time of a phase is the wall time inside TRL's own functions for it, phases inside it left out; `rest` is what no
phase claims. Padding is counted where the models are called: tokens that the attention mask leaves out.
"""

from __future__ import annotations

import json
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from datasets import Dataset
from length_reward import length_reward
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import (
    DistillationConfig,
    DistillationTrainer,
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    KTOConfig,
    KTOTrainer,
    SFTConfig,
    SFTTrainer,
)
from trl.experimental.gkd import GKDConfig, GKDTrainer

GENERATE, SCORE, LOGPS, UPDATE = "generate", "score", "logps", "update"


class Clock:
    """Seconds by phase. Phases nest: the time of an inner one is not the outer one's."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._open: list[str] = []
        self._since = time.perf_counter()

    @property
    def phase(self) -> str | None:
        return self._open[-1] if self._open else None

    def begin(self, phase: str) -> None:
        self._charge()
        self._open.append(phase)

    def end(self) -> None:
        self._charge()
        self._open.pop()

    def clear(self) -> None:
        self._charge()
        self.seconds.clear()

    def _charge(self) -> None:
        now = time.perf_counter()
        if self._open:
            self.seconds[self._open[-1]] += now - self._since
        self._since = now


class Tokens:
    """What goes through the models: tokens of text, and all that is computed with them. Decoding is counted apart: a
    sequence that has ended is computed until the last one has."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self.clear()

    def clear(self) -> None:
        self.real = self.computed = self.decoded = 0

    def count(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        tokens, mask = kwargs.get("input_ids"), kwargs.get("attention_mask")
        if tokens is None:  # TRL's distillation calls the decoder itself, inside a call of the model without tokens
            return
        if self._clock.phase == GENERATE:
            self.decoded += len(tokens)
            return
        self.computed += tokens.numel()
        self.real += tokens.numel() if mask is None else int(mask.sum())


class Steps(TrainerCallback):
    """Seconds of each step; what was counted is cleared after the warm-up."""

    def __init__(self, warmup: int, clock: Clock, tokens: Tokens) -> None:
        self.warmup, self.clock, self.tokens = warmup, clock, tokens
        self.durations: list[float] = []
        self.began = 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.warmup:
            self.clock.clear()
            self.tokens.clear()
        self.began = time.perf_counter()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.clock.begin(UPDATE)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.clock.end()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.durations.append(time.perf_counter() - self.began)


def timed(owner: Any, name: str, phase: Callable[[], str], clock: Clock) -> None:
    function = getattr(owner, name)

    @wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        clock.begin(phase())
        try:
            return function(*args, **kwargs)
        finally:
            clock.end()

    setattr(owner, name, wrapper)


def time_phases(trainer: Any, clock: Clock) -> None:
    """A pass without gradient is `logps` (of the reference, or of the policy for an estimate), one with it `update`."""
    phases = {"_generate": GENERATE, "_calculate_rewards": SCORE, "_compute_kl_logps": LOGPS, "compute_loss": UPDATE}
    phases["generate_on_policy_outputs"] = GENERATE
    for name, phase in phases.items():
        if hasattr(trainer, name):
            timed(trainer, name, lambda phase=phase: phase, clock)
    if hasattr(trainer, "_get_per_token_logps_and_entropies"):
        by_gradient = lambda: UPDATE if torch.is_grad_enabled() else LOGPS  # noqa: E731
        timed(trainer, "_get_per_token_logps_and_entropies", by_gradient, clock)
    if getattr(trainer, "ref_model", None) is not None:
        timed(trainer.ref_model, "forward", lambda: LOGPS, clock)
    timed(trainer.accelerator, "backward", lambda: UPDATE, clock)
    timed(trainer.accelerator, "clip_grad_norm_", lambda: UPDATE, clock)


def make_trainer(job: dict[str, Any], model: Any, tokenizer: Any, rows: Dataset, callback: TrainerCallback) -> Any:
    common = {
        "output_dir": job["output"],
        "max_steps": job["warmup"] + job["steps"],
        "per_device_train_batch_size": job["items"],
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
    given = {"model": model, "train_dataset": rows, "processing_class": tokenizer, "callbacks": [callback]}
    match job["method"]:
        case "sft":
            return SFTTrainer(args=SFTConfig(**common | _batching(job, rows)), **given)
        case "dpo":
            in_order = {"train_sampling_strategy": "sequential", "max_length": job["max_length"], "beta": job["beta"]}
            return DPOTrainer(args=DPOConfig(**common, **in_order), **given)
        case "kto":
            return KTOTrainer(args=KTOConfig(**common, max_length=job["max_length"], beta=job["beta"]), **given)
        case "grpo":
            sampled = {"num_generations": job["samples"], "max_completion_length": job["max_tokens"]}
            sampled["shuffle_dataset"] = False
            config = GRPOConfig(
                **common | {"per_device_train_batch_size": job["rows"]}, **sampled, beta=job["beta"], temperature=1.0
            )
            return GRPOTrainer(args=config, reward_funcs=length_reward, **given)
        case "on_policy_distillation":
            sampled = {"max_completion_length": job["max_tokens"], "shuffle_dataset": False, "temperature": 1.0}
            config = DistillationConfig(**common, **sampled, beta=job["beta"])
            return DistillationTrainer(args=config, teacher_model=teacher(job), **given)
        case "gkd":
            sampled = {"max_new_tokens": job["max_tokens"], "temperature": 1.0, "lmbda": 1.0}
            in_order = {"train_sampling_strategy": "sequential", "max_length": job["max_length"]}
            config = GKDConfig(**common, **sampled, **in_order, beta=job["beta"])
            tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
            return GKDTrainer(args=config, teacher_model=teacher(job), **given | {"train_dataset": rows.map(answered)})
    raise ValueError(f"no such method: {job['method']}")


def teacher(job: dict[str, Any]) -> Any:
    return AutoModelForCausalLM.from_pretrained(job["model"], dtype=getattr(torch, job["dtype"]))


def answered(row: dict[str, Any]) -> dict[str, Any]:
    """A prompt as TRL's GKD takes it. The answer is never trained on: every completion is sampled."""
    return {"messages": [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": "."}]}


def _batching(job: dict[str, Any], rows: Dataset) -> dict[str, Any]:
    """Plain batches are taken in the data's order. A packed row is `max_length` tokens of several examples: so many of
    them are a batch that a step has about as many tokens as a plain one."""
    options: dict[str, Any] = {"max_length": job["max_length"]}
    match job["batching"]:
        case "plain":
            return options | {"train_sampling_strategy": "sequential"}
        case "group_by_length":
            return options | {"train_sampling_strategy": "group_by_length"}
        case "packing":
            mean = sum(len(row["prompt"]) + len(row["completion"]) + 1 for row in rows) / len(rows)
            packs = max(1, round(job["rows"] * mean / job["max_length"]))
            return options | {"packing": True, "packing_strategy": "bfd", "per_device_train_batch_size": packs}
    raise ValueError(f"no such batching: {job['batching']}")


def main() -> None:
    jobs = json.loads(sys.argv[1])
    torch.set_num_threads(jobs[0]["threads"])
    print(json.dumps([train(job) for job in jobs]))


def train(job: dict[str, Any]) -> dict[str, Any]:
    tokenizer = AutoTokenizer.from_pretrained(job["model"])
    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=getattr(torch, job["dtype"]), use_cache=True)
    clock = Clock()
    tokens = Tokens(clock)
    steps = Steps(job["warmup"], clock, tokens)
    trainer = make_trainer(job, model, tokenizer, Dataset.from_json(job["data"]), steps)
    time_phases(trainer, clock)
    for module in {trainer.model, getattr(trainer, "ref_model", None)} - {None}:
        module.register_forward_pre_hook(tokens.count, with_kwargs=True)
    trainer.train()
    return summary(job, trainer, steps, clock, tokens)


def summary(job: dict[str, Any], trainer: Any, steps: Steps, clock: Clock, tokens: Tokens) -> dict[str, Any]:
    counted = steps.durations[job["warmup"] :]
    history = [entry for entry in trainer.state.log_history if "num_tokens" in entry]
    counts = [entry["num_tokens"] for entry in history]
    seen = counts[-1] - counts[job["warmup"] - 1] if counts else tokens.real
    lengths = [entry["completions/mean_length"] for entry in history if "completions/mean_length" in entry]
    phases = {phase: clock.seconds[phase] / len(counted) for phase in (GENERATE, SCORE, LOGPS, UPDATE)}
    step_s = sum(counted) / len(counted)
    mean_length = sum(lengths) / len(lengths) if lengths else None
    sampled = sum(lengths[job["warmup"] :]) * job["rows"]
    return {
        "step_s": step_s,
        "tokens": seen / len(counted),
        "phases": {**phases, "publish": 0.0, "rest": step_s - sum(phases.values())},
        "padding": 1 - tokens.real / tokens.computed if tokens.computed else 0.0,  # not counted
        "decoded_in_vain": 1 - sampled / tokens.decoded if tokens.decoded and lengths else None,
        "mean_length": mean_length,
    }


if __name__ == "__main__":
    main()

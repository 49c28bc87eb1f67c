"""Troupe's side of a comparison: one run of a workload, and what its steps cost."""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml
from processes import Ran, run
from workload import DISTILLING, SAMPLING, Job

HERE = Path(__file__).parent
TIMEOUT_S = 1800.0
PHASES = ("generate", "score", "logps", "update", "publish", "rest")
Figures = dict[str, Any]


def run_troupe(job: Job, checkout: Path = HERE.parent.parent) -> Figures:
    """Means over the counted steps. `checkout`: of Troupe's source."""
    with tempfile.TemporaryDirectory() as folder:
        data, recipe = Path(folder) / "data.jsonl", Path(folder) / "recipe.yaml"
        job.write(data)
        recipe.write_text(yaml.safe_dump(_recipe(job, data, folder)))
        ran = run([Path(sys.executable).parent / "troupe", "run", recipe], {"PYTHONPATH": str(checkout)}, TIMEOUT_S)
        (metrics,) = Path(folder).glob("bench-*/metrics.jsonl")
        lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    steps = [line for line in lines if "step_time" in line][job.warmup :]

    def mean(name: str) -> float:
        return sum(line.get(name, 0.0) for line in steps) / len(steps)

    given = job.tokens()
    update = {name: mean(f"time/{name}") for name in ("statistics", "forward", "backward", "step")}
    phases = {
        "generate": mean("time/generate"),
        "score": mean("time/score"),
        "logps": mean("time/batch_stages" if job.method in SAMPLING else "time/collect"),
        "update": sum(update.values()),
        "publish": mean("time/publish"),
    }
    return {
        "step_s": mean("step_time"),
        "tokens": mean("num_tokens") if given is None else sum(given) / len(given),
        "phases": {**phases, "rest": mean("step_time") - sum(phases.values())},
        "update": update,
        "padding": mean("padding_share"),
        "mean_length": mean("completions/mean_length") or None,
        **around(ran),
    }


def around(ran: Ran) -> Figures:
    return {"peak_gib": ran.peak_gib, "others_cores": ran.others_cores}


def median(runs: list[Figures]) -> Figures:
    """Key by key; nested dictionaries too; None where a side has no such figure."""
    merged: Figures = {}
    for key in runs[0]:
        values = [figures[key] for figures in runs]
        if isinstance(values[0], dict):
            merged[key] = median(values)
        else:
            merged[key] = None if values[0] is None else statistics.median(values)
    return merged


def _recipe(job: Job, data: Path, folder: str) -> Figures:
    recipe: Figures = {
        "name": "bench",
        "output": folder,
        "model": {"path": f"example:skewed-{job.size}", "dtype": job.dtype},
        "method": job.method,
        "data": {"path": str(data), "max_length": job.max_length, "shuffle": False},
        "train": {
            "steps": job.warmup + job.steps,
            "batch_size": job.items,
            "learning_rate": 1e-6,
            "token_budget": 4096,
        },
        "logging": {"completions_every": None, "trackers": [], "ray_metrics": False},
        "cluster": {"num_cpus": 8},
    }
    if job.method in SAMPLING:
        recipe["sampling"] = {"max_tokens": job.max_tokens}
        recipe["roles"] = {"rollout": {"workers": job.threads, "threads": 1, "kv_cache_gib": 0.25}}
    if job.method in DISTILLING:
        recipe["options"] = {"beta": job.beta}
        recipe["roles"]["teacher"] = {"model": recipe["model"]["path"]}
    elif job.method == "grpo":
        recipe["options"] = {"num_generations": job.samples, "beta": job.beta}
        recipe["rewards"] = [{"fn": f"{HERE / 'length_reward.py'}:length_reward"}]
    elif job.method != "sft":
        recipe["options"] = {"beta": job.beta}
    return recipe

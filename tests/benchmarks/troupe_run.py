"""Troupe's side of a comparison: one run with a phase for each workload, and what the steps of each cost."""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from processes import Ran, run
from workload import DISTILLING, SAMPLING, Job

HERE = Path(__file__).parent
TIMEOUT_S = 1800.0
PHASES = ("generate", "score", "logps", "update", "publish", "rest")
Figures = dict[str, Any]


def run_troupe(jobs: Sequence[Job], checkout: Path = HERE.parent.parent) -> list[Figures]:
    """Means over the counted steps of each job. The jobs differ in nothing but their method, so that one run can have a
    phase for each: what starts is started once. Memory and other programs are those of the run. `checkout`: of Troupe's
    source."""
    with tempfile.TemporaryDirectory() as folder:
        recipe = Path(folder) / "recipe.yaml"
        recipe.write_text(yaml.safe_dump(_recipe(jobs, Path(folder))))
        ran = run([Path(sys.executable).parent / "troupe", "run", recipe], {"PYTHONPATH": str(checkout)}, TIMEOUT_S)
        (metrics,) = Path(folder).glob("bench-*/metrics.jsonl")
        lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    steps = [line for line in lines if "step_time" in line]
    return [
        {**_figures(job, [line for line in steps if line["phase"] == job.method][job.warmup :]), **around(ran)}
        for job in jobs
    ]


def _figures(job: Job, steps: list[Figures]) -> Figures:
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


def _recipe(jobs: Sequence[Job], folder: Path) -> Figures:
    first, methods = jobs[0], {job.method for job in jobs}
    recipe: Figures = {
        "name": "bench",
        "output": str(folder),
        "model": {"path": f"example:skewed-{first.size}", "dtype": first.dtype},
        "phases": {job.method: _phase(job, folder / f"{job.method}.jsonl") for job in jobs},
        "roles": {},
        "logging": {"completions_every": None, "trackers": [], "ray_metrics": False},
        "cluster": {"num_cpus": 8},
    }
    if methods & set(SAMPLING):
        recipe["roles"]["rollout"] = {"workers": first.threads, "threads": 1}
    if methods & set(DISTILLING):
        recipe["roles"]["teacher"] = {"model": recipe["model"]["path"]}
    if "grpo" in methods:
        recipe["rewards"] = [{"fn": f"{HERE / 'length_reward.py'}:length_reward"}]
    return recipe


def _phase(job: Job, data: Path) -> Figures:
    job.write(data)
    phase: Figures = {
        "method": job.method,
        "data": {"path": str(data), "max_length": job.max_length, "shuffle": False},
        "train": {
            "steps": job.warmup + job.steps,
            "batch_size": job.items,
            "learning_rate": 1e-6,
            "token_budget": 4096,
        },
    }
    if job.method in SAMPLING:
        phase["sampling"] = {"max_tokens": job.max_tokens}
    if job.method == "grpo":
        phase["options"] = {"num_generations": job.samples, "beta": job.beta}
    elif job.method != "sft":
        phase["options"] = {"beta": job.beta}
    return phase

"""Troupe beside TRL: the same generated model, data, batch, dtype and cores, in turn, on a length-skewed workload.

    python tests/benchmarks/against_trl.py [--sizes 2.6m 26m] [--dtypes float32] [--methods sft grpo] [--rounds 2]

TRL 1.16.0 is installed into an environment of its own (`.cache/trl`) that shares every other package with this one, so
both sides compute with the same torch. Prints a table and, last, one line of JSON. Figures are medians over steps; what
counts is the ratio, since both sides ran on the same machine within minutes.
"""

from __future__ import annotations

import argparse
import json
import os
import site
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import venv
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
import yaml
from rich.console import Console
from rich.table import Table

from orchestrator.examples import dataset, model_folder

HERE = Path(__file__).parent
REPOSITORY = HERE.parent.parent
TRL = "trl==1.16.0"
CORES = os.cpu_count() or 1
TIMEOUT_S = 1800


@dataclass(frozen=True)
class Job:
    """One workload. `rows` are sequences per step; prompts = rows / samples. Lengths in tokens."""

    method: str
    size: str
    dtype: str
    rows: int
    samples: int = 1
    max_length: int = 256
    max_tokens: int = 96
    beta: float = 0.04
    warmup: int = 2
    steps: int = 6
    threads: int = CORES

    @classmethod
    def of(cls, method: str, size: str, dtype: str) -> Job:
        if method == "sft":
            return cls(method, size, dtype, rows=16)
        return cls(method, size, dtype, rows=64 if size == "2.6m" else 32, samples=8, warmup=1, steps=4)


def main() -> None:
    options = _options()
    python = trl_environment(REPOSITORY / ".cache" / "trl")
    results = []
    for size in options.sizes:
        for dtype in options.dtypes:
            for method in options.methods:
                results.append(compare(Job.of(method, size, dtype), python, options.rounds))
                show(results)
    print(json.dumps({"cores": CORES, "processor": _processor(), "results": results}))


def compare(job: Job, python: Path, rounds: int) -> dict[str, Any]:
    """Both sides in turn; the medians over all their steps."""
    theirs, ours = [], []
    for _ in range(rounds):
        theirs.append(run_trl(job, python))
        ours.append(run_troupe(job))
    summary = {"job": asdict(job), "trl": _median(theirs), "troupe": _median(ours)}
    summary["speedup"] = summary["trl"]["step_s"] / summary["troupe"]["step_s"]
    return summary


def run_trl(job: Job, python: Path) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "data.jsonl"
        columns = ("prompt", "completion") if job.method == "sft" else ("prompt",)
        rows = dataset("skewed", seed=0, split="train", max_length=job.max_length)
        data.write_text("\n".join(json.dumps({name: row[name] for name in columns}) for row in rows))
        given = {**asdict(job), "model": _model(job), "data": str(data), "output": folder}
        command = [str(python), "-W", "ignore", str(HERE / "trl_run.py"), json.dumps(given)]
        output, peak_gib = _run(command, {"OMP_NUM_THREADS": str(job.threads)})
    result = json.loads(output.strip().splitlines()[-1])
    result["step_s"] = statistics.median(result.pop("steps_s"))
    return {**result, "peak_gib": peak_gib}


def run_troupe(job: Job) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        recipe = Path(folder) / "recipe.yaml"
        recipe.write_text(yaml.safe_dump(_recipe(job, folder)))
        _, peak_gib = _run([str(Path(sys.executable).parent / "troupe"), "run", str(recipe)], {})
        (metrics,) = Path(folder).glob("bench-*/metrics.jsonl")
        lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    steps = [line for line in lines if "step_time" in line][job.warmup :]

    def median(name: str) -> float:
        return statistics.median(line.get(name, 0.0) for line in steps)

    parts = {
        "generate": "time/generate",
        "score": "time/score",
        "logps": "time/batch_stages",
        "forward": "time/forward",
        "backward": "time/backward",
        "optimizer": "time/step",
        "publish": "time/publish",
    }
    seconds = {part: median(name) for part, name in parts.items()}
    step_s = median("step_time")
    seconds["Ray and rest"] = step_s - sum(seconds.values())
    return {
        "step_s": step_s,
        "tokens": median("num_tokens"),
        "parts": seconds,
        "padding": median("padding_share"),
        "mean_length": median("completions/mean_length"),
        "peak_gib": peak_gib,
    }


def _recipe(job: Job, folder: str) -> dict[str, Any]:
    common = {
        "name": "bench",
        "output": folder,
        "model": {"path": f"example:skewed-{job.size}", "dtype": job.dtype},
        "data": {"path": "example:skewed", "options": {"max_length": job.max_length}, "max_length": job.max_length},
        "logging": {"completions_every": None, "tensorboard": False, "ray_metrics": False},
        "cluster": {"num_cpus": 8},
    }
    schedule = {"steps": job.warmup + job.steps, "learning_rate": 1e-6, "token_budget": 4096}
    if job.method == "sft":
        return {**common, "method": "sft", "train": {**schedule, "batch_size": job.rows}}
    return {
        **common,
        "method": "grpo",
        "options": {"num_generations": job.samples, "beta": job.beta},
        "train": {**schedule, "batch_size": job.rows // job.samples},
        "sampling": {"max_tokens": job.max_tokens},
        "rewards": [{"fn": f"{HERE / 'length_reward.py'}:length_reward"}],
        "roles": {"rollout": {"workers": CORES, "threads": 1, "kv_cache_gib": 0.25}},
    }


def trl_environment(folder: Path) -> Path:
    """An environment with TRL of its own and every other package of this one."""
    python = folder / "bin" / "python"
    if not (folder / "ready").exists():
        venv.create(folder, with_pip=True)
        theirs = subprocess.run(
            [python, "-c", "import site; print(site.getsitepackages()[0])"], capture_output=True, text=True, check=True
        )
        Path(theirs.stdout.strip(), "shared.pth").write_text("\n".join(site.getsitepackages()))
        subprocess.run([python, "-m", "pip", "install", "--quiet", "--no-deps", TRL], check=True)
        (folder / "ready").touch()
    return python


def _run(command: list[str], environment: dict[str, str]) -> tuple[str, float]:
    """Output, and the peak memory (GiB) of all processes together, shared pages counted once (PSS)."""
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, **environment}
    )
    peak, stop = [0.0], threading.Event()
    watcher = threading.Thread(target=_watch, args=(process.pid, peak, stop), daemon=True)
    watcher.start()
    try:
        output, errors = process.communicate(timeout=TIMEOUT_S)
    finally:
        process.kill()
        stop.set()
        watcher.join(10)
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)[:200]} failed:\n{errors[-3000:]}")
    return output, peak[0]


def _watch(pid: int, peak: list[float], stop: threading.Event) -> None:
    while not stop.wait(1.0):
        total = 0
        try:
            root = psutil.Process(pid)
            for process in (root, *root.children(recursive=True)):
                try:
                    total += process.memory_full_info().pss
                except psutil.Error:
                    continue
        except psutil.Error:
            return
        peak[0] = max(peak[0], total / 2**30)


def _median(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Key by key; nested dictionaries too; None where a side has no such figure."""
    merged: dict[str, Any] = {}
    for key in runs[0]:
        values = [run[key] for run in runs]
        if isinstance(values[0], dict):
            merged[key] = _median(values)
        else:
            merged[key] = None if values[0] is None else statistics.median(values)
    return merged


def show(results: list[dict[str, Any]]) -> None:
    table = Table(
        "workload",
        "TRL s/step",
        "Troupe s/step",
        "ratio",
        "TRL tok/s",
        "Troupe tok/s",
        "padding",
        "TRL GiB",
        "Troupe GiB",
    )
    for result in results:
        job, theirs, ours = result["job"], result["trl"], result["troupe"]
        rates = [f"{side['tokens'] / side['step_s']:,.0f}" for side in (theirs, ours)]
        sizes = [f"{side['peak_gib']:.2f}" for side in (theirs, ours)]
        seconds = [f"{side['step_s']:.3f}" for side in (theirs, ours)]
        name = f"{job['method']} {job['size']} {job['dtype']}"
        table.add_row(name, *seconds, f"{result['speedup']:.2f}x", *rates, f"{ours['padding']:.1%}", *sizes)
    console = Console(width=140)
    console.print(table)
    for result in results:
        parts = {
            side: {name: round(value, 3) for name, value in result[side]["parts"].items()} for side in ("trl", "troupe")
        }
        console.print(f"{result['job']['method']} {result['job']['size']} {result['job']['dtype']}: {parts}")


def _model(job: Job) -> str:
    return str(model_folder(f"skewed-{job.size}", 0))


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=["2.6m", "26m"])
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--methods", nargs="+", default=["sft", "grpo"])
    parser.add_argument("--rounds", type=int, default=2)
    return parser.parse_args()


if __name__ == "__main__":
    began = time.monotonic()
    main()
    print(f"took {time.monotonic() - began:.0f} s", file=sys.stderr)

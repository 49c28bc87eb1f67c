"""How long a run takes to its first step, part by part, and a worker that joins it to its first sample.

    python tests/benchmarks/startup.py --size 2.6m --rounds 3
    python tests/benchmarks/startup.py --warm

A real run with vLLM is started as a user starts it; when its first step is done, `troupe scale` asks for one more
rollout worker; when that has given its first sample, the run is ended. With `--warm` it is started by `troupe submit`,
as a job of the Ray that `troupe up` has started. Everything is read from what the run itself writes. Prints a table of
medians, then one JSON line.

    submit ─ command ─ job, driver's process ─┐
    command ─ imports ─ prepare ─ Ray start ─ placement ─ roles up ─ publish ─ first step ─► metrics.jsonl
    scale ─► resized ─ up (process, imports, engine) ─ weights (joined) ─ first sample
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import yaml
from processes import end_family, processor
from rich.console import Console
from rich.table import Table

HERE = Path(__file__).parent
TROUPE = Path(sys.executable).parent / "troupe"
DEADLINE_S = 300.0
POLL_S = 0.1
Event = dict[str, Any]
Parts = dict[str, float]


def main() -> None:
    options = _options()
    with tempfile.TemporaryDirectory() as folder, warm_head(options, Path(folder) / "runs") as runs:
        rounds = [measure(options, runs) for _ in range(options.rounds)]
    merged = {part: median(found[part] for found in rounds) for part in rounds[0]}
    show(merged, options)
    result = {
        "size": options.size,
        "engine": options.engine,
        "warm": options.warm,
        "rounds": options.rounds,
        "seconds": merged,
    }
    print(json.dumps({"benchmark": "startup", "processor": processor(), "results": [result]}))


def measure(options: argparse.Namespace, runs: Path | None) -> Parts:
    """Seconds by part, of one run; a job of the service of `runs`, if there is one."""
    begin = started if runs is None else submitted
    with tempfile.TemporaryDirectory() as folder, begin(options, Path(folder), runs) as (asked_at, taken_at, wait):
        first_step = wait("the first step", lambda run: next(iter(_lines(run / "metrics.jsonl")), None))
        run = wait("its board, which takes `troupe scale`", lambda run: run if (run / "run.json").exists() else None)
        if taken_at is None:
            parts = until_first_step(asked_at, events(wait), first_step["time"])
        else:
            driver_at = json.loads((run / "run.json").read_text())["driver"]["started"]
            parts = {"`troupe submit`, until it returns": taken_at - asked_at, "job, process": driver_at - taken_at}
            parts |= until_first_step(driver_at, events(wait), first_step["time"])
            parts["from the command to the first step"] = first_step["time"] - asked_at
        scaled_at = time.time()
        scale(run)
        wait("the new worker's first sample", lambda run: _find(_lines(run / "events.jsonl"), "first_result", worker=1))
        return parts | until_first_sample(scaled_at, events(wait))


def scale(run: Path) -> None:
    command = [TROUPE, "scale", run, "rollout=2"]
    asked = subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE_S)
    if asked.returncode:
        raise RuntimeError(f"`troupe scale` ended with {asked.returncode}: {asked.stderr[-2000:]}")


def until_first_step(command_at: float, found: list[Event], first_step_at: float) -> Parts:
    """The parts follow upon one another, but for those of `roles up`, which go on at the same time."""
    prepared, *others = (_find(found, kind) for kind in ("prepared", "connected", "reserved", "started", "published"))
    connected, reserved, started, published = others
    asked_at = prepared["time"] - prepared["seconds"]
    first = {role: _find(found, "up", role=role)["seconds"] for role in ("policy", "rollout", "reward")}
    return {
        "imports": asked_at - command_at,
        "prepare: data, plan": prepared["time"] - asked_at,
        "Ray start": connected["time"] - prepared["time"],
        "placement": reserved["time"] - connected["time"],
        "roles up": started["time"] - reserved["time"],
        "- policy: process, imports, model": first["policy"],
        "- rollout: process, imports, engine": first["rollout"],
        "- reward: process, imports": first["reward"],
        "publish": published["time"] - started["time"],
        "first step": first_step_at - published["time"],
        "from the command to the first step": first_step_at - command_at,
    }


def until_first_sample(scaled_at: float, found: list[Event]) -> Parts:
    resized = _find(found, "resized", role="rollout")
    up, joined, sample = (
        _find(found, kind, role="rollout", worker=1)["time"] for kind in ("up", "joined", "first_result")
    )
    return {
        "join: `troupe scale` until the driver has it": resized["time"] - scaled_at,
        "join: placement, process, imports, engine": up - resized["time"],
        "join: weights": joined - up,
        "join: first sample, and the wait for work": sample - joined,
        "from joining to the first sample": sample - resized["time"],
    }


@contextmanager
def warm_head(options: argparse.Namespace, runs: Path) -> Iterator[Path | None]:
    """A Ray and a service for the runs of a folder; None without `--warm`."""
    if not options.warm:
        yield None
        return
    cpus = str(max(8, os.cpu_count() or 1))
    _troupe("up", "--runs", runs, "--port", "0", "--allow-code", "--cpus", cpus)
    try:
        yield runs
    finally:
        _troupe("down", "--runs", runs)


Started = tuple[float, float | None, Callable[..., Any]]


@contextmanager
def submitted(options: argparse.Namespace, folder: Path, runs: Path | None) -> Iterator[Started]:
    """As `started`; and when the service had taken it."""
    assert runs is not None
    recipe = folder / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({**_recipe(options, runs), "cluster": {}}))
    name = f"startup-{time.time_ns()}"
    asked_at = time.time()
    _troupe("submit", recipe, "--runs", runs, "--name", name)
    taken_at, run = time.time(), runs / name

    def wait(what: str, look: Callable[[Path], Any]) -> Any:
        """Ended by the run, which writes it, or by the deadline."""
        deadline = time.monotonic() + DEADLINE_S
        while time.monotonic() < deadline:
            if found := look(run):
                return found
            time.sleep(POLL_S)
        console = run / "console.log"
        raise RuntimeError(f"waited for {what}: {console.read_text()[-2000:] if console.exists() else 'no output'}")

    try:
        yield asked_at, taken_at, wait
    finally:
        _troupe("stop", run)


def _troupe(*arguments: Any) -> None:
    done = subprocess.run([TROUPE, *map(str, arguments)], capture_output=True, text=True, timeout=DEADLINE_S)
    if done.returncode:
        raise RuntimeError(f"`troupe {arguments[0]}` ended with {done.returncode}: {done.stdout}{done.stderr}")


@contextmanager
def started(options: argparse.Namespace, folder: Path, _: Path | None = None) -> Iterator[Started]:
    """A run; when it was asked for; and a function that waits until something shows in the run's folder."""
    recipe = folder / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(_recipe(options, folder)))
    command_at = time.time()
    with (folder / "output.txt").open("w") as output:
        process = subprocess.Popen([TROUPE, "run", recipe], stdout=output, stderr=output)

        def wait(what: str, look: Callable[[Path], Any]) -> Any:
            """Ended by the run, which writes it, or by its end, or by the deadline."""
            deadline = time.monotonic() + DEADLINE_S
            while time.monotonic() < deadline and process.poll() is None:
                found = [look(run) for run in folder.glob("startup-*")]
                if found and found[0]:
                    return found[0]
                time.sleep(POLL_S)
            tail = (folder / "output.txt").read_text()[-2000:]
            raise RuntimeError(
                f"waited for {what}; the run {'goes on' if process.poll() is None else 'ended'}:\n{tail}"
            )

        try:
            yield command_at, None, wait
        finally:
            _end(process)


def _end(process: subprocess.Popen[bytes]) -> None:
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(60)
    except subprocess.TimeoutExpired:
        end_family(process.pid)


def events(wait: Callable[..., Any]) -> list[Event]:
    return wait("events", lambda run: _lines(run / "events.jsonl"))


def _lines(file: Path) -> list[Event]:
    """The complete lines of a file that is being written."""
    if not file.exists():
        return []
    return [json.loads(line) for line in file.read_text().splitlines(keepends=True) if line.endswith("\n")]


def _find(found: list[Event], kind: str, **values: Any) -> Any:
    """The first event of a kind with these values; None if there is none yet."""
    wanted = {"event": kind, **values}
    return next((event for event in found if wanted.items() <= event.items()), None)


def _recipe(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    return {
        "name": "startup",
        "output": str(folder),
        "model": {"path": f"example:skewed-{options.size}"},
        "method": "grpo",
        "options": {"num_generations": 4},
        "data": {"path": "example:skewed"},
        "train": {"steps": 10_000, "batch_size": 4, "learning_rate": 1e-6},
        "sampling": {"max_tokens": 32},
        "rewards": [{"fn": f"{HERE / 'length_reward.py'}:length_reward"}],
        "roles": {"rollout": {"engine": options.engine, "workers": 1, "threads": 1, "kv_cache_gib": 0.1}},
        "logging": {"completions_every": None, "trackers": [], "ray_metrics": False},
        "cluster": {"num_cpus": max(8, os.cpu_count() or 1)},
    }


def show(parts: Parts, options: argparse.Namespace) -> None:
    table = Table("part", "s", title=f"skewed-{options.size}, {options.engine}, median of {options.rounds}")
    for part, seconds in parts.items():
        table.add_row(part, f"{seconds:.2f}", end_section=part.startswith("from"))
    Console().print(table)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=("2.6m", "26m"), default="2.6m")
    parser.add_argument("--engine", choices=("vllm", "hf", "scripted"), default="vllm")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--warm", action="store_true", help="Submitted to a Ray and a service that run already.")
    return parser.parse_args()


if __name__ == "__main__":
    main()

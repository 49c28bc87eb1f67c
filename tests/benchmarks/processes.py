"""Commands run to their end, with the peak memory of all their processes together."""

from __future__ import annotations

import os
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

GIB = 2**30
PULSE_S = 0.5


class CommandFailed(RuntimeError):
    """A command that did not end well, with the end of what it complained about."""


@dataclass(frozen=True)
class Ran:
    """What a command printed; the peak memory of all its processes together, pages that they share counted once (PSS);
    and how many cores other programs kept busy meanwhile: far from 0, its figures are not worth much."""

    output: str
    peak_gib: float
    others_cores: float


def run(command: Sequence[str | Path], environment: Mapping[str, str], timeout_s: float) -> Ran:
    """Run a command to its end. Raises CommandFailed; none of its processes survives the deadline."""
    process = subprocess.Popen(
        list(map(str, command)),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **environment},
    )
    with Watch(process.pid) as watch:
        try:
            output, errors = process.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            end_family(process.pid)
            raise CommandFailed(f"{_name(command)} was not done after {timeout_s:g} s") from None
        except BaseException:
            end_family(process.pid)
            raise
    if process.returncode:
        said = f"{output[-3000:]}\n{errors[-3000:]}"  # Ray writes to one of them, and a run's reason is on the other
        raise CommandFailed(f"{_name(command)} ended with {process.returncode}:\n{said}")
    return Ran(output, watch.peak_gib, watch.others_cores)


class Watch:
    """Looks at a process and its descendants twice a second while the block runs: their peak memory together, and how
    many cores everybody else used."""

    def __init__(self, pid: int) -> None:
        self.peak_gib = self.others_cores = 0.0
        self._pid, self._over = pid, threading.Event()
        self._seconds: dict[int, float] = {}  # of each process seen
        self._watcher = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Watch:
        self._began, self._busy_before = time.monotonic(), _busy_s()
        self._watcher.start()
        return self

    def __exit__(self, *reason: object) -> None:
        self._over.set()
        self._watcher.join(10)
        others_s = _busy_s() - self._busy_before - sum(self._seconds.values())
        self.others_cores = max(0.0, others_s / (time.monotonic() - self._began))

    def _watch(self) -> None:
        while not self._over.wait(PULSE_S):
            members = family(self._pid)
            self.peak_gib = max(self.peak_gib, sum(map(_pss, members)) / GIB)
            self._seconds.update((process.pid, _cpu_s(process)) for process in members)


def family(pid: int) -> list[psutil.Process]:
    """A process and its descendants; none if it is gone."""
    try:
        root = psutil.Process(pid)
        return [root, *root.children(recursive=True)]
    except psutil.Error:
        return []


def end_family(pid: int) -> None:
    for process in family(pid):
        try:
            process.kill()
        except psutil.Error:
            continue


def _pss(process: psutil.Process) -> int:
    try:
        return process.memory_full_info().pss
    except psutil.Error:
        return 0


def _cpu_s(process: psutil.Process) -> float:
    try:
        times = process.cpu_times()
    except psutil.Error:
        return 0.0
    return times.user + times.system


def _busy_s() -> float:
    """Seconds that all cores together have been busy since the machine started."""
    times = psutil.cpu_times()
    return times.user + times.nice + times.system + times.irq + times.softirq + times.steal


def _name(command: Sequence[str | Path]) -> str:
    return " ".join(map(str, command))[:200]


def processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown")


def computes_bfloat16() -> bool:
    """Whether the processor has instructions for it; without any, bfloat16 is many times slower than float32."""
    return bool({"avx512_bf16", "amx_bf16", "bf16"} & set(Path("/proc/cpuinfo").read_text().split()))

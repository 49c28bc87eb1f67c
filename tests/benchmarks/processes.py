"""Commands run to their end, with the peak memory of all their processes together."""

from __future__ import annotations

import os
import subprocess
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path

import psutil

GIB = 2**30
PULSE_S = 0.5


class CommandFailed(RuntimeError):
    """A command that did not end well, with the end of what it complained about."""


def run(command: Sequence[str | Path], environment: Mapping[str, str], timeout_s: float) -> tuple[str, float]:
    """Standard output, and the peak memory (GiB) of the command and all its descendants, pages that they share counted
    once (PSS). Raises CommandFailed; none of its processes survives the deadline."""
    process = subprocess.Popen(
        list(map(str, command)),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **environment},
    )
    with PeakMemory(process.pid) as peak:
        try:
            output, errors = process.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            end_family(process.pid)
            raise CommandFailed(f"{_name(command)} was not done after {timeout_s:g} s") from None
        except BaseException:
            end_family(process.pid)
            raise
    if process.returncode:
        raise CommandFailed(f"{_name(command)} ended with {process.returncode}:\n{(errors or output)[-3000:]}")
    return output, peak.gib


class PeakMemory:
    """The largest memory that a process and its descendants held together while the block ran, looked at twice a
    second."""

    def __init__(self, pid: int) -> None:
        self.gib = 0.0
        self._pid, self._over = pid, threading.Event()
        self._watcher = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> PeakMemory:
        self._watcher.start()
        return self

    def __exit__(self, *reason: object) -> None:
        self._over.set()
        self._watcher.join(10)

    def _watch(self) -> None:
        while not self._over.wait(PULSE_S):
            self.gib = max(self.gib, sum(map(_pss, family(self._pid))) / GIB)


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


def _name(command: Sequence[str | Path]) -> str:
    return " ".join(map(str, command))[:200]


def processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown")


def computes_bfloat16() -> bool:
    """Whether the processor has instructions for it; without any, bfloat16 is many times slower than float32."""
    return bool({"avx512_bf16", "amx_bf16", "bf16"} & set(Path("/proc/cpuinfo").read_text().split()))

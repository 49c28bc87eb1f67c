"""Whole runs as a user starts them: the command `troupe` in a process of its own."""

from __future__ import annotations

import ctypes
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet as pq
import yaml

PR_SET_PDEATHSIG = 1  # of prctl(2)
TROUPE = str(Path(sys.executable).parent / "troupe")

ARITHMETIC: dict[str, Any] = {
    "name": "t",
    "model": {"path": "example:arithmetic"},
    "rewards": [{"fn": "exact_match"}],
    "method": "grpo",
    "options": {"num_generations": 4},
    "data": {"path": "example:arithmetic"},
    "train": {"steps": 6, "batch_size": 8, "learning_rate": 1e-3, "scheduler": "constant"},
    "sampling": {"max_tokens": 5},
    "roles": {
        "rollout": {"engine": "vllm", "kv_cache_gib": 0.05, "cpus": 0.5},
        "reward": {"cpus": 0.1},
    },
    "cluster": {"num_cpus": 4, "object_store_mib": 100},
    "logging": {"completions_every": 1000, "trackers": [], "curves": False},
}

SFT: dict[str, Any] = {  # seconds on one core, without Ray
    "name": "t",
    "model": {"path": "example:arithmetic"},
    "method": "sft",
    "data": {"path": "example:arithmetic_sft"},
    "train": {"steps": 3, "batch_size": 4},
    "logging": {"trackers": [], "curves": False},
}


def plain_environment() -> dict[str, str]:
    """Ours, without what a Ray of this process leaves in it: where it is, and that it asks for a token."""
    return {name: value for name, value in os.environ.items() if name not in ("RAY_ADDRESS", "RAY_AUTH_MODE")}


def merged(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """`base` with nested changes; neither is modified."""
    result = dict(base)
    for key, value in changes.items():
        nested = isinstance(value, dict) and isinstance(result.get(key), dict)
        result[key] = merged(result[key], value) if nested else value
    return result


def end_with_the_tests() -> None:
    """In a child process before its program starts: SIGTERM when the thread that starts it ends. Tests that are killed
    leave no run and no Ray behind."""
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def as_in_a_terminal() -> None:
    """A shell that runs the tests in the background makes them, and so their children, ignore Ctrl-C."""
    end_with_the_tests()
    signal.signal(signal.SIGINT, signal.SIG_DFL)


class Run:
    """A `troupe run` in the background, and the folder that it writes."""

    in_foreground = False

    def __init__(
        self,
        where: Path,
        changes: dict[str, Any] | None = None,
        *arguments: str,
        environment: Any = None,
        base: dict[str, Any] = ARITHMETIC,
        into: str | None = None,
    ) -> None:
        """`into`: a shell command that standard output is piped to; else it goes to `output`, with standard error."""
        self.into = into
        where.mkdir(parents=True, exist_ok=True)
        self.environment: dict[str, str] = environment or {}
        recipe = where / "recipe.yaml"
        recipe.write_text(yaml.safe_dump(merged(base, {"output": str(where), **(changes or {})}), sort_keys=False))
        self.where, self.output = where, where / "output.txt"
        self.process = self._start("run", str(recipe), *arguments)

    def _start(self, *arguments: str) -> subprocess.Popen[bytes]:
        environment = {**plain_environment(), "COLUMNS": "160", **self.environment}
        with self.output.open("ab") as stream:
            reader = subprocess.Popen(["sh", "-c", self.into], stdin=subprocess.PIPE) if self.into else None
            return subprocess.Popen(
                [TROUPE, *arguments],
                stdout=reader.stdin if reader else stream,
                stderr=stream,
                cwd=self.where,
                env=environment,
                process_group=0 if self.in_foreground else None,
                preexec_fn=as_in_a_terminal if self.in_foreground else end_with_the_tests,
            )

    def rank(self, role: str) -> psutil.Process:
        """The process of a role's first rank, once it is up."""
        up = self.until(lambda: [up for up in self.events("up") if up["role"] == role], f"{role} to be up")
        return psutil.Process(int(up[-1]["ranks"][0].split()[1]))  # "pid 12 on node a"

    def ended(self, timeout_s: float = 400.0) -> tuple[int, str]:
        """(exit code, output) of a run that is to fail."""
        try:
            code = self.process.wait(timeout_s)
        finally:
            self.process.kill()
        return code, self.output.read_text()

    def said(self) -> list[str]:
        """Troupe's own lines. That Ray was slow to start and was started again is about the machine and left out."""
        lines = [line for line in self.output.read_text().splitlines() if line.startswith("troupe: ")]
        return [line for line in lines if "Ray did not start within" not in line]

    def resume(self, *arguments: str) -> None:
        self.process = self._start("resume", str(self.folder), *arguments)

    @property
    def folder(self) -> Path:
        (folder,) = [path for path in self.where.glob("t-*") if path.is_dir()]
        return folder

    def wait(self, timeout_s: float = 400.0) -> None:
        """Until the process ends well; its output is the message if it does not."""
        try:
            code = self.process.wait(timeout_s)
        finally:
            self.process.kill()
        assert code == 0, self.output.read_text()[-4000:]

    def until(self, condition: Callable[[], Any], what: str, timeout_s: float = 400.0) -> Any:
        """Poll until the condition holds; the run must not end meanwhile."""
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            if found := condition():
                return found
            assert self.process.poll() is None, f"the run ended before {what}:\n{self.output.read_text()[-4000:]}"
            time.sleep(0.05)
        raise AssertionError(f"no {what} within {timeout_s:g} s:\n{self.output.read_text()[-4000:]}")

    def lines(self, file: str) -> list[dict[str, Any]]:
        """Whole lines of a JSONL file in the run's folder; none while there is no folder."""
        found = list(self.where.glob(f"t-*/{file}"))
        text = found[0].read_text() if found else ""
        return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]

    def steps(self) -> int:
        return max((line["step"] for line in self.lines("metrics.jsonl") if "step_time" in line), default=0)

    def events(self, kind: str) -> list[dict[str, Any]]:
        return [line for line in self.lines("events.jsonl") if line["event"] == kind]

    def completions(self) -> list[dict[str, Any]]:
        """Every sample that was trained on."""
        files = sorted((self.folder / "completions").glob("*.parquet"))
        return [row for file in files for row in pq.read_table(file).to_pylist()]

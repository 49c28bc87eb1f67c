"""Runs Python code that a model wrote, so that whatever it does, it does to nobody.

    run(source, stdin) ── starts `rewards.confinement`, which starts the interpreter ──► Execution
                          reads what it prints until it ends, prints too much, or the deadline has passed;
                          then kills all of it

What the code can reach, and what it cannot, is in the drawing of `confinement`. It has the standard library, a small
folder to write to, and no file, variable, process or network of the host. Each run is a process of its own.

**A layer that the machine lacks is an error**, unless `without` names it: nothing is weaker than it was asked to be.

Whose fault is it? Code that crashes, computes or sleeps too long, uses too much memory or prints too much is an
`Execution` with that ending. A sandbox that could not be built, or an interpreter that the host killed, is a
`SandboxFailure`, and so is a deadline that passed while the code waited for a processor: an error of the machine says
nothing about the code.
"""

from __future__ import annotations

import json
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import IO, Any, Literal, get_args

from actors.errors import ConfigError, InfraFailure, did_you_mean

Layer = Literal["namespaces", "landlock", "seccomp"]
LAYERS: tuple[Layer, ...] = get_args(Layer)

MEBIBYTE = 2**20
END_S = 5.0  # for processes to be gone after they were killed
# What an interpreter reads; its own folders are added.
_READABLE = ("/usr/lib", "/usr/lib64", "/lib", "/lib64", "/etc/ld.so.cache", "/etc/localtime", "/usr/share/zoneinfo")
_DEVICES = ("/dev/null", "/dev/zero", "/dev/urandom", "/dev/random")
_CONFINEMENT = Path(__file__).with_name("confinement.py")
# `exit` and `quit` as `site` defines them, which is not imported: it takes longer than all the rest, and what is
# installed beside the interpreter is not part of the sandbox. The file main.py lets tracebacks show lines.
_BOOTSTRAP = """
import builtins, io, os, _sitebuiltins
builtins.exit = builtins.quit = _sitebuiltins.Quitter("exit", "")
text = io.open(4, encoding="utf-8").read()
if os.getcwd() != "/":
    with io.open("main.py", "w", encoding="utf-8") as file: file.write(text)
scope = globals()
for name in ("builtins", "io", "os", "_sitebuiltins", "file"): scope.pop(name, None)
exec(compile(scope.pop("text"), "main.py", "exec"), scope.pop("scope"))
"""


class SandboxFailure(InfraFailure):
    """The sandbox failed, not the code in it."""


class Ending(StrEnum):
    """How a run of the code ended."""

    EXITED = "exited"  # by itself, or by a signal that it caused
    CPU_LIMIT = "cpu limit"
    DEADLINE = "deadline"
    OUTPUT_LIMIT = "output limit"


@dataclass(frozen=True)
class Limits:
    """`deadline_s` is wall time, which code that sleeps or waits uses up; a busy machine does, too: see `run`."""

    cpu_s: float = 5.0
    deadline_s: float = 20.0
    memory_mib: int = 512
    disk_mib: int = 16
    output_kib: int = 64  # of each: standard output, standard error, reports

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value <= 0:
                raise ConfigError(f"sandbox: {name}={value}; it must be positive")


@dataclass(frozen=True)
class Execution:
    """What a run gave. `exit_code`: negative for a signal; None where it was killed at a limit. `report`: what the
    code wrote to descriptor 3. `layers`: those that were in force."""

    ending: Ending
    exit_code: int | None
    stdout: str
    stderr: str
    report: bytes
    seconds: float
    layers: tuple[str, ...]


class Sandbox:
    """Runs code under `limits`, with every layer but those in `without`. May be used from several threads at once."""

    def __init__(self, limits: Limits | None = None, without: Sequence[str] = ()) -> None:
        self.limits = limits or Limits()
        for layer in without:
            if layer not in LAYERS:
                hint = did_you_mean(layer, LAYERS) or f". There are: {', '.join(LAYERS)}"
                raise ConfigError(f"sandbox: without={list(without)}: no layer is called {layer!r}{hint}")
        self.without = tuple(without)

    def check(self) -> tuple[str, ...]:
        """The layers in force on this machine. Raises ConfigError if one is missing that is not in `without`."""
        return self.run("").layers

    def run(self, source: str, stdin: str = "") -> Execution:
        """Run `source` as a program. Raises ConfigError if a layer is missing, SandboxFailure if the sandbox failed.
        It returns within `deadline_s` and a moment."""
        began = time.monotonic()
        with ExitStack() as files:
            process, pipes = self._started(files, source, stdin)
            try:
                ending = _read(pipes, began + self.limits.deadline_s, self.limits.output_kib * 1024)
                waited_s = _waited_for_cpu_s(pipes.status) if ending is Ending.DEADLINE else 0.0
            finally:
                _kill(process)
            pipes.read_what_is_there()
        seconds = time.monotonic() - began
        if waited_s > seconds / 2:
            raise SandboxFailure(f"sandbox: in {seconds:.0f} s the code waited {waited_s:.0f} s for a processor")
        return self._execution(pipes, ending, seconds)

    def _started(self, files: ExitStack, source: str, stdin: str) -> tuple[subprocess.Popen[bytes], _Pipes]:
        given = [_file_with(files, text) for text in (stdin, source)]
        ends = {name: os.pipe() for name in ("stdout", "stderr", "report", "status")}
        for reading, _ in ends.values():
            files.callback(os.close, reading)
        writing = {name: end for name, (_, end) in ends.items()}
        passed = (writing["report"], given[1].fileno(), writing["status"])
        interpreter = os.path.realpath(sys.executable)
        settings = {
            "descriptors": passed,
            "without": self.without,
            "interpreter": interpreter,
            "arguments": ["-I", "-S", "-B", "-X", "utf8", "-c", _BOOTSTRAP],
            "readable": [*_READABLE, *_DEVICES, sys.base_prefix, sys.base_exec_prefix],
            "cpu_s": self.limits.cpu_s,
            "memory_bytes": self.limits.memory_mib * MEBIBYTE,
            "disk_bytes": self.limits.disk_mib * MEBIBYTE,
        }
        try:
            process = subprocess.Popen(
                [interpreter, "-I", "-S", str(_CONFINEMENT), json.dumps(settings)],
                stdin=given[0],
                stdout=writing["stdout"],
                stderr=writing["stderr"],
                pass_fds=passed,
                env={},
                cwd="/",
                start_new_session=True,
            )
        except OSError as error:
            raise SandboxFailure(f"sandbox: no process could be started: {error}") from error
        finally:
            for end in writing.values():
                os.close(end)
        return process, _Pipes({name: end for name, (end, _) in ends.items()})

    def _execution(self, pipes: _Pipes, ending: Ending, seconds: float) -> Execution:
        said = pipes.status
        stderr = pipes.text("stderr")
        if "error" in said or "missing" not in said:
            detail = said.get("error") or stderr.strip()[-500:] or "no reason was given"
            raise SandboxFailure(f"sandbox: it could not be built: {detail}")
        if said["missing"]:
            raise ConfigError(_weaker(said["missing"], self.without))
        code = said.get("code")
        if ending is Ending.EXITED:
            if code is None:
                raise SandboxFailure("sandbox: its process was killed")
            # The code cannot send itself SIGKILL. `confinement` does at its CPU limit; otherwise the host ran out of
            # memory, or somebody killed it.
            if code in (-signal.SIGKILL, -signal.SIGXCPU):
                if not said["at_cpu_limit"]:
                    raise SandboxFailure(f"sandbox: the code was killed from outside after {seconds:.1f} s")
                ending, code = Ending.CPU_LIMIT, None
        else:
            code = None
        return Execution(
            ending, code, pipes.text("stdout"), stderr, bytes(pipes.got["report"]), seconds, tuple(said["layers"])
        )


class _Pipes:
    """What has arrived on each pipe. They end when the last process that holds them does."""

    def __init__(self, descriptors: dict[str, int]) -> None:
        self.descriptors = descriptors
        self.got = {name: bytearray() for name in descriptors}
        for descriptor in descriptors.values():
            os.set_blocking(descriptor, False)

    @property
    def status(self) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for line in self.got["status"].splitlines():
            found |= json.loads(line)
        return found

    def text(self, name: str) -> str:
        return self.got[name].decode("utf-8", "replace")

    def take(self, name: str) -> bool:
        """Read once. False at the end."""
        with suppress(BlockingIOError):
            found = os.read(self.descriptors[name], 65536)
            self.got[name] += found
            return bool(found)
        return True

    def read_what_is_there(self) -> None:
        """The status of processes that have ended."""
        self.take("status")


def _read(pipes: _Pipes, deadline: float, most_bytes: int) -> Ending:
    with selectors.DefaultSelector() as selector:
        for name, descriptor in pipes.descriptors.items():
            selector.register(descriptor, selectors.EVENT_READ, name)
        while selector.get_map():
            left = deadline - time.monotonic()
            if left <= 0:
                return Ending.DEADLINE
            for key, _ in selector.select(left):
                if not pipes.take(key.data):
                    selector.unregister(key.fd)
                elif key.data != "status" and len(pipes.got[key.data]) > most_bytes:
                    del pipes.got[key.data][most_bytes:]
                    return Ending.OUTPUT_LIMIT
    return Ending.EXITED


def _kill(process: subprocess.Popen[bytes]) -> None:
    """The group: neither the code nor what confines it can leave it."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait(timeout=END_S)


def _waited_for_cpu_s(status: dict[str, Any]) -> float:
    """Seconds for which the code was ready to run and had no processor; 0 where the kernel does not say."""
    try:
        return int(Path(f"/proc/{status['pid']}/schedstat").read_text().split()[1]) / 1e9
    except (OSError, KeyError, IndexError):
        return 0.0


def _file_with(files: ExitStack, text: str) -> IO[bytes]:
    file: IO[bytes] = files.enter_context(tempfile.TemporaryFile())  # noqa: SIM115
    file.write(text.encode("utf-8", "replace"))
    file.seek(0)
    return file


def _weaker(missing: dict[str, str], without: Sequence[str]) -> str:
    names = sorted({*missing, *without})
    reasons = "; ".join(f"{layer} ({why})" for layer, why in missing.items())
    return (
        f"this machine cannot isolate generated code as asked: it lacks {reasons}.\n"
        f"Run on a machine that has them (docs/rewards.md, The sandbox), or accept the weaker isolation: "
        f"without: [{', '.join(names)}]"
    )

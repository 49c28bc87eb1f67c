"""A Python interpreter that a model may call as a tool, in the sandbox."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rewards.sandbox import Ending, Limits, Sandbox

_ENDED = {
    Ending.CPU_LIMIT: "it computed for more than {0.cpu_s:g} s",
    Ending.DEADLINE: "it took more than {0.deadline_s:g} s",
    Ending.OUTPUT_LIMIT: "it printed more than {0.output_kib} KiB",
}


class PythonSandbox:
    """Its method `python` is the tool. Each call is a process of its own, in which nothing of an earlier one is left.
    Raises ConfigError on a machine that lacks a layer of isolation that is not in `without` (`rewards.sandbox`)."""

    def __init__(
        self,
        cpu_limit_s: float = 5.0,
        deadline_s: float = 10.0,
        memory_mib: int = 512,
        output_kib: int = 8,
        without: Sequence[str] = (),
    ) -> None:
        limits = Limits(cpu_s=cpu_limit_s, deadline_s=deadline_s, memory_mib=memory_mib, output_kib=output_kib)
        self._sandbox = Sandbox(limits, without)
        self._sandbox.check()

    def reset(self, **row: Any) -> None:
        """Nothing is kept between episodes."""

    def python(self, code: str) -> str:
        """Run a Python program. Print what you want to see. Nothing is kept from one call to the next.

        Args:
            code: The program. It has the standard library, and neither files nor network.

        Returns:
            What it printed, and its error if it ended with one.
        """
        found = self._sandbox.run(code)
        printed = [found.stdout.rstrip(), found.stderr.rstrip()]
        if found.ending in _ENDED:
            printed.append(f"ended: {_ENDED[found.ending].format(self._sandbox.limits)}")
        elif found.exit_code and not found.stderr:
            printed.append(f"ended with exit code {found.exit_code}")
        return "\n".join(part for part in printed if part) or "it printed nothing"

"""Unit tests of code that a model wrote, run in the sandbox.

A row's column `tests` is a text of Python, or a list of tests, each of one of these forms:

    "assert add(2, 3) == 5"                   it passes if it raises nothing; a text that defines functions `test_*`
                                              is as many tests as there are functions
    {"input": "2 3\\n", "output": "5\\n"}       the code is run as a program; what it prints is compared, without the
                                              white space at the ends of lines and of the text

Python of tests shares a process with the code under test, which could look for ways to tamper with them; what a program
prints is compared outside.
"""

from __future__ import annotations

import ast
import json
import re
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rewards.functions import Completion, Scores, text_of
from rewards.sandbox import Limits, Sandbox

_FENCED = re.compile(r"^[ \t]*```[ \t]*(\w*)[^\n]*\n(.*?)^[ \t]*```[ \t]*$", re.DOTALL | re.MULTILINE)
_HARNESS = Path(__file__).with_name("unit_test_harness.py").read_text()


class UnitTests:
    """The share of its row's tests that a completion's code passes, or with `all_or_nothing` 1 for all, else 0.

    The code is the last fenced block marked as Python or as nothing; a completion without one passes no test, unless
    `require_fence` is false: then its whole text is the code. A row without tests has no opinion (None). The limits
    hold for each run of the code: all Python tests of a completion are one run, each program with an input is another.
    Code that meets a limit fails the tests that it had not passed by then. An error of the sandbox is a failure of the
    reward, never a score. `without`: layers of isolation that a machine may lack (`rewards.sandbox`).
    """

    def __init__(
        self,
        all_or_nothing: bool = False,
        require_fence: bool = True,
        cpu_limit_s: float = 5.0,
        deadline_s: float = 20.0,
        memory_mib: int = 512,
        without: Sequence[str] = (),
    ) -> None:
        limits = Limits(cpu_s=cpu_limit_s, deadline_s=deadline_s, memory_mib=memory_mib)
        self._sandbox = Sandbox(limits, without)
        self._all_or_nothing, self._require_fence = all_or_nothing, require_fence
        self._sandbox.check()

    def __call__(
        self, completions: Sequence[Completion], tests: Sequence[Any], log_extra: Callable[[str, Sequence[Any]], None]
    ) -> Scores:
        """Raises ValueError for tests that are none of the forms above."""
        passed = [
            self._passed(text_of(completion), tests_of(given))
            for completion, given in zip(completions, tests, strict=True)
        ]
        log_extra("unit_tests", [f"{sum(each)}/{len(each)}" for each in passed])
        return [self._score(each) for each in passed]

    def _score(self, passed: list[bool]) -> float | None:
        if not passed:
            return None
        return float(all(passed)) if self._all_or_nothing else sum(passed) / len(passed)

    def _passed(self, text: str, tests: Tests) -> list[bool]:
        code = code_of(text) if self._require_fence else (code_of(text) or text)
        if code is None:
            return [False] * len(tests)
        return [*self._pass_python(code, tests.python), *(self._prints(code, test) for test in tests.programs)]

    def _pass_python(self, code: str, tests: Sequence[PythonTest]) -> list[bool]:
        if not tests:
            return []
        token = secrets.token_hex(16)
        request = {"code": code, "tests": [(test.text, test.function) for test in tests], "token": token}
        report = self._sandbox.run(_HARNESS, json.dumps(request)).report.decode(errors="replace")
        lines = {line for line in report.splitlines() if line.startswith(token)}
        return [f"{token} {number}" in lines for number in range(len(tests))]

    def _prints(self, code: str, test: ProgramTest) -> bool:
        found = self._sandbox.run(code, test.given)
        return found.exit_code == 0 and _without_trailing_space(found.stdout) == _without_trailing_space(test.expected)


@dataclass(frozen=True)
class PythonTest:
    text: str
    function: str | None


@dataclass(frozen=True)
class ProgramTest:
    given: str
    expected: str


@dataclass(frozen=True)
class Tests:
    python: tuple[PythonTest, ...]
    programs: tuple[ProgramTest, ...]

    def __len__(self) -> int:
        return len(self.python) + len(self.programs)


def tests_of(given: object) -> Tests:
    """The tests of a row's column. Raises ValueError if it is of another form."""
    listed: Sequence[Any] = given if isinstance(given, list | tuple) else [] if given is None else [given]
    python: list[PythonTest] = []
    programs: list[ProgramTest] = []
    for test in listed:
        if isinstance(test, str):
            python += _python_tests(test)
        elif isinstance(test, Mapping) and {"input", "output"} <= set(test):
            programs.append(ProgramTest(str(test["input"]), str(test["output"])))
        else:
            raise ValueError(
                f"the column `tests` has {test!r}; a test is a text of Python, or a mapping with `input` and `output`"
            )
    return Tests(tuple(python), tuple(programs))


def code_of(text: str) -> str | None:
    """The last fenced block that is Python, or is not said to be another language; None if there is none."""
    blocks = fenced_blocks(text, ("", "python", "py", "python3"))
    return blocks[-1] if blocks else None


def fenced_blocks(text: str, languages: Sequence[str]) -> list[str]:
    """The contents of the blocks between lines of three back quotes that are marked as one of `languages`."""
    return [body for language, body in _FENCED.findall(text) if language.lower() in languages]


def _python_tests(text: str) -> list[PythonTest]:
    if not text.strip():
        return []
    try:
        statements = ast.parse(text).body
    except (SyntaxError, ValueError) as error:
        raise ValueError(f"the column `tests` has a text that is no Python ({error}): {text!r}") from None
    names = [each.name for each in statements if isinstance(each, ast.FunctionDef) and each.name.startswith("test_")]
    return [PythonTest(text, name) for name in names or [None]]


def _without_trailing_space(text: str) -> list[str]:
    return [line.rstrip() for line in text.strip().splitlines()]

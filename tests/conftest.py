"""Coroutine tests run on an event loop of their own, without a plugin."""

import asyncio
import gc
import inspect
import os
from collections.abc import Generator
from typing import Any

import pytest

DEADLINE_S = 400.0
# Ray would start an idle worker for every CPU that a test invents; our actors have processes of their own anyway.
os.environ.setdefault("RAY_prestart_worker_first_driver", "0")
# Ray's workers would be nicer than everything else: with several Rays on few cores, the drivers and services of some
# tests would leave the workers of others so little that they do not start within minutes.
os.environ.setdefault("RAY_worker_niceness", "0")
# Modules that tests share, whose assertions say what they found.
pytest.register_assert_rewrite(
    "tests.contract.backend_stage",
    "tests.contract.engine_stage",
    "tests.golden.cases",
    "tests.unit.forward_stage",
    "tests.unit.model_worker_stage",
)
gc.disable()  # while the tests are imported, all that is made stays
os.environ.pop("COLUMNS", None)  # pytest-xdist sets it in its workers; a user whose output is no terminal has none


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    if not inspect.iscoroutinefunction(pyfuncitem.obj):
        return None
    arguments = {name: pyfuncitem.funcargs[name] for name in pyfuncitem._fixtureinfo.argnames}
    asyncio.run(asyncio.wait_for(pyfuncitem.obj(**arguments), DEADLINE_S))
    return True


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(call: pytest.CallInfo[None]) -> Generator[None, Any, Any]:
    """A failure is reported while the garbage collector rests. To show the line that failed, pytest parses the test's
    file; a collected task whose exception nobody asked for is logged with a traceback, for which Python parses a file,
    too; and `ast.parse` within `ast.parse` is a SystemError in Python 3.11.7 (cpython#106905), which ends pytest."""
    if call.excinfo is None:
        return (yield)
    gc.collect()
    gc.disable()
    try:
        return (yield)
    finally:
        gc.enable()


def pytest_collection_finish() -> None:
    """The garbage collector need not look again and again at the million objects of imported libraries."""
    gc.freeze()
    gc.enable()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked `gpu` are skipped, with the reason, on a machine without one."""
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if marked and not _has_gpu():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU, and torch sees none here"))


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()

"""Fixtures that several files of this folder use, and which tests belong together."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from xdist.scheduler import LoadScopeScheduling

from tests.trainer_ranks import Gangs
from tests.unit.tiny import tiny_tokenizer

# Files that one process runs one after the other: they use the same ranks.
GANGS = (
    "test_scalar_heads_backends",
    "test_companion",
    "test_methods_backends",
    "test_backend_states",
    "test_models_of_ranks",
    "test_backend_adapters",
    "test_backends",  # the last: its last test kills a rank
)
ENGINES = ("test_engines", "test_engine_abilities")  # as well: both import vLLM, which takes long
# What takes longest begins first, so that no process is left alone with it in the end.
FIRST = (*GANGS, *ENGINES, "test_queued_runs", "test_evaluation_runs", "test_episode_runs", "test_run_handle")

_GANGS = Gangs()


class ByFile(LoadScopeScheduling):
    """One process runs all tests of a file, which share what is slow to start, and of the files of `GANGS`; another one
    those of `ENGINES`.

    Of pytest-xdist's own, `loadfile` knows no files that belong together, and `loadgroup` spreads single tests over the
    processes with this pytest: the names of the groups do not arrive."""

    def _split_scope(self, nodeid: str) -> str:
        file = Path(nodeid.split("::", 1)[0]).stem
        return "gangs" if file in GANGS else "engines" if file in ENGINES else file


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> ByFile | None:
    """In place of `--dist loadgroup`."""
    if config.getvalue("dist") != "loadgroup":
        return None
    config.option.loadscopereorder = False  # by the number of tests, which says little about how long they take
    return ByFile(config, log)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    places = {file: place for place, file in enumerate(FIRST)}
    items.sort(key=lambda item: places.get(item.path.stem, len(FIRST)))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(nextitem: pytest.Item | None) -> Iterator[None]:
    """The gangs end with the last test that may want them: a run in this process is not to find a Ray."""
    yield
    if nextitem is None or nextitem.path.stem not in GANGS:
        _GANGS.end()


@pytest.fixture(scope="session")
def gangs() -> Gangs:
    """See `tests/trainer_ranks.py`."""
    return _GANGS


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with a tokenizer."""
    folder = tmp_path_factory.mktemp("tokenizer")
    tiny_tokenizer().save_pretrained(folder)
    return str(folder)

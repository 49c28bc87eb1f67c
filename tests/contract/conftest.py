"""Fixtures that several files of this folder use, and which tests belong together."""

from collections.abc import Iterator

import pytest

from tests.trainer_ranks import Gangs
from tests.unit.tiny import tiny_tokenizer

_GANGS = Gangs()


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """With `--dist loadgroup` one process runs all tests of a file, which share what is slow to start, and of the files
    that name a common group. The largest group is the first one."""
    for item in items:
        if item.get_closest_marker("xdist_group") is None:
            item.add_marker(pytest.mark.xdist_group(item.path.stem))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(nextitem: pytest.Item | None) -> Iterator[None]:
    """The gangs end with the last test that may want them: a run in this process is not to find a Ray."""
    yield
    if nextitem is None or "gangs" not in [mark.args[0] for mark in nextitem.iter_markers("xdist_group")]:
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

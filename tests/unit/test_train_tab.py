"""The Train tab of Ray's dashboard shows how a run ended, and whatever goes wrong there is one warning and no failure.

With Ray's own classes: tests/ray/test_private_head.py."""

from __future__ import annotations

import asyncio

import pytest

from orchestrator.cluster.shutdown import Stopped
from orchestrator.cluster.train_tab import shown


class Recorded:
    """A tab that keeps what it was told, or breaks when it is closed."""

    def __init__(self, *, breaks: bool = False) -> None:
        self.breaks, self.ended = breaks, list[str]()

    def close(self, ended: str) -> None:
        if self.breaks:
            raise AttributeError("TrainRun has no status")
        self.ended.append(ended)


@pytest.mark.parametrize(
    ("error", "ended"),
    [(None, "FINISHED"), (RuntimeError(), "ERRORED"), (Stopped(), "ABORTED"), (asyncio.CancelledError(), "ABORTED")],
    ids=repr,
)
def test_how_a_run_ended_is_told_and_its_error_goes_on(error: BaseException | None, ended: str):
    tab, warnings = Recorded(), list[str]()

    async def run() -> None:
        async with shown(lambda: tab, warnings.append):
            if error is not None:
                raise error

    if error is None:
        asyncio.run(run())
    else:
        with pytest.raises(type(error)):
            asyncio.run(run())
    assert (tab.ended, warnings) == ([ended], [])


def test_a_tab_that_cannot_begin_or_end_is_one_warning_and_the_run_goes_on():
    warnings, trained = list[str](), list[str]()

    def moved() -> Recorded:
        raise ModuleNotFoundError("No module named 'ray.train.v2._internal.state'")

    async def run() -> None:
        async with shown(moved, warnings.append):
            trained.append("with a Ray that has moved its classes")
        async with shown(lambda: Recorded(breaks=True), warnings.append):
            trained.append("with a Ray that has changed them")

    asyncio.run(run())
    assert len(trained) == len(warnings) == 2
    assert "logging.ray_train_tab: the run is not shown there: ModuleNotFoundError: No module" in warnings[0]
    assert "AttributeError: TrainRun has no status" in warnings[1]

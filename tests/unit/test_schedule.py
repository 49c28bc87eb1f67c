"""An epoch ends where it ends: every row is learned from as often as `epochs` says, and the plan says how often."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from actors.errors import ConfigError
from orchestrator.collection.cursor import Cursor
from orchestrator.collection.staleness import Contract
from orchestrator.config.schema import RunConfig
from orchestrator.planning.resolve import Prepared, prepare
from orchestrator.planning.schedule import Schedule
from orchestrator.reporting.metrics import METRICS_FILE, read
from orchestrator.run import run
from tests.unit.source_stub import write_rows
from tests.unit.tiny import tiny_model_folder

ROWS = [{"prompt": f"{i}=", "completion": "x" * (i + 1), "label": i % 2 == 0} for i in range(10)]


def prepared(tmp_path: Path, train: dict[str, Any], method: str = "sft", **run_keys: Any) -> Prepared:
    data = {"path": str(write_rows(tmp_path / "d.jsonl", ROWS))}
    phase = {"method": method, "data": data, "train": train}
    return prepare(RunConfig.model_validate({"phases": {"p": phase}, **run_keys}))


@pytest.mark.parametrize(
    ("train", "steps", "last", "drawn"),
    [
        ({"epochs": 1, "batch_size": 6}, 2, 4, "2 steps of 6 examples, the last of 4: 1 pass over 10 examples"),
        ({"epochs": 1, "batch_size": 5}, 2, 5, "2 steps of 5 examples: 1 pass over 10 examples"),
        ({"epochs": 2, "batch_size": 6}, 4, 2, "4 steps of 6 examples, the last of 2: 2 passes over 10 examples"),
        ({"epochs": 0.5, "batch_size": 5}, 1, 5, "1 step of 5 examples: 0.5 passes over 10 examples"),
        ({"epochs": 0.1, "batch_size": 4}, 1, 1, "1 step of 1 examples: 0.1 passes over 10 examples"),
        ({"steps": 3, "batch_size": 6}, 3, 6, "3 steps of 6 examples: 1.8 passes over 10 examples"),
    ],
)
def test_an_epoch_ends_with_the_last_row_and_the_plan_says_how_many_passes_it_is(
    tmp_path: Path, train: dict[str, Any], steps: int, last: int, drawn: str
) -> None:
    (phase,) = prepared(tmp_path, train).phases
    assert (phase.steps, phase.schedule.last, phase.drawn) == (steps, last, drawn)


def test_a_single_last_row_that_needs_a_partner_joins_the_previous_batch(tmp_path: Path) -> None:
    (phase,) = prepared(tmp_path, {"epochs": 1, "batch_size": 3}, "kto").phases
    assert phase.schedule == Schedule(steps=3, batch=3, last=4)


def test_the_last_batch_has_an_item_for_every_rank(tmp_path: Path) -> None:
    roles = {"policy": {"backend": "deepspeed", "ranks": 4}}
    (phase,) = prepared(tmp_path, {"epochs": 1, "batch_size": 4}, roles=roles).phases
    assert phase.schedule == Schedule(steps=2, batch=4, last=6)


def test_a_batch_larger_than_the_data_and_an_endless_number_of_epochs_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="batch_size=32 is more than the 10 items"):
        prepared(tmp_path, {"epochs": 1, "batch_size": 32})
    with pytest.raises(ValueError, match="finite"):
        prepared(tmp_path, {"epochs": float("inf"), "batch_size": 2})


@given(items=st.integers(1, 200), batch=st.integers(1, 50), least=st.integers(1, 8))
def test_every_schedule_draws_exactly_its_items_in_batches_that_are_large_enough(
    items: int, batch: int, least: int
) -> None:
    least = min(least, batch)
    schedule = Schedule.of_items(items, batch, least=least)
    assert schedule.items == max(items, least)
    assert least <= schedule.last < batch + least


def test_one_epoch_of_a_run_learns_from_every_row_once(tmp_path: Path) -> None:
    model = {"path": str(tiny_model_folder(tmp_path / "model", hidden=32))}
    train = {"epochs": 1, "batch_size": 4}
    ready = prepared(tmp_path, train, model=model, output=str(tmp_path), logging={"trackers": [], "curves": False})
    lines = read(run(ready.config, local=True).folder / METRICS_FILE)
    (phase,) = ready.phases
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert sum(line["num_tokens"] for line in lines) == phase.source.report.tokens


def test_groups_are_admitted_for_the_last_batch_as_many_as_it_has() -> None:
    smaller, larger = (Contract(1, batch=4, first_version=10, batches=3, last=last) for last in (2, 5))
    assert [smaller.size(version) for version in (10, 11, 12)] == [4, 4, 2]

    def admitted(contract: Contract, version: int) -> int:
        return next(n for n in range(99) if not contract.may_admit(accepted=n, running=0, version=version))

    assert [admitted(smaller, version) for version in (10, 11, 12)] == [8, 10, 10]
    assert [admitted(larger, version) for version in (10, 11, 12)] == [8, 13, 13]


def test_a_cursor_after_one_epoch_stands_at_its_end() -> None:
    cursor, schedule = Cursor(), Schedule.of_items(10, 6)
    drawing = cursor.unsettled()
    for items in (schedule.batch, schedule.last):
        cursor.settle([next(drawing) for _ in range(items)])
    assert cursor.to_json() == {"frontier": 10, "beyond": []}

"""What a run writes down: metrics file, TensorBoard, Parquet, picture, console lines."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from pyarrow import parquet
from rich.console import Console as Terminal

from orchestrator.console import Console, Pace, duration
from orchestrator.metrics import METRICS_FILE, MetricsLog, read
from orchestrator.plot import draw


@dataclass(frozen=True)
class Ended:
    """A run that has ended, as the console sees it."""

    folder: Path
    scores: dict[str, float]
    checkpoint: Path | None = None
    model: Path | None = None
    averaged: Path | None = None
    picture: Path | None = None


@pytest.fixture
def log(tmp_path: Path) -> Iterator[MetricsLog]:
    log = MetricsLog(tmp_path, run="test", ray_metrics=False)
    yield log
    log.close()


def lines(folder: Path) -> list[str]:
    return (folder / METRICS_FILE).read_text().splitlines()


def tensorboard_scalars(folder: Path) -> dict[str, dict[int, float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    return {tag: {e.step: e.value for e in events.Scalars(tag)} for tag in events.Tags()["scalars"]}


def test_a_line_is_readable_by_others_as_soon_as_it_is_written(log: MetricsLog, tmp_path: Path):
    log.write(1, "grpo", {"reward": 0.5})
    assert json.loads(lines(tmp_path)[0]).items() >= {"step": 1, "phase": "grpo", "reward": 0.5}.items()


def test_a_number_that_is_not_finite_is_null_and_the_line_stays_json(log: MetricsLog, tmp_path: Path):
    log.write(1, "grpo", {"kl": math.nan, "ratio": math.inf, "loss": -0.25})

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    line = json.loads(lines(tmp_path)[0], parse_constant=refuse)
    assert (line["kl"], line["ratio"], line["loss"]) == (None, None, -0.25)


def test_tensorboard_has_the_same_numbers_by_phase(log: MetricsLog, tmp_path: Path):
    log.write(1, "sft", {"loss": 2.0})
    log.write(2, "grpo", {"loss": 1.0})
    log.close()
    assert tensorboard_scalars(tmp_path) == {"sft/loss": {1: 2.0}, "grpo/loss": {2: 1.0}}


def test_rewinding_forgets_later_steps_everywhere(log: MetricsLog, tmp_path: Path):
    for step in (1, 2, 3):
        log.write(step, "sft", {"loss": float(step)})
        log.write_completions(step, [{"prompt": "a", "completion": "b", "reward": 1.0}])
    log.rewind(2)
    log.write(3, "sft", {"loss": 30.0})
    log.close()
    assert [(line["step"], line["loss"]) for line in read(tmp_path / METRICS_FILE)] == [(1, 1.0), (2, 2.0), (3, 30.0)]
    assert sorted(file.name for file in (tmp_path / "completions").iterdir()) == [
        "step_000001.parquet",
        "step_000002.parquet",
    ]
    assert tensorboard_scalars(tmp_path)["sft/loss"] == {1: 1.0, 2: 2.0, 3: 30.0}


def test_a_line_cut_off_by_a_kill_is_passed_over_and_removed_on_resume(tmp_path: Path):
    whole = '{"step": 1, "phase": "sft", "time": 0, "loss": 1.0}\n'
    (tmp_path / METRICS_FILE).write_text(whole + '{"step": 2, "pha')
    assert [line["step"] for line in read(tmp_path / METRICS_FILE)] == [1]
    log = MetricsLog(tmp_path, run="test", tensorboard=False, ray_metrics=False)
    log.rewind(1)
    log.write(2, "sft", {"loss": 0.5})
    log.close()
    assert [json.loads(line)["step"] for line in lines(tmp_path)] == [1, 2]


def test_an_opened_log_goes_on_with_what_is_there(tmp_path: Path):
    for step in (1, 2):
        log = MetricsLog(tmp_path, run="test", tensorboard=False, ray_metrics=False)
        log.write(step, "sft", {"loss": 1.0})
        log.close()
    assert len(lines(tmp_path)) == 2


def test_completions_are_a_parquet_table_with_their_step_although_rows_differ(log: MetricsLog):
    rows = [{"prompt": "1+1=", "completion": "2", "reward": 1.0}, {"prompt": "x", "completion": "", "judge": 0.5}]
    table = parquet.read_table(log.write_completions(7, rows)).to_pylist()
    assert table[0] == {"step": 7, "prompt": "1+1=", "completion": "2", "reward": 1.0, "judge": None}
    assert table[1]["reward"] is None


def test_columns_of_any_values_reach_the_table_unchanged_or_as_json(log: MetricsLog):
    columns: dict[str, list[Any]] = {
        "whole": [1, 2],
        "number": [1, 2.5],
        "mixed": [1, "1"],
        "mapping": [{"a": 1}, {"b": 2}],
        "list": [[1], ["x"]],
        "large": [2**70, 1],
        "half": ["\ud800", "a"],
        "none": [None, None],
        "gap": [None, True],
    }
    rows = [{name: values[row] for name, values in columns.items()} for row in (0, 1)]
    table = parquet.read_table(log.write_completions(1, rows)).to_pydict()
    assert table == {
        "step": [1, 1],
        "whole": [1, 2],
        "number": [1.0, 2.5],
        "mixed": ["1", '"1"'],
        "mapping": ['{"a": 1}', '{"b": 2}'],
        "list": ["[1]", '["x"]'],
        "large": ["1180591620717411303424", "1"],
        "half": ['"\\ud800"', '"a"'],
        "none": [None, None],
        "gap": [None, True],
    }


def test_the_picture_is_drawn_from_the_file_and_shows_more_with_more_metrics(log: MetricsLog, tmp_path: Path):
    log.write(0, "sft", {"eval_reward": 0.1})
    for step in range(1, 30):
        log.write(step, "sft", {"loss": 1 / step})
    alone = png_size(draw(tmp_path))
    log.write(30, "grpo", {"reward": 0.5, "completions/mean_length": 3.0, "kl": math.nan})
    assert png_size(draw(tmp_path)) > alone


def png_size(file: Path | None) -> tuple[int, int]:
    """Height and width, from the header."""
    assert file is not None
    header = file.read_bytes()[:24]
    assert header.startswith(b"\x89PNG")
    return int.from_bytes(header[20:24], "big"), int.from_bytes(header[16:20], "big")


def test_a_run_without_metrics_has_no_picture(tmp_path: Path):
    assert draw(tmp_path) is None


def shown(action: str, *arguments: object, width: int = 150) -> str:
    """What a console prints, as plain text."""
    out = io.StringIO()
    console = Console({"sft": 10, "grpo": 200}, Terminal(file=out, width=width, highlight=False))
    getattr(console, action)(*arguments)
    return out.getvalue()


def test_a_step_is_one_line_with_what_was_measured():
    line = shown("step", "grpo", 50, 200, {"reward": 0.6125, "num_tokens": 900.0, "step_time": 0.5})
    assert line.count("\n") == 1
    for part in ("grpo", " 50/200", "reward  0.613", "tok/s   1800", "s/step  0.50"):
        assert part in line
    assert "kl" not in line


def test_a_step_stays_one_line_on_a_narrow_terminal():
    metrics = dict.fromkeys(("reward", "loss", "kl", "entropy", "completions/mean_length", "step_time"), 1.0)
    assert shown("step", "grpo", 50, 200, metrics, width=60).count("\n") == 1


def test_the_time_left_follows_the_recent_pace():
    now = iter([0.0, 2.0, 4.0])
    pace = Pace(clock=lambda: next(now))
    assert [pace.seconds_left(step, 12) for step in (1, 2, 3)] == [None, 20.0, 18.0]


@pytest.mark.parametrize(("seconds", "text"), [(7.4, "7 s"), (125, "2:05"), (3723, "1:02:03")])
def test_durations_are_short(seconds: float, text: str):
    assert duration(seconds) == text


def test_sampled_text_is_shown_as_it_is_but_never_controls_the_terminal():
    row = {"prompt": "[red]2+2=", "completion": "\x1b[2J4\nend", "reward": math.nan, "version": 3}
    text = shown("completions", [row])
    assert "[red]2+2=" in text
    assert "·[2J4↵ end" in text
    assert "nan" in text


def test_the_end_shows_each_phases_gain_and_the_places(tmp_path: Path):
    model = tmp_path / "model"
    result = Ended(tmp_path, {"before": 0.0, "sft": 0.53, "grpo": 0.91}, tmp_path, model, tmp_path / "curves.png")
    text = shown("done", result, width=400)
    assert "+53.0 points" in text
    assert "+38.0 points" in text
    assert f"troupe run RECIPE model.path={model}" in text


def test_scores_that_are_no_shares_are_not_shown_in_per_cent(tmp_path: Path):
    text = shown("done", Ended(tmp_path, {"before": -2.0, "grpo": 3.5}))
    assert "+5.5000" in text
    assert "%" not in text

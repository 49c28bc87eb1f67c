"""What a run writes down: metrics file, TensorBoard, Parquet, picture, console lines."""

from __future__ import annotations

import io
import json
import math
import shlex
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure
from pyarrow import parquet
from rich.console import Console as Terminal

from orchestrator.methods import build
from orchestrator.reporting.account import Account, PhaseCost
from orchestrator.reporting.console import Console, Pace, duration
from orchestrator.reporting.gains import phase_gains
from orchestrator.reporting.metrics import METRICS_FILE, MetricsLog, of_first_role, read
from orchestrator.reporting.plot import PANELS, _draw_panel, draw
from orchestrator.reporting.trackers.table import queued
from orchestrator.reporting.trackers.tracker import TrackedRun
from orchestrator.result import Gain


@dataclass(frozen=True)
class Ended:
    """A run that has ended, as the console sees it."""

    folder: Path
    checkpoint: Path | None = None
    model: Path | None = None
    averaged: Path | None = None
    picture: Path | None = None
    output: Path | None = None
    scores: dict[str, float] = field(default_factory=dict)
    gains: tuple[Gain, ...] = ()
    seconds: dict[str, float] = field(default_factory=dict)


@pytest.fixture
def log(tmp_path: Path) -> Iterator[MetricsLog]:
    run = TrackedRun("test", tmp_path, "tests", {})
    log = MetricsLog(tmp_path, [queued("tensorboard", run, print)])
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


def test_rewinding_removes_later_steps_from_every_destination(log: MetricsLog, tmp_path: Path):
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


def test_an_incomplete_line_is_skipped_and_removed_on_resume(tmp_path: Path):
    whole = '{"step": 1, "phase": "sft", "time": 0, "loss": 1.0}\n'
    (tmp_path / METRICS_FILE).write_text(whole + '{"step": 2, "pha')
    assert [line["step"] for line in read(tmp_path / METRICS_FILE)] == [1]
    log = MetricsLog(tmp_path)
    log.rewind(1)
    log.write(2, "sft", {"loss": 0.5})
    log.close()
    assert [json.loads(line)["step"] for line in lines(tmp_path)] == [1, 2]


def test_an_existing_log_is_continued(tmp_path: Path):
    for step in (1, 2):
        log = MetricsLog(tmp_path)
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
    assert png_size(draw(tmp_path, phases=["sft"])) == alone


def test_a_curve_goes_on_over_a_phase_without_values_and_a_narrow_phase_has_no_name_in_the_picture():
    rounds = [("sft", 100, 0.5), ("generate", 104, None), ("dpo", 150, 0.75)]
    lines = [{"phase": phase, "step": step, "eval_reward": value} for phase, step, value in rounds]
    axis = Figure().subplots()
    _draw_panel(axis, PANELS[0], [{"phase": "sft", "step": 0}, *lines], [], named=True)
    assert [list(line.get_xdata()) for line in axis.lines] == [[100], [100, 150]]
    assert {"sft", "dpo"} == {text.get_text() for text in axis.texts} - {"0.5", "0.75"}


def test_the_accuracy_of_a_process_reward_model_is_of_steps_and_that_of_a_reward_model_of_pairs():
    def titles(line: dict[str, float]) -> set[str]:
        return {panel.title for panel in PANELS if panel.value(line) is not None}

    assert titles({"eval_accuracy": 0.9}) == {"held-out rows: share scored in the right order"}
    assert titles({"eval_accuracy": 0.9, "eval_first_error": 0.7}) == {
        "held-out rows: share of steps judged rightly",
        "held-out answers: share whose first wrong step is found",
    }


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


def test_a_step_is_one_line_with_its_metrics():
    line = shown("step", "grpo", 50, 200, {"reward": 0.6125, "num_tokens": 900.0, "step_time": 0.5})
    assert line.count("\n") == 1
    for part in ("grpo", " 50/200", "reward  0.613", "tok/s   1800", "s/step  0.50"):
        assert part in line
    assert "kl" not in line


def test_of_what_two_roles_report_a_steps_line_says_the_first_ones():
    metrics = {"policy/loss": -0.25, "policy/num_tokens": 900.0, "value/loss": 4.0, "value/num_tokens": 700.0}
    metrics |= {"reward": 0.5, "objective/kl": 0.125, "val/explained_variance": 0.75, "step_time": 0.5}
    line = shown("step", "grpo", 50, 200, metrics, width=180)
    for part in ("loss -0.2500", "kl/row  0.125", "explained  0.750", "tok/s   1800"):
        assert part in line
    assert of_first_role({"eval_policy/loss": 1.0}, "loss") is None, "an evaluation is no step"


def test_a_step_stays_one_line_on_a_narrow_terminal():
    metrics = dict.fromkeys(("reward", "loss", "kl", "entropy", "completions/mean_length", "step_time"), 1.0)
    assert shown("step", "grpo", 50, 200, metrics, width=60).count("\n") == 1


def test_the_time_left_follows_the_recent_pace():
    now = iter([0.0, 2.0, 4.0])
    pace = Pace(clock=lambda: next(now))
    assert [pace.seconds_left(step, 12) for step in (1, 2, 3)] == [None, 20.0, 18.0]


@pytest.mark.parametrize(("seconds", "text"), [(7.4, "7 s"), (125, "2:05"), (3723, "1:02:03")])
def test_durations_are_formatted_briefly(seconds: float, text: str):
    assert duration(seconds) == text


def test_sampled_text_is_shown_without_its_terminal_escape_sequences():
    row = {"prompt": "[red]2+2=", "completion": "\x1b[2J4\nend", "reward": math.nan, "version": 3}
    text = shown("completions", [row])
    assert "[red]2+2=" in text
    assert "·[2J4↵ end" in text
    assert "nan" in text


def test_the_end_shows_each_phases_gain_its_steps_and_tokens_and_where_the_time_went(tmp_path: Path):
    gains = (
        Gain("sft", 320, 69_750, "held-out score", 0.0, 0.53),
        Gain("grpo", 80, 180_000, "held-out score", 0.53, 0.91),
    )
    seconds = {"start": 15.0, "generation": 31.0, "update": 80.2, "rest": 0.1}
    text = shown("done", Ended(tmp_path, gains=gains, seconds=seconds), width=80)
    for part in ("sft 320 69,750 held-out score 0.0% 53.0% +53.0 points", "53.0% 91.0% +38.0 points"):
        assert part in " ".join(text.split())
    assert "time  start 15 s, generation 31 s, update 1:20\n" in text


def test_scores_that_are_no_shares_and_losses_are_not_shown_in_per_cent(tmp_path: Path):
    gains = (Gain("grpo", 1, 1, "held-out score", -2.0, 3.5), Gain("dpo", 1, 1, "held-out loss", 0.7, 0.5))
    text = shown("done", Ended(tmp_path, gains=gains))
    assert "+5.5000" in text and "-0.2000" in text
    assert "%" not in text


def test_commands_below_next_can_be_copied_even_if_a_folder_has_spaces_and_quotes(tmp_path: Path):
    model = tmp_path / "it's a run" / "model"
    text = shown("done", Ended(tmp_path / "it's a run", model=model), width=80)
    commands = text[text.index("next") :]
    assert f"model.path={shlex.quote(str(model))}" in commands
    words = shlex.split(commands[commands.index("python -c") : commands.index("ask the model")])
    compile(words[2], "next", "exec")
    assert f"pipeline('text-generation', {str(model)!r})" in words[2]


def test_after_a_reward_model_was_trained_the_command_below_next_asks_it_for_a_score(tmp_path: Path):
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text('{"architectures": ["Qwen2ForSequenceClassification"]}')
    text = shown("done", Ended(tmp_path, model=model), width=80)
    words = shlex.split(text[text.index("python -c") : text.index("score a text")])
    compile(words[2], "next", "exec")
    assert f"pipeline('text-classification', {str(model)!r}" in words[2]
    assert "text-generation" not in text and "model.path=" not in text


@pytest.mark.parametrize("width", [40, 60, 80, 100, 140])
def test_no_figure_of_a_step_is_cut_on_a_terminal_of_any_width(width: int):
    metrics = dict.fromkeys(("reward", "loss", "kl", "entropy", "completions/mean_length", "step_time"), 1.25)
    line = shown("step", "grpo", 150, 200, {**metrics, "num_tokens": 900.0, "staleness/mean": 1.0}, width=width)
    assert "…" not in line and len(line.rstrip()) <= width
    label, value = line.split()[-2:]
    assert (label, value) in {("s/step", "1.25"), ("reward", "1.250")}
    assert ("reward  1.250" in line) and ("loss" in line) == (width >= 80)


def test_a_conversation_is_shown_as_its_turns_and_json_that_is_none_as_it_is():
    turns = json.dumps([{"role": "system", "content": "Be brief."}, {"role": "user", "content": "2+2?"}])
    row = {"prompt": turns, "completion": "4", "reward": 1.0, "version": 3}
    assert "system: Be brief.↵ user: 2+2?" in " ".join(shown("completions", [row]).split())
    assert "[1, 2]" in shown("completions", [{**row, "prompt": "[1, 2]"}])


def test_the_gain_of_a_phase_uses_the_most_informative_metric_and_starts_at_the_previous_score():
    lines: list[dict[str, object]] = [
        {"step": 0, "phase": "sft", "eval_reward": 0.0},
        {"step": 1, "phase": "sft", "loss": 9.0},
        {"step": 1, "phase": "sft", "eval_reward": 0.5},
        {"step": 2, "phase": "grpo", "reward": 0.6},
        {"step": 2, "phase": "grpo", "eval_reward": 0.75},
        {"step": 3, "phase": "dpo", "loss": 0.7},
        {"step": 4, "phase": "dpo", "loss": 0.25},
    ]
    assert phase_gains(lines, {"sft": PhaseCost(1, 30)}) == (
        Gain("sft", 1, 30, "held-out score", 0.0, 0.5),
        Gain("grpo", 0, 0, "held-out score", 0.5, 0.75),
        Gain("dpo", 0, 0, "loss in training", 0.7, 0.25),
    )


def test_no_second_of_a_step_is_counted_twice_and_unnamed_time_is_the_rest():
    account, pipeline = Account(), build("grpo", {"beta": 0.1})
    account.spend("start", 2.0)
    times = {"time/collect": 4.0, "time/generate": 6.0, "time/score": 1.0, "time/batch_stages": 1.0}
    account.step("grpo", pipeline, {**times, "time/policy.update": 3.0, "time/publish": 0.5, "num_tokens": 70.0})
    assert account.shares(12.0) == {
        "start": 2.0, "generation": 3.0, "scoring": 0.5, "log-probabilities": 0.5, "update": 3.0, "publish": 0.5,
        "rest": 2.5,
    }  # fmt: skip
    account.step("ppo", build("ppo", {}), {"policy/num_tokens": 60.0, "value/num_tokens": 50.0})
    assert account.phases == {"grpo": PhaseCost(1, 70), "ppo": PhaseCost(1, 60)}


def test_waiting_for_rows_is_time_for_data():
    account = Account()
    account.step("sft", build("sft", {}), {"time/collect": 1.5, "time/policy.update": 2.0})
    assert account.shares(3.5) == {"data": 1.5, "update": 2.0, "rest": 0.0}

"""Files of lines that are remembered say what reading them anew would say."""

from __future__ import annotations

import json
import random
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from orchestrator.json_lines import LineReader, all_lines, last_lines
from orchestrator.reporting.metrics import JsonLines
from orchestrator.run_handle import RunHandle
from orchestrator.service.metric_lines import MetricLines

TAIL = 110  # bytes; two lines, of the lines below


def write(file: Path, *lines: dict[str, Any], mode: str = "a") -> None:
    with file.open(mode) as stream:
        stream.write("".join(json.dumps(line) + "\n" for line in lines))


def steps(*numbers: int, **values: Any) -> list[dict[str, Any]]:
    return [{"step": number, "phase": "sft", "loss": 1.0 / (1 + number), **values} for number in numbers]


def replaced(file: Path) -> None:
    """As a resumed run does: what came after step 2 is taken out."""
    other = file.with_suffix(".tmp")
    write(other, *[line for line in LineReader(file).new() if line["step"] <= 2])
    other.replace(file)


CHANGES: dict[str, Callable[[Path], Any]] = {
    "added to": lambda file: write(file, *steps(4, 5)),
    "replaced by its beginning": replaced,
    "replaced, and added to beyond its size": lambda file: (replaced(file), write(file, *steps(*range(3, 9), kl=0.5))),
    "written anew in place": lambda file: write(file, *steps(1, 2, kl=1.0), *steps(*range(3, 9)), mode="w"),
    "written anew with the same beginning": lambda file: write(file, *steps(1, 2, 7, 8, 9), mode="w"),
    "cut": lambda file: file.write_bytes(file.read_bytes()[:100]),
    "removed": lambda file: file.unlink(),
    "cut in a line and added to": lambda file: (file.write_text(file.read_text() + '{"st'), write(file, *steps(4, 5))),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_is_remembered_of_a_file_is_what_it_holds_whatever_becomes_of_it(tmp_path: Path, change: str):
    file = tmp_path / "metrics.jsonl"
    index = MetricLines(tmp_path)
    assert all_lines(file) == last_lines(file, TAIL) == []
    write(file, *steps(1, 2, 3))
    before = LineReader(file).new()
    assert all_lines(file) == before and len(before) == 3
    assert last_lines(file, TAIL) == before[-2:]
    assert answer(index) == before and answer(index, names=["loss"])
    CHANGES[change](file)
    now = LineReader(file).new()
    assert now != before, "the change is one"
    assert all_lines(file) == answer(index) == now
    assert answer(index, names=["loss"]) == named(now, "loss")
    written = file.read_bytes() if file.exists() else b""
    newest = [json.loads(line) for line in written.split(b"\n")[:-1] if not line.startswith(b'{"st{')]
    shown = last_lines(file, TAIL)
    assert shown == newest[len(newest) - len(shown) :] and min(1, len(newest)) <= len(shown) <= 2


@pytest.mark.parametrize("change", CHANGES)
def test_a_follower_is_told_what_a_file_holds_beyond_that_in_which_it_is_as_before(tmp_path: Path, change: str):
    file = tmp_path / "metrics.jsonl"
    reader = LineReader(file)
    assert reader.new() == []
    write(file, *steps(1, 2, 3))
    before = reader.new()
    assert [line["step"] for line in before] == [1, 2, 3] and reader.new() == []
    CHANGES[change](file)
    now = LineReader(file).new()
    assert now != before, "the change is one"
    common = next((at for at, pair in enumerate(zip(before, now, strict=False)) if pair[0] != pair[1]), len(before))
    assert reader.new() == now[common:] and reader.new() == []
    write(file, *steps(10, 11))  # the first of them ends a line that was cut
    assert reader.new()[-1:] == steps(11)


@pytest.mark.parametrize("read", [6, 5, 3, 2, 0])
def test_a_follower_gets_each_step_after_the_one_that_a_run_went_back_to_once_more(tmp_path: Path, read: int):
    """`read`: steps of which it had the metrics when the run was killed in step 7; the run is resumed from step 3, and
    gets further than it was before the follower looks again."""
    file = tmp_path / "metrics.jsonl"
    reader, killed = LineReader(file), JsonLines(file)
    for step in range(1, 7):
        killed.write(step, "sft", {"loss": 1 / step})
        if step == read:
            assert [line["step"] for line in reader.new()] == list(range(1, read + 1))
    resumed = JsonLines(file)
    resumed.rewind(3)
    for step in range(4, 10):
        resumed.write(step, "sft", {"loss": 0.5 / step})
    found = reader.new()
    assert [line["step"] for line in found] == list(range(min(read, 3) + 1, 10))
    assert [line["loss"] for line in found[-6:]] == [pytest.approx(0.5 / step) for step in range(4, 10)]


def test_a_client_that_follows_the_metrics_of_a_run_sees_that_it_went_back(tmp_path: Path):
    process = subprocess.Popen(["sleep", "60"])  # drives the run, as far as the handle can see
    try:
        log = JsonLines(tmp_path / "metrics.jsonl")
        lines = RunHandle(tmp_path, process).metrics(timeout_s=30)
        for step in (1, 2, 3):
            log.write(step, "sft", {"loss": 1.0})
        assert [next(lines)["step"] for _ in range(3)] == [1, 2, 3]
        log.rewind(1)
        log.write(2, "sft", {"loss": 0.5})
        found = next(lines)
        assert (found["step"], found["loss"]) == (2, 0.5)
    finally:
        process.kill()
        process.wait()


def test_a_follower_that_begins_inside_a_file_gets_whole_lines_from_there(tmp_path: Path):
    file = tmp_path / "events.jsonl"
    write(file, *steps(1, 2))
    reader = LineReader(file, file.stat().st_size)
    assert reader.new() == []
    write(file, *steps(3))
    assert reader.new() == steps(3)
    beyond = LineReader(file, len(file.read_bytes().splitlines(keepends=True)[0]))
    assert beyond.new() == steps(2, 3)


def answer(index: MetricLines, **asked: Any) -> list[dict[str, Any]]:
    return json.loads(index.answer(**{"after": -1, "phase": None, "names": (), "limit": 10_000, **asked}))


def named(lines: list[dict[str, Any]], *names: str) -> list[dict[str, Any]]:
    return [
        {name: value for name, value in line.items() if name in (*names, "step", "phase", "time")}
        for line in lines
        if not line.keys().isdisjoint(names)
    ]


def test_metrics_of_a_growing_file_are_chosen_as_from_all_of_its_lines(tmp_path: Path):
    draw, index, lines = random.Random(0), MetricLines(tmp_path), []
    for step in range(60):
        phase = "sft" if step < 20 else "grpo"
        lines.append({"step": step, "phase": phase, "loss": draw.random()})
        if step % 7 == 0:
            lines.append({"step": step, "phase": phase, "eval_reward": draw.random(), "time": 1.0})
        write(tmp_path / "metrics.jsonl", *lines[-2:] if step % 7 == 0 else lines[-1:])
        for names in ((), ("loss",), ("eval_reward", "loss"), ("nothing",)):
            after, limit = draw.randrange(-1, step + 2), draw.randrange(1, 30)
            chosen = named(lines, *names) if names else lines
            for of in (None, "sft"):
                wanted = [line for line in chosen if line["step"] > after and of in (None, line["phase"])][-limit:]
                assert answer(index, after=after, limit=limit, names=names, phase=of) == wanted


def test_a_line_that_is_being_written_is_told_once_it_is_whole(tmp_path: Path):
    file = tmp_path / "events.jsonl"
    file.write_text('{"event": "prep')
    assert all_lines(file) == last_lines(file) == []
    with file.open("a") as stream:
        stream.write('ared"}\n{"event"')
    assert all_lines(file) == last_lines(file) == [{"event": "prepared"}]

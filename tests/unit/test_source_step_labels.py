"""Answers in steps, each of which has a label."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from actors.errors import DataError
from orchestrator.pipeline import StepLabels
from tests.unit.source_stub import opened, write_rows


def test_process_labels_stand_at_the_last_token_of_their_step(tmp_path: Path) -> None:
    row = {"prompt": "p", "completions": ["ab", "c"], "labels": [True, False]}
    batch = opened(write_rows(tmp_path / "d.jsonl", [row]), StepLabels).item(0).batch
    assert batch["step_label"].tolist() == [-1, -1, -1, 1, -1, 0]
    assert batch["mask"].tolist() == [False, True, True, True, True, True]


def test_steps_end_with_the_separator_that_is_set_and_only_the_last_may_have_its_label(tmp_path: Path) -> None:
    row = {"prompt": "p", "completions": ["ab", "c"], "labels": [True, False]}
    file = write_rows(tmp_path / "d.jsonl", [row])
    source = opened(file, replace(StepLabels, step_separator="; ", last_step_only=True))
    assert source.preview() == "p⟦ab; c; ⟧"
    assert source.batch([0])["step_label"].tolist() == [-1] * 7 + [0]


def test_steps_whose_end_is_cut_off_lose_their_label_and_are_counted(tmp_path: Path) -> None:
    rows = [{"prompt": "p", "completions": ["ab", "c", "d"], "labels": [True, False, True]}] * 2
    file = write_rows(tmp_path / "d.jsonl", rows)
    for streaming in (False, True):
        source = opened(file, StepLabels, max_length=5, streaming=streaming, cache_dir=tmp_path / "cache")
        assert source.batch([0])["step_label"].tolist() == [-1, -1, -1, 1, -1]
        assert "4 steps have no label, because their end was cut off" in source.report.lines()
    assert "4 steps have no label" in "".join(
        opened(file, StepLabels, max_length=5, cache_dir=tmp_path / "cache").report.lines()
    )
    assert "no label" not in "".join(opened(file, StepLabels).report.lines())


def test_an_answer_without_a_label_that_is_left_is_dropped(tmp_path: Path) -> None:
    long = {"prompt": "p", "completions": ["abc"], "labels": [True]}
    file = write_rows(tmp_path / "d.jsonl", [long, {**long, "completions": ["a"]}])
    source = opened(file, StepLabels, max_length=3)
    assert len(source) == 1 and source.report.dropped == {"nothing to learn from is left: longer than max_length=3": 1}


def test_the_problem_is_not_cut_off_the_steps_that_are_about_it(tmp_path: Path) -> None:
    file = write_rows(tmp_path / "d.jsonl", [{"prompt": "p", "completions": ["ab"], "labels": [True]}])
    with pytest.raises(DataError, match=r"data\.truncation=keep_end would cut off the problem"):
        opened(file, StepLabels, truncation="keep_end")

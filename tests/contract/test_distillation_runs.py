"""Whole runs in this process of methods that distil, with engines that sample: of a tiny student and a tiny teacher."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from actors.errors import ConfigError, DataError
from orchestrator.config.loading import config_of
from orchestrator.run import run
from tests.unit.source_stub import merging_tokenizer
from tests.unit.tiny import tiny_model_folder

STEPS = 3


def row(index: int, named: tuple[str, ...]) -> dict[str, str]:
    return {"prompt": f"a{index}", "completion": f"b{index}", "teacher": named[index % len(named)]}


def ran(
    tmp_path: Path,
    options: dict[str, Any],
    max_staleness: int = 0,
    method: str = "gkd",
    steps: int = STEPS,
    named: tuple[str, ...] = ("teacher",),
    teacher: Path | None = None,
) -> tuple[list[dict[str, Any]], list[float]]:
    """(the metrics of each step, the divergence on held-out rows before and after). `named`: what the rows' column
    `teacher` holds, in turn."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(row(i, named)) + "\n" for i in range(12)))
    tree: dict[str, Any] = {
        "method": method,
        "options": options,
        "model": {"path": str(tiny_model_folder(tmp_path, hidden=32))},
        "roles": {
            "teacher": {"model": str(teacher or tiny_model_folder(tmp_path, hidden=32, seed=1))},
            "coach": {"kind": "engine", "engine": "hf", "follows": "teacher"},
            "tutor": {"kind": "frozen", "model": str(tiny_model_folder(tmp_path, hidden=32, seed=2))},
            "rollout": {"engine": "hf"},
            "teacher_rollout": {"engine": "hf"},
        },
        "data": {"path": str(rows)},
        "sampling": {"max_tokens": 4},
        "train": {"steps": steps, "batch_size": 8, "learning_rate": 0.01, "max_staleness": max_staleness},
        "evaluation": None if teacher else {"rows": {"path": str(rows)}},
        "output": str(tmp_path / "runs"),
        "logging": {"trackers": [], "curves": False},
    }
    folder = run(config_of(tree, [], "test"), local=True).folder
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    held_out = [line["eval_divergence"] for line in lines if "eval_divergence" in line]
    return [line for line in lines if "loss" in line], held_out


@pytest.mark.parametrize(("lmbda", "max_staleness"), [(0.0, 1), (0.5, 0)])
def test_a_student_learns_from_what_its_teacher_samples_which_does_not_grow_old(
    tmp_path: Path, lmbda: float, max_staleness: int
) -> None:
    """The teacher alone may sample ahead. With two engine roles, each follows a role of its own: they share the
    process, and no weights."""
    steps, (before, after) = ran(tmp_path, {"beta": 0.0, "lmbda": lmbda, "seq_kd": True}, max_staleness)
    assert len(steps) == STEPS and all(step["grad_norm"] > 0 for step in steps)
    assert all(step["groups/expired"] == 0 for step in steps)
    assert [step.get("staleness/max") for step in steps] == [0.0 if lmbda else None] * STEPS
    assert after < 0.9 * before


def test_a_student_learns_from_a_teacher_s_most_likely_tokens_on_its_own_samples(tmp_path: Path) -> None:
    steps, (before, after) = ran(tmp_path, {"beta": 0.0, "teacher_top_k": 8})
    assert len(steps) == STEPS and all(step["grad_norm"] > 0 for step in steps)
    assert after < 0.9 * before


def test_an_engine_teaches_what_the_same_model_in_ranks_teaches(tmp_path: Path) -> None:
    """Kind decides: a role of kind engine says its likeliest tokens of rows that the student's own engine sampled."""
    options = {"teacher_top_k": 8, "beta": 0.0}
    (by_ranks, _), (by_engine, held_out) = (
        ran(tmp_path, {**options, "teachers": [role]}) for role in ("teacher", "coach")
    )
    for one, other in zip(by_ranks, by_engine, strict=True):
        assert other["divergence"] == pytest.approx(one["divergence"], rel=1e-3)
    assert held_out[1] < 0.9 * held_out[0]


def test_a_student_learns_from_a_teacher_with_another_tokenizer(tmp_path: Path) -> None:
    """Half of the prompts have the data's answers, half the student's own."""
    words = merging_tokenizer("b1", "1a")
    folder = tiny_model_folder(tmp_path, hidden=32, vocab=len(words.get_vocab()), seed=1, tied=False)
    words.save_pretrained(folder)
    options = {"teacher_top_k": 16, "shared_weight": 0.5, "lmbda": 0.5}
    steps, _ = ran(tmp_path, options, method="gold", steps=16, teacher=folder)
    assert all(step["grad_norm"] > 0 for step in steps)
    assert min(step["aligned_share"] for step in steps) < 1 and all(step["aligned_share"] > 0.3 for step in steps)
    first, last = (np.mean([step["divergence"] for step in part]) for part in (steps[:4], steps[-4:]))
    assert last < 0.95 * first


TWO = {"teachers": ["teacher", "tutor"], "teacher_top_k": 8}


@pytest.mark.parametrize(
    ("method", "options"),
    [("gkd", {"lmbda": 0.5, "beta": 0.0, **TWO}), ("minillm", {"gamma": 0.5, **TWO})],
    ids=str,
)
def test_a_student_learns_from_the_teacher_that_each_row_names(
    tmp_path: Path, method: str, options: dict[str, Any]
) -> None:
    steps, held_out = ran(tmp_path, options, method=method, named=("teacher", "tutor", "tutor"))
    assert len(steps) == STEPS and all(step["grad_norm"] > 0 for step in steps)
    if method == "gkd":
        assert held_out[1] < 0.95 * held_out[0]


def test_a_row_that_names_no_teacher_of_the_run_is_refused_before_anything_is_launched(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"row 2.*teacher is 'nobody'; it must be one of teacher, tutor") as refused:
        ran(tmp_path, TWO, named=("teacher", "nobody"))
    assert "rows.jsonl" in str(refused.value)
    with pytest.raises(ConfigError, match=r"gkd learns from the distributions of nobody; describe it as roles\.nobody"):
        ran(tmp_path, {**TWO, "teachers": ["teacher", "nobody"]}, named=("teacher", "nobody"))


@pytest.mark.parametrize(
    ("method", "options", "measure"),
    [
        ("on_policy_distillation", {}, "divergence"),
        ("on_policy_distillation", {"teacher_top_k": 8, "beta": 0.5, "token_metrics": True}, "divergence"),
        ("minillm", {"gamma": 0.5}, "divergence"),
        ("minillm", {"single_step_decomposition": False}, "reverse_kl"),
        ("iw_opd", {}, "reverse_kl"),
    ],
    ids=str,
)
def test_a_student_comes_nearer_to_its_teacher_on_its_own_samples(
    tmp_path: Path, method: str, options: dict[str, Any], measure: str
) -> None:
    steps, _ = ran(tmp_path, options, method=method, steps=24)
    first, last = (np.mean([step[measure] for step in part]) for part in (steps[:4], steps[-4:]))
    assert last < 0.9 * first and all(step["grad_norm"] > 0 for step in steps)

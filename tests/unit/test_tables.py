"""Tables are tables where they fit, and entries elsewhere: no cell becomes a narrow strip beside others."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from orchestrator.cli import main
from orchestrator.reporting.terminal_tables import Rows, entry

WHAT = "Direct preference optimisation: the policy is its own reward model"


def printed(rows: Rows, width: int) -> list[str]:
    out = io.StringIO()
    Console(file=out, width=width, highlight=False).print(rows)
    return [line.rstrip() for line in out.getvalue().splitlines()]


@pytest.fixture
def rows() -> Rows:
    rows = Rows("method", "data", "steps", "what it does", prose=("what it does",), numbers=("steps",))
    rows.add("dpo", "pairs", "10", WHAT)
    rows.add("orpo", "", "9", "[red] is no colour here")
    return rows


def test_rows_that_fit_are_a_table_with_numbers_to_the_right(rows: Rows):
    assert printed(rows, 90) == [
        "method  data   steps  what it does",
        f"dpo     pairs     10  {WHAT}",
        "orpo               9  [red] is no colour here",
    ]


def test_rows_that_do_not_fit_are_entries_whose_facts_are_named_and_whose_prose_has_lines_of_its_own(rows: Rows):
    assert printed(rows, 60) == [
        "dpo  data pairs; steps 10",
        "    Direct preference optimisation: the policy is its own",
        "    reward model",
        "orpo  steps 9",
        "    [red] is no colour here",
    ]


def test_one_column_decides_between_the_two(rows: Rows):
    fits = len("method  data   steps  ") + len(WHAT)
    assert printed(rows, fits)[0].startswith("method")
    assert printed(rows, fits - 1)[0].startswith("dpo")


def test_a_word_with_a_hyphen_stays_whole():
    assert entry("name", "", "reads log-probabilities", width=22).plain == "name\n    reads\n    log-probabilities"


@pytest.mark.parametrize(
    ("command", "whole"),
    [
        (("methods",), WHAT),
        (("methods", "grpo"), "correction default none; type none | token_truncate | token_mask | sequence_truncate"),
        (("methods", "--papers"), "papers/dft arXiv 2508.05629 On the Generalization of SFT sft loss_type=dft"),
        (("recipes",), "Two-digit addition from worked examples, all of them right: the shortest run there is"),
        (
            ("plan", "grpo_arithmetic", "cluster.num_cpus=4", "phases.sft.data.limit=64"),
            "reads mask, tokens; writes reward; part collect",
        ),
        (("keys", "roles.rollout"), "fallback_strategy [section, ...], default [] Other nodes, tried in turn"),
    ],
)
def test_on_eighty_columns_no_sentence_of_any_command_is_cut(
    command: tuple[str, ...], whole: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit):
        main(command)
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    assert whole in " ".join(" ".join(lines).split())

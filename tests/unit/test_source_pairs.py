"""Pairs and labels as they come from elsewhere: where their prompt is, and when nothing is preferred."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from actors.errors import DataError
from orchestrator.config.schema import DataConfig
from orchestrator.data.source import Prompt, validate
from orchestrator.pipeline import Completions, DataKind, Labelled, Pairs, Prompts, StepLabels, Triples
from tests.unit.source_stub import PLAIN_TEMPLATE, assistant, opened, previews, system, tokenizer, user, write_rows

PAIR = {"prompt": "p", "chosen": "c", "rejected": "d"}


@pytest.mark.parametrize("prompt", ["q", " q\n", [user("q")]])
@pytest.mark.parametrize(
    ("kind", "row", "answers"),
    [
        (Pairs, {"chosen": [user("q"), assistant("r")], "rejected": [user("q"), assistant("s")]}, "rs"),
        (
            Triples,
            {
                "chosen": [user("q"), assistant("r")],
                "rejected": [user("q"), assistant("s")],
                "reference": [user("q"), assistant("t")],
            },
            "rst",
        ),
        (Completions, {"completion": [user("q"), assistant("r")]}, "r"),
        (Labelled, {"completion": [user("q"), assistant("r")], "label": True}, "r"),
        (Labelled, {"chosen": [user("q"), assistant("r")], "rejected": [user("q"), assistant("s")]}, "r"),
    ],
)
def test_a_prompt_beside_whole_conversations_is_the_one_that_they_begin_with(
    tmp_path: Path, prompt: Any, kind: DataKind, row: dict[str, Any], answers: str
) -> None:
    shown = previews(tmp_path, {"prompt": prompt, **row}, kind, PLAIN_TEMPLATE)
    assert shown == "\n".join(f"u:q;a:⟦{answer};⟧" for answer in answers)


@pytest.mark.parametrize("prompt", ["q", "s"])
def test_the_prompt_of_a_pair_that_is_named_by_one_of_its_messages_is_all_that_both_share(
    tmp_path: Path, prompt: str
) -> None:
    shared = [system("y"), user("q"), assistant("r"), user("s")]
    row = {"prompt": prompt, "chosen": [*shared, assistant("t")], "rejected": [*shared, assistant("u")]}
    assert previews(tmp_path, row, Pairs, PLAIN_TEMPLATE) == "s:y;u:q;a:r;u:s;a:⟦t;⟧\ns:y;u:q;a:r;u:s;a:⟦u;⟧"


def test_one_conversation_is_answered_after_the_message_that_says_its_prompt(tmp_path: Path) -> None:
    row = {"prompt": "s", "completion": [user("q"), assistant("r"), user("s"), assistant("t")]}
    assert previews(tmp_path, row, Completions, PLAIN_TEMPLATE) == "u:q;a:r;u:s;a:⟦t;⟧"


@pytest.mark.parametrize("prompt", ["another", "r"])
def test_a_text_that_no_message_contains_is_not_the_prompt_of_conversations(tmp_path: Path, prompt: str) -> None:
    row = {"prompt": prompt, "chosen": [user("q"), assistant("r")], "rejected": [user("q"), assistant("s")]}
    with pytest.raises(DataError, match="row 1: prompt is a text, and the answers are conversations that do not"):
        previews(tmp_path, row, Pairs, PLAIN_TEMPLATE)


@pytest.mark.parametrize("kind", [Pairs, Labelled])
@pytest.mark.parametrize("sides", [("ab", "ab c"), ("ab c", "ab")])
def test_a_text_that_is_a_prefix_of_the_other_is_refused(
    tmp_path: Path, kind: DataKind, sides: tuple[str, str]
) -> None:
    name = "chosen" if sides[0] == "ab" else "rejected"
    with pytest.raises(DataError, match=f"row 1: {name} is a prefix of the other one"):
        previews(tmp_path, {"chosen": sides[0], "rejected": sides[1]}, kind)


def test_a_conversation_that_goes_on_from_the_other_differs_after_the_shared_answer(tmp_path: Path) -> None:
    chosen = [user("q"), assistant("r")]
    row = {"chosen": chosen, "rejected": [*chosen, user("s"), assistant("t")]}
    assert previews(tmp_path, row, Pairs, PLAIN_TEMPLATE) == "u:q;a:⟦r;⟧\nu:q;a:⟦r;u:s;a:t;⟧"


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("kind", [Pairs, Triples])
def test_pairs_with_equal_sides_after_truncation_are_dropped_and_counted(
    tmp_path: Path, kind: DataKind, streaming: bool
) -> None:
    same = {"prompt": "p", "chosen": "cccccx", "rejected": "cccccy", "reference": "ddd"}
    rows = [PAIR | {"reference": "e"}, same, same]
    file = write_rows(tmp_path / "d.jsonl", rows)
    source = opened(file, kind, max_length=5, streaming=streaming)
    if streaming:
        source.batch([0, 1])  # the second is of the next pass
    reason = "chosen and rejected are the same tokens: nothing is preferred (cut: longer than max_length=5)"
    assert source.report.items == 1
    assert source.report.dropped == {reason: 2}
    assert f"dropped 2 rows: {reason}" in source.report.lines()
    assert source.preview(0 if not streaming else 1).startswith("p⟦c<eos>⟧\np⟦d<eos>⟧")


def test_pairs_that_only_a_template_makes_the_same_are_dropped_and_counted(tmp_path: Path) -> None:
    trimming = PLAIN_TEMPLATE.replace("{{ m.content }}", "{{ m.content | trim }}")
    pairs = [([assistant("r ")], [assistant("r")]), ([assistant("r")], [assistant("s")])]
    rows = [{"prompt": [user("q")], "chosen": chosen, "rejected": rejected} for chosen, rejected in pairs]
    report = opened(write_rows(tmp_path / "d.jsonl", rows), Pairs, tokenizer(trimming)).report
    assert report.items == 1
    assert report.dropped == {"chosen and rejected are the same tokens: nothing is preferred": 1}


def test_pairs_that_differ_within_the_limit_are_kept(tmp_path: Path) -> None:
    report = opened(write_rows(tmp_path / "d.jsonl", [PAIR | {"chosen": "cxxxx"}]), Pairs, max_length=3).report
    assert (report.items, report.dropped) == (1, {})
    assert report.truncated == {"longer than max_length=3": 1}


@pytest.mark.parametrize("streaming", [False, True])
def test_a_margin_counts_only_if_the_columns_name_it(tmp_path: Path, streaming: bool) -> None:
    file = write_rows(tmp_path / "d.jsonl", [PAIR | {"margin": "high"}])
    assert "margin" not in opened(file, Pairs, streaming=streaming).batch([0])
    with pytest.raises(DataError, match="row 1: margin is 'high'; it must be a finite number"):
        opened(file, Pairs, streaming=streaming, columns={"margin": "margin"})


def test_a_margin_in_a_table_reaches_rewards_as_it_was_written_unless_the_columns_name_it(tmp_path: Path) -> None:
    (tmp_path / "d.csv").write_text("prompt,margin\na,007\n")
    prompt = opened(tmp_path / "d.csv", Prompts).item(0)
    assert isinstance(prompt, Prompt)
    assert prompt.columns == {"margin": "007"}


ONE_CLASS = {
    "desirable": (
        Labelled,
        [{"prompt": str(i), "completion": "a", "label": True} for i in range(4)],
        "4 of 4 labels are true",
    ),
    "undesirable": (Labelled, [{"prompt": "p", "completion": "a", "label": False}] * 2, "2 of 2 labels are false"),
    "steps": (
        StepLabels,
        [{"prompt": "p", "completions": ["a", "b"], "labels": [True, True]}],
        "2 of 2 labels are true",
    ),
}


@pytest.mark.parametrize("case", ONE_CLASS)
def test_labels_of_a_single_class_are_a_remark(tmp_path: Path, case: str) -> None:
    kind, rows, said = ONE_CLASS[case]
    file = write_rows(tmp_path / "d.jsonl", rows)
    line = f"one class only: {said}"
    for report in (
        opened(file, kind).report,
        opened(file, kind, streaming=True).report,
        validate(DataConfig(path=str(file)), kind),
    ):
        assert line in report.lines()


@pytest.mark.parametrize("kind", [Labelled, Pairs])
def test_labels_of_two_classes_or_none_give_no_remark(tmp_path: Path, kind: DataKind) -> None:
    file = write_rows(tmp_path / "d.jsonl", [PAIR])
    for report in (opened(file, kind).report, validate(DataConfig(path=str(file)), kind)):
        assert report.notes == ()

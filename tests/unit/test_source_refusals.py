"""Rows, settings and columns that do not fit are refused with the reason."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from actors.errors import DataError
from orchestrator.config.schema import DataConfig
from orchestrator.data.source import validate
from orchestrator.pipeline import Completions, DataKind, Labelled, Pairs, Prompts, StepLabels, Triples
from tests.unit.source_stub import (
    MARKED_TEMPLATE,
    PLAIN_TEMPLATE,
    assistant,
    opened,
    previews,
    system,
    user,
    write_rows,
)


@pytest.mark.parametrize(
    ("kind", "row", "reason"),
    [
        (Completions, {"prompt": "a", "completion": ""}, "completion is empty"),
        (Completions, {"prompt": "a", "completion": 3}, "completion is of type int"),
        (Completions, {"prompt": "a", "completion": None}, "completion is missing"),
        (
            Completions,
            {"prompt": "a", "completion": [assistant("b")]},
            "the answers are conversations that do not begin with it",
        ),
        (Completions, {"messages": [{"content": "q"}]}, "no `role`"),
        (Completions, {"messages": []}, "messages is empty"),
        (Completions, {"conversations": [{"from": "human"}]}, "every turn needs `from` and `value`"),
        (
            Completions,
            {"conversations": [{"from": 1, "value": "q"}]},
            "every turn needs `from` and `value`, both texts",
        ),
        (Completions, {"conversations": [{"from": "gpt", "value": ""}]}, "conversations is empty"),
        (Pairs, {"prompt": [user("q")], "chosen": [assistant("")], "rejected": [assistant("b")]}, "chosen is empty"),
        (Completions, {"input_ids": [1, 2], "labels": [1]}, "labels has 1 entries for 2"),
        (Labelled, {"prompt": "a", "completion": "b", "label": 2}, "not true or false"),
        (Pairs, {"prompt": "a", "chosen": "b", "rejected": "b"}, "chosen and rejected are the same"),
        (Pairs, {"chosen": [assistant("b")], "rejected": [assistant("b")]}, "chosen and rejected are the same"),
        (Triples, {"prompt": "a", "chosen": "b", "rejected": "c", "reference": [assistant("b")]}, "both be texts"),
        (StepLabels, {"prompt": "a", "completions": ["b"], "labels": [True, True]}, "one entry per step"),
        (Completions, {"messages": [user("q"), assistant("r")], "tools": "{"}, "tools is not JSON"),
        (Completions, {"prompt": "a", "completion": " \n"}, "completion is blank"),
        (Completions, {"messages": [user("q")]}, "messages has no turn of the assistant's, only of: user"),
        (Completions, {"messages": [system("s")]}, "messages has no turn of the assistant's, only of: system"),
        (Completions, {"messages": [user("q"), assistant("")]}, "message 2 is the assistant's and says nothing"),
        (Completions, {"messages": [user("q"), assistant(" "), user("s"), assistant("t")]}, "message 2 is the assis"),
        (
            Completions,
            {"messages": [user("q"), {"role": "assistant", "content": "", "tool_calls": []}]},
            "says nothing",
        ),
        (Completions, {"messages": [user("q"), assistant("r"), user("s")]}, "ends in a turn of user"),
        (
            Completions,
            {"conversations": [{"from": "gpt", "value": "r"}, {"from": "human", "value": "s"}]},
            "ends in a turn of user.*data\\.assistant_only=true",
        ),
        (Completions, {"conversations": [{"from": "human", "value": "s"}]}, "conversations has no turn of the assista"),
        (Completions, {"prompt": [user("q")], "completion": [user("s")]}, "completion has no turn of the assistant's"),
        (Completions, {"prompt": [user("q")], "completion": [user("s"), assistant("r")]}, "begins with a turn of user"),
        (Completions, {"prompt": [user("q")], "completion": [assistant("r"), user("s")]}, "ends in a turn of user"),
        (
            Pairs,
            {"prompt": [user("q")], "chosen": [assistant("r"), user("s")], "rejected": [assistant("t")]},
            "ends in",
        ),
        (Pairs, {"chosen": [user("q"), assistant("r")], "rejected": [user("q"), assistant("")]}, "rejected: message 1"),
        (Pairs, {"chosen": [user("q"), assistant("r")], "rejected": [user("q"), user("s")]}, "rejected has no turn"),
        (Pairs, {"chosen": "a \n", "rejected": "a b"}, "chosen is blank"),
        (Labelled, {"chosen": "a ", "rejected": "a\n"}, "chosen is blank"),
        (Labelled, {"prompt": [user("q")], "completion": [assistant("")], "label": True}, "completion is empty"),
        (Triples, {"prompt": "a", "chosen": "b", "rejected": "c", "reference": " "}, "reference is blank"),
        (StepLabels, {"prompt": "a", "completions": ["b", " "], "labels": [True, True]}, "a step is blank"),
    ],
)
def test_a_row_that_cannot_be_used_is_refused_with_its_reason(
    tmp_path: Path, kind: DataKind, row: dict[str, Any], reason: str
) -> None:
    with pytest.raises(DataError, match=reason) as refusal:
        previews(tmp_path, row, kind, PLAIN_TEMPLATE)
    assert "d.jsonl, row 1" in str(refusal.value)


def test_turns_after_the_last_answer_are_no_fault_where_answers_alone_are_learned(tmp_path: Path) -> None:
    row = {"messages": [user("q"), assistant("r"), user("s")]}
    assert previews(tmp_path, row, Completions, MARKED_TEMPLATE, assistant_only=True) == "u:q;a:⟦r;⟧u:s;"


def test_a_check_without_a_tokenizer_refuses_the_same_turns(tmp_path: Path) -> None:
    for messages in ([user("q")], [user("q"), assistant("")], [user("q"), assistant("r"), user("s")]):
        config = DataConfig(path=str(write_rows(tmp_path / "d.jsonl", [{"messages": messages}])))
        with pytest.raises(DataError, match=r"d\.jsonl, row 1"):
            validate(config, Completions)


@pytest.mark.parametrize(
    ("kind", "row", "setting", "refusal"),
    [
        (Completions, {"messages": [user("q"), assistant("r")]}, {"completion_only": True}, "assistant_only=true"),
        (Completions, {"text": "abc"}, {"completion_only": True}, "is read as text; leave it out"),
        (Completions, {"input_ids": [20, 21]}, {"completion_only": True}, "is read as input_ids; leave it out"),
        (Completions, {"input_ids": [20, 21]}, {"completion_only": False}, "is read as input_ids; leave it out"),
        (Completions, {"input_ids": [20, 21]}, {"assistant_only": True}, "needs conversations"),
        (Completions, {"text": "abc"}, {"assistant_only": True}, "needs conversations"),
        (Prompts, {"prompt": "abc"}, {"completion_only": True}, "is read as prompt; leave it out"),
        (Prompts, {"prompt": [user("q")]}, {"assistant_only": True}, "is read as prompt; leave it out"),
        (
            StepLabels,
            {"prompt": "a", "completions": ["b"], "labels": [True]},
            {"completion_only": False},
            "leave it out",
        ),
    ],
)
def test_a_choice_of_trained_tokens_that_the_data_does_not_have_is_refused(
    tmp_path: Path, kind: DataKind, row: dict[str, Any], setting: dict[str, Any], refusal: str
) -> None:
    (name,) = setting
    with pytest.raises(DataError, match=rf"data\.{name}={str(setting[name]).lower()} .*{refusal}"):
        previews(tmp_path, row, kind, MARKED_TEMPLATE, **setting)


def test_a_missing_column_names_those_found_the_sets_allowed_and_how_to_rename(tmp_path: Path) -> None:
    file = write_rows(tmp_path / "d.jsonl", [{"question": "q", "completion": "a"}])
    with pytest.raises(DataError) as refusal:
        opened(file, Completions)
    message = str(refusal.value)
    assert "found question, completion" in message
    assert "prompt + completion or messages" in message
    assert "data.columns.prompt=ITS_NAME" in message
    assert opened(file, Completions, columns={"prompt": "question"}).preview() == "q⟦a<eos>⟧"


def test_a_mapping_to_a_column_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    file = write_rows(tmp_path / "d.jsonl", [{"question": "q", "completion": "a"}])
    with pytest.raises(DataError, match=r"data\.columns\.prompt=asked.*only question, completion"):
        opened(file, Completions, columns={"prompt": "asked"})

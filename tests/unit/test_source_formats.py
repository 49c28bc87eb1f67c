"""Every format becomes the rows that it means: which tokens, in which order, and which of them are learned from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from actors.errors import DataError
from orchestrator.data.source import Prompt
from orchestrator.pipeline import AnsweredPrompts, Completions, Prompts
from tests.unit.source_stub import (
    MARKED_TEMPLATE,
    PLAIN_TEMPLATE,
    assistant,
    merging_tokenizer,
    opened,
    previews,
    system,
    tokenizer,
    user,
    write_rows,
)


@pytest.mark.parametrize(
    ("row", "shown"),
    [
        ({"text": "abc"}, "a⟦bc<eos>⟧"),
        ({"prompt": "ab=", "completion": "cd"}, "ab=⟦cd<eos>⟧"),
        ({"prompt": [user("q")], "completion": [assistant("r")]}, "u:q;a:⟦r;⟧"),
        ({"messages": [user("q"), assistant("r")]}, "u⟦:q;a:r;⟧"),
        ({"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "r"}]}, "u⟦:q;a:r;⟧"),
        ({"input_ids": [20, 21, 22], "completion_mask": [0, 0, 1]}, "34⟦5⟧"),
        ({"input_ids": [20, 21, 22], "labels": [-100, 21, -100]}, "3⟦4⟧5"),
        ({"input_ids": [20, 21, 22]}, "3⟦45⟧"),
    ],
)
def test_a_completion_is_learned_from_where_its_format_says(tmp_path: Path, row: dict[str, Any], shown: str) -> None:
    assert previews(tmp_path, row, Completions, PLAIN_TEMPLATE) == shown


def test_the_prompt_is_learned_from_too_if_completion_only_is_off(tmp_path: Path) -> None:
    row = {"prompt": "ab=", "completion": "cd"}
    assert previews(tmp_path, row, Completions, completion_only=False) == "a⟦b=cd<eos>⟧"


def test_no_second_end_of_sequence_is_appended_and_none_if_it_is_not_wanted(tmp_path: Path) -> None:
    assert previews(tmp_path, {"text": "abc<eos>"}, Completions) == "a⟦bc<eos>⟧"
    assert previews(tmp_path, {"text": "abc"}, Completions, append_eos=False) == "a⟦bc⟧"


def test_only_the_assistants_words_are_learned_from_where_the_template_marks_them(tmp_path: Path) -> None:
    row = {"messages": [user("q"), assistant("r"), user("s"), assistant("t")]}
    assert previews(tmp_path, row, Completions, MARKED_TEMPLATE, assistant_only=True) == "u:q;a:⟦r;⟧u:s;a:⟦t;⟧"


def test_assistant_only_refuses_a_template_without_generation_markers(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="generation"):
        previews(tmp_path, {"messages": [user("q"), assistant("r")]}, Completions, PLAIN_TEMPLATE, assistant_only=True)


def test_assistant_only_refuses_a_row_without_an_assistant(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"row 1: messages has no turn of the assistant's, only of: system, user"):
        previews(tmp_path, {"messages": [system("s"), user("q")]}, Completions, MARKED_TEMPLATE, assistant_only=True)


def test_assistant_only_refuses_a_row_whose_assistant_the_template_never_marks(tmp_path: Path) -> None:
    template = MARKED_TEMPLATE.replace("m.role == 'assistant'", "m.role == 'model'")
    with pytest.raises(DataError, match=r"row 1: no token of it is the assistant's"):
        previews(tmp_path, {"messages": [user("q"), assistant("r")]}, Completions, template, assistant_only=True)


def test_conversations_without_a_chat_template_are_told_what_to_set(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"model\.chat_template"):
        previews(tmp_path, {"messages": [user("q"), assistant("r")]}, Completions)


def test_tools_as_a_list_or_as_json_text_and_template_arguments_reach_the_template(tmp_path: Path) -> None:
    tools = [{"type": "function", "function": {"name": "add"}}]
    row = {"messages": [user("q"), assistant("r")], "chat_template_kwargs": {"shout": True}}
    shown = previews(tmp_path, {**row, "tools": tools}, Completions, PLAIN_TEMPLATE)
    assert '"add"' in shown and "]!u:q;a:r;" in shown
    assert previews(tmp_path, {**row, "tools": str(tools).replace("'", '"')}, Completions, PLAIN_TEMPLATE) == shown


def test_a_token_that_straddles_prompt_and_completion_is_the_completions_and_is_reported(tmp_path: Path) -> None:
    file = write_rows(tmp_path / "d.jsonl", [{"prompt": "xa", "completion": "bc"}])
    source = opened(file, Completions, merging_tokenizer("ab"))
    assert source.preview() == "x⟦abc<eos>⟧"
    assert source.item(0).batch.lengths.tolist() == [4]
    assert "straddles" in source.report.lines()[-1]


@pytest.mark.parametrize("streaming", [False, True])
def test_an_answered_prompt_is_what_comes_before_its_completion_with_the_row_of_both(
    tmp_path: Path, streaming: bool
) -> None:
    rows = [
        {"prompt": "ab", "completion": "cd"},
        {"prompt": [user("hi")], "completion": [{"role": "assistant", "content": "yo"}], "level": 3},
        {"prompt": "too long a prompt", "completion": "x"},
    ]
    words = tokenizer(PLAIN_TEMPLATE)
    file = write_rows(tmp_path / "d.jsonl", rows)
    source = opened(file, AnsweredPrompts, words, max_length=12, streaming=streaming)
    found = [source.item(index) for index in (0, 1)]
    assert all(isinstance(item, Prompt) and item.answer is not None for item in found)
    assert [words.decode(list(item.tokens)) for item in found] == ["ab", "u:hi;a:"]
    assert [words.decode(item.answer["tokens"].tolist()) for item in found] == ["abcd<eos>", "u:hi;a:yo;"]
    assert [int(item.answer["mask"].sum()) for item in found] == [3, 3]
    assert found[1].columns["level"] == 3
    if not streaming:
        assert source.preview() == "ab⟦cd<eos>⟧"
        assert (source.longest.row, source.longest.prompt) == (10, 7)
        assert len(source) == 2 and source.report.dropped == {"longer than max_length=12": 1}


def test_answered_prompts_need_prompts_apart_that_are_not_cut(tmp_path: Path) -> None:
    file = write_rows(tmp_path / "d.jsonl", [{"text": "ab"}])
    with pytest.raises(DataError, match=r"no column 'prompt'.*answered_prompts need prompt \+ completion"):
        opened(file, AnsweredPrompts)
    file = write_rows(tmp_path / "e.jsonl", [{"prompt": "ab", "completion": "c"}])
    with pytest.raises(DataError, match="completion_only=false needs a prompt apart"):
        opened(file, AnsweredPrompts, completion_only=False)
    with pytest.raises(DataError, match=r"data\.truncation=keep_start would cut rows that are judged as a whole"):
        opened(file, AnsweredPrompts, truncation="keep_start")


def test_a_prompt_carries_every_other_column_for_the_rewards(tmp_path: Path) -> None:
    row = {"prompt": "1+1=", "answer": "2", "level": 3, "hint": None}
    prompt = opened(write_rows(tmp_path / "d.jsonl", [row]), Prompts).item(0)
    assert isinstance(prompt, Prompt)
    assert prompt.prompt == "1+1="
    assert tokenizer().decode(list(prompt.tokens)) == "1+1="
    assert prompt.columns == {"answer": "2", "level": 3, "hint": None}


def test_a_conversational_prompt_opens_the_answer_and_one_that_began_the_answer_is_left_open(tmp_path: Path) -> None:
    asked = {"prompt": [user("q")], "answer": "r"}
    begun = {"prompt": [user("q"), assistant("well")], "answer": "r"}
    assert previews(tmp_path, asked, Prompts, PLAIN_TEMPLATE) == "u:q;a:"
    assert previews(tmp_path, begun, Prompts, PLAIN_TEMPLATE) == "u:q;a:well"
    source = opened(write_rows(tmp_path / "d.jsonl", [asked]), Prompts, tokenizer(PLAIN_TEMPLATE))
    assert source.item(0).prompt == [user("q")]


def test_a_batch_holds_the_drawn_items_in_order_with_their_positions_as_groups(tmp_path: Path) -> None:
    file = write_rows(tmp_path / "d.jsonl", [{"text": "a" * (i + 1)} for i in range(5)])
    source = opened(file, Completions, shuffle=True, append_eos=False, completion_only=False)
    positions = [7, 0, 4]
    batch = source.batch(positions)
    assert batch["group"].tolist() == positions
    lengths = [int(source.item(source.order.at(position)[1]).batch.lengths[0]) for position in positions]
    assert batch.lengths.tolist() == lengths
    assert not batch["mask"][batch.offsets[:-1]].any()
    assert np.issubdtype(batch["tokens"].dtype, np.int32)

"""Every format becomes the rows that it means: which tokens, in which order, and which of them are learned from."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from actors.errors import DataError
from orchestrator.config.schema import DataConfig
from orchestrator.data.formats import extract_prompt
from orchestrator.data.source import Prompt, validate
from orchestrator.pipeline import (
    AnsweredPrompts,
    Completions,
    DataKind,
    Labelled,
    MismatchedLabelled,
    Pairs,
    Prompts,
    StepLabels,
    Triples,
    WeightedLabelled,
)
from tests.unit.source_stub import (
    MARKED_TEMPLATE,
    PLAIN_TEMPLATE,
    merging_tokenizer,
    opened,
    tokenizer,
    write_rows,
)


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def system(text: str) -> dict[str, str]:
    return {"role": "system", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def previews(tmp_path: Path, row: dict[str, Any], kind: DataKind, template: str | None = None, **data: Any) -> str:
    return opened(write_rows(tmp_path / "d.jsonl", [row]), kind, tokenizer(template), **data).preview()


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
def test_a_completion_is_learned_from_where_its_format_says(tmp_path: Path, row: dict, shown: str) -> None:
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


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "ab=", "chosen": "cd", "rejected": "e"},
        {"chosen": "ab=cd", "rejected": "ab=e"},
    ],
)
def test_a_pair_is_two_rows_chosen_first_with_one_boundary(tmp_path: Path, row: dict) -> None:
    source = opened(write_rows(tmp_path / "d.jsonl", [row]), Pairs)
    batch = source.item(0).batch
    assert source.preview() == "ab=⟦cd<eos>⟧\nab=⟦e<eos>⟧"
    assert batch["preferred"].tolist() == [True, False]
    assert batch["group"].tolist() == [0, 0]


def test_the_boundary_of_a_pair_is_where_the_first_of_the_two_parts_from_the_prompt(tmp_path: Path) -> None:
    file = write_rows(tmp_path / "d.jsonl", [{"prompt": "xa", "chosen": "bc", "rejected": "cc"}])
    assert opened(file, Pairs, merging_tokenizer("ab")).preview() == "x⟦abc<eos>⟧\nx⟦acc<eos>⟧"


def test_conversational_pairs_share_their_prompt(tmp_path: Path) -> None:
    row = {"chosen": [user("q"), assistant("yes")], "rejected": [user("q"), assistant("no")]}
    assert previews(tmp_path, row, Pairs, PLAIN_TEMPLATE) == "u:q;a:⟦yes;⟧\nu:q;a:⟦no;⟧"


@pytest.mark.parametrize(
    ("kind", "row", "shown"),
    [
        (Pairs, {"prompt": [user("q")], "chosen": [assistant("r")], "rejected": [assistant("s")]}, "rs"),
        (
            Triples,
            {
                "prompt": [user("q")],
                "chosen": [assistant("r")],
                "rejected": [assistant("s")],
                "reference": [assistant("t")],
            },
            "rst",
        ),
        (Labelled, {"prompt": [user("q")], "completion": [assistant("r")], "label": False}, "r"),
        (Labelled, {"chosen": [user("q"), assistant("r")], "rejected": [user("q"), assistant("s")]}, "r"),
    ],
)
def test_preferences_over_conversations_are_rendered_by_the_template(
    tmp_path: Path, kind: DataKind, row: dict, shown: str
) -> None:
    tools = [{"type": "function", "function": {"name": "add"}}]
    row = {**row, "chat_template_kwargs": {"shout": True}, "tools": tools}
    prompt = f"[{json.dumps(tools)}]!u:q;a:"
    assert previews(tmp_path, row, kind, PLAIN_TEMPLATE) == "\n".join(f"{prompt}⟦{answer};⟧" for answer in shown)


def test_a_margin_goes_with_both_rows_of_its_pair(tmp_path: Path) -> None:
    rows = [{"prompt": "a", "chosen": "b", "rejected": "c", "margin": margin} for margin in (0.5, 2)]
    file = write_rows(tmp_path / "d.jsonl", rows)
    assert opened(file, Pairs, columns={"margin": "margin"}).batch([1, 0])["margin"].tolist() == [2, 2, 0.5, 0.5]


@pytest.mark.parametrize(
    ("chosen", "rejected", "expected"),
    [
        ("The sky is blue.", "The sky is green.", ("The sky is", " blue.", " green.")),
        ("abc", "abcd", ("abc", "", "d")),
        ("The sky is blue", "The sky is blue and vast", ("The sky is blue", "", " and vast")),
        ("ab ", "ab c", ("ab", " ", " c")),
        ("x ", "y", ("", "x ", "y")),
        ([user("q"), assistant("a")], [user("q"), assistant("b")], ([user("q")], [assistant("a")], [assistant("b")])),
    ],
)
def test_the_prompt_of_a_pair_is_what_both_begin_with(chosen: Any, rejected: Any, expected: tuple) -> None:
    assert extract_prompt(chosen, rejected) == expected


def test_labelled_rows_keep_their_label(tmp_path: Path) -> None:
    rows = [{"prompt": "p", "completion": "c", "label": True}, {"prompt": "p", "completion": "d", "label": False}]
    assert opened(write_rows(tmp_path / "d.jsonl", rows), Labelled).batch([0, 1])["label"].tolist() == [True, False]


def test_unpaired_pairs_alternate_so_that_every_batch_has_both_classes(tmp_path: Path) -> None:
    rows = [{"prompt": "p", "chosen": f"c{i}", "rejected": f"r{i}"} for i in range(3)]
    source = opened(write_rows(tmp_path / "d.jsonl", rows), Labelled)
    assert len(source) == 6
    assert source.batch(range(6))["label"].tolist() == [True, False] * 3
    assert source.preview(3) == "p⟦r1<eos>⟧"


def test_a_triple_is_a_pair_with_the_gold_completion_as_its_third_row(tmp_path: Path) -> None:
    row = {"prompt": "ab=", "chosen": "cd", "rejected": "e", "reference": "f"}
    source = opened(write_rows(tmp_path / "d.jsonl", [row]), Triples)
    batch = source.batch([0])
    assert source.preview() == "ab=⟦cd<eos>⟧\nab=⟦e<eos>⟧\nab=⟦f<eos>⟧"
    assert batch["preferred"].tolist() == [True, False, False]
    assert batch["imitated"].tolist() == [False, False, True]


def test_a_batch_of_labelled_rows_has_a_mismatched_row_after_each_within_the_models_length(tmp_path: Path) -> None:
    rows = [{"prompt": "p", "completion": "cde", "label": True}, {"prompt": "qrs", "completion": "d", "label": False}]
    source = opened(write_rows(tmp_path / "d.jsonl", rows), MismatchedLabelled, model_max_length=5)
    batch = source.batch([0, 1])
    texts = [tokenizer().decode(batch.row("tokens", row).tolist()) for row in range(4)]
    assert texts == ["pcde<eos>", "pd<eos>", "qrsd<eos>", "qrscd"]
    assert batch["mismatched"].tolist() == [False, True, False, True]
    assert batch["label"].tolist() == [True, True, False, False]
    assert source.preview() == "p⟦cde<eos>⟧"


def test_pairs_taken_apart_are_mismatched_across_prompts_in_their_own_order(tmp_path: Path) -> None:
    rows = [{"prompt": "p", "chosen": "c", "rejected": "r"}, {"prompt": "q", "chosen": "s", "rejected": "t"}]
    batch = opened(write_rows(tmp_path / "d.jsonl", rows), MismatchedLabelled).batch(range(4))
    mismatched = [batch.row("tokens", row).tolist() for row in np.flatnonzero(batch["mismatched"])]
    assert [tokenizer().decode(row) for row in mismatched] == ["pt<eos>", "pt<eos>", "qr<eos>", "qr<eos>"]


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


def test_undesirable_rows_weigh_less_the_less_their_prompts_look_like_desirable_ones(tmp_path: Path) -> None:
    words = {True: ["aab", "aba", "baa", "bab"], False: ["xxy", "xyx", "yxx", "yxy"]}
    rows = [{"prompt": p, "completion": "c", "label": label} for label in words for p in words[label] * 8]
    strange = [{"prompt": "aab", "completion": "d", "label": False}] * 4
    source = opened(write_rows(tmp_path / "d.jsonl", [*rows, *strange]), WeightedLabelled)
    weight = source.batch(range(len(source)))["weight"]
    assert (weight[:32] == 1).all()
    assert weight[32:64].max() < weight[64:].min()


def test_a_column_of_weights_is_taken_as_it_is_and_a_stream_needs_one(tmp_path: Path) -> None:
    rows = [{"prompt": "p", "completion": "c", "label": False, "odds": odds} for odds in (0.5, 2.0)]
    file = write_rows(tmp_path / "d.jsonl", rows)
    assert opened(file, WeightedLabelled, columns={"weight": "odds"}).batch([0, 1])["weight"].tolist() == [0.5, 2.0]
    with pytest.raises(DataError, match=r"data\.columns\.weight=ITS_NAME"):
        opened(file, WeightedLabelled, streaming=True)


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
    tmp_path: Path, kind: DataKind, row: dict, reason: str
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
    tmp_path: Path, kind: DataKind, row: dict, setting: dict[str, Any], refusal: str
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


def test_a_column_that_happens_to_be_called_weight_counts_only_if_it_is_mapped(tmp_path: Path) -> None:
    file = write_rows(tmp_path / "d.jsonl", [{"text": "ab", "weight": 70.5}])
    assert "weight" not in opened(file, Completions).item(0).batch
    assert opened(file, Completions, columns={"weight": "weight"}).item(0).batch["weight"].tolist() == [70.5]


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

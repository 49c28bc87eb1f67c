"""Conversations are rendered alike wherever they are used, and what is learned from them is what would be sampled."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerBase, Qwen2Tokenizer

from actors.errors import DataError
from orchestrator.config.schema import DataConfig, EvaluationConfig, ModelConfig, RewardConfig, RunConfig
from orchestrator.data.formats import FORMATS
from orchestrator.data.prepare import Preparer
from orchestrator.data.source import validate
from orchestrator.data.tokenise import Tokeniser
from orchestrator.data.truncation import Limits
from orchestrator.pipeline import Completions, DataKind, Pairs, Prompts, StepLabels
from orchestrator.planning.resolve import prepare
from tests.unit.source_stub import MARKED_TEMPLATE, PLAIN_TEMPLATE, opened, tokenizer, write_rows
from tests.unit.tiny import tiny_model_folder

U, A = "user", "assistant"
OPENS_A_THOUGHT = (
    "{% for m in messages %}{{ m.role[0] }}:{% if m.role == 'assistant' %}{{ m.content.split('</think>')[-1] }}"
    "{% else %}{{ m.content }}{% endif %};{% endfor %}{% if add_generation_prompt %}a:<think>{% endif %}"
)
DROPS_A_THOUGHT = OPENS_A_THOUGHT.replace("a:<think>", "a:")
KEEPS_A_THOUGHT = PLAIN_TEMPLATE.replace("{{ m.content }}", "{{ m.content | trim }}")
UNMARKED_CALLS = (
    "{% for m in messages %}{{ m.role[0] }}:{% if m.tool_calls %}{{ m.tool_calls[0].function.name }};"
    "{% elif m.role == 'assistant' %}{% generation %}{{ m.content }};{% endgeneration %}"
    "{% else %}{{ m.content }};{% endif %}{% endfor %}{% if add_generation_prompt %}a:{% endif %}"
)
ENDLESS = (
    "{% for m in messages %}{% for a in range(99999) %}\n{% for b in range(99999) %}{{ a * b }}{% endfor %}\n"
    "{% endfor %}{% endfor %}"
)


def said(*turns: str) -> list[dict[str, Any]]:
    """'u:words' and 'a:words' as messages."""
    roles = {"u": U, "a": A, "s": "system", "t": "tool"}
    return [{"role": roles[turn[0]], "content": turn[2:]} for turn in turns]


def shown(tmp_path: Path, row: dict[str, Any], kind: DataKind, words: Any = None, **data: Any) -> str:
    words = words if isinstance(words, PreTrainedTokenizerBase) else tokenizer(words or PLAIN_TEMPLATE)
    return opened(write_rows(tmp_path / "d.jsonl", [row]), kind, words, **data).preview()


def enclosing(before: str, after: str, template: str | None = PLAIN_TEMPLATE) -> PreTrainedTokenizerBase:
    """A tokenizer that puts special tokens before and after each text."""
    words: Any = tokenizer(template)
    words.add_special_tokens({"bos_token": "<bos>"})
    ids = [(token, words.convert_tokens_to_ids(token)) for token in ("<bos>", "<eos>")]
    words.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{before} $A {after}".strip(), special_tokens=ids
    )
    assert words.decode(words("q")["input_ids"]) == f"{before}q{after}"
    return words


@pytest.mark.parametrize(("before", "after"), [("", ""), ("<bos>", ""), ("<bos>", "<eos>"), ("", "<eos>")])
@pytest.mark.parametrize(
    ("prompt", "completion", "kwargs", "expected"),
    [
        ("qr=", "st", {}, "{before}qr="),
        ("<bos>qr=", "st", {}, "<bos>qr="),
        (said("u:q"), said("a:r"), {}, "u:q;a:"),
        (said("u:q", "a:r", "u:s"), said("a:t", "u:v", "a:w"), {}, "u:q;a:r;u:s;a:"),
        (said("u:q", "a:well, "), said("a:r"), {}, "u:q;a:well, "),
        (said("u:q"), said("a:r"), {"shout": True}, "!u:q;a:"),
    ],
)
def test_training_and_rollouts_see_the_same_prompt(
    tmp_path: Path, before: str, after: str, prompt: Any, completion: Any, kwargs: dict, expected: str
) -> None:
    row = {"prompt": prompt, "completion": completion} | ({"chat_template_kwargs": kwargs} if kwargs else {})
    words = enclosing(before, after)
    expected = expected.format(before=before)
    learned = shown(tmp_path, row, Completions, words)
    assert shown(tmp_path, row, Prompts, words) == expected
    assert learned[: len(expected) + 1] == f"{expected}⟦"
    other = [{"role": A, "content": "x"}] if isinstance(completion, list) else "x"
    pair = {**row, "chosen": completion, "rejected": other}
    assert shown(tmp_path, pair, Pairs, words).split("\n")[0] == learned


def test_evaluation_prompts_are_rendered_as_the_phases_own(tmp_path: Path) -> None:
    template = tmp_path / "template.jinja"
    template.write_text(PLAIN_TEMPLATE)
    file = write_rows(tmp_path / "d.jsonl", [{"prompt": said("u:q", "a:well, "), "answer": "r"}] * 2)
    phase = {
        "method": "grpo",
        "data": DataConfig(path=str(file)),
        "train": {"steps": 1, "batch_size": 1},
        "evaluation": EvaluationConfig(data=DataConfig(path=str(file))),
    }
    config = RunConfig.model_validate(
        {
            "phases": {"p": phase},
            "model": ModelConfig(path=str(tiny_model_folder(tmp_path)), chat_template=str(template)),
            "rewards": [RewardConfig(fn="exact_match")],
            "roles": {"rollout": {"engine": "hf"}},
        }
    )
    prepared = prepare(config)
    held_out = prepared.phases[0].evaluation
    assert held_out is not None
    assert prepared.tokenizer.decode(held_out.item(0).tokens) == "u:q;a:well, "  # pyright: ignore
    assert held_out.item(0).tokens == prepared.phases[0].source.item(0).tokens  # pyright: ignore


@pytest.mark.parametrize("append_eos", [True, False])
def test_rows_of_text_end_as_append_eos_says_whatever_the_tokenizer_would_append(
    tmp_path: Path, append_eos: bool
) -> None:
    end, words = "<eos>" * append_eos, enclosing("<bos>", "<eos>")
    data: dict[str, Any] = {"append_eos": append_eos}
    assert shown(tmp_path, {"text": "abc"}, Completions, words, **data) == f"<bos>⟦abc{end}⟧"
    assert shown(tmp_path, {"text": "<bos>abc"}, Completions, words, **data) == f"<bos>⟦abc{end}⟧"
    assert shown(tmp_path, {"prompt": "ab", "completion": "c"}, Completions, words, **data) == f"<bos>ab⟦c{end}⟧"


def test_the_prompt_of_a_stepwise_answer_does_not_end_in_an_end_of_sequence(tmp_path: Path) -> None:
    row = {"prompt": "p", "completions": ["ab", "c"], "labels": [True, False]}
    assert shown(tmp_path, row, StepLabels, enclosing("<bos>", "<eos>")) == "<bos>p⟦ab\nc\n⟧"


def test_a_completion_goes_on_with_the_answer_that_the_prompt_began(tmp_path: Path) -> None:
    row = {"prompt": said("u:q", "a:Sure"), "completion": said("a:, go", "u:more", "a:no")}
    assert shown(tmp_path, row, Completions) == "u:q;a:Sure⟦, go;u:more;a:no;⟧"
    marked = shown(tmp_path, row, Completions, MARKED_TEMPLATE, assistant_only=True)
    assert marked == "u:q;a:Sure⟦, go;⟧u:more;a:⟦no;⟧"


@pytest.mark.parametrize("template", [OPENS_A_THOUGHT, DROPS_A_THOUGHT])
@pytest.mark.parametrize(
    ("kind", "row"),
    [
        (Completions, {"prompt": said("u:q"), "completion": said("a:<think>t</think>r")}),
        (Completions, {"messages": said("u:q", "a:<think>t</think>r")}),
        (Completions, {"messages": said("u:q", "a:<think>t</think>r", "u:s", "a:v")}),
        (Pairs, {"prompt": said("u:q"), "chosen": said("a:<think>t</think>r"), "rejected": said("a:s")}),
    ],
)
def test_a_template_that_drops_reasoning_is_refused(
    tmp_path: Path, template: str, kind: DataKind, row: dict[str, Any]
) -> None:
    with pytest.raises(DataError, match=r"d\.jsonl, row 1: the chat template does not .*model\.chat_template"):
        shown(tmp_path, row, kind, template)


def test_a_template_that_opens_reasoning_only_for_rollouts_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"'u:q;a:r;' instead of 'u:q;a:<think>'.*model\.chat_template"):
        shown(tmp_path, {"messages": said("u:q", "a:r")}, Completions, OPENS_A_THOUGHT)
    assert shown(tmp_path, {"messages": said("u:q", "a:r")}, Completions, DROPS_A_THOUGHT) == "u⟦:q;a:r;⟧"


def test_a_template_that_ignores_another_field_of_an_answer_is_refused(tmp_path: Path) -> None:
    thought = {"role": A, "content": "r", "reasoning_content": "t t"}
    call = {"role": A, "content": "r", "tool_calls": [{"type": "function", "function": {"name": "add"}}]}
    for message, missing in ((thought, "t t"), (call, "tool_calls")):
        with pytest.raises(DataError, match=f"does not write all that the assistant says: '{missing}' is missing"):
            shown(tmp_path, {"prompt": said("u:q"), "completion": [message]}, Completions)


def test_a_template_may_change_white_space_and_leave_out_untrained_turns(tmp_path: Path) -> None:
    row = {"prompt": said("u:q"), "completion": said("a: <think>t</think>  r ")}
    assert shown(tmp_path, row, Completions, KEEPS_A_THOUGHT) == "u:q;a:⟦<think>t</think>  r;⟧"
    row = {"prompt": said("u:q", "a:<think>t</think>r", "u:s"), "completion": said("a:v")}
    assert shown(tmp_path, row, Completions, DROPS_A_THOUGHT) == "u:q;a:r;u:s;a:⟦v;⟧"


@pytest.mark.parametrize(
    "name",
    ["tokenize", "chat_template", "return_dict", "messages", "tools", "add_generation_prompt", "eos_token", "padding"],
)
def test_a_row_may_not_set_arguments_of_apply_chat_template(tmp_path: Path, name: str) -> None:
    row = {"messages": said("u:q", "a:r"), "chat_template_kwargs": {name: True}}
    file = write_rows(tmp_path / "d.jsonl", [row])
    for reading in (
        lambda: opened(file, Completions, tokenizer(PLAIN_TEMPLATE)),
        lambda: validate(DataConfig(path=str(file)), Completions),
    ):
        with pytest.raises(DataError, match=rf"row 1: chat_template_kwargs\.{name} is not one of the"):
            reading()


def test_a_row_may_not_replace_a_special_token_that_its_tokenizer_alone_has(tmp_path: Path) -> None:
    words = Qwen2Tokenizer(
        vocab={"<eos>": 0}, merges=[], unk_token="<eos>", extra_special_tokens={"image_token": "<i>"}
    )  # pyright: ignore
    words.chat_template = PLAIN_TEMPLATE + "{{ image_token }}"
    row = {"prompt": said("u:q"), "chat_template_kwargs": {"image_token": "x"}}
    with pytest.raises(DataError, match=r"chat_template_kwargs\.image_token is a special token"):
        shown(tmp_path, row, Prompts, words)


def test_a_variable_that_the_template_does_not_read_is_a_remark(tmp_path: Path) -> None:
    row = {"messages": said("u:q", "a:r"), "chat_template_kwargs": {"shuot": True}, "tools": [{"name": "add"}]}
    source = opened(write_rows(tmp_path / "d.jsonl", [row]), Completions, tokenizer(MARKED_TEMPLATE))
    assert source.report.notes == (
        "1 rows have 'tools' for the chat template, which does not read it",
        "1 rows have 'shuot' for the chat template, which does not read it",
    )


@pytest.mark.parametrize("kind", [Completions, Prompts])
def test_a_template_that_does_not_end_is_stopped_and_named_with_its_row(kind: DataKind) -> None:
    form = FORMATS[kind.name][1 if kind is Completions else 0]
    limits = Limits(None, None, "keep_start")
    words = tokenizer("{% if messages[0].content == 'q' %}" + ENDLESS + "{% endif %}" + PLAIN_TEMPLATE)
    preparer = Preparer(form, limits, Tokeniser(words, render_limit_s=0.1), kind is Prompts, assistant_only=False)
    rows = [{"prompt": said(f"u:{question}"), "completion": said("a:s")} for question in "rqqq"]
    refused: list[int] = []
    with pytest.raises(DataError, match=r"row 8: the chat template .*did not end within 0\.1 s of") as refusal:
        preparer.prepare(enumerate(rows), lambda row, _: refused.append(row), lambda row: ("d.jsonl", row + 7))
    assert "in its line 2: '{% for b in range(99999) %}" in str(refusal.value)
    assert "model.chat_template" in str(refusal.value)
    assert refused == []


def test_a_turn_that_the_template_does_not_mark_is_mentioned(tmp_path: Path) -> None:
    call: dict[str, Any] = {"role": A, "tool_calls": [{"type": "function", "function": {"name": "add"}}]}
    rows = [
        {"messages": [*said("u:q"), call, *said("t:5", "a:r")]},
        {"messages": said("u:q", "a:s")},
    ]
    file = write_rows(tmp_path / "d.jsonl", rows)
    source = opened(file, Completions, tokenizer(UNMARKED_CALLS), assistant_only=True)
    assert source.preview(0) == "u:q;a:add;t:5;a:⟦r;⟧"
    expected = "1 rows have a turn of the assistant's that the chat template does not mark: it is not learned from"
    assert source.report.notes == (expected,)
    streamed = opened(file, Completions, tokenizer(UNMARKED_CALLS), assistant_only=True, streaming=True)
    assert streamed.report.notes == (expected,)


@pytest.mark.parametrize("marker", ["{%+ generation %}", "{%-   generation -%}", "{%\ngeneration %}"])
def test_every_spelling_of_a_generation_marker_is_read(tmp_path: Path, marker: str) -> None:
    template = MARKED_TEMPLATE.replace("{% generation %}", marker)
    row = {"messages": said("u:q", "a:r")}
    assert shown(tmp_path, row, Completions, template, assistant_only=True) == "u:q;a:⟦r;⟧"


@pytest.mark.parametrize("words", ["{# {% generation %} #}", "{{ '{% generation %}' }}", "{% set generation = 1 %}"])
def test_a_generation_marker_that_is_no_code_of_the_template_is_none(tmp_path: Path, words: str) -> None:
    with pytest.raises(DataError, match="needs a chat template that marks"):
        shown(tmp_path, {"messages": said("u:q", "a:r")}, Completions, words + PLAIN_TEMPLATE, assistant_only=True)

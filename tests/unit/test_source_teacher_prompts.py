"""What a teacher reads in the place of a prompt is what the template makes of the row, or a column is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from actors.errors import ConfigError, DataError
from actors.other_prompts import FILL, INSERT
from orchestrator.config.loading import config_of
from orchestrator.data.source import Prompt
from orchestrator.methods import build
from orchestrator.pipeline import Prompts
from orchestrator.planning.machine import Machine
from orchestrator.planning.plan import draft_plan
from orchestrator.planning.resolve import build_pipeline, prepare
from tests.unit.source_stub import PLAIN_TEMPLATE, merging_tokenizer, opened, tokenizer, write_rows


def read_by_teachers(path: Path, template: str, chat_template: str | None = None) -> list[str]:
    words = tokenizer(chat_template)
    source = opened(path, Prompts.with_teacher_prompts(template), words)
    found: list[str] = []
    for index in range(len(source)):
        prompt = source.item(index)
        assert isinstance(prompt, Prompt) and prompt.teacher_prompt is not None
        tokens = prompt.teacher_prompt.tolist()
        text = [words.decode([token]) if token >= 0 else {INSERT: "<SHOWN>", FILL: "_"}[token] for token in tokens]
        found.append("".join(text))
    return found


def test_columns_of_the_row_stand_where_the_template_says_filled_up_to_the_longest(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", [{"prompt": "1+1=", "hint": "{two}"}, {"prompt": "2=", "hint": "2"}])
    assert read_by_teachers(path, "{hint}: {prompt}{{}}") == ["{two}: 1+1={}", "2: 2={}______"]
    assert read_by_teachers(path, "a{demonstration}b {prompt}") == ["a<SHOWN>b 1+1=", "a<SHOWN>b 2=__"]


def test_of_a_conversation_the_last_message_is_changed_and_the_chat_template_applied(tmp_path: Path) -> None:
    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": "q"}]
    path = write_rows(tmp_path / "rows.jsonl", [{"prompt": messages, "hint": "h"}])
    found = read_by_teachers(path, "{prompt} ({hint}, {demonstration})", PLAIN_TEMPLATE)
    assert found == ["s:s;u:q (h, <SHOWN>);a:"]


def test_a_teacher_with_another_tokenizer_reads_the_prompt_in_its_own_tokens(tmp_path: Path) -> None:
    words = merging_tokenizer("ab")
    words.save_pretrained(tmp_path / "theirs")
    path = write_rows(tmp_path / "rows.jsonl", [{"prompt": "abc"}])
    kind = Prompts.with_teacher_prompts("{prompt}")
    item = opened(path, replace(kind, teacher_tokenizer=(str(tmp_path / "theirs"), False))).item(0)
    assert isinstance(item, Prompt) and item.teacher_prompt is not None and len(item.tokens) == 3
    expected = words("abc", add_special_tokens=False)["input_ids"]
    assert item.teacher_prompt.tolist() == expected and len(item.teacher_prompt) == 2


def test_a_row_without_a_column_of_the_template_is_refused_with_the_column(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", [{"prompt": "a", "hint": "b"}, {"prompt": "a", "hint": None}])
    with pytest.raises(DataError, match=r"row 2.*hint is missing"):
        read_by_teachers(path, "{hint}{prompt}")
    with pytest.raises(DataError, match=r"clue is missing, and options\.teacher_template needs it"):
        read_by_teachers(path, "{clue}{prompt}")
    with pytest.raises(DataError, match=r"data\.streaming: how long teachers' prompts are"):
        opened(path, Prompts.with_teacher_prompts("{prompt}"), streaming=True)


@pytest.mark.parametrize(
    ("method", "template", "said"),
    [
        ("sdft", "{prompt", "a brace is written twice"),
        ("sdft", "{prompt.real}", "is not the name of a column"),
        ("sdft", "{prompt} {demonstration}", "a completion that sdpo samples"),
        ("sdpo", "{prompt}", "lacks {demonstration}"),
        ("sdpo", "{demonstration} {demonstration}", "more than once"),
    ],
)
def test_what_is_no_template_of_the_method_is_refused(method: str, template: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        build(method, {"teacher_template": template})


@pytest.mark.parametrize(
    ("method", "changes", "said"),
    [
        ("sdft", {"train": {"token_budget": 20}}, r"what a teacher reads may have 26 tokens, 22 of options.teacher_t"),
        ("sdpo", {"train": {"token_budget": 20}}, r"may have 28 tokens, 20 of .* and 2 times sampling.max_tokens"),
        (
            "gold",
            {"train": {}},
            r"teacher is asked for its 300 most likely tokens, and the tokenizers have 258 and 258",
        ),
        ("gold", {"roles": {}}, r"gold learns from the distributions of teacher, and roles.teacher.model is not set"),
        ("sdft", {"model": {"lora": {"r": 4}}}, r"train without model.lora, or set options.teacher=base"),
        ("sdft", {"episode": {"tools": ["calculator"]}}, r"gives its teacher another prompt, and the prompt of an"),
    ],
)
def test_what_cannot_run_is_refused_at_the_plan(
    tmp_path: Path, method: str, changes: dict[str, Any], said: str
) -> None:
    path = write_rows(tmp_path / "rows.jsonl", [{"prompt": "1+1=", "hint": "x" * 17}])
    template = "{hint} {prompt}" if method == "sdft" else "x" * 15 + "{demonstration}{prompt}"
    options = {"teacher_top_k": 300} if method == "gold" else {"teacher_template": template, "teacher_top_k": 4}
    teacher = {"teacher": {"model": "example:arithmetic"}} if method == "gold" and "roles" not in changes else {}
    tree = {
        "method": method,
        "options": options,
        "model": {"path": "example:arithmetic", **changes.get("model", {})},
        "rewards": [{"fn": "exact_match"}] if method == "sdpo" else [],
        "data": {"path": str(path)},
        "sampling": {"max_tokens": 4},
        "train": {"steps": 1, "batch_size": 1, **changes.get("train", {})},
        "roles": {"rollout": {"engine": "hf"}, **teacher},
        **({"episode": changes["episode"]} if "episode" in changes else {}),
    }
    with pytest.raises(ConfigError, match=said):
        config = config_of(tree, [], "test")
        if "train" in changes:  # how long the data's prompts are is known only when it is opened
            prepare(config)
        pipelines = {name: build_pipeline(each) for name, each in config.phases.items()}
        draft_plan(config, pipelines, machine=Machine(2)).accepted()

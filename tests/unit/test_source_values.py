"""What was written is what arrives, at the template and at the rewards; or a refusal names the row and the field."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, Features, Json, Value

from actors.errors import DataError
from orchestrator.config import DataConfig, MixtureEntry
from orchestrator.data.rows import mixture_counts
from orchestrator.pipeline import Completions, Labelled, Prompts
from orchestrator.source import Prompt, Source, open_source, validate
from rewards.functions import exact_match
from tests.unit.source_stub import opened, tokenizer, write_rows

TEMPLATE = (
    "{% if tools %}{{ tools | tojson }}{% endif %}{% if mood is defined %}{{ mood }}{% endif %}"
    "{% for m in messages %}{% for c in m.tool_calls or [] %}{{ c.function.arguments | tojson }}{% endfor %}"
    "{{ m.keys() | list }}{{ m.content or '' }}{% endfor %}"
)
NULL_IN_TOOL = [{"name": "f", "properties": {"n": {"type": "integer", "default": None}}}]
BOTH = pytest.mark.parametrize("streaming", [False, True], ids=["table", "stream"])


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def calling(arguments: dict[str, Any]) -> dict[str, Any]:
    return {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": arguments}}]}


def chat(arguments: dict[str, Any], **columns: Any) -> dict[str, Any]:
    return {"messages": [user("q"), calling(arguments)], **columns}


def text_of(source: Source, index: int = 0) -> str:
    return source.preview(index).replace("⟦", "").replace("⟧", "")


def prompts(path: Path, count: int, **data: Any) -> list[Prompt]:
    source = opened(path, Prompts, cache_dir=path.parent / "cache", **data)
    found = [source.item(index) for index in range(count)]
    assert all(isinstance(each, Prompt) for each in found)
    return found  # pyright: ignore


def columns_of(path: Path, count: int, **data: Any) -> list[dict[str, Any]]:
    return [prompt.columns for prompt in prompts(path, count, **data)]


# JSON


@BOTH
@pytest.mark.parametrize(
    ("first", "second"),
    [
        (5, 2.5),
        (5, "five"),
        ({"words": 3}, {"letter": "x"}),
        ([1, 2], [1.5]),
        ([{"a": 1}, {"b": None}], None),
        (True, 0),
        (9007199254740993, 0.5),
        (12345678901234567890123, 1),
        ({}, []),
        ("a\u0000b", "\U0001f600"),
    ],
    ids=repr,
)
def test_a_value_reaches_the_reward_as_it_was_written_whatever_other_rows_hold(
    tmp_path: Path, first: Any, second: Any, streaming: bool
) -> None:
    file = write_rows(tmp_path / "d.jsonl", [{"prompt": "p", "answer": first}, {"prompt": "q", "answer": second}])
    found = [columns["answer"] for columns in columns_of(file, 2, streaming=streaming)]
    assert [repr(value) for value in found] == [repr(first), repr(second)]  # 5 == 5.0 == True


def test_an_integer_answer_matches_although_another_row_has_a_fraction(tmp_path: Path) -> None:
    file = write_rows(tmp_path / "d.jsonl", [{"prompt": "p", "answer": 5}, {"prompt": "q", "answer": 2.5}])
    assert exact_match(["5"], [columns_of(file, 2)[0]["answer"]]) == [1.0]


@BOTH
def test_tool_calls_reach_the_template_with_their_nulls_their_types_and_the_order_of_their_keys(
    tmp_path: Path, streaming: bool
) -> None:
    given = [{"n": 5, "limit": None}, {"limit": 3, "n": 2.5}, {"b": 1}]
    source = opened(
        write_rows(tmp_path / "d.jsonl", map(chat, given)), Completions, tokenizer(TEMPLATE), streaming=streaming
    )
    for index, arguments in enumerate(given):
        assert json.dumps(arguments) in text_of(source, index)


@BOTH
@pytest.mark.parametrize("as_text", [False, True], ids=["list", "JSON text"])
def test_schemas_of_tools_keep_the_nulls_that_were_written(tmp_path: Path, as_text: bool, streaming: bool) -> None:
    tools: Any = json.dumps(NULL_IN_TOOL) if as_text else NULL_IN_TOOL
    file = write_rows(tmp_path / "d.jsonl", [chat({}, tools=tools), chat({}, tools=json.dumps([{"name": "g"}]))])
    source = opened(file, Completions, tokenizer(TEMPLATE), streaming=streaming)
    assert text_of(source).startswith(json.dumps(NULL_IN_TOOL))
    assert text_of(source, 1).startswith('[{"name": "g"}]')


@BOTH
def test_arguments_of_the_template_keep_their_nulls_and_do_not_get_those_of_other_rows(
    tmp_path: Path, streaming: bool
) -> None:
    rows = [chat({}, chat_template_kwargs={"mood": None}), chat({}, chat_template_kwargs={"tone": "x"}), chat({})]
    source = opened(write_rows(tmp_path / "d.jsonl", rows), Completions, tokenizer(TEMPLATE), streaming=streaming)
    assert [text_of(source, index).startswith("None") for index in range(3)] == [True, False, False]


@BOTH
def test_a_message_has_the_keys_that_it_was_given_and_a_null_one_counts_as_not_given(
    tmp_path: Path, streaming: bool
) -> None:
    rows = [{"messages": [user("q"), {"role": "assistant", "content": "r", "tool_calls": None}]}, chat({"n": 1})]
    source = opened(write_rows(tmp_path / "d.jsonl", rows), Completions, tokenizer(TEMPLATE), streaming=streaming)
    assert "tool_calls" not in text_of(source)
    assert "['role', 'tool_calls']" in text_of(source, 1)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (r'{"prompt": "a \ud83d b"}', "prompt holds half of a surrogate pair"),
        (r'{"prompt": "a", "x": [{"y": "\udc00"}]}', r"x\.0\.y holds half of a surrogate pair"),
        (r'{"prompt": "a", "\udc00": 1}', "a key holds half of a surrogate pair"),
        ('{"prompt": "a", "prompt": "b"}', "the key 'prompt' is given twice"),
        ('{"prompt": "a", "x": {"y": 1, "y": 1}}', "the key 'y' is given twice"),
        ('{"prompt": "a", "x": ' + "9" * 5000 + "}", "not JSON: .*digits"),
        ('{"prompt": "a", "x": ' + "[" * 200_000 + "]" * 200_000 + "}", "nested too deeply"),
    ],
    ids=["surrogate", "nested surrogate", "key", "twice", "twice inside", "digits", "depth"],
)
@BOTH
def test_a_row_that_cannot_be_taken_as_it_is_is_a_bad_row_with_its_line_and_field(
    tmp_path: Path, line: str, reason: str, streaming: bool
) -> None:
    file = tmp_path / "d.jsonl"
    file.write_text('{"prompt": "ok"}\n' + line + "\n")
    with pytest.raises(DataError, match=rf"d\.jsonl, row 2: .*{reason}"):
        opened(file, Prompts, streaming=streaming)
    source = opened(file, Prompts, streaming=streaming, max_bad_rows=1)
    assert (source.preview(), source.report.items) == ("ok", 1)


def test_a_whole_surrogate_pair_is_a_character(tmp_path: Path) -> None:
    (tmp_path / "d.jsonl").write_text(r'{"prompt": "\ud83d\ude00"}' + "\n")
    assert prompts(tmp_path / "d.jsonl", 1)[0].prompt == "\U0001f600"


def test_half_of_a_surrogate_pair_inside_json_text_is_a_bad_row(tmp_path: Path) -> None:
    file = write_rows(tmp_path / "d.jsonl", [chat({}), chat({}, tools=r'[{"name": "\ud83d"}]')])
    with pytest.raises(DataError, match=r"row 2: .*half of a surrogate pair"):
        opened(
            file,
            Completions,
            tokenizer("{{ tools[0].name if tools }}" + TEMPLATE),
        )


@pytest.mark.parametrize("token", [-1, 10**6, 2**40, 10**30, True])
def test_a_token_that_the_tokenizer_does_not_have_is_a_bad_row(tmp_path: Path, token: int) -> None:
    file = write_rows(tmp_path / "d.jsonl", [{"input_ids": [20, 21]}, {"input_ids": [20, token]}])
    with pytest.raises(DataError, match="row 2: input_ids"):
        opened(file, Completions)


@pytest.mark.parametrize("weight", ["nan", "inf", "-1", "1" + "0" * 400])
def test_a_weight_that_is_no_finite_number_from_0_on_is_a_bad_row(tmp_path: Path, weight: str) -> None:
    written = {"nan": "NaN", "inf": "Infinity"}.get(weight, weight)
    (tmp_path / "d.jsonl").write_text('{"text": "ab", "w": 1}\n{"text": "ab", "w": ' + written + "}\n")
    with pytest.raises(DataError, match=r"row 2: weight is .*must be a number from 0 on"):
        opened(tmp_path / "d.jsonl", Completions, columns={"weight": "w"})


def test_options_that_a_json_file_cannot_take_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"data\.options: field.*JSON"):
        opened(write_rows(tmp_path / "d.jsonl", [{"text": "ab"}]), Completions, options={"field": "data"})


@BOTH
def test_a_column_that_a_row_lacks_is_none_for_the_reward(tmp_path: Path, streaming: bool) -> None:
    file = write_rows(tmp_path / "d.jsonl", [{"prompt": "a"}, {"prompt": "b", "answer": 1}])
    assert columns_of(file, 2, streaming=streaming) == [{"answer": None}, {"answer": 1}]


@BOTH
def test_a_renamed_column_may_be_missing_in_the_first_row(tmp_path: Path, streaming: bool) -> None:
    file = write_rows(tmp_path / "d.jsonl", [{"prompt": "a"}, {"prompt": "b", "solution": 1}])
    found = columns_of(file, 2, streaming=streaming, columns={"answer": "solution"})
    assert found == [{"answer": None}, {"answer": 1}]
    with pytest.raises(DataError, match="has no column 'result', only prompt, solution"):
        opened(file, Prompts, streaming=streaming, columns={"answer": "result"})


# Tables


@BOTH
@pytest.mark.parametrize(("suffix", "separator"), [("csv", ","), ("tsv", "\t")])
def test_every_cell_of_a_table_of_text_arrives_as_the_text_that_it_is(
    tmp_path: Path, suffix: str, separator: str, streaming: bool
) -> None:
    cells = ["007", "5", "1e3", "NA", "nan", "True", "", " x ", "null", "9" * 30]
    file = tmp_path / f"d.{suffix}"
    file.write_text("\n".join(separator.join(row) for row in [("prompt", "answer"), *(("p", cell) for cell in cells)]))
    found = columns_of(file, len(cells), streaming=streaming)
    assert [columns["answer"] for columns in found] == cells


@BOTH
def test_labels_and_weights_of_a_table_of_text_are_read_from_their_text(tmp_path: Path, streaming: bool) -> None:
    file = tmp_path / "d.csv"
    file.write_text("prompt,completion,good,w\n1,2,True,0.5\n3,4,false,2\n5,6,1,1e0\n7,8,0,3\n")
    columns, cache = {"label": "good", "weight": "w"}, tmp_path / "cache"
    batch = opened(file, Labelled, streaming=streaming, columns=columns, cache_dir=cache).batch(range(4))
    assert batch["label"].tolist() == [True, False, True, False]
    assert batch["weight"].tolist() == [0.5, 2.0, 1.0, 3.0]
    file.write_text("prompt,completion,good,w\n1,2,maybe,1\n3,4,true,1\n")
    with pytest.raises(DataError, match="row 1: label is 'maybe', not true or false"):
        opened(file, Labelled, streaming=streaming, columns=columns, cache_dir=tmp_path / "other")
    file.write_text("prompt,completion,good,w\n1,2,true,1\n3,4,true,much\n")
    with pytest.raises(DataError, match="row 2: weight is 'much'"):
        opened(file, Labelled, streaming=streaming, columns=columns, cache_dir=tmp_path / "third")


@BOTH
def test_a_row_of_a_table_with_fewer_cells_than_columns_is_refused(tmp_path: Path, streaming: bool) -> None:
    file = tmp_path / "d.csv"
    file.write_text('prompt,completion\n"a\nb",2\n\n3\n')
    with pytest.raises(DataError, match=r"d\.csv: row 2 has 1 cell for 2 columns"):
        opened(file, Completions, streaming=streaming, cache_dir=tmp_path / "cache")


@BOTH
def test_dicts_of_a_parquet_file_do_not_get_the_keys_of_other_rows_as_nulls(tmp_path: Path, streaming: bool) -> None:
    rows = [{"prompt": "p", "x": {"a": 1}, "y": [{"b": None}]}, {"prompt": "q", "x": {"c": "d"}, "y": [{"e": 2}]}]
    Dataset.from_list(rows).to_parquet(tmp_path / "d.parquet")
    found = columns_of(tmp_path / "d.parquet", 2, streaming=streaming)
    assert found == [{"x": {"a": 1}, "y": [{}]}, {"x": {"c": "d"}, "y": [{"e": 2}]}]


@BOTH
def test_a_column_that_a_table_keeps_as_json_has_its_nulls(tmp_path: Path, streaming: bool) -> None:
    rows = {"prompt": ["p", "q"], "x": [{"a": None}, {"a": [1, "b"]}]}
    Dataset.from_dict(rows, Features(prompt=Value("string"), x=Json())).to_parquet(tmp_path / "d.parquet")
    found = columns_of(tmp_path / "d.parquet", 2, streaming=streaming)
    assert found == [{"x": value} for value in rows["x"]]


# Table and stream


FILES = {
    "jsonl": lambda file, rows: write_rows(file, rows),
    "json": lambda file, rows: file.write_text(json.dumps(rows)),
    "csv": lambda file, rows: Dataset.from_list(rows).to_csv(file),
    "parquet": lambda file, rows: Dataset.from_list(rows).to_parquet(file),
}


@pytest.mark.parametrize("suffix", FILES)
def test_a_stream_and_a_table_give_the_same_prompts_and_columns(tmp_path: Path, suffix: str) -> None:
    rows = [{"prompt": f"{i}+1=", "answer": i + 1, "level": i / 4, "hint": None if i % 2 else "h"} for i in range(9)]
    file = tmp_path / f"d.{suffix}"
    FILES[suffix](file, rows)
    table, stream = prompts(file, 9), prompts(file, 9, streaming=True)
    assert [(repr(p.prompt), repr(p.columns), p.tokens) for p in table] == [
        (repr(p.prompt), repr(p.columns), p.tokens) for p in stream
    ]


# Mixtures


def mixed(*entries: tuple[Path, float], kind: Any = Completions, **data: Any) -> Source:
    parts = tuple(MixtureEntry(path=str(path), fraction=fraction) for path, fraction in entries)
    config = DataConfig.model_validate({"mixture": parts, "shuffle": False, **data})
    return open_source(config, kind, tokenizer(TEMPLATE), seed=0, model_max_length=512)


def test_parts_of_a_mixture_keep_their_own_types(tmp_path: Path) -> None:
    plain = write_rows(tmp_path / "plain.jsonl", [{"messages": [user("q"), {"role": "assistant", "content": "r"}]}] * 2)
    tools = write_rows(tmp_path / "tools.jsonl", [chat({"x": 1})] * 2)
    source = mixed((plain, 1), (tools, 1))
    assert [text_of(source, index) for index in range(4)] == [
        *["['role', 'content']q['role', 'content']r"] * 2,
        *["['role', 'content']q{\"x\": 1}['role', 'tool_calls']"] * 2,
    ]


def test_a_mixture_takes_json_lines_beside_a_table_of_text_and_a_parquet_file(tmp_path: Path) -> None:
    write_rows(tmp_path / "a.jsonl", [{"prompt": "a", "answer": 1}] * 2)
    (tmp_path / "b.csv").write_text("prompt,answer\nb,02\nb,02\n")
    Dataset.from_list([{"prompt": "c", "answer": 3.0, "more": "m"}] * 2).to_parquet(tmp_path / "c.parquet")
    files = [(tmp_path / name, 1.0) for name in ("a.jsonl", "b.csv", "c.parquet")]
    source = mixed(*files, kind=Prompts, cache_dir=tmp_path / "cache")
    found = [source.item(index) for index in range(6)]
    expected = [("a", 1, None), ("b", "02", None), ("c", 3.0, "m")]
    assert [(p.prompt, p.columns["answer"], p.columns["more"]) for p in found[::2]] == expected  # pyright: ignore


def test_a_bad_row_of_a_mixture_is_named_with_its_own_file_and_line(tmp_path: Path) -> None:
    write_rows(tmp_path / "a.jsonl", [{"text": "a"}] * 3)
    write_rows(tmp_path / "b.jsonl", [{"text": "b"}, {"text": ""}, {"text": "b"}])
    with pytest.raises(DataError, match=r"b\.jsonl, row 2: text is empty"):
        mixed((tmp_path / "a.jsonl", 1), (tmp_path / "b.jsonl", 1))


@BOTH
def test_the_limit_of_a_mixture_is_shared_by_its_parts(tmp_path: Path, streaming: bool) -> None:
    files = [(write_rows(tmp_path / f"{n}.jsonl", [{"text": f"{n}{i}"} for i in range(200)]), 1.0) for n in "xy"]
    source = mixed(*files, limit=200, streaming=streaming)
    first = [source.preview(index)[0] for index in range(200)]
    if streaming:
        assert 70 < first.count("x") < 130  # drawn by chance
    else:
        assert (first.count("x"), first.count("y"), len(source)) == (100, 100, 200)


@pytest.mark.parametrize(
    ("lengths", "fractions", "limit", "counts"),
    [
        ([100, 100, 100], (1, 1, 2), None, [50, 50, 100]),
        ([40, 10], (3, 1), None, [30, 10]),
        ([10, 10], (0.7, 0.3), None, [10, 4]),
        ([100, 100], (1, 1), 10, [5, 5]),
        ([100, 100], (1, 1), 1000, [100, 100]),
        ([100, 100, 100], (1, 1, 1), 10, [4, 3, 3]),
        ([100, 2], (1, 1), 10, [2, 2]),
        ([100, 0], (1, 1), None, [0, 0]),
    ],
)
def test_a_mixture_takes_as_many_rows_as_its_fractions_and_limit_allow(
    lengths: list[int], fractions: tuple[float, ...], limit: int | None, counts: list[int]
) -> None:
    entries = tuple(MixtureEntry(path="x", fraction=fraction) for fraction in fractions)
    assert mixture_counts(lengths, entries, limit) == counts


def test_rows_that_a_mixture_or_a_limit_leaves_out_are_reported(tmp_path: Path) -> None:
    many = write_rows(tmp_path / "many.jsonl", [{"text": f"a{i}"} for i in range(10)])
    few = write_rows(tmp_path / "few.jsonl", [{"text": f"b{i}"} for i in range(2)])
    notes = mixed((many, 1), (few, 1)).report.lines()
    assert f"left out 8 of 10 rows of {many}: the fractions of data.mixture" in notes
    assert not any("few" in line for line in notes if "left out" in line)
    assert f"left out 7 of 10 rows of {many}: data.limit=3" in opened(many, Completions, limit=3).report.lines()
    checked = validate(DataConfig(path=str(many), limit=3), Completions)
    assert f"left out 7 of 10 rows of {many}: data.limit=3" in checked.lines()

"""`troupe check` as a user meets it: each kind of malformed row is named with its file, its row and what is wrong."""

from __future__ import annotations

from pathlib import Path

import pytest

from orchestrator.cli import main

PAIR = b'{"prompt": "1+1=", "chosen": "2", "rejected": "3"}'
LABELLED = b'{"prompt": "1+1=", "completion": "2", "label": true}'


def check(capsys: pytest.CaptureFixture[str], file: Path, method: str, *options: str) -> tuple[int, str]:
    """(exit code, what was printed) of the command; wherever lines were broken is a space."""
    with pytest.raises(SystemExit) as ended:
        main(["check", str(file), "--method", method, *options])
    out, err = capsys.readouterr()
    return int(ended.value.code or 0), " ".join((out + err).split())


def write(tmp_path: Path, *lines: bytes) -> Path:
    (tmp_path / "rows.jsonl").write_bytes(b"\n".join(lines) + b"\n")
    return tmp_path / "rows.jsonl"


MALFORMED = {
    "a column that this row lacks": ("dpo", PAIR, b'{"prompt": "1+1=", "chosen": "2"}', "rejected is missing"),
    "a value of another type": (
        "dpo",
        PAIR,
        b'{"prompt": "1+1=", "chosen": 2, "rejected": "3"}',
        "chosen is of type int, not a text",
    ),
    "an empty completion": ("dpo", PAIR, b'{"prompt": "1+1=", "chosen": "", "rejected": "3"}', "chosen is empty"),
    "chosen equal to rejected": (
        "dpo",
        PAIR,
        b'{"prompt": "1+1=", "chosen": "2", "rejected": "2"}',
        "chosen and rejected are the same: nothing is preferred",
    ),
    "a broken line": ("dpo", PAIR, b'{"prompt": "1+1=", "chosen', "not JSON: "),
    "broken UTF-8": ("dpo", PAIR, b'{"prompt": "1+1=", "chosen": "\xff", "rejected": "3"}', "not UTF-8: byte 0xff"),
    "a list in the place of a row": ("dpo", PAIR, b'["1+1=", "2", "3"]', "a JSON list, not an object"),
    "a label that is no boolean": (
        "kto",
        LABELLED.replace(b"true", b"1"),
        LABELLED.replace(b"true", b"2"),
        "label is 2, not true or false",
    ),
    "a label in words": (
        "bco",
        LABELLED.replace(b"true", b'"good"'),
        LABELLED.replace(b"true", b'"bad"'),
        "label is 'bad', not true or false",
    ),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_a_malformed_row_is_named_with_its_line_and_what_is_wrong(
    case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    method, good, bad, reason = MALFORMED[case]
    code, said = check(capsys, write(tmp_path, good, bad), method)
    assert code == 2
    assert f"{tmp_path / 'rows.jsonl'}, row 2: " in said
    assert reason in said
    assert "data.max_bad_rows" in said


def test_a_column_that_no_row_has_names_those_found_and_how_to_rename(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, said = check(capsys, write(tmp_path, b'{"prompt": "1+1=", "better": "2", "rejected": "3"}'), "dpo")
    assert code == 2
    for part in ("has no column 'chosen'", "found prompt, better, rejected", "data.columns.chosen=ITS_NAME"):
        assert part in said


def test_a_prompt_longer_than_the_limit_is_named_if_a_model_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write(tmp_path, PAIR, PAIR.replace(b"1+1", b"1+1+1"))
    code, said = check(capsys, file, "dpo", "--model", "example:arithmetic", "--max-prompt-length", "4")
    assert code == 2
    assert f"{file}, row 2: 6 tokens: its prompt is longer than data.max_prompt_length=4" in said
    code, said = check(capsys, file, "dpo", "--model", "example:arithmetic", "--max-prompt-length", "6")
    assert code == 0
    assert "2 items" in said and "1+1=⟦2<eos>⟧" in said


def test_a_limit_in_tokens_needs_a_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, said = check(capsys, write(tmp_path, PAIR), "dpo", "--max-length", "4")
    assert code == 2
    assert "--max-length=4 counts tokens, so it needs a tokenizer: name one by --model" in said


def test_bad_rows_within_the_bound_are_listed_and_the_rest_is_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, said = check(capsys, write(tmp_path, PAIR, b"{", PAIR), "dpo", "--bad-rows", "1")
    assert code == 0
    assert "3 rows read as prompt + chosen + rejected; 2 items" in said
    assert "row 2: not JSON" in said


def test_the_remedy_in_an_error_message_can_be_applied(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write(tmp_path, PAIR.replace(b"chosen", b"better"), b"{")
    code, said = check(capsys, file, "dpo", "data.columns.chosen=better", "data.max_bad_rows=1")
    assert code == 0, said
    assert "2 rows read as prompt + chosen + rejected; 1 items" in said
    code, said = check(capsys, file, "dpo", "data.column.chosen=better")
    assert code == 2
    assert "did you mean data.columns?" in said


def test_options_of_the_method_and_a_chat_template_are_taken_into_account(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    turns = b'[{"role": "user", "content": "q"}], "completion": [{"role": "assistant", "content": "r"}]'
    file = write(tmp_path, b'{"prompt": ' + turns + b', "label": true}')
    template = tmp_path / "template.jinja"
    template.write_text("{% for m in messages %}{{ m.role[0] }}:{{ m.content }};{% endfor %}")
    options = ("options.loss_type=apo_zero_unpaired", f"model.chat_template={template}")
    code, said = check(capsys, file, "kto", "--model", "example:arithmetic", *options)
    assert code == 0, said
    assert "u:q;⟦a:r;⟧" in said


@pytest.mark.parametrize(
    ("data", "methods"),
    [
        ("pairs", ("dpo", "cpo", "simpo", "alphapo", "orpo", "kto", "bco")),
        ("labelled", ("kto", "bco")),
        ("triples", ("tpo",)),
    ],
)
def test_the_example_data_is_valid_for_its_methods(
    data: str, methods: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    for count, method in enumerate(methods):  # all rows once, and some for whoever reads the same columns
        some = ["data.limit=200"] if count else []
        code, said = check(capsys, Path(f"example:arithmetic_{data}"), method, *some)
        assert code == 0, said

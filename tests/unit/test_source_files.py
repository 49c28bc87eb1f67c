"""Whatever a path means is read as it is, and what cannot be read is told with file, row and reason."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, DatasetDict

from actors.errors import DataError
from orchestrator.config.schema import DataConfig, MixtureEntry
from orchestrator.data.source import open_source, validate
from orchestrator.pipeline import Completions
from tests.unit.source_stub import opened, tokenizer, write_rows

ROWS = [{"prompt": f"{i}+1=", "completion": str(i + 1)} for i in range(3)]
SHOWN = ["0+1=⟦1<eos>⟧", "1+1=⟦2<eos>⟧", "2+1=⟦3<eos>⟧"]


def write_jsonl(file: Path) -> None:
    write_rows(file, ROWS)


def write_json(file: Path) -> None:
    file.write_text(json.dumps(ROWS, indent=1))


def write_csv(file: Path) -> None:
    Dataset.from_list(ROWS).to_csv(file)


def write_tsv(file: Path) -> None:
    file.write_text("prompt\tcompletion\n" + "".join(f"{row['prompt']}\t{row['completion']}\n" for row in ROWS))


def write_parquet(file: Path) -> None:
    Dataset.from_list(ROWS).to_parquet(file)


def write_arrow(file: Path) -> None:
    Dataset.from_list(ROWS).save_to_disk(str(file.parent / "saved"))
    (file.parent / "saved" / "data-00000-of-00001.arrow").rename(file)


def shown(source: Any) -> list[str]:
    return [source.preview(index) for index in range(len(source))]


@pytest.mark.parametrize("write", [write_jsonl, write_json, write_csv, write_tsv, write_parquet, write_arrow])
def test_a_file_gives_its_rows_in_order(tmp_path: Path, write: Any) -> None:
    file = tmp_path / f"rows.{write.__name__.removeprefix('write_')}"
    write(file)
    assert shown(opened(file, Completions, cache_dir=tmp_path / "cache")) == SHOWN


def test_an_empty_cell_of_a_table_is_an_empty_text(tmp_path: Path) -> None:
    file = tmp_path / "rows.csv"
    file.write_text("prompt,completion\n1,\n2,3\n")
    with pytest.raises(DataError, match="row 1: completion is empty"):
        opened(file, Completions, cache_dir=tmp_path / "cache")


@pytest.mark.parametrize(("rows", "number"), [("x,1,2\n", 1), ("x,1\ny,2,3\n", 2)])
def test_a_table_whose_rows_have_more_cells_than_columns_is_refused(tmp_path: Path, rows: str, number: int) -> None:
    file = tmp_path / "rows.csv"
    file.write_text("prompt,completion\n" + rows)
    with pytest.raises(DataError, match=rf"row {number} has 3 cells for 2 columns \(prompt, completion\)"):
        opened(file, Completions, cache_dir=tmp_path / "cache")


@pytest.mark.parametrize("name", ["rows.csv", "rows.txt"])
def test_broken_utf_8_in_a_table_or_a_text_is_named_as_such(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"text\na\n\xff\n")
    with pytest.raises(DataError, match=rf"cannot load .*{name}: UnicodeDecodeError: .* byte 0xff"):
        opened(tmp_path / name, Completions, cache_dir=tmp_path / "cache")


def test_a_text_file_has_a_row_per_line(tmp_path: Path) -> None:
    file = tmp_path / "rows.txt"
    file.write_text("ab\ncd\n")
    assert shown(opened(file, Completions, cache_dir=tmp_path / "cache")) == ["a⟦b<eos>⟧", "c⟦d<eos>⟧"]


def test_a_folder_has_a_split_for_each_beginning_of_its_files_names(tmp_path: Path) -> None:
    write_rows(tmp_path / "train-0.jsonl", ROWS[:1])
    write_rows(tmp_path / "train-1.jsonl", ROWS[1:2])
    write_rows(tmp_path / "test.jsonl", ROWS[2:])
    assert shown(opened(tmp_path, Completions)) == SHOWN[:2]
    assert shown(opened(tmp_path, Completions, split="test")) == SHOWN[2:]
    with pytest.raises(DataError, match=r"no file for split 'validation': test\.jsonl, train-0\.jsonl"):
        opened(tmp_path, Completions, split="validation")


def test_a_folder_that_datasets_saved_is_read_by_split(tmp_path: Path) -> None:
    DatasetDict(train=Dataset.from_list(ROWS[:2]), test=Dataset.from_list(ROWS[2:])).save_to_disk(str(tmp_path / "d"))
    assert shown(opened(tmp_path / "d", Completions, split="test")) == SHOWN[2:]
    with pytest.raises(DataError, match="it has train, test"):
        opened(tmp_path / "d", Completions, split="dev")


@pytest.mark.parametrize(
    ("path", "told"),
    [("missing.jsonl", "there is no file"), ("./folder", "there is no file"), ("example:none", "arithmetic_sft")],
)
def test_a_path_that_does_not_exist_is_an_error(path: str, told: str) -> None:
    with pytest.raises(DataError, match=told):
        opened(path, Completions)


def test_no_path_at_all_says_what_to_set() -> None:
    with pytest.raises(DataError, match=r"set data\.path"):
        open_source(DataConfig(), Completions, tokenizer(), seed=0, model_max_length=64)


def test_a_file_of_an_unknown_kind_names_the_kinds_that_can_be_read(tmp_path: Path) -> None:
    (tmp_path / "rows.xlsx").write_bytes(b"PK")
    with pytest.raises(DataError, match=r"cannot read \.xlsx; readable: \.jsonl"):
        opened(tmp_path / "rows.xlsx", Completions)


def test_an_empty_file_has_no_rows(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("\n\n")
    with pytest.raises(DataError, match="has no rows"):
        opened(tmp_path / "rows.jsonl", Completions)


@pytest.fixture
def broken(tmp_path: Path) -> Path:
    """Lines 2 to 6 are broken, each in its own way; line 7 is blank."""
    good = json.dumps(ROWS[0]).encode()
    lines = [
        good,
        b'{"prompt": "1+1=", "compl',
        b'{"prompt": "1+1=", "completion": "\xff"}',
        b"[1, 2]",
        b'{"prompt": "1+1=", "completion": ""}',
        b'{"prompt": {"a": 1}, "completion": "2"}',
        b"",
        json.dumps(ROWS[2]).encode(),
    ]
    (tmp_path / "broken.jsonl").write_bytes(b"\n".join(lines) + b"\n")
    return tmp_path / "broken.jsonl"


def test_broken_rows_beyond_the_bound_are_an_error_that_names_the_first_with_their_lines(broken: Path) -> None:
    with pytest.raises(DataError) as refusal:
        opened(broken, Completions, max_bad_rows=3)
    message = str(refusal.value)
    assert "5 rows cannot be used" in message
    assert f"{broken}, row 2: not JSON: Unterminated string starting at (character 20)" in message
    assert f"{broken}, row 3: not UTF-8: byte 0xff" in message
    assert "... and 2 more" in message
    assert "data.max_bad_rows=5" in message


def test_broken_rows_within_the_bound_are_skipped_and_reported_with_their_lines(broken: Path) -> None:
    source = opened(broken, Completions, max_bad_rows=5)
    assert shown(source) == [SHOWN[0], SHOWN[2]]
    assert [bad.row for bad in source.report.bad] == [2, 3, 4, 5, 6]
    assert sum("skipped" in line for line in source.report.lines()) == 5


def test_validate_finds_the_same_broken_rows_without_a_tokenizer(broken: Path) -> None:
    report = validate(DataConfig(path=str(broken), max_bad_rows=5), Completions)
    assert sorted(bad.row for bad in report.bad) == [2, 3, 4, 5, 6]
    assert (report.rows, report.items) == (7, 2)
    with pytest.raises(DataError, match=r"data\.max_bad_rows=0"):
        validate(DataConfig(path=str(broken)), Completions)


def test_a_mixture_has_its_fractions_and_no_row_twice(tmp_path: Path) -> None:
    write_rows(tmp_path / "a.jsonl", [{"text": f"a{i}"} for i in range(40)])
    write_rows(tmp_path / "b.jsonl", [{"text": f"b{i}"} for i in range(10)])
    entries = tuple(MixtureEntry(path=str(tmp_path / f"{name}.jsonl"), fraction=f) for name, f in (("a", 3), ("b", 1)))
    config = DataConfig(mixture=entries)
    source = open_source(config, Completions, tokenizer(), seed=0, model_max_length=64)
    texts = [source.preview(index) for index in range(len(source))]
    assert len(texts) == len(set(texts)) == 40
    assert sum(text.startswith("a") for text in texts) == 30


def test_limit_takes_the_first_rows_only(tmp_path: Path) -> None:
    assert shown(opened(write_rows(tmp_path / "d.jsonl", ROWS), Completions, limit=2)) == SHOWN[:2]

"""What was tokenised once is used again exactly where it would come out the same; and data are known by their rows."""

from __future__ import annotations

from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset

from orchestrator.data.source import Source, tokenizer_parts
from orchestrator.methods import build
from orchestrator.pipeline import Completions, DataKind, Labelled, Pairs, Prompts, Triples
from tests.unit.source_stub import opened, tokenizer, write_rows

LONG = {"prompt": "abcd", "completion": "efghi"}  # 4 + 5 + 1 tokens
SHORT = {"prompt": "a", "completion": "b"}
PAIRS = [{"prompt": f"{i}=", "chosen": "a", "rejected": "b", "reference": "c"} for i in range(4)]
TEXTS = [{"text": f"text {i}"} for i in range(12)]


def kept(cache: Path) -> set[str]:
    return {folder.name for folder in (cache / "tokenised").iterdir()}


def everything(source: Source) -> dict[str, Any]:
    """All columns of all items, as lists."""
    batch = source.batch(range(len(source)))
    return {name: np.asarray(values).tolist() for name, values in batch.columns.items()}


def test_tokenised_rows_are_kept_and_used_again_until_something_changes(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    file = write_rows(tmp_path / "d.jsonl", [LONG, SHORT, {"prompt": "x", "completion": ""}])
    first = opened(file, Completions, max_length=6, max_bad_rows=1, cache_dir=cache)
    before = kept(cache)
    again = opened(file, Completions, max_length=6, max_bad_rows=1, cache_dir=cache)
    assert kept(cache) == before and len(before) == 1
    assert again.report == first.report
    assert everything(again) == everything(first)
    opened(file, Completions, max_length=5, max_bad_rows=1, cache_dir=cache)
    write_rows(file, [SHORT])
    opened(file, Completions, max_length=6, cache_dir=cache)
    opened(file, Completions, tokenizer("{{ messages }}"), max_length=6, cache_dir=cache)
    assert len(kept(cache)) == 4


def of(method: str, **options: Any) -> DataKind:
    return build(method, options, {}).data


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (Pairs, Labelled),
        (Labelled, Pairs),
        (Triples, Pairs),
        (of("simpo"), of("bco")),
        (of("kto"), of("dpo")),
        (of("dpo"), of("kto")),
        (Prompts, Pairs),
    ],
    ids=lambda kind: kind.name,
)
def test_cached_tokens_of_one_kind_of_data_are_not_used_for_another(
    tmp_path: Path, first: DataKind, second: DataKind
) -> None:
    file, cache = write_rows(tmp_path / "pairs.jsonl", PAIRS), tmp_path / "cache"
    fresh = opened(file, second)
    opened(file, first, cache_dir=cache)
    found = opened(file, second, cache_dir=cache)
    assert (len(found), found.report.items) == (len(fresh), fresh.report.items)
    assert everything(found) == everything(fresh)
    assert len(kept(cache)) == 2


@pytest.mark.parametrize(
    ("column", "kind", "rows", "others"),
    [
        ("label", Labelled, [{**SHORT, "label": True}] * 2, [{**SHORT, "label": False}, {**SHORT, "label": True}]),
        ("weight", Completions, [{**SHORT, "weight": 1.0}] * 2, [{**SHORT, "weight": 2.0}, {**SHORT, "weight": 3}]),
    ],
)
def test_rows_with_the_same_texts_and_other_values_beside_them_are_other_data(
    tmp_path: Path, column: str, kind: DataKind, rows: list[dict[str, Any]], others: list[dict[str, Any]]
) -> None:
    file, cache = tmp_path / "d.jsonl", tmp_path / "cache"
    for written in (rows, others):
        write_rows(file, written)
        source = opened(file, kind, cache_dir=cache, columns={column: column})
        assert source.batch([0, 1])[column].tolist() == [row[column] for row in written]


def test_the_same_rows_from_a_file_of_another_kind_and_name_are_found_in_the_cache(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    opened(write_rows(tmp_path / "a.jsonl", TEXTS), Completions, cache_dir=cache)
    before = kept(cache)
    opened(write_rows(tmp_path / "b.jsonl", TEXTS), Completions, cache_dir=cache)
    assert kept(cache) == before


def test_a_template_that_writes_the_date_is_rendered_again_on_another_day() -> None:
    dated, plain = tokenizer("{{ strftime_now('%Y') }}"), tokenizer("{{ messages }}")
    monday, tuesday = date(2026, 11, 23), date(2026, 11, 24)
    assert tokenizer_parts(dated, monday) == tokenizer_parts(dated, monday) != tokenizer_parts(dated, tuesday)
    assert tokenizer_parts(plain, monday) == tokenizer_parts(plain, tuesday)


# The rows' fingerprint, by which a resumed run knows its data


def print_of(path: Path, kind: DataKind = Completions, **data: Any) -> str:
    return opened(path, kind, **data).rows_fingerprint


@pytest.mark.parametrize("streaming", [False, True])
def test_the_fingerprint_of_rows_changes_with_any_value_and_with_their_order(tmp_path: Path, streaming: bool) -> None:
    def of_rows(rows: list[dict[str, Any]]) -> str:
        return print_of(write_rows(tmp_path / "d.jsonl", rows), streaming=streaming)

    one, two = {"text": "ab", "answer": 1}, {"text": "cd", "answer": 2}
    prints = [of_rows(rows) for rows in ([one, two], [two, one], [one], [one, {**two, "answer": 2.0}])]
    assert len(set(prints)) == 4
    assert of_rows([one, two]) == prints[0]


def test_the_fingerprint_of_rows_does_not_depend_on_how_they_are_tokenised_or_drawn_or_where_they_lie(
    tmp_path: Path,
) -> None:
    file = write_rows(tmp_path / "a.jsonl", TEXTS)
    first = print_of(file)
    assert print_of(file, max_length=4, shuffle=True) == first
    assert print_of(write_rows(tmp_path / "b.jsonl", TEXTS)) == first
    assert print_of(file, limit=11) != first


def test_the_fingerprint_of_a_table_is_that_of_its_values(tmp_path: Path) -> None:
    files = [tmp_path / "a.parquet", tmp_path / "b.parquet"]
    for file in files:
        Dataset.from_list(TEXTS).to_parquet(file)
    first, second = (print_of(file, cache_dir=tmp_path / "cache") for file in files)
    assert first == second
    Dataset.from_list([*TEXTS[:-1], {"text": "other"}]).to_parquet(files[1])
    assert print_of(files[1], cache_dir=tmp_path / "other") != first


def test_prompts_are_known_by_the_columns_that_only_rewards_see(tmp_path: Path) -> None:
    prints = [
        print_of(write_rows(tmp_path / "d.jsonl", [{"prompt": "p", "answer": answer}]), Prompts) for answer in "xy"
    ]
    assert prints[0] != prints[1]

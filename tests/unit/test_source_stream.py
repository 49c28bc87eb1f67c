"""A stream gives the same items at the same positions whenever it is read, and keeps the same rules as a table."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset

from actors.errors import DataError
from orchestrator.config.schema import DataConfig, MixtureEntry
from orchestrator.data.source import open_source, validate
from orchestrator.data.stream import shuffled
from orchestrator.pipeline import Completions, Prompts
from tests.unit.source_stub import opened, tokenizer, write_rows


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return write_rows(tmp_path / "d.jsonl", [{"text": f"text {i}"} for i in range(1200)])


def test_without_shuffling_a_stream_equals_the_table(file: Path) -> None:
    stream, table = opened(file, Completions, streaming=True), opened(file, Completions)
    positions = [0, 1, 700, 1199]
    streamed, tabled = stream.batch(positions), table.batch(positions)
    assert streamed["tokens"].tolist() == tabled["tokens"].tolist()
    assert streamed["group"].tolist() == positions


def test_positions_mean_the_same_items_after_a_resume_and_every_epoch_has_each_row_once(file: Path) -> None:
    first = opened(file, Completions, streaming=True, shuffle=True)
    texts = [first.preview(position) for position in range(2400)]
    assert len(set(texts[:1200])) == len(set(texts[1200:])) == 1200
    assert texts[:1200] != texts[1200:] and texts[:1200] != sorted(texts[:1200])
    resumed = opened(file, Completions, streaming=True, shuffle=True)
    assert [resumed.preview(position) for position in (1300, 1301)] == texts[1300:1302]


def test_a_streamed_prompt_has_the_columns_of_its_row(tmp_path: Path) -> None:
    Dataset.from_list([{"question": "1+1=", "answer": "2"}]).to_parquet(tmp_path / "d.parquet")
    columns = {"prompt": "question"}
    source = opened(tmp_path / "d.parquet", Prompts, streaming=True, columns=columns, cache_dir=tmp_path / "cache")
    prompt = source.item(0)
    assert (prompt.prompt, prompt.columns) == ("1+1=", {"answer": "2"})  # pyright: ignore


def test_a_streamed_column_that_happens_to_be_called_weight_counts_only_if_it_is_mapped(tmp_path: Path) -> None:
    file = write_rows(tmp_path / "d.jsonl", [{"text": "ab", "weight": 70.5}])
    assert "weight" not in opened(file, Completions, streaming=True).batch([0])
    mapped = opened(file, Completions, streaming=True, columns={"weight": "weight"})
    assert mapped.batch([0])["weight"].tolist() == [70.5]


def test_the_length_of_a_stream_is_unknown_and_says_what_to_set(file: Path) -> None:
    with pytest.raises(DataError, match=r"train\.steps"):
        len(opened(file, Completions, streaming=True))
    with pytest.raises(DataError, match="streaming"):
        validate(DataConfig(path=str(file), streaming=True), Completions)


def test_the_report_of_a_stream_counts_what_was_read_so_far(file: Path) -> None:
    source = opened(file, Completions, streaming=True, max_length=8)
    before = source.report
    source.batch(range(600))
    assert 0 < before.rows < source.report.rows == 1000
    assert before.truncated == {"longer than max_length=8": before.rows - 100}


def test_bad_rows_of_a_stream_are_bounded(tmp_path: Path) -> None:
    rows = [{"text": f"{i}"} for i in range(600)]
    rows[550] = {"text": ""}
    source = opened(write_rows(tmp_path / "d.jsonl", rows), Completions, streaming=True)
    with pytest.raises(DataError, match="row 551: text is empty"):
        source.batch(range(520))


def test_a_second_pass_over_a_stream_counts_nothing_twice(tmp_path: Path) -> None:
    rows = [{"text": "ok"}, {"text": ""}, {"text": "fine"}]
    source = opened(write_rows(tmp_path / "d.jsonl", rows), Completions, streaming=True, max_bad_rows=1)
    assert [source.preview(position) for position in range(4)] == ["o⟦k<eos>⟧", "f⟦ine<eos>⟧"] * 2
    assert (source.report.rows, source.report.items, len(source.report.bad)) == (3, 2, 1)


def test_a_stream_without_a_usable_row_is_refused_at_once(tmp_path: Path) -> None:
    file = write_rows(tmp_path / "d.jsonl", [{"text": "too long"}])
    with pytest.raises(DataError, match="no row of it can be used"):
        opened(file, Completions, streaming=True, max_length=3, truncation="drop")


def test_a_streamed_mixture_draws_by_fraction(tmp_path: Path) -> None:
    for name in "ab":
        write_rows(tmp_path / f"{name}.jsonl", [{"text": f"{name}{i}"} for i in range(500)])
    entries = tuple(MixtureEntry(path=str(tmp_path / f"{n}.jsonl"), fraction=f) for n, f in (("a", 3.0), ("b", 1.0)))
    config = DataConfig(mixture=entries, streaming=True, shuffle=False)
    source = open_source(config, Completions, tokenizer(), seed=0, model_max_length=64)
    first = [source.preview(position)[0] for position in range(400)]
    assert 0.65 < first.count("a") / 400 < 0.85


def test_packing_a_stream_packs_what_was_read_together(file: Path) -> None:
    source = opened(file, Completions, streaming=True, packing="bfd", max_length=64)
    lengths = [int(source.item(position).batch.num_tokens) for position in range(50)]  # pyright: ignore
    assert max(lengths) <= 64 and sum(lengths) / 50 > 50


def test_the_shuffle_buffer_keeps_every_item_and_holds_no_more_than_its_size() -> None:
    taken = 0

    def items() -> Iterator[int]:
        nonlocal taken
        for item in range(100):
            taken = item
            yield item

    out = []
    for item in shuffled(items(), 10, np.random.default_rng(0)):
        assert taken - len(out) <= 11
        out.append(item)
    assert sorted(out) == list(range(100)) != out

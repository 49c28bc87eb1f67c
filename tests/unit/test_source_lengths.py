"""What is too long is cut, dropped, refused or packed as the configuration says, and always counted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from actors.errors import ConfigError, DataError
from orchestrator.config.schema import LoggingConfig, ModelConfig, RewardConfig, RunConfig
from orchestrator.methods import build
from orchestrator.pipeline import Completions, Pairs, Prompts
from orchestrator.planning.resolve import prepare
from orchestrator.reporting.metrics import METRICS_FILE, read
from orchestrator.run import run
from tests.unit.source_stub import opened, write_rows
from tests.unit.tiny import tiny_model_folder

LONG = {"prompt": "abcd", "completion": "efghi"}  # 4 + 5 + 1 tokens
SHORT = {"prompt": "a", "completion": "b"}


def source_of(tmp_path: Path, rows: list[dict[str, Any]], kind: Any = Completions, **data: Any) -> Any:
    return opened(write_rows(tmp_path / "d.jsonl", rows), kind, **data)


@pytest.mark.parametrize(("truncation", "shown"), [("keep_start", "abcd⟦ef⟧"), ("keep_end", "e⟦fghi<eos>⟧")])
def test_a_long_row_keeps_the_end_that_it_is_told_to_keep_and_is_counted(
    tmp_path: Path, truncation: str, shown: str
) -> None:
    source = source_of(tmp_path, [LONG, SHORT], max_length=6, truncation=truncation)
    assert source.preview(0) == shown
    assert source.report.truncated == {"longer than max_length=6": 1}
    assert source.report.longest == 6


def test_dropping_leaves_long_rows_out_and_counts_them(tmp_path: Path) -> None:
    source = source_of(tmp_path, [LONG, SHORT], max_length=6, truncation="drop")
    assert [len(source), source.preview(0)] == [1, "a⟦b<eos>⟧"]
    assert source.report.dropped == {"longer than max_length=6": 1}


def test_pairs_that_are_judged_as_a_whole_are_left_out_if_one_side_is_too_long_and_never_cut(tmp_path: Path) -> None:
    short = {"prompt": "a", "chosen": "b", "rejected": "c"}
    pairs = [
        {"prompt": "a", "chosen": "b", "rejected": "cdefghi"},
        short,
        {"prompt": "a", "chosen": "b" * 9, "rejected": "c"},
    ]
    judged = build("reward_model", {}).data
    source = source_of(tmp_path, pairs, judged, max_length=6)
    assert [len(source), source.preview(0)] == [1, "a⟦b<eos>⟧\na⟦c<eos>⟧"]
    assert source.report.dropped == {"longer than max_length=6": 2}
    assert len(source_of(tmp_path, pairs, Pairs, max_length=6)) == 3
    for truncation in ("keep_start", "keep_end"):
        with pytest.raises(DataError, match=f"data.truncation={truncation} would cut rows that are judged as a whole"):
            source_of(tmp_path, pairs, judged, max_length=6, truncation=truncation)
    with pytest.raises(DataError, match=r"data\.truncation=error"):
        source_of(tmp_path, pairs, judged, max_length=6, truncation="error")


def test_margins_reach_both_rows_of_a_pair_and_data_without_them_are_refused_if_they_are_asked_for(
    tmp_path: Path,
) -> None:
    pair, with_margin = (
        {"prompt": "a", "chosen": "b", "rejected": "c"},
        build("reward_model", {"use_margin": True}).data,
    )
    rows = [{**pair, "margin": 1.5}, {**pair, "margin": None}]
    source = source_of(tmp_path, rows, with_margin, shuffle=False)
    assert [source.batch([0, 1])["margin"].tolist()] == [[1.5, 1.5, 0.0, 0.0]]
    with pytest.raises(DataError, match="no column 'margin'"):
        source_of(tmp_path, [pair], with_margin)


def test_refusing_names_the_length_and_the_limit(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"10 tokens: longer than max_length=6.*data\.truncation=error"):
        source_of(tmp_path, [SHORT, LONG], max_length=6, truncation="error")


def test_a_row_whose_prompt_fills_the_limit_has_nothing_to_learn_from_and_is_dropped(tmp_path: Path) -> None:
    source = source_of(tmp_path, [LONG, SHORT], max_length=4)
    assert len(source) == 1
    assert list(source.report.dropped) == ["nothing to learn from is left: longer than max_length=4"]


def test_the_models_own_length_is_the_limit_where_none_is_given_and_bounds_the_given_one(tmp_path: Path) -> None:
    assert source_of(tmp_path, [LONG, SHORT], model_max_length=6).preview(0) == "abcd⟦ef⟧"
    with pytest.raises(DataError, match=r"data\.max_length=9, but the model holds 6 tokens"):
        source_of(tmp_path, [SHORT], model_max_length=6, max_length=9)


@pytest.mark.parametrize(("truncation", "shown"), [("keep_start", "ab⟦efghi<eos>⟧"), ("keep_end", "cd⟦efghi<eos>⟧")])
def test_a_long_prompt_is_shortened_without_touching_the_completion(
    tmp_path: Path, truncation: str, shown: str
) -> None:
    source = source_of(tmp_path, [LONG], max_prompt_length=2, truncation=truncation)
    assert source.preview(0) == shown
    assert source.report.truncated == {"its prompt is longer than data.max_prompt_length=2": 1}


def test_a_pair_is_dropped_if_one_of_its_rows_has_nothing_left(tmp_path: Path) -> None:
    pair = {"prompt": "abc", "chosen": "d", "rejected": "efghijk"}
    assert source_of(tmp_path, [pair], Pairs, max_length=6).preview() == "abc⟦d<eos>⟧\nabc⟦efg⟧"
    with pytest.raises(DataError, match="none of 1 rows is left"):
        source_of(tmp_path, [pair], Pairs, max_length=3)


@pytest.mark.parametrize(
    ("truncation", "shown"), [("keep_start", ["ab"]), ("drop", ["ab"]), ("keep_end", ["cd", "ab"])]
)
def test_a_prompt_to_be_answered_is_never_cut_at_its_end(tmp_path: Path, truncation: str, shown: list[str]) -> None:
    rows = [{"prompt": "abcd"}, {"prompt": "ab"}]
    source = source_of(tmp_path, rows, Prompts, max_prompt_length=2, truncation=truncation)
    assert [source.preview(index) for index in range(len(source))] == shown
    assert sum(source.report.dropped.values()) + sum(source.report.truncated.values()) == 1


def test_packed_items_hold_several_documents_as_rows_of_their_own(tmp_path: Path) -> None:
    rows = [{"text": "a" * n} for n in (4, 2, 1, 9)]  # with the end: 5, 3, 2, 10
    source = source_of(tmp_path, rows, max_length=6, packing="bfd")
    assert [source.item(index).batch.lengths.tolist() for index in range(len(source))] == [[6], [5], [3, 2]]
    assert source.report.truncated == {"longer than max_length=6": 1}
    batch = source.batch([2])
    assert batch["group"].tolist() == [2, 2]
    assert batch["mask"].tolist() == [False, True, True, False, True]


def test_splitting_keeps_every_token_of_a_long_document(tmp_path: Path) -> None:
    source = source_of(tmp_path, [{"text": "abcdefgh"}], max_length=6, packing="bfd_split")
    assert [source.preview(index) for index in range(len(source))] == ["a⟦bcdef⟧", "g⟦h<eos>⟧"]
    assert source.report.truncated == {}


def test_wrapped_documents_share_packs_of_the_full_length(tmp_path: Path) -> None:
    source = source_of(tmp_path, [{"text": "abc"}, {"text": "defg"}], max_length=6, packing="wrapped")
    previews = [source.preview(index) for index in range(len(source))]
    assert previews == ["a⟦bc<eos>⟧\nd⟦e⟧", "f⟦g<eos>⟧"]


UNEVEN = [{"prompt": "abcdef", "completion": "12"}, {"prompt": "a", "completion": "1"}] * 3


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("packing", "tokens", "learned", "longest"), [("bfd", 6, 3, 2), ("bfd_split", 18, 9, 4), ("wrapped", 16, 8, 4)]
)
def test_every_pack_has_a_trained_token_and_the_report_counts_the_packs(
    tmp_path: Path, packing: str, tokens: int, learned: int, longest: int, streaming: bool
) -> None:
    source = source_of(tmp_path, UNEVEN, packing=packing, max_length=4, append_eos=False, streaming=streaming)
    report = source.report
    batches = [source.item(index).batch for index in range(report.items)]
    assert all(row.any() for batch in batches for row in (batch.row("mask", i) for i in range(len(batch))))
    assert sum(batch.num_tokens for batch in batches) == report.tokens == tokens
    assert sum(int(batch["mask"].sum()) for batch in batches) == report.learned_tokens == learned
    assert max(int(batch.lengths.max()) for batch in batches) == report.longest == longest


def test_rows_that_packing_splits_and_tokens_that_it_leaves_out_are_reported(tmp_path: Path) -> None:
    source = source_of(tmp_path, UNEVEN, packing="bfd_split", max_length=4, append_eos=False)
    assert source.report.notes == (
        "3 rows are split into pieces, which do not see one another (data.packing)",
        "12 tokens are left out, in pieces with nothing to learn from (data.packing)",
    )
    rows = [{"prompt": "abcd", "completion": "1"}, {"prompt": "ab", "completion": "12"}]
    source = source_of(tmp_path, rows, packing="bfd_split", max_length=4, append_eos=False)
    assert source.report.dropped == {"nothing to learn from in any piece of it (data.packing)": 1}
    assert [source.preview(index) for index in range(len(source))] == ["ab⟦12⟧"]


@pytest.mark.parametrize(
    ("truncation", "shown"), [("keep_start", ["abcd⟦ef⟧"]), ("keep_end", ["e⟦fghi<eos>⟧"]), ("drop", [])]
)
def test_a_row_longer_than_a_pack_is_treated_as_truncation_says(
    tmp_path: Path, truncation: str, shown: list[str]
) -> None:
    source = source_of(tmp_path, [LONG, SHORT], max_length=6, packing="bfd", truncation=truncation)
    assert [source.preview(index) for index in range(len(source))] == [*shown, "a⟦b<eos>⟧"]
    with pytest.raises(DataError, match=r"data\.truncation=error"):
        source_of(tmp_path, [LONG], max_length=6, packing="bfd", truncation="error")


def test_truncation_is_refused_with_packing_that_truncates_nothing(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"data\.truncation=drop .*data\.packing=wrapped cuts nothing off"):
        source_of(tmp_path, [LONG], max_length=6, packing="wrapped", truncation="drop")


def test_packing_is_refused_for_anything_but_completions(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"data\.packing=bfd is for completions, not for prompts"):
        source_of(tmp_path, [{"prompt": "a"}], Prompts, packing="bfd")


def phase_of(tmp_path: Path, method: str, rows: list[dict], budget: int, **data: Any) -> RunConfig:
    """A run of one phase on those rows, with a model of one token per byte."""
    data["path"] = str(write_rows(tmp_path / "d.jsonl", rows))
    train = {"steps": 1, "batch_size": 1, "token_budget": budget}
    return RunConfig.model_validate({"phases": {"p": {"method": method, "data": data, "train": train}}})


ROWS = [{"prompt": "ab", "completion": "cdef"}, {"prompt": "abcdefgh", "completion": "c"}]  # 7 and 10 tokens
PAIRS = [{"prompt": "ab", "chosen": "cdef", "rejected": "c"}] * 2  # 7 + 4 tokens
LABELLED = [{**row, "label": True} for row in ROWS]  # mismatched: 8 tokens of one's prompt, 5 of the other's completion


@pytest.mark.parametrize(
    ("method", "rows", "longest", "data"),
    [
        ("sft", ROWS, 10, {}),
        ("sft", ROWS[:1] * 3, 4, {"max_length": 4, "packing": "bfd_split"}),
        ("sft", ROWS, 10, {"packing": "wrapped"}),
        ("sft", ROWS, 9, {"max_length": 9, "streaming": True}),
        ("dpo", PAIRS, 11, {}),
        ("kto", LABELLED, 13, {}),
        ("kto", LABELLED, 11, {"max_length": 11}),
        ("bco", LABELLED, 10, {}),
    ],
)
def test_a_micro_batch_that_cannot_hold_the_longest_row_is_refused_before_anything_starts(
    tmp_path: Path, method: str, rows: list[dict], longest: int, data: dict[str, Any]
) -> None:
    refused = rf"token_budget={longest - 1}: .* may have {longest} tokens.*raise phases\.p\.train\.token_budget"
    with pytest.raises(ConfigError, match=refused):
        prepare(phase_of(tmp_path, method, rows, longest - 1, **data))
    source = prepare(phase_of(tmp_path, method, rows, longest, **data)).phases[0].source
    assert source.longest.row <= longest
    if method == "kto" and "max_length" not in data:
        assert max(source.batch([0, 1]).lengths) == longest


def test_a_sampled_completion_counts_with_its_prompt(tmp_path: Path) -> None:
    config = phase_of(tmp_path, "grpo", [{"prompt": "abcd", "answer": "e"}] * 2, 259)
    config = config.model_copy(update={"rewards": (RewardConfig(fn="exact_match"),)})
    with pytest.raises(ConfigError, match=r"a prompt with sampling\.max_tokens may have 260 tokens"):
        prepare(config)


def test_a_run_prints_and_logs_how_many_rows_are_used_and_dropped(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = phase_of(tmp_path, "sft", [SHORT, LONG, {"prompt": "abcdefgh", "completion": "x"}], 100, max_length=6)
    config = config.model_copy(
        update={
            "output": tmp_path,
            "model": ModelConfig(path=str(tiny_model_folder(tmp_path / "model", hidden=32))),
            "logging": LoggingConfig(trackers=()),
        }
    )
    (line,) = read(run(config, local=True).folder / METRICS_FILE)
    assert [line[f"data/{what}"] for what in ("dropped", "truncated", "bad")] == [1, 1, 0]
    printed = " ".join(capsys.readouterr().out.split())
    assert "dropped 1 rows: nothing to learn from is left: longer than max_length=6" in printed
    assert "truncated 1 rows: longer than max_length=6" in printed

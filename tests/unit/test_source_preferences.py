"""Pairs, triples and labelled rows: what is compared with what, where their prompt ends, and how much they weigh."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from actors.errors import DataError
from orchestrator.data.formats import extract_prompt
from orchestrator.pipeline import Completions, DataKind, Labelled, MismatchedLabelled, Pairs, Triples, WeightedLabelled
from tests.unit.source_stub import (
    PLAIN_TEMPLATE,
    assistant,
    merging_tokenizer,
    opened,
    previews,
    tokenizer,
    user,
    write_rows,
)


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "ab=", "chosen": "cd", "rejected": "e"},
        {"chosen": "ab=cd", "rejected": "ab=e"},
    ],
)
def test_a_pair_is_two_rows_chosen_first_with_one_boundary(tmp_path: Path, row: dict[str, Any]) -> None:
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
    tmp_path: Path, kind: DataKind, row: dict[str, Any], shown: str
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
def test_the_prompt_of_a_pair_is_what_both_begin_with(chosen: Any, rejected: Any, expected: tuple[Any, ...]) -> None:
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


def test_a_column_that_happens_to_be_called_weight_counts_only_if_it_is_mapped(tmp_path: Path) -> None:
    file = write_rows(tmp_path / "d.jsonl", [{"text": "ab", "weight": 70.5}])
    assert "weight" not in opened(file, Completions).item(0).batch
    assert opened(file, Completions, columns={"weight": "weight"}).item(0).batch["weight"].tolist() == [70.5]

"""The tokens that are kept of samples: which rows, how much of them, their texts, and what is known of each token."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from actors.batch import Batch
from actors.worker import Ref
from orchestrator.batches.row_table import RowTable
from orchestrator.reporting import token_tables
from orchestrator.reporting.metrics import MetricsLog
from orchestrator.reporting.token_pieces import Pieces
from orchestrator.reporting.token_tables import TokenLimits, TokenRow, chosen_rows, columns_of, token_rows
from tests.unit.tiny import tiny_tokenizer

TEXTS = ["plain words", "1+1=2", "漢字 and 🙂🙃!", "é à\n\tx", "ends in half a 🙂"]


def byte_tokenizer() -> Any:
    """Each byte is a token: every character that is not ASCII is several."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: index for index, letter in enumerate(letters)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>")


def marked_tokenizer() -> Any:
    """As those of Llama and Gemma: a space is a part of the next token, and is not decoded at the beginning."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<unk>", "▁", "a", "▁a", "▁fox", "fox", "s", *(f"<0x{byte:02X}>" for byte in range(256))]
    vocabulary = {word: index for index, word in enumerate(words)}
    merges = [("▁", "a")]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    fused = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(fused)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


@pytest.mark.parametrize("text", TEXTS)
def test_the_pieces_of_a_text_are_the_text_and_a_character_of_several_tokens_is_the_last_one_s(text: str):
    tokenizer = byte_tokenizer()
    tokens = tokenizer.encode(text)
    assert len(tokens) == len(text.encode())
    pieces = Pieces(tokenizer).of(tokens)
    assert "".join(pieces) == text and len(pieces) == len(tokens)
    expected = [part for letter in text for part in [*[""] * (len(letter.encode()) - 1), letter]]
    assert pieces == expected


def test_a_text_that_is_cut_inside_a_character_ends_in_a_mark_and_a_special_token_is_shown():
    tokenizer = byte_tokenizer()
    tokens = tokenizer.encode("a🙂")[:-1]
    assert Pieces(tokenizer).of([*tokens, *tokenizer.encode("<|end|>")]) == ["a", "", "", "\ufffd", "<|end|>"]
    assert Pieces(tokenizer).of([]) == []


def test_a_space_at_the_beginning_of_a_token_is_not_lost():
    tokenizer = marked_tokenizer()
    ids = tokenizer.convert_tokens_to_ids(["▁fox", "▁fox", "s", "<0xE6>", "<0xBC>", "<0xA2>"])
    assert tokenizer.decode(ids[:1]) == "fox", "what a decoder does at the beginning"
    assert Pieces(tokenizer).of(ids) == [" fox", " fox", "s", "", "", "漢"]


def test_the_pieces_of_a_small_tokenizer_are_its_text():
    tokenizer = tiny_tokenizer()
    tokens = tokenizer.encode("12+34=46")
    assert "".join(Pieces(tokenizer).of(tokens)) == tokenizer.decode(tokens)


class Letters:
    """A token is the letter with its code."""

    def of(self, tokens: list[int]) -> list[str]:
        return [chr(token) for token in tokens]


def sampled(texts: list[str], wrote: list[str], position: int) -> tuple[RowTable, Batch]:
    """Samples of one prompt: `wrote` has an x where the model wrote."""
    lengths = [len(text) for text in texts]
    mask = np.array([mark == "x" for marks in wrote for mark in marks])
    block = Batch.build(
        lengths,
        tokens=[ord(letter) for text in texts for letter in text],
        mask=mask,
        sample_logps=np.where(mask, -np.arange(sum(lengths)) / 4, 0.0).astype(np.float32),
        version=np.zeros(sum(lengths), np.int32),
    )
    count = len(texts)
    rows = Batch.build(lengths, group=np.full(count, position), sample=np.arange(count))
    return RowTable.of_block(rows, Ref(block), block.columns), block


def kept(table: RowTable, lines: Any, limit: int = 100) -> list[TokenRow]:
    table = table.only(columns_of(table))
    return token_rows(table, [ref.target for ref in table.blocks], np.asarray(lines), limit)


def test_values_are_known_where_the_model_wrote_and_what_a_tool_said_has_none(tmp_path: Path):
    table, _ = sampled(["pqTOOLrs"], ["--xx--xx"[:8]], 0)
    table = table.with_values(advantages=[0.5])
    (row,) = kept(table, [7])
    file = MetricsLog(tmp_path).write_tokens(3, [row], Letters(), TokenLimits(9, 9, 9))  # type: ignore[arg-type]
    assert file == tmp_path / "tokens" / "step_000003.parquet"
    (shown,) = token_tables.read(tmp_path / "tokens", 3, [7])[7]
    assert "".join(shown["pieces"]) == "pqTOOLrs" and (shown["start"], shown["total"]) == (0, 8)
    assert shown["mask"] == [False, False, True, True, False, False, True, True]
    assert shown["values"] == {
        "sample_logps": [None, None, -0.5, -0.75, None, None, -1.5, -1.75],
        "advantages": [None, None, 0.5, 0.5, None, None, 0.5, 0.5],
    }
    json.dumps(shown, allow_nan=False)


def test_a_row_that_is_not_learned_from_has_an_empty_mask_and_keeps_its_log_probabilities():
    table, _ = sampled(["ab", "cd"], ["-x", "-x"], 0)
    cut, learned = kept(table.with_values(learned=[False, True]), [0, 1])
    assert cut.mask.tolist() == [False, False] and learned.mask.tolist() == [False, True]
    assert cut.values["sample_logps"][1] == -0.25
    assert "advantages" not in cut.values, "a method without advantages has none"


def test_values_that_a_stage_wrote_for_some_rows_only_are_those_of_these_rows(tmp_path: Path):
    table, _ = sampled(["ab", "cd"], ["-x", "-x"], 0)
    judged = Ref(Batch.build([2], teacher_logps=np.array([0, -3], np.float32)))
    table = table.with_blocks({"teacher_logps"}, [(np.array([1]), judged)])
    first, second = kept(table, [0, 1])
    assert "teacher_logps" not in first.values and second.values["teacher_logps"][1] == -3
    token_tables.write(tmp_path / "tokens", 1, [first, second], Letters(), TokenLimits(9, 9, 9))  # type: ignore[arg-type]
    shown = token_tables.read(tmp_path / "tokens", 1, [0, 1])
    assert "teacher_logps" not in shown[0][0]["values"] and shown[1][0]["values"]["teacher_logps"] == [None, -3]


@pytest.mark.parametrize(
    ("marks", "start", "text"),
    [
        ("----------xxxx", 6, "ghijklmn"),  # little of the prompt
        ("-xxxxxxxxxxxxx", 0, "abcdefgh"),  # the end is left out
        ("----xxxxxxxxxx", 2, "cdefghij"),
        ("--------------", 0, "abcdefgh"),
    ],
)
def test_of_a_long_row_most_of_the_prompt_is_left_out_and_then_the_end(marks: str, start: int, text: str):
    table, _ = sampled(["abcdefghijklmn"], [marks], 0)
    (row,) = kept(table, [0], limit=8)
    assert (row.start, row.total, "".join(Letters().of(row.tokens.tolist()))) == (start, 14, text)
    assert len(row.mask) == len(row.values["sample_logps"]) == 8


def test_whole_groups_are_kept_and_found_by_their_lines_among_the_completions():
    tables = [sampled(["ab"] * 3, ["-x"] * 3, position)[0] for position in (9, 4, 6)]
    table = RowTable.concat(tables).select([5, 8, 0, 2, 1, 3, 4, 6, 7])  # as a batch's rows may come
    numbers = {4: 0, 6: 3, 9: 6}
    rows, lines = chosen_rows(table, numbers, 7, 10**6)
    assert table["group"][rows].tolist() == [4, 4, 4, 6, 6, 6], "a third group would be too many"
    assert lines.tolist() == [2, 0, 1, 5, 3, 4]
    rows, lines = chosen_rows(table, numbers, 2, 10**6)
    assert lines.tolist() == [2, 0], "of the first group as many as are kept"
    rows, lines = chosen_rows(table.select([0]), numbers, 7, 10**6)
    assert lines.tolist() == [2], "what was filtered or regrouped away has no row"
    assert chosen_rows(table.without({"sample"}), numbers, 7, 10**6)[0].tolist() == [], "rows of a data set"
    assert chosen_rows(table.select([]), numbers, 7, 10**6)[0].tolist() == []


def test_a_group_whose_values_lie_among_those_of_too_many_others_is_left_out():
    table, _ = sampled(["ab"] * 4, ["-x"] * 4, 0)
    other, _ = sampled(["ab"] * 2, ["-x"] * 2, 1)
    assert chosen_rows(RowTable.concat([table, other]), {0: 0, 1: 4}, 9, 7)[1].tolist() == [4, 5]
    assert chosen_rows(RowTable.concat([table, other]), {0: 0, 1: 4}, 9, 8)[1].tolist() == [0, 1, 2, 3]


def test_only_the_newest_steps_are_kept_and_a_resumed_run_writes_its_steps_again(tmp_path: Path):
    (row,) = kept(sampled(["ab"], ["-x"], 0)[0], [0])
    log = MetricsLog(tmp_path)
    for step in (8, 9, 10, 11):
        log.write_tokens(step, [row], Letters(), TokenLimits(1, 9, 3))  # type: ignore[arg-type]
    files = token_tables.of_steps(tmp_path / "tokens")
    assert [token_tables.step_of(file) for file in files] == [9, 10, 11]
    log.rewind(9)
    assert [token_tables.step_of(file) for file in token_tables.of_steps(tmp_path / "tokens")] == [9]
    with pytest.raises(FileNotFoundError):
        token_tables.read(tmp_path / "tokens", 10, [0])

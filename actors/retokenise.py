"""A completion in the tokens of another tokenizer, for a teacher that has its own.

    our tokens        |To|ken|is|ation|<eos>|      begin at characters 0 2 5 7 12
    their tokens      |Token|isation|</s>|                             0 5 12
    aligned           our 0, 2 and 4 with their 0, 1 and 2

Where a token of ours and one of theirs begin at the same character, both models have read the same text and say what
comes next. Between those places one of them is in the middle of a token of the other's, and there is nothing to
compare.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import numpy as np

from actors.batch import Array, Batch
from actors.other_prompts import completion_of, completions_of, prompt_of
from actors.pretrained import load_tokenizer

CUT = "\ufffd"  # what decoding makes of a character's first bytes alone


@dataclass(frozen=True)
class Retokeniser:
    """From our tokenizer to another one, which must be a fast one: only these know where in a text a token stands."""

    ours: Any
    theirs: Any

    @cached_property
    def in_ours(self) -> Array:
        """[V'] int32: of each of their tokens, ours with the same string; -1 if we have none. The end of a text is the
        end of a text, whatever it is called."""
        own, other = self.ours.get_vocab(), self.theirs.get_vocab()
        found = np.full(max(other.values()) + 1, -1, np.int32)
        for text, token in other.items():
            found[token] = own.get(text, -1)
        if self.theirs.eos_token_id is not None and self.ours.eos_token_id is not None:
            found[self.theirs.eos_token_id] = self.ours.eos_token_id
        return found

    def aligned(self, tokens: Sequence[int]) -> tuple[list[int], Array]:
        """(their tokens, [C] of each of ours the place of theirs that begins at the same character; -1: none does)."""
        ended = len(tokens) > 0 and tokens[-1] == self.ours.eos_token_id
        pieces = pieces_of(self.ours, tokens[:-1] if ended else tokens)
        text = "".join(pieces)
        encoded = self.theirs(text, add_special_tokens=False, return_offsets_mapping=True)
        places: dict[int, int] = {}
        for place, (start, _) in enumerate(encoded["offset_mapping"]):
            places.setdefault(start, place)
        found, character, whole = [], 0, True  # `whole`: the tokens so far end with a character
        for piece in pieces:
            found.append(places.get(character, -1) if whole else -1)
            character, whole = character + len(piece), bool(piece)
        ids = list(encoded["input_ids"])
        if ended:
            found.append(len(ids) if whole else -1)
            ids.append(self.theirs.eos_token_id)
        return ids, np.asarray(found, np.int64)


@lru_cache(maxsize=2)
def retokeniser_of(ours: str, theirs: str, trust_remote_code: bool) -> Retokeniser:
    """Of tokenizers in folders, or by hub name. Raises ModelError."""
    return Retokeniser(load_tokenizer(ours, trust_remote_code), load_tokenizer(theirs, trust_remote_code))


def pieces_of(tokenizer: Any, tokens: Sequence[int]) -> list[str]:
    """The text that each token adds to those before it; empty for one that ends within a character. As few tokens as
    possible are decoded at a time: what a token looks like may depend on the one before it, not on all of them."""

    def decoded(start: int, stop: int) -> str:
        return tokenizer.decode(tokens[start:stop], skip_special_tokens=True, clean_up_tokenization_spaces=False)

    found: list[str] = []
    begun = read = 0
    for stop in range(1, len(tokens) + 1):
        before, now = decoded(begun, read), decoded(begun, stop)
        if now.endswith(CUT):
            found.append("")
            continue
        found.append(now[len(before) :])
        begun, read = read, stop
    return found


def exchanged_in(batch: Batch, retokeniser: Retokeniser) -> tuple[Batch, list[Array]]:
    """The rows with their teacher prompts and their completions in the other tokenizer's tokens, and the `aligned`
    places of each."""
    rows: list[Array] = []
    masks: list[Array] = []
    places: list[Array] = []
    for row in range(len(batch)):
        ids, found = retokeniser.aligned(completion_of(batch, row).tolist())
        prompt = prompt_of(batch, row)
        rows.append(np.concatenate([prompt, np.asarray(ids, np.int32)]))
        masks.append(np.arange(len(rows[-1])) >= len(prompt))
        places.append(found)
    other = Batch.build(
        [len(row) for row in rows],
        tokens=np.concatenate([np.zeros(0, np.int32), *rows]).astype(np.int32),
        mask=np.concatenate([np.zeros(0, np.bool_), *masks]),
    )
    return other, places


def returned_from(found: Batch, batch: Batch, places: Sequence[Array], in_ours: Array) -> Batch:
    """What was found of the exchanged rows, at our tokens that are aligned with theirs, ids in our tokens (-1: we have
    no such token). Of the others NaN says that nothing is known; 0 stands at prompts."""
    here = np.split(completions_of(batch), np.cumsum(batch["completion_tokens"])[:-1])
    ours: list[Array] = [at[place >= 0] for at, place in zip(here, places, strict=True)]
    unknown: list[Array] = [at[place < 0] for at, place in zip(here, places, strict=True)]
    begins = [int(found.offsets[row + 1]) - _completion_length(found, batch, row) for row in range(len(batch))]
    theirs = [begin + place[place >= 0] for begin, place in zip(begins, places, strict=True)]
    columns: dict[str, Array] = {}
    for name, values in found.columns.items():
        columns[name] = np.zeros((batch.num_tokens, *values.shape[1:]), values.dtype)
        taken = values[np.concatenate(theirs)]
        columns[name][np.concatenate(ours)] = _mapped(taken, in_ours) if values.dtype == np.int32 else taken
        if values.dtype != np.int32:
            columns[name][np.concatenate(unknown)] = np.nan
    return Batch.build(batch.lengths, **columns)


def _mapped(ids: Array, in_ours: Array) -> Array:
    """Their ids in ours; -1 for ids beyond their tokenizer's, which exist only where a vocabulary is padded."""
    return np.where(ids < len(in_ours), in_ours[ids.clip(max=len(in_ours) - 1)], -1)


def _completion_length(found: Batch, batch: Batch, row: int) -> int:
    return int(found.lengths[row]) - len(prompt_of(batch, row))

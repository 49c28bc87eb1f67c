"""Finds documents with a common prefix, so that the prefix is computed once.

a b c d        the samples of a prompt, the two sides of a pair, a system prompt before every question:
a b c e f      under causal attention a token's hidden states are a function of the tokens up to it, so equal
a b c d        beginnings have equal states, and equal samples are equal altogether: here 6 rows instead of 12
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from actors.transfers import on_device

WORTH_SHARING = (
    0.9  # computed rows per token; above that, spreading rows out for attention costs more than sharing saves
)


@dataclass(frozen=True)
class SharedPrefixes:
    """Which tokens of a flat micro-batch are computed, and which row of that computation stands for each token."""

    kept: Tensor  # [R] int64, ascending, into the T tokens
    row_of_token: Tensor  # [T] int64, into the R rows


def shared_prefixes(
    tokens: np.ndarray, lengths: Sequence[int], device: torch.device | str = "cpu"
) -> SharedPrefixes | None:
    """The prefixes that documents (`tokens` [T], end to end, on the host) share; None if sharing saves too little."""
    first = _first_alike(tokens, lengths)
    kept, row_of_token = np.unique(first, return_inverse=True)
    if len(kept) > WORTH_SHARING * len(first):
        return None
    return SharedPrefixes(*(on_device(rows, device) for rows in (kept, row_of_token)))


def _first_alike(tokens: np.ndarray, lengths: Sequence[int]) -> np.ndarray:
    """[T] int64: for each token the one that stands for it, which has the same tokens up to it; itself, if none has.

    Among sorted documents, a document shares its longest prefix with the one before it."""
    ends = np.cumsum(lengths)
    documents = [tokens[end - length : end] for end, length in zip(ends, lengths, strict=True)]
    keys = [document.astype(">i8").tobytes() for document in documents]  # big-endian: sorts as the tokens do
    first = np.arange(len(tokens))
    for before, this in pairwise(sorted(range(len(documents)), key=keys.__getitem__)):
        common = _common(documents[before], documents[this])
        starts = ends[before] - lengths[before], ends[this] - lengths[this]
        first[starts[1] : starts[1] + common] = first[starts[0] : starts[0] + common]
    return first


def _common(one: np.ndarray, other: np.ndarray) -> int:
    """Length of the common prefix of two documents."""
    shorter = min(len(one), len(other))
    differs = np.flatnonzero(one[:shorter] != other[:shorter])
    return int(differs[0]) if len(differs) else shorter

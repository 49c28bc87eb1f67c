"""Packing: which pieces of documents share an item of `max_length` tokens. Pure functions of the lengths.

Micro-batches have no padding in any case, so packing does not make a step faster. It gives items about the same number
of tokens, and decides how a document that is too long is handled: `bfd` truncates its end, `bfd_split` and `wrapped`
keep all of it. Pieces do not attend to one another: each is a row of its own."""

from __future__ import annotations

import heapq
from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Piece:
    """Tokens [start, stop) of one document."""

    document: int
    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start


Bin = list[Piece]


def best_fit_decreasing(lengths: Sequence[int], max_length: int, *, split: bool = False) -> list[Bin]:
    """Places the longest piece first, each into the fullest bin that has room for it; among equals, the earliest.

    A document that is longer than a bin is truncated, or with `split` becomes several pieces."""
    pieces = [piece for document, length in enumerate(lengths) for piece in _cut(document, length, max_length, split)]
    bins: list[Bin] = []
    roomy: dict[int, list[int]] = {}  # room left -> heap of bins with that much
    rooms: list[int] = []  # keys of `roomy`, sorted
    for piece in sorted(pieces, key=len, reverse=True):
        at = bisect_left(rooms, len(piece))
        if at == len(rooms):
            index, room = len(bins), max_length
            bins.append([])
        else:
            room = rooms[at]
            index = heapq.heappop(roomy[room])
            if not roomy[room]:
                del roomy[room], rooms[at]
        bins[index].append(piece)
        left = room - len(piece)
        if left not in roomy:
            roomy[left] = []
            insort(rooms, left)
        heapq.heappush(roomy[left], index)
    return bins


def wrapped(lengths: Sequence[int], max_length: int) -> list[Bin]:
    """All documents concatenated, and cut every `max_length` tokens."""
    bins: list[Bin] = []
    room = 0
    for document, length in enumerate(lengths):
        start = 0
        while start < length:
            if room == 0:
                bins.append([])
                room = max_length
            stop = min(length, start + room)
            bins[-1].append(Piece(document, start, stop))
            room -= stop - start
            start = stop
    return bins


def _cut(document: int, length: int, max_length: int, split: bool) -> list[Piece]:
    if length == 0:
        return []
    if not split:
        return [Piece(document, 0, min(length, max_length))]
    return [Piece(document, start, min(length, start + max_length)) for start in range(0, length, max_length)]

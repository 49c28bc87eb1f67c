"""The tokens of a sample in a terminal, coloured by what is known of each."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from actors.errors import ConfigError

MASK = "mask"
POSITIVE, NEGATIVE, UNLIKELY = (40, 110, 190), (170, 90, 0), (110, 70, 170)  # at full strength
WHITE = (255, 255, 255)


def strengths(sequences: Sequence[dict[str, Any]], column: str) -> list[list[float | None]]:
    """For each token of each sequence its value as a share of the largest that the sequences have, -1 to 1; None where
    nothing is known. Raises ConfigError for a column that none of them has."""
    if column == MASK:
        return [[float(learned) for learned in each["mask"]] for each in sequences]
    known = sorted({name for each in sequences for name in each["values"]})
    if sequences and column not in known:
        raise ConfigError(f"--tokens {column}: no value of that name is kept; there are {', '.join([MASK, *known])}")
    nothing = [[None] * len(each["mask"]) for each in sequences]
    found = [each["values"].get(column, empty) for each, empty in zip(sequences, nothing, strict=True)]
    largest = max((abs(value) for values in found for value in values if value is not None), default=0.0) or 1.0
    return [[None if value is None else value / largest for value in values] for values in found]


def coloured(sequence: dict[str, Any], shares: Sequence[float | None], column: str) -> Iterator[tuple[str, Any, Any]]:
    """(text, foreground, background) of each token; None: the terminal's own. What a model wrote cannot steer the
    terminal: characters that cannot be printed are dots."""
    for piece, share in zip(sequence["pieces"], shares, strict=True):
        strong = UNLIKELY if column.endswith("_logps") else POSITIVE if (share or 0) > 0 else NEGATIVE
        if not share:
            yield _printable(piece), None, None
        else:
            yield _printable(piece), WHITE, tuple(round(part * abs(share)) for part in strong)


def _printable(piece: str) -> str:
    return "".join(mark if mark.isprintable() else "⏎\n" if mark == "\n" else "·" for mark in piece)

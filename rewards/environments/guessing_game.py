"""A game of several turns: find a secret number by guesses that are answered with "higher" or "lower"."""

from __future__ import annotations

import re
from typing import Any

_NUMBER = re.compile(r"-?\d+")


class GuessingGame:
    """The secret is the row's column `secret`. The last whole number of a turn is its guess; a turn without one uses up
    a guess. Finding it in the first guess is worth 1, in the last `at_last`; not finding it 0."""

    def __init__(self, low: int = 1, high: int = 100, guesses: int = 7, at_last: float = 0.5) -> None:
        if not (low < high and guesses > 0 and 0 <= at_last <= 1):
            raise ValueError(
                f"it needs low < high, guesses > 0 and at_last in [0, 1]; not {low, high, guesses, at_last}"
            )
        self._low, self._high, self._guesses, self._at_last = low, high, guesses, at_last
        self._secret = self._used = 0

    def reset(self, row: dict[str, Any]) -> str:
        """Raises ValueError for a secret out of bounds."""
        secret = int(row["secret"])
        if not self._low <= secret <= self._high:
            raise ValueError(f"the column `secret` is {secret}; the game is from {self._low} to {self._high}")
        self._secret, self._used = secret, 0
        return f"Guess a whole number from {self._low} to {self._high}. You have {self._guesses} guesses."

    def step(self, message: dict[str, Any]) -> tuple[str, float | None, bool]:
        found = _NUMBER.findall(message["content"])
        guess = int(found[-1][:20]) if found else None
        self._used += 1
        if guess == self._secret:
            return "Right.", self._worth(), True
        if self._used == self._guesses:
            return f"It was {self._secret}.", 0.0, True
        if guess is None:
            return "Say a number.", None, False
        return ("Higher." if guess < self._secret else "Lower."), None, False

    def _worth(self) -> float:
        progress = (self._used - 1) / max(1, self._guesses - 1)
        return 1.0 + (self._at_last - 1.0) * progress

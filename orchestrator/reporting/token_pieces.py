"""The text of each token of a row, as a reader sees it: the pieces of a row, joined, are the row's text.

    tokens   12    400   7   181 162 177   2
    pieces   "The" " fox" ""  ""  ""  "漢"   "<|end|>"

A token that is only a part of a character is the empty text, and the token that completes the character is the whole of
it. Pure, but for the tokenizer.
"""

# pyright: basic
# (tokenizers are typed in part only)

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

HALF = "\ufffd"  # what a tokenizer writes for bytes that are no character


class Pieces:
    """Of one tokenizer. A token is decoded once, and its text kept: a row of known tokens costs look-ups."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        # Alone, or at the beginning, the token of " fox" may be decoded as "fox"; behind another one it is not.
        self._first: list[int] = list(tokenizer.encode("a", add_special_tokens=False))[-1:]
        self._first_text = self._decoded(self._first)
        self._known: dict[int, str] = {}

    def of(self, tokens: Sequence[int]) -> list[str]:
        """The text of each token."""
        pieces = [self._piece(token) for token in tokens]
        begin = 0
        while begin < len(pieces):
            if HALF not in pieces[begin]:
                begin += 1
                continue
            end = begin
            while end < len(pieces) and HALF in pieces[end]:
                end += 1
            pieces[begin:end] = self._completed(tokens[begin:end])
            begin = end
        return pieces

    def _completed(self, tokens: Sequence[int]) -> list[str]:
        """The text of each of several tokens that encode parts of characters: a character belongs to the token that
        completes it."""
        pieces: list[str] = []
        said = ""
        for count in range(1, len(tokens) + 1):
            text = self._behind_first(tokens[:count])
            whole = text if count == len(tokens) else text.rstrip(HALF)
            pieces.append(whole[len(said) :])
            said = whole if len(whole) > len(said) else said
        return pieces

    def _piece(self, token: int) -> str:
        if token not in self._known:
            self._known[token] = self._behind_first([token])
        return self._known[token]

    def _behind_first(self, tokens: Sequence[int]) -> str:
        text = self._decoded([*self._first, *tokens])
        if text.startswith(self._first_text):
            return text[len(self._first_text) :]
        return self._decoded(tokens)

    def _decoded(self, tokens: Sequence[int]) -> str:
        return str(self._tokenizer.decode(list(tokens), skip_special_tokens=False, clean_up_tokenization_spaces=False))

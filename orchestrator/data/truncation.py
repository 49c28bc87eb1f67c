"""Items that are too long: truncated, dropped or refused according to `data.truncation`, and always counted."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from orchestrator.data.conversation import RowError
from orchestrator.data.tokenise import Encoded

Truncation = Literal["keep_start", "keep_end", "drop", "error"]


@dataclass(frozen=True)
class Fit:
    """The outcome for one item: `dropped` or `truncated` is the reason; both are None if it fits. `cut_labels`: step
    labels that it lost."""

    encoded: Encoded
    dropped: str | None = None
    truncated: str | None = None
    cut_labels: int = 0


@dataclass(frozen=True)
class Limits:
    """In tokens; None: no limit. `max_length` limits prompt and completion together, or a prompt without completion."""

    max_length: int | None
    max_prompt_length: int | None
    truncation: Truncation

    def fit_rows(self, encoded: Encoded) -> Fit:
        """Prompt and completion. Items without a trained token are dropped, and so are pairs whose sides have the same
        tokens. Raises RowError if it is refused."""
        cut, labels = None, _labels_of(encoded)
        if self.max_prompt_length is not None and encoded.boundary > self.max_prompt_length:
            cut = f"its prompt is longer than data.max_prompt_length={self.max_prompt_length}"
            if refusal := self._refused(encoded, cut, encoded.boundary):
                return refusal
            encoded = _cut_prompt(encoded, self.max_prompt_length, keep_end=self.truncation == "keep_end")
        longest = max(map(len, encoded.rows))
        if self.max_length is not None and longest > self.max_length:
            cut = f"longer than max_length={self.max_length}"
            if refusal := self._refused(encoded, cut, longest):
                return refusal
            encoded = _cut_rows(encoded, self.max_length, keep_end=self.truncation == "keep_end")
        left = _labels_of(encoded)
        if not all(map(any, encoded.masks)) or left == 0:
            return Fit(encoded, dropped=f"nothing to learn from is left: {cut}" if cut else "nothing to learn from")
        if encoded.rows[1:] and encoded.rows[0] == encoded.rows[1]:
            same = "chosen and rejected are the same tokens: nothing is preferred"
            return Fit(encoded, dropped=f"{same} (cut: {cut})" if cut else same)
        return Fit(encoded, truncated=cut, cut_labels=(labels or 0) - (left or 0))

    def fit_prompt(self, encoded: Encoded) -> Fit:
        """A prompt to be completed. Its beginning alone would be useless: `keep_start` drops it, `keep_end` keeps its
        end. Raises RowError if it is refused."""
        limit = self.max_prompt_length
        if limit is None or len(encoded.rows[0]) <= limit:
            return Fit(encoded)
        cut = f"prompt longer than {limit} tokens"
        if self.truncation == "error":
            self._refused(encoded, cut, len(encoded.rows[0]))
        if self.truncation != "keep_end":
            return Fit(encoded, dropped=f"{cut} (data.truncation=keep_end would keep its end)")
        return Fit(_cut_rows(encoded, limit, keep_end=True), truncated=cut)

    def _refused(self, encoded: Encoded, cut: str, length: int) -> Fit | None:
        if self.truncation == "error":
            raise RowError(
                f"{length} tokens: {cut}, and data.truncation=error. Raise the limit, or set data.truncation to "
                "keep_start, keep_end or drop"
            )
        return Fit(encoded, dropped=cut) if self.truncation == "drop" else None


def _cut_rows(encoded: Encoded, limit: int, *, keep_end: bool) -> Encoded:
    def cut(values: list[int]) -> list[int]:
        return values[-limit:] if keep_end else values[:limit]

    def cut_mask(mask: list[bool]) -> list[bool]:
        kept = mask[-limit:] if keep_end else mask[:limit]
        return [False, *kept[1:]]

    labels = None if encoded.step_labels is None else [cut(row) for row in encoded.step_labels]
    rows, masks = [cut(row) for row in encoded.rows], [cut_mask(mask) for mask in encoded.masks]
    return Encoded(rows, masks, min(encoded.boundary, limit), encoded.remarks, labels)


def _labels_of(encoded: Encoded) -> int | None:
    """How many steps are labelled; None if the data has no such labels."""
    return None if encoded.step_labels is None else sum(label >= 0 for row in encoded.step_labels for label in row)


def _cut_prompt(encoded: Encoded, limit: int, *, keep_end: bool) -> Encoded:
    """Remove tokens of the prompt: from its start with `keep_end`, else from its end."""
    excess = encoded.boundary - limit
    start, stop = (0, excess) if keep_end else (limit, encoded.boundary)
    rows = [[*row[:start], *row[stop:]] for row in encoded.rows]
    masks = [[False, *[*mask[:start], *mask[stop:]][1:]] for mask in encoded.masks]
    labels = None if encoded.step_labels is None else [[*row[:start], *row[stop:]] for row in encoded.step_labels]
    return Encoded(rows, masks, limit, encoded.remarks, labels)

"""Short samples of a small model on a CPU, of several requests at a time, in passes of one shape.

A pass of a small model takes four times as long for 128 rows as for eight, so a pass for each request wastes most of
the time. But what a row gets must not depend on the rows beside it, to the bit: with other rows a matrix product may
sum in another order if that changes its shape. So the shape never changes:

    seats       0        1        2        3                 a pass reads one token per seat, of empty ones too
    columns  [. p p p][p p p p][. . p p][       ]            a prompt ends where its multiple of STRIDE ends; what is
             [t t    ][t      ][t t t  ][       ]            left of it is masked, and so is what has not been read

A prompt is read once for all of its samples, with others that are padded to the same length, in passes of one shape
again. A row that ends leaves its seat; new rows sit down when half of the seats are free, as their prompts then fill
their passes. How many seats and columns there are follows from the request alone (`short_samples.py`). Columns to the
right of all that have been read are left out of a pass: they would add zeros at the end of a row's sums, so the bits
are the same.
"""

from __future__ import annotations

import inspect
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from rollout.grouped_attention import use_grouped_attention
from rollout.running import Row
from rollout.short_samples import STRIDE, Shape, model_refusal

PROMPT_TOKENS = 256  # of a pass that reads prompts, at most
WIDTH = 32  # the columns of a pass are a multiple of it: whole vectors of every processor


def prepare_for_fixed_rows(model: Any, device: torch.device) -> bool:
    """Whether a model of transformers is decoded so; on a CPU alone, where it was measured. Its attention is ready for
    it then."""
    parameters = sum(parameter.numel() for parameter in model.parameters())
    masked = (
        "position_ids" in inspect.signature(model.forward).parameters and model.config._attn_implementation == "sdpa"
    )
    suitable = device.type == "cpu" and masked and model_refusal(model.config, parameters) is None
    if suitable:
        use_grouped_attention(model)
    return suitable


class FixedRows:
    """Rows that are decoded together: at most `concurrency` and as many as the shape has at a time, the others wait."""

    def __init__(self, model: Any, shape: Shape, concurrency: int) -> None:
        seats = min(shape.rows, concurrency)
        self._model = model
        self._columns = shape.columns
        self._seats: list[Row | None] = [None] * seats
        self._waiting: deque[Row] = deque()
        self._unread: set[int] = set()  # seats whose keys and values are not there
        self._cache = _Cache(seats, shape.columns)
        self._starts = torch.zeros(seats, dtype=torch.int64)  # [S] the first token's column
        self._ends = torch.zeros(seats, dtype=torch.int64)  # [S] the column of the next token that is read

    @property
    def busy(self) -> bool:
        return bool(self._waiting) or any(row is not None for row in self._seats)

    def add(self, rows: Iterable[Row]) -> None:
        self._waiting.extend(rows)

    def remove(self, gone: Callable[[Row], bool]) -> None:
        """Of the rows, those of which that is true."""
        self._waiting = deque(row for row in self._waiting if not gone(row))
        for seat, row in enumerate(self._seats):
            if row is not None and gone(row):
                self._seats[seat] = None
                self._unread.discard(seat)
                self._starts[seat] = self._ends[seat] = 0  # an empty seat makes no pass wider

    def forget(self) -> None:
        """The weights have changed: what the rows have read is read again."""
        self._unread = {seat for seat, row in enumerate(self._seats) if row is not None}

    def next_logits(self) -> tuple[list[Row], Tensor]:
        """The rows that have a seat, and [R, V] float32: logits of each one's next token."""
        self._sit_down()
        taken = [seat for seat, row in enumerate(self._seats) if row is not None]
        found: dict[int, Tensor] = {}
        if any(seat not in self._unread for seat in taken):
            logits = self._read_last_tokens()
            found = {seat: logits[seat] for seat in taken if seat not in self._unread}
        found |= self._read_prefixes()
        return [self._row(seat) for seat in taken], torch.stack([found[seat] for seat in taken])

    def _row(self, seat: int) -> Row:
        row = self._seats[seat]
        assert row is not None
        return row

    def _sit_down(self) -> None:
        free = [seat for seat, row in enumerate(self._seats) if row is None]
        if 2 * len(free) < len(self._seats):
            return
        for seat in free[: len(self._waiting)]:
            self._seats[seat] = self._waiting.popleft()
            self._unread.add(seat)

    def _read_last_tokens(self) -> Tensor:
        """[S, V] float32. Empty seats, and those whose prefix is read next, read something that is overwritten."""
        last = [0 if row is None or not row.tokens else row.tokens[-1] for row in self._seats]
        width = min(-(-(int(self._ends.max()) + 1) // WIDTH) * WIDTH, self._columns)
        places = torch.arange(width)
        inside = (places >= self._starts[:, None]) & (places <= self._ends[:, None])
        self._cache.one_token(self._ends, width)
        logits = self._pass(torch.tensor(last)[:, None], inside[:, None, None], (self._ends - self._starts)[:, None])
        read = [seat for seat, row in enumerate(self._seats) if row is not None and seat not in self._unread]
        self._ends[read] += 1
        return logits

    def _read_prefixes(self) -> dict[int, Tensor]:
        """[V] float32 for each seat that has read nothing: prompt and tokens, once for all rows that have the same."""
        seats_of: dict[tuple[int, ...], list[int]] = {}
        for seat in sorted(self._unread):
            row = self._row(seat)
            seats_of.setdefault((*row.request.prompt, *row.tokens), []).append(seat)
        by_shape: dict[tuple[int, int], list[tuple[int, ...]]] = {}
        for prefix, seats in seats_of.items():
            shape = self._shape(len(prefix), self._row(seats[0]).request.n)
            by_shape.setdefault(shape, []).append(prefix)
        found: dict[int, Tensor] = {}
        for (count, length), prefixes in by_shape.items():
            for some in (prefixes[start : start + count] for start in range(0, len(prefixes), count)):
                logits = self._read(some, count, length, [seats_of[prefix] for prefix in some])
                found |= {seat: logits[place] for place, prefix in enumerate(some) for seat in seats_of[prefix]}
        self._unread.clear()
        return found

    def _shape(self, tokens: int, samples: int) -> tuple[int, int]:
        """Rows and columns of the pass that reads a prefix of so many tokens: as many as fill half of the seats, each
        with so many samples."""
        length = -(-tokens // STRIDE) * STRIDE
        return max(1, min(-(-len(self._seats) // (2 * samples)), PROMPT_TOKENS // length)), length

    def _read(
        self, prefixes: Sequence[tuple[int, ...]], count: int, length: int, seats_of: Sequence[Sequence[int]]
    ) -> Tensor:
        """[count, V] float32: one pass. Padding is on the left, so that all prefixes end in the same column; a padded
        token attends to itself, because attention to nothing is no number."""
        ids, starts = torch.zeros(count, length, dtype=torch.int64), torch.full((count,), length - 1)
        for place, prefix in enumerate(prefixes):
            starts[place] = length - len(prefix)
            ids[place, length - len(prefix) :] = torch.tensor(prefix)
        places = torch.arange(length)
        causal = (places <= places[:, None]) & (places >= starts[:, None, None])
        seen = causal | torch.eye(length, dtype=torch.bool)
        pairs = [(seat, place) for place, seats in enumerate(seats_of) for seat in seats]
        seats, sources = torch.tensor(pairs).unbind(1)
        self._starts[seats], self._ends[seats] = starts[sources], length
        self._cache.prefixes(seats, sources)
        return self._pass(ids, seen[:, None], (places - starts[:, None]).clamp(min=0))

    def _pass(self, ids: Tensor, seen: Tensor, positions: Tensor) -> Tensor:
        """Logits after the last column. `seen` [N, 1, queries, keys] bool."""
        unseen = torch.zeros(seen.shape, dtype=self._model.dtype).masked_fill_(~seen, -torch.inf)
        output = self._model(
            input_ids=ids,
            attention_mask=unseen,  # as numbers, or each layer would make these of it
            position_ids=positions,
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=1,
        )
        return output.logits[:, -1].float()


class _Cache:
    """Keys and values of all seats, [S, heads, columns, head_dim] for each layer: what a layer of transformers asks of
    its cache. Before a pass it is told what the pass reads."""

    def __init__(self, seats: int, columns: int) -> None:
        self._columns = columns
        self._every = torch.arange(seats)
        self._held: dict[int, tuple[Tensor, Tensor]] = {}
        self._write: Callable[[Tensor, Tensor], None]
        self._width: int | None = None  # columns that are attended to; None: the new keys alone are

    def one_token(self, ends: Tensor, width: int) -> None:
        """The pass reads a token of each seat, in the column `ends` [S], and attends to the first `width` columns."""

        def write(held: Tensor, new: Tensor) -> None:
            held[self._every, :, ends] = new[:, :, 0]

        self._write, self._width = write, width

    def prefixes(self, seats: Tensor, sources: Tensor) -> None:
        """The pass reads prefixes that begin in the first column: that in the row `sources[i]` is of `seats[i]`."""

        def write(held: Tensor, new: Tensor) -> None:
            held[seats, :, : new.shape[2]] = new[sources]

        self._write, self._width = write, None

    def update(self, keys: Tensor, values: Tensor, layer: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """What the layer attends to, after its new keys and values [N, heads, new, head_dim] were taken in."""
        if layer not in self._held:
            shapes = [(len(self._every), new.shape[1], self._columns, new.shape[3]) for new in (keys, values)]
            self._held[layer] = keys.new_zeros(shapes[0]), values.new_zeros(shapes[1])
        held = self._held[layer]
        for mine, new in zip(held, (keys, values), strict=True):
            self._write(mine, new)
        if self._width is None:
            return keys, values
        kept, said = (mine[:, :, : self._width] for mine in held)
        return kept, said

    def get_seq_length(self, *_: Any) -> int:
        return 0

"""Passes of one shape: what a row's result depends on is that row alone, to the bit.

    rows of 5, 7, 8 tokens          one pass, always of 32 rows of 8 tokens
    a b c d e                  ──►  a b c d e . . .
    f g h i j k l              ──►  f g h i j k l .
    m n o p q r s t            ──►  m n o p q r s t
                                    . . . . . . . .    (29 empty rows)

Under causal attention what follows a row changes nothing before it, and in products of one shape the sums of a row are
taken in one order, whatever the other rows are. Common prefixes are not shared, since that would change the shape. A
model with experts multiplies as many tokens by an expert's weights as were sent to it: there each row has a pass of its
own.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from actors.backends.protocol import Backend
from actors.batch import Array, Batch
from actors.columns import Head
from actors.forward import forward_padded
from actors.sharding import MicroBatches, padded_length, rows_of_a_pass


def padded_passes(backend: Backend, batch: Batch, members: MicroBatches, head: Head) -> Iterator[tuple[int, Array]]:
    """Of each row, what a scalar head says: one number [], or one per token [length]. Collective: every rank has as
    many `members`, some of which may be empty."""
    for rows in _alone(backend, batch, members) if _has_experts(backend) else members:
        length = padded_length(max((int(batch.lengths[row]) for row in rows), default=1))
        count = 1 if _has_experts(backend) else rows_of_a_pass(length)
        texts = [batch.row("tokens", row) for row in rows]
        found = forward_padded(backend.model, texts, head=head, length=length, count=count, device=backend.device)
        yield from zip(rows, found, strict=True)


def _alone(backend: Backend, batch: Batch, members: MicroBatches) -> MicroBatches:
    """Each row by itself, and as many passes on every rank."""
    rows = [row for micro_batch in members for row in micro_batch]
    passes = int(backend.world.gather(torch.tensor([float(len(rows))])).max())
    return (*((row,) for row in rows), *[()] * (passes - len(rows)))


def _has_experts(backend: Backend) -> bool:
    model = getattr(backend.model, "module", backend.model)  # of a backend's wrapper
    return bool(getattr(model, "has_experts", False))

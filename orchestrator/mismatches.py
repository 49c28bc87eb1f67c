"""Mismatched rows: prompts with other prompts' completions, from which KTO estimates how far the policy has moved."""

from __future__ import annotations

import numpy as np

from actors.batch import Array, Batch
from actors.columns import COLUMNS, Axis


def with_mismatches(batch: Batch) -> Batch:
    """Every row, followed by its prompt with the completion of the row before it (the first one takes the last one's).

    The second row of each two is `mismatched` and has the first one's values in every other per-row column. A prompt is
    what stands before the first masked token. Raises ValueError for a single row, which has nobody to swap with.
    """
    if len(batch) < 2:
        raise ValueError(f"mismatched rows need at least two examples in a batch, got {len(batch)}")
    prompts, completions = _split(batch)
    tokens: list[Array] = []
    mask: list[Array] = []
    for row, prompt in enumerate(prompts):
        for completion in (completions[row], completions[row - 1]):
            tokens.append(np.concatenate([batch["tokens"][prompt], batch["tokens"][completion]]))
            mask.append(np.concatenate([batch["mask"][prompt], batch["mask"][completion]]))
    of_row = [name for name in batch.columns if COLUMNS[name].axis is Axis.ROW]
    twice = {name: np.repeat(batch[name], 2) for name in of_row}
    twice |= {"tokens": np.concatenate(tokens), "mask": np.concatenate(mask)}
    return Batch.build([len(row) for row in tokens], **twice, mismatched=np.arange(2 * len(batch)) % 2 == 1)


def _split(batch: Batch) -> tuple[list[slice], list[slice]]:
    """Where each row's prompt and completion stand."""
    prompts: list[slice] = []
    completions: list[slice] = []
    for start, end in zip(batch.offsets[:-1].tolist(), batch.offsets[1:].tolist(), strict=True):
        learned = np.flatnonzero(batch["mask"][start:end])
        boundary = start + int(learned[0]) if len(learned) else end
        prompts.append(slice(start, boundary))
        completions.append(slice(boundary, end))
    return prompts, completions

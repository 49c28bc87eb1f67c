"""Mismatched rows: prompts with completions of other prompts, from which KTO estimates the policy's KL from the
reference."""

from __future__ import annotations

import numpy as np

from actors.batch import Array, Batch
from actors.columns import COLUMNS, Axis


def with_mismatches(batch: Batch, max_length: int | None = None) -> Batch:
    """Every row, followed by its prompt with a completion of another prompt, truncated to `max_length` tokens.

    The completion is that of the nearest row before, cyclically, with another prompt; of the row before if all prompts
    are the same. The second row of each two is `mismatched` and has the first one's values in every other per-row
    column. A prompt consists of the tokens before the first trained one. Raises ValueError for a single row."""
    if len(batch) < 2:
        raise ValueError(f"mismatched rows need at least two examples in a batch, got {len(batch)}")
    prompts, completions = _split(batch)
    partners = _partners([batch["tokens"][prompt].tobytes() for prompt in prompts])
    tokens: list[Array] = []
    mask: list[Array] = []
    for row, prompt in enumerate(prompts):
        for completion, limit in ((completions[row], None), (completions[partners[row]], max_length)):
            tokens.append(np.concatenate([batch["tokens"][prompt], batch["tokens"][completion]])[:limit])
            mask.append(np.concatenate([batch["mask"][prompt], batch["mask"][completion]])[:limit])
    of_row = [name for name in batch.columns if COLUMNS[name].axis is Axis.ROW]
    twice = {name: np.repeat(batch[name], 2) for name in of_row}
    twice |= {"tokens": np.concatenate(tokens), "mask": np.concatenate(mask)}
    return Batch.build([len(row) for row in tokens], **twice, mismatched=np.arange(2 * len(batch)) % 2 == 1)


def _partners(prompts: list[bytes]) -> list[int]:
    """For each row the nearest one before it with another prompt; negative numbers count from the end."""
    return [
        next((row - back for back in range(1, len(prompts)) if prompts[row - back] != prompt), row - 1)
        for row, prompt in enumerate(prompts)
    ]


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

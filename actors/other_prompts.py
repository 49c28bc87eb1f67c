"""What a model says of completions behind other prompts than those that they were sampled for.

A row's column `teacher_prompt` holds the tokens that its teacher reads in the place of the row's own prompt:

    row        [own prompt     | completion]            its last `completion_tokens` tokens
    exchanged  [teacher prompt | completion]  ──► model ──► columns per token
    returned   [0 ... 0        | their values]

In a teacher prompt, `INSERT` stands for the completion of the row that the column `demonstration` names, if there is
that column, and `FILL` for nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from actors.batch import Array, Batch


@dataclass(frozen=True)
class OtherPrompts:
    """That a model is to read completions behind their teacher prompts; if it has another tokenizer than those who
    sampled them (`ours`), in its own tokens (`theirs`). Folders or hub names."""

    ours: str | None = None
    theirs: str | None = None
    trust_remote_code: bool = False


TEACHER_PROMPT = "teacher_prompt"
DEMONSTRATION = "demonstration"
INSERT, FILL = -1, -2


def exchanged(batch: Batch) -> Batch:
    """The rows with their teacher prompts in the places of their own: `tokens` and `mask`."""
    rows = [np.concatenate([prompt_of(batch, row), completion_of(batch, row)]) for row in range(len(batch))]
    lengths = [len(row) for row in rows]
    mask = np.zeros(sum(lengths), np.bool_)
    other = Batch.build(lengths, tokens=np.concatenate([np.zeros(0, np.int32), *rows]).astype(np.int32), mask=mask)
    mask[completions_of(other, batch["completion_tokens"])] = batch["mask"][completions_of(batch)]
    return other


def returned(found: Batch, batch: Batch) -> Batch:
    """What was found of the exchanged rows, at the same completions in the rows of the batch; 0 elsewhere."""
    here, there = completions_of(batch), completions_of(found, batch["completion_tokens"])
    columns: dict[str, Array] = {}
    for name, values in found.columns.items():
        columns[name] = np.zeros((batch.num_tokens, *values.shape[1:]), values.dtype)
        columns[name][here] = values[there]
    return Batch.build(batch.lengths, **columns)


def prompt_of(batch: Batch, row: int) -> Array:
    """The teacher prompt of a row, with the demonstration in its place, as far as there is one."""
    prompt = batch[TEACHER_PROMPT][row]
    prompt = prompt[prompt != FILL]
    demonstration = int(batch[DEMONSTRATION][row]) if DEMONSTRATION in batch else -1
    if demonstration < 0:
        return prompt[prompt != INSERT]
    (place,) = np.flatnonzero(prompt == INSERT)
    shown = completion_of(batch, demonstration)
    shown = shown if batch["truncated"][demonstration] else shown[:-1]  # its last token says that it ends
    return np.concatenate([prompt[:place], shown, prompt[place + 1 :]])


def completion_of(batch: Batch, row: int) -> Array:
    """The tokens of a row's completion."""
    stop = int(batch.offsets[row + 1])
    return batch["tokens"][stop - int(batch["completion_tokens"][row]) : stop]


def completions_of(batch: Batch, counts: Array | None = None) -> Array:
    """Positions of the last tokens of each row, so many of each."""
    counts = batch["completion_tokens"] if counts is None else counts
    from_end = np.repeat(batch.offsets[1:], batch.lengths) - np.arange(batch.num_tokens)
    return np.flatnonzero(from_end <= np.repeat(counts, batch.lengths))

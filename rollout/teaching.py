"""What an engine says of rows that are there: the likeliest tokens in the place of each of theirs.

Each row is a request whose prompt is the row. The engine has to sample one token more, which nobody looks at.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from actors.batch import Array, Batch
from actors.distributions import TOP_K
from actors.errors import RunError
from rollout.sampling import Completion, Request, Sampling

ONE_TOKEN = Sampling(max_tokens=1, temperature=1.0)


def requests_of(name: str, batch: Batch, top_k: int) -> list[Request]:
    """One for each row."""
    rows = (tuple(batch.row("tokens", row).tolist()) for row in range(len(batch)))
    return [Request(f"{name}/{at}", row, 1, ONE_TOKEN, seed=0, prompt_top_k=top_k) for at, row in enumerate(rows)]


def columns_of(batch: Batch, said: Sequence[Completion], into: Sequence[str], vocabulary: int | None) -> Batch:
    """The columns `into` for what `actors.distributions.TOP_K` lists, as a model in ranks writes them: values of a
    token's prediction stand at that token, and are 0 where the mask is. Raises RunError if an entry beyond the
    `vocabulary`, which stands for no token, is among the likeliest."""
    parts: dict[str, list[Array]] = {name: [] for name in TOP_K[: len(into)]}
    for row, completion in enumerate(said):
        found, mask = completion.prompt, batch.row("mask", row)
        assert found is not None, "the engine did not say what it was asked of a prompt"
        if vocabulary is not None and found.ids[mask[1:]].max(initial=0) >= vocabulary:
            raise RunError(
                f"the teacher's engine finds entry {found.ids[mask[1:]].max()} of a padded vocabulary likely, and the "
                f"tokenizer has {vocabulary} tokens; use a teacher in ranks (kind frozen), which leaves them out"
            )
        tail = np.log1p(-np.exp(found.logps.astype(np.float64)).sum(axis=1).clip(max=1.0 - 1e-12))
        each = {"topk_ids": found.ids, "topk_logps": found.logps, "tail_logps": tail[:, None], "main": found.own}
        for name, values in parts.items():
            whole = np.concatenate([np.zeros_like(each[name][:1]), each[name]])
            values.append(np.where(mask if whole.ndim == 1 else mask[:, None], whole, 0))
    dtypes = {name: np.int32 if name == "topk_ids" else np.float32 for name in parts}
    columns = {name: np.concatenate(values).astype(dtypes[name]) for name, values in parts.items()}
    return Batch.build(batch.lengths, **dict(zip(into, columns.values(), strict=True)))

"""Estimates weights of undesirable rows for data without a column of weights."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from actors.errors import DataError
from orchestrator.config.schema import DataConfig
from orchestrator.data.density_ratio import density_ratio_weights, desirable_probability
from orchestrator.data.store import Store
from orchestrator.pipeline import DataKind

DIMENSIONS = 64
_SEED = 20_240_404  # of the projection: the same rows have the same weights in every run


def weighted(store: Store) -> Store:
    """The same items; the weight of an undesirable one is the odds that its prompt belongs to a desirable one."""
    label = store.label == 1
    ratios = density_ratio_weights(desirable_probability(_embeddings(store), label))
    return replace(store, weight=np.where(label, 1.0, ratios).astype(np.float32))


def refuse_weights_of_stream(data: DataConfig, kind: DataKind) -> None:
    """Raises DataError for a stream, all rows of which would be needed for the estimate."""
    if "weight" in kind.columns and "weight" not in data.columns:
        raise DataError(
            "options.density_ratio estimates weights from all prompts, and a stream is not read to its end: "
            "leave data.streaming out, or name a column of weights: data.columns.weight=ITS_NAME"
        )


def _embeddings(store: Store) -> NDArray[np.float64]:
    """[I, D]: a random projection of each prompt's bag of tokens, normalised.

    It needs no embedding model, and prompts of different sources differ in their vocabulary."""
    vocabulary = int(store.tokens.max()) + 1
    signs = np.random.default_rng(_SEED).choice(np.array([-1, 1], np.int8), (vocabulary, DIMENSIONS))
    embedded = np.array([signs[_prompt(store, row)].sum(axis=0) for row in store.first_row[:-1].tolist()], np.float64)
    return embedded / np.maximum(np.linalg.norm(embedded, axis=1, keepdims=True), 1e-12)


def _prompt(store: Store, row: int) -> NDArray[np.int32]:
    """The tokens before the first trained one."""
    start, stop = store.offsets[row : row + 2].tolist()
    return store.tokens[start : start + int(np.argmax(store.mask[start:stop]))]

"""Weights of undesirable rows whose prompts are not like the desirable ones', for data that brings none of its own."""

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
    """The same items, each undesirable one weighed by how likely its prompt is among the desirable ones."""
    label = store.label == 1
    ratios = density_ratio_weights(desirable_probability(_embeddings(store), label))
    return replace(store, weight=np.where(label, 1.0, ratios).astype(np.float32))


def refuse_weights_of_stream(data: DataConfig, kind: DataKind) -> None:
    """Raises DataError where weights would have to be estimated from rows that were not read yet."""
    if "weight" in kind.columns and "weight" not in data.columns:
        raise DataError(
            "options.density_ratio weighs rows by how all prompts are spread, and a stream is never read to its end: "
            "leave data.streaming out, or name a column of weights: data.columns.weight=ITS_NAME"
        )


def _embeddings(store: Store) -> NDArray[np.float64]:
    """[I, D]: the tokens of each prompt without their order, projected at random and of length 1.

    No embedding model is needed for it, and prompts of different sources differ in their words."""
    vocabulary = int(store.tokens.max()) + 1
    signs = np.random.default_rng(_SEED).choice(np.array([-1, 1], np.int8), (vocabulary, DIMENSIONS))
    embedded = np.array([signs[_prompt(store, row)].sum(axis=0) for row in store.first_row[:-1].tolist()], np.float64)
    return embedded / np.maximum(np.linalg.norm(embedded, axis=1, keepdims=True), 1e-12)


def _prompt(store: Store, row: int) -> NDArray[np.int32]:
    """What stands before the first token that is learned from."""
    start, stop = store.offsets[row : row + 2].tolist()
    return store.tokens[start : start + int(np.argmax(store.mask[start:stop]))]

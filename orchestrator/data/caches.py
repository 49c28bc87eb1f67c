"""Columns that are computed once for a whole data set and cached on disk for later runs.

    ROOT/ref_logps/DATA/REST/     values.npy, opened memory-mapped, and origin.json, which says what they depend on
                   │    └── hash of everything else that the values depend on
                   └─────── fingerprint of the tokens and masks

A folder is written completely or not at all.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib.format import open_memmap
from numpy.typing import NDArray

from actors.errors import DataError

VERSION = 1  # of the values: raise it when the same weights give other values
VALUES, ORIGIN = "values.npy", "origin.json"


@dataclass(frozen=True)
class Origin:
    """Everything that the values of a per-token column depend on."""

    column: str
    data: str  # fingerprint of the tokens and masks
    weights: str  # fingerprint of the model
    dtype: str
    temperature: float

    def folder(self, root: Path) -> Path:
        rest = blake2b(repr((VERSION, self.weights, self.dtype, self.temperature)).encode(), digest_size=8).hexdigest()
        return root / self.column / self.data / rest


def any_of(root: Path, column: str, data: str) -> bool:
    """Whether that column is cached for that data, under any weights."""
    return (root / column / data).is_dir()


def load(folder: Path, tokens: int) -> NDArray[np.float32] | None:
    """[T] the values that `writing` stored, memory-mapped; None if there are none. Raises DataError for a damaged
    file."""
    if not (folder / ORIGIN).is_file():
        return None
    try:
        values: NDArray[np.float32] = np.load(folder / VALUES, mmap_mode="r")
    except (OSError, EOFError, ValueError) as error:
        raise DataError(f"{folder / VALUES} is damaged ({error}); delete {folder}, to compute them again") from None
    if values.shape != (tokens,) or values.dtype != np.float32:
        raise DataError(f"{folder / VALUES} holds {values.dtype} {values.shape} for {tokens} tokens; delete {folder}")
    return values


@contextmanager
def writing(folder: Path, origin: Origin, tokens: int) -> Iterator[NDArray[np.float32]]:
    """[T] an array to be filled inside the block. If the block raises, nothing is stored. If two processes write at the
    same time, either result is kept: they are equal."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        values: Any = open_memmap(staging / VALUES, mode="w+", dtype=np.float32, shape=(tokens,))
        yield values
        values.flush()
        (staging / ORIGIN).write_text(json.dumps({**asdict(origin), "tokens": tokens}, indent=2))
        staging.chmod(0o755)
        os.replace(staging, folder)
    except OSError:
        if not (folder / ORIGIN).is_file():
            raise
    finally:
        shutil.rmtree(staging, ignore_errors=True)

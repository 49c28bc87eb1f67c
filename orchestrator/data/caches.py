"""Columns that were computed once for a whole data set, kept on disk between runs.

    ROOT/ref_logps/DATA/REST/     values.npy, opened memory-mapped, and origin.json, which says what they are of
                   │    └── hash of everything else that the values depend on
                   └─────── fingerprint of the tokens and masks

A folder is written whole or not at all.
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

VERSION = 1  # of the numbers themselves: raise it when the same weights give others
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
    """Whether that column is kept of that data, under whichever weights."""
    return (root / column / data).is_dir()


def load(folder: Path, tokens: int) -> NDArray[np.float32] | None:
    """[T] what `writing` left there, memory-mapped; None if there is nothing. Raises DataError for a damaged file."""
    if not (folder / ORIGIN).is_file():
        return None
    try:
        values: NDArray[np.float32] = np.load(folder / VALUES, mmap_mode="r")
    except (OSError, EOFError, ValueError) as error:
        raise DataError(f"{folder / VALUES} is damaged ({error}); delete {folder}, and it is computed again") from None
    if values.shape != (tokens,) or values.dtype != np.float32:
        raise DataError(f"{folder / VALUES} holds {values.dtype} {values.shape} for {tokens} tokens; delete {folder}")
    return values


@contextmanager
def writing(folder: Path, origin: Origin, tokens: int) -> Iterator[NDArray[np.float32]]:
    """[T] to be filled inside the block. If that fails, nothing is left behind; of two processes that write at once,
    one wins, and both wrote the same."""
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

"""A rank's state on disk, for exact resumption: data, never code; a failed write says which disk and why.

save ──► only numbers, text, tensors and containers of these ──► one file
load ◄── the same; a file that holds anything else is refused before anything in it runs
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import pickle
import shutil
from collections.abc import Generator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict, cast

import torch
from torch import Tensor

from actors.errors import DiskError, RunError, TroupeError, first_lines

DATA_ONLY = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"  # torch's own switch: it holds for every `torch.load` of the process
REFUSALS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)
TORCH_WRITER = (
    "inline_container"  # the only sign in torch's message that a write failed: the name of its own source file
)


class Seal(TypedDict):
    """What a file is, in a checkpoint's manifest."""

    bytes: int
    sha256: str


def sealed(file: Path) -> Seal:
    """Puts a file on the disk, not only in its cache, and says what it holds. Raises OSError if the disk refuses."""
    sync(file)
    return Seal(bytes=file.stat().st_size, sha256=sha256(file))


def sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def sync(path: Path) -> None:
    """A file or a folder on the disk, not only in its cache. Raises OSError if the disk refuses."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def save(state: Mapping[str, Any], file: Path) -> None:
    """Write a state that `load` will read. Raises RunError now, not at the resume, if it holds anything but data, and
    DiskError if the disk refuses it."""
    if found := _not_data(state):
        raise RunError(
            f"{file.name} cannot be saved: {found}; a checkpoint holds numbers, text, tensors and containers"
        )
    with writing(file.parent):
        torch.save(dict(state), file)


def load(file: Path, device: torch.device | str = "cpu") -> dict[str, Any]:
    """The state that `save` wrote. Raises RunError for any other file; nothing in the file is executed."""
    with data_only(file.parent):
        return torch.load(file, map_location=device)


@contextlib.contextmanager
def data_only(folder: Path, allowed: Sequence[type] = ()) -> Generator[None]:
    """Within this block every `torch.load`, including those of libraries, reads only tensors, plain containers and
    objects of `allowed`. Anything else in a file is a RunError and is not executed."""
    before = os.environ.get(DATA_ONLY)
    os.environ[DATA_ONLY] = "1"
    try:
        with torch.serialization.safe_globals(list(allowed)):
            yield
    except pickle.UnpicklingError as error:
        raise RunError(
            f"{folder} holds something that is not data ({_unsupported(error)}), and a checkpoint that Troupe wrote "
            "holds nothing else: it was not loaded"
        ) from error
    finally:
        if before is None:
            del os.environ[DATA_ONLY]
        else:
            os.environ[DATA_ONLY] = before


@contextlib.contextmanager
def writing(folder: Path) -> Generator[None]:
    """What is written to a folder in the block, by whichever library: if the disk refuses it, that is a DiskError."""
    try:
        yield
    except Exception as error:
        if isinstance(error, TroupeError) or not refused_by_disk(error):
            raise
        raise DiskError(f"{folder}: {error} ({free_space(folder)})") from error


def refused_by_disk(error: Exception) -> bool:
    """Whether this is how Python, torch, safetensors, tokenizers or Arrow say that a disk is full or does not write."""
    if isinstance(error, OSError) and error.errno in REFUSALS:
        return True
    said = str(error)
    return TORCH_WRITER in said or any(os.strerror(number) in said for number in REFUSALS)


def free_space(folder: Path) -> str:
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return f"{shutil.disk_usage(folder).free / 2**20:,.0f} MiB free there"


def _not_data(value: Any, where: str = "state") -> str | None:
    """The first part of a value that is not plain data; None if there is none."""
    if value is None or type(value) in (bool, int, float, str, Tensor):
        return None
    parts: list[tuple[str, Any]]
    if type(value) is dict:
        entries = cast(dict[Any, Any], value)
        odd = [key for key in entries if type(key) not in (bool, int, float, str)]
        if odd:
            return f"a key of {where} is a {type(odd[0]).__name__}"
        parts = [(f"{where}[{key!r}]", part) for key, part in entries.items()]
    elif type(value) in (list, tuple):
        parts = [(f"{where}[{index}]", part) for index, part in enumerate(cast(Sequence[Any], value))]
    else:
        return f"{where} is a {type(value).__module__}.{type(value).__qualname__}"
    return next((found for name, part in parts if (found := _not_data(part, name))), None)


def _unsupported(error: Exception) -> str:
    """The class that torch names in its error message."""
    lines = [line.strip() for line in str(error).splitlines() if "GLOBAL" in line or "Unsupported" in line]
    return lines[0].split(". Please")[0].split(" was not an allowed")[0] if lines else first_lines(error)

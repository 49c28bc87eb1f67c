"""Checkpoints that are whole or absent.

    .tmp-* ─ ranks write, files are synced ─► MANIFEST.json (sizes, sha256) ─ synced ─► renamed to step-00000042

The rename is the commit. A process that dies before it leaves a `.tmp-*` folder, which the next write removes; a folder
whose files do not match its manifest (a disk's fault) is passed over, with a warning, for the one before it.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import re
import shutil
import uuid
import warnings
from collections.abc import Awaitable, Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from actors.errors import RunError

MANIFEST, STATE = "MANIFEST.json", "state.json"
NAME = re.compile(r"step-(\d{8})")


@dataclass(frozen=True)
class RunState:
    """Where a run stands. `step` counts in the phase, `total_step` in the run; `cursor` is at the training frontier."""

    phase: str
    phase_index: int
    step: int
    total_step: int
    version: int
    cursor: dict[str, Any]
    seed: int
    scores: dict[str, float] = field(default_factory=dict[str, float])


@dataclass(frozen=True)
class Checkpoint:
    path: Path
    state: RunState


class CheckpointStore:
    """The checkpoints of one run, in one folder that the driver and all trainer ranks see."""

    def __init__(self, folder: Path, *, keep: int) -> None:
        self.folder, self.keep = folder, keep

    async def write(self, writer: Callable[[Path], Awaitable[None]], state: RunState) -> Checkpoint:
        """Let `writer` fill a folder, then make it a checkpoint. If that fails, nothing is left behind and those
        before it are as they were. Raises RunError if the disk does not take it."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self._sweep()
        temporary = self.folder / f".tmp-{state.total_step}-{uuid.uuid4().hex[:8]}"
        temporary.mkdir()
        try:
            await writer(temporary)
            return await _to_the_end(self._commit, temporary, state)
        except OSError as error:
            raise RunError(
                f"the checkpoint of step {state.total_step} could not be written below {self.folder}: {error}; the one "
                f"before it is intact: make room, then `troupe resume`"
            ) from error
        finally:
            shutil.rmtree(temporary, ignore_errors=True)

    def latest(self) -> Checkpoint | None:
        """The newest checkpoint whose files are what its manifest says; warns about every one that it passes over."""
        for path in reversed(self._committed()):
            problem = verify(path)
            if problem is None:
                return Checkpoint(path, _read_state(path))
            warnings.warn(f"checkpoint passed over: {problem}", stacklevel=2)
        return None

    def _commit(self, temporary: Path, state: RunState) -> Checkpoint:
        (temporary / STATE).write_text(json.dumps(asdict(state), indent=2))
        files = sorted(file for file in temporary.rglob("*") if file.is_file())
        manifest = {str(file.relative_to(temporary)): _sealed(file) for file in files}
        (temporary / MANIFEST).write_text(json.dumps(manifest, indent=2))
        for path in (temporary / MANIFEST, *(p for p in temporary.rglob("*") if p.is_dir()), temporary):
            _sync(path)
        final = self.folder / f"step-{state.total_step:08d}"
        if final.exists():  # passed over when the run was resumed, or it would have been resumed from there
            shutil.rmtree(final)
        temporary.rename(final)
        _sync(self.folder)
        self._prune(final)
        return Checkpoint(final, state)

    def _prune(self, newest: Path) -> None:
        """Only the newest `keep` are left. Later steps go too: they were passed over when the run was resumed, and must
        neither count nor come up again."""
        committed = self._committed()
        upto = committed.index(newest) + 1
        for path in (*committed[: max(0, upto - self.keep)], *committed[upto:]):
            shutil.rmtree(path, ignore_errors=True)

    def _committed(self) -> list[Path]:
        if not self.folder.is_dir():
            return []
        return sorted(path for path in self.folder.iterdir() if NAME.fullmatch(path.name))

    def _sweep(self) -> None:
        for left in self.folder.glob(".tmp-*"):
            shutil.rmtree(left, ignore_errors=True)


def verify(path: Path) -> str | None:
    """What is wrong with a checkpoint; None if every file is there with the size and hash of the manifest."""
    try:
        manifest: dict[str, dict[str, Any]] = json.loads((path / MANIFEST).read_text())
        for name, sealed in manifest.items():
            file = (path / name).resolve()
            if not file.is_relative_to(path.resolve()):
                return f"{path}: the manifest names a file outside of it: {name}"
            if file.stat().st_size != sealed["bytes"] or _sha256(file) != sealed["sha256"]:
                return f"{file} is not what the manifest says"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{path}: {error}"
    return None if STATE in manifest else f"{path}: the manifest has no {STATE}"


def _read_state(path: Path) -> RunState:
    values = json.loads((path / STATE).read_text())
    try:
        return RunState(**values)
    except TypeError as error:
        raise RunError(
            f"{path / STATE} is not of this version of Troupe ({error}): resume with the one that wrote it"
        ) from error


async def _to_the_end(work: Callable[[Path, RunState], Checkpoint], temporary: Path, state: RunState) -> Checkpoint:
    """In a thread. Returns or raises only when it is over: a thread cannot be cancelled, and nothing may be taken away
    under its hands. It waits for the disk, which the system ends."""
    working = asyncio.ensure_future(asyncio.to_thread(work, temporary, state))
    try:
        return await asyncio.shield(working)
    except asyncio.CancelledError:
        await asyncio.wait({working})
        raise


def _sealed(file: Path) -> dict[str, Any]:
    _sync(file)
    return {"bytes": file.stat().st_size, "sha256": _sha256(file)}


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _sync(path: Path) -> None:
    """On the disk, not only in its cache. Raises OSError if the disk refuses."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

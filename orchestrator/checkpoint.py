"""Checkpoints that are whole or absent.

    .tmp-* ─ ranks write, sync and hash files ─► MANIFEST.json (sizes, sha256) ─ synced ─► renamed to step-00000042

The rename is the commit. A process that dies before it leaves a `.tmp-*` folder, which the next write removes; a folder
whose files do not match its manifest (damaged, missing, or not named there at all) is passed over, with a warning, for
the one before it. `model` and `bema` are outputs, and nothing is resumed from them: a file that was added there only
causes a warning.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import uuid
import warnings
from collections.abc import Awaitable, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from actors.errors import ConfigError, DiskError, RunError
from actors.saved_state import Seal, sealed, sha256, sync
from actors.worker import to_the_end

MANIFEST, STATE = "MANIFEST.json", "state.json"
MODEL, AVERAGED = "model", "bema"  # Hugging Face folders: the weights of the step, and their average
ADAPTER = "adapter"  # the adapters alone, beside the model that they are merged in; of the average, `bema-adapter`
READERS = 8  # files that are read at once when a checkpoint is verified
NAME = re.compile(r"step-(\d{8})")


@dataclass(frozen=True)
class RunState:
    """Where a run stands, and what it was trained with. `step` counts in the phase, `total_step` in the run; `cursor`
    is at the training frontier of the phase's data, whose rows have the fingerprint `data`."""

    phase: str
    phase_index: int
    step: int
    total_step: int
    version: int
    cursor: dict[str, Any]
    config: dict[str, Any]  # a RunConfig as JSON
    data: str
    scores: dict[str, float] = field(default_factory=dict[str, float])


@dataclass(frozen=True)
class Checkpoint:
    path: Path
    state: RunState


class CheckpointStore:
    """The checkpoints of one run, in one folder that the driver and all trainer ranks see."""

    def __init__(self, folder: Path, *, keep: int) -> None:
        self.folder, self.keep = folder, keep

    async def write(self, writer: Callable[[Path], Awaitable[Mapping[str, Seal]]], state: RunState) -> Checkpoint:
        """Let `writer` fill a folder, then make it a checkpoint. It returns the seals of files that are on the disk
        already; the others are synced and hashed here. If that fails, nothing is left behind and those before it are as
        they were. Raises DiskError if the disk does not take it."""
        temporary = self.folder / f".tmp-{state.total_step}-{uuid.uuid4().hex[:8]}"
        try:
            await to_the_end(self._sweep)
            await to_the_end(partial(temporary.mkdir, parents=True))
            written = await writer(temporary)
            return await to_the_end(partial(self._commit, temporary, state, written))
        except (OSError, DiskError) as error:
            raise DiskError(
                f"the checkpoint of step {state.total_step} could not be written below {self.folder}: {error}; the one "
                f"before it is intact: make room, then `troupe resume`"
            ) from error
        finally:
            await to_the_end(partial(shutil.rmtree, temporary, ignore_errors=True))

    def latest(self) -> Checkpoint | None:
        """The newest checkpoint whose files are what its manifest says; warns about every one that it passes over.
        Reads all of its files: not for an event loop."""
        for path in reversed(self._committed()):
            problem = verify(path)
            if problem is None:
                return _opened(path)
            warnings.warn(f"checkpoint passed over: {problem}", stacklevel=2)
        return None

    def at(self, step: int) -> Checkpoint:
        """The checkpoint of that step of the run. Raises ConfigError if there is none, or if it is damaged. Reads all
        of its files: not for an event loop."""
        path = self.folder / f"step-{step:08d}"
        if path not in self._committed():
            steps = ", ".join(str(int(each.name.removeprefix("step-"))) for each in self._committed()) or "none"
            raise ConfigError(f"{self.folder} holds no checkpoint of step {step}; there are: {steps}")
        if problem := verify(path):
            raise ConfigError(f"the checkpoint of step {step} cannot be used: {problem}")
        return _opened(path)

    def give_up_after(self, chosen: Checkpoint) -> None:
        """Remove the checkpoints of later steps: the run goes on from this one, and must not come back to them if it
        ends before its next. All are renamed before a file is deleted, so none is left in part under a valid name."""
        later = [path for path in self._committed() if path.name > chosen.path.name]
        given_up = [path.rename(path.with_name(f".tmp-{path.name}-{uuid.uuid4().hex[:8]}")) for path in reversed(later)]
        if given_up:
            sync(self.folder)
        for path in given_up:
            shutil.rmtree(path, ignore_errors=True)  # what is left of it, the next write removes

    def _commit(self, temporary: Path, state: RunState, written: Mapping[str, Seal]) -> Checkpoint:
        (temporary / STATE).write_text(json.dumps(asdict(state), indent=2))
        files = {str(file.relative_to(temporary)): file for file in temporary.rglob("*") if file.is_file()}
        for name, seal in written.items():
            if name not in files or files[name].stat().st_size != seal["bytes"]:
                raise OSError(f"{name}, {seal['bytes']} bytes by its writer, is not there for the driver")
        manifest = {name: written.get(name) or sealed(files[name]) for name in sorted(files)}
        (temporary / MANIFEST).write_text(json.dumps(manifest, indent=2))
        for path in (temporary / MANIFEST, *(p for p in temporary.rglob("*") if p.is_dir()), temporary):
            sync(path)
        final = self.folder / f"step-{state.total_step:08d}"
        if final.exists():  # the run was resumed from one before it
            shutil.rmtree(final)
        temporary.rename(final)
        sync(self.folder)
        self._prune(final)
        return Checkpoint(final, state)

    def _prune(self, newest: Path) -> None:
        """Only the newest `keep` are left. Later steps go too: they were damaged, the run was resumed from one before
        them, and they must neither count nor come up again."""
        committed = self._committed()
        upto = committed.index(newest) + 1
        for path in (*committed[: max(0, upto - self.keep)], *committed[upto:]):
            shutil.rmtree(path, ignore_errors=True)

    def _committed(self) -> list[Path]:
        if not self.folder.is_dir():
            return []
        return sorted(path for path in self.folder.iterdir() if NAME.fullmatch(path.name))

    def _sweep(self) -> None:
        """Remove what a process left behind that died: the run's lock says that none is writing now."""
        for left in self.folder.glob(".tmp-*"):
            shutil.rmtree(left, ignore_errors=True)


def verify(path: Path) -> str | None:
    """What is wrong with a checkpoint; None if every file is there with the size and hash of the manifest, and no other
    file stands where something is resumed from."""
    try:
        manifest: dict[str, dict[str, Any]] = json.loads((path / MANIFEST).read_text())
        for name in manifest:
            if not (path / name).resolve().is_relative_to(path.resolve()):
                return f"{path}: the manifest names a file outside of it: {name}"
        with ThreadPoolExecutor(READERS) as readers:  # hashing leaves the interpreter to others
            as_said = readers.map(lambda name: _is_as_said((path / name).resolve(), manifest[name]), manifest)
            for name, whole in zip(manifest, as_said, strict=True):
                if not whole:
                    return f"{(path / name).resolve()} is not what the manifest says"
        foreign = [name for name in _unnamed(path, manifest) if Path(name).parts[0] not in (MODEL, AVERAGED)]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{path}: {error}"
    if foreign:
        return f"{path} holds files that its manifest does not name: {_listed(foreign)}; take them away to use it"
    return None if STATE in manifest else f"{path}: the manifest has no {STATE}"


def _is_as_said(file: Path, seal: dict[str, Any]) -> bool:
    return file.stat().st_size == seal["bytes"] and sha256(file) == seal["sha256"]


def _opened(path: Path) -> Checkpoint:
    """A checkpoint that was verified."""
    foreign = _unnamed(path, json.loads((path / MANIFEST).read_text()))
    if foreign:
        warnings.warn(f"{path} holds files that the run did not write: {_listed(foreign)}", stacklevel=3)
    return Checkpoint(path, _read_state(path))


def _unnamed(path: Path, manifest: dict[str, Any]) -> list[str]:
    """Files, and links of any kind, that the manifest does not name, relative to the folder."""
    found: list[str] = []
    for folder, folders, files in os.walk(path):
        links = [name for name in folders if os.path.islink(os.path.join(folder, name))]
        found += [os.path.relpath(os.path.join(folder, name), path) for name in (*files, *links)]
    return sorted(set(found) - manifest.keys() - {MANIFEST})


def _listed(names: list[str], shown: int = 5) -> str:
    return ", ".join(names[:shown]) + (f" and {len(names) - shown} more" if len(names) > shown else "")


def _read_state(path: Path) -> RunState:
    values = json.loads((path / STATE).read_text())
    try:
        return RunState(**values)
    except TypeError as error:
        raise RunError(
            f"{path / STATE} is not of this version of Troupe ({error}): resume with the one that wrote it"
        ) from error

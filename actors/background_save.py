"""A rank's part of a checkpoint, copied while training goes on and written by a thread.

    begin ──► copying: reads the live tensors into the host's memory ──► writing: files, on the disk, hashed ──► result
                  │                                                        reads the copies alone
                  └─ training goes on up to what changes the tensors: `wait_copied` stands before the optimizer's step

The forward and backward pass of the next step change no weight and no moment, so the copy is that of the step at which
the save began, and the pass hides it. On a GPU the copy runs in a stream of its own, to pinned memory.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Generator, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from torch import Tensor

from actors import saved_state
from actors.errors import RunError

COPY_TIMEOUT_S = 600.0
WRITERS_NICE = 19  # the thread that writes gives way to the threads that compute


@dataclass(frozen=True)
class StateFile:
    """What `torch.save` shall write; its tensors are the live ones. `plain`: it must hold nothing but data."""

    name: str
    content: dict[str, Any]
    plain: bool = True


class Piece(Protocol):
    """Some files of a checkpoint: first `copy`, while nothing changes what it reads, then `write`."""

    def copy(self) -> None: ...

    def write(self) -> list[Path]:
        """The files that it has written."""
        ...


class StatePiece:
    """The state of a rank. `check` reads the live tensors and raises if they must not be saved."""

    def __init__(self, folder: Path, files: Sequence[StateFile], check: Callable[[], None]) -> None:
        self._folder, self._files, self._check = folder, files, check
        self._copies: list[StateFile] = []

    def copy(self) -> None:
        self._check()
        memo: dict[int, Tensor] = {}
        self._copies = [StateFile(each.name, on_host(each.content, memo), each.plain) for each in self._files]

    def write(self) -> list[Path]:
        files = [self._folder / each.name for each in self._copies]
        for each, file in zip(self._copies, files, strict=True):
            file.parent.mkdir(parents=True, exist_ok=True)
            if each.plain:
                saved_state.save(each.content, file)
            else:
                torch.save(each.content, file)
        self._copies = []
        return files


class BackgroundSave:
    """One save of a rank below `folder`. Training may go on at once, up to `wait_copied`. `copied`: pieces whose copy
    was made already, on the device's current stream."""

    def __init__(
        self, name: str, folder: Path, pieces: Sequence[Piece], device: torch.device, *, copied: Sequence[Piece] = ()
    ) -> None:
        self.name = name
        self._folder, self._pieces, self._made, self._device = folder, pieces, copied, device
        self._copied, self._ended = threading.Event(), threading.Event()
        self._error: BaseException | None = None
        self._sealed: dict[str, saved_state.Seal] = {}
        self._ready = torch.cuda.current_stream(device).record_event() if device.type == "cuda" else None
        threading.Thread(target=self._run, name=f"{name} saves", daemon=True).start()

    def wait_copied(self) -> None:
        """Returns when the tensors may change. Whether the copy succeeded is said by `result`."""
        if not self._copied.wait(COPY_TIMEOUT_S):
            raise RunError(f"{self.name}: the copy of its state was not ready within {COPY_TIMEOUT_S:g} s")

    def result(self, timeout_s: float) -> dict[str, saved_state.Seal]:
        """What was written, by its path below the folder. Waits for the disk. Raises what went wrong."""
        if not self._ended.wait(timeout_s):
            raise RunError(f"{self.name}: its part of {self._folder} was not written within {timeout_s:g} s")
        if self._error is not None:
            raise self._error
        return self._sealed

    def _run(self) -> None:
        try:
            try:
                with torch.no_grad(), self._copying():
                    for piece in self._pieces:
                        piece.copy()
            finally:
                self._copied.set()
            _give_way()
            with saved_state.writing(self._folder):
                files = [file for piece in (*self._made, *self._pieces) for file in piece.write()]
                self._sealed = {str(file.relative_to(self._folder)): saved_state.sealed(file) for file in files}
        except BaseException as error:  # of this thread: raised where `result` is asked for
            self._error = error
        finally:
            self._pieces = self._made = ()  # the copies
            self._ended.set()

    @contextlib.contextmanager
    def _copying(self) -> Generator[None]:
        """In a stream of its own, after what the device had to do when the save began."""
        if self._ready is None:
            yield
            return
        stream = torch.cuda.Stream(self._device)
        stream.wait_event(self._ready)
        with torch.cuda.stream(stream):
            yield
        stream.synchronize()


def on_host(value: Any, memo: dict[int, Tensor] | None = None) -> Any:
    """A copy that nothing else refers to, tensors in the host's memory; a tensor that occurs twice is copied once."""
    memo = {} if memo is None else memo
    if isinstance(value, Tensor):
        if id(value) not in memo:
            memo[id(value)] = host_copy(value)
        return memo[id(value)]
    if type(value) in (dict, OrderedDict):
        entries = cast(dict[Any, Any], value)
        return type(value)((key, on_host(entry, memo)) for key, entry in entries.items())
    if type(value) in (list, tuple):
        return type(value)(on_host(entry, memo) for entry in value)
    return deepcopy(value)


def host_copy(tensor: Tensor) -> Tensor:
    """A dense copy in the host's memory. Of a GPU's tensor it is ready when the current stream is."""
    tensor = tensor.detach()
    on_gpu = tensor.device.type == "cuda"
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=on_gpu)
    return host.copy_(tensor, non_blocking=on_gpu)


def _give_way() -> None:
    """Lowers the priority of this thread, and not of the process: training comes first."""
    with contextlib.suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), WRITERS_NICE)

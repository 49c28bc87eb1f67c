"""Buckets between two processes that share one GPU: CUDA IPC. NCCL refuses two ranks on one GPU, gloo would copy every
byte to the host and back.

    sender (rank 0)                          store of the link                   receiver (rank 1)
    fill bucket i, wait for the GPU
    offer its memory                 ─────►  bucket/i = handle, offsets  ─────►  map the memory, copy it on the GPU
    wait: the buffer may be refilled ◄─────  taken/i                     ◄─────  wait for the copy

Numbers count on through the orders that use the link. The receiver deletes `bucket/i` and the sender deletes `taken/i`,
so the store does not grow.

Who ends a wait: the other side; a deadline; `leave` on either side (`left/RANK` in the store); the end of the other
side's process, looked up every 50 ms; the end of the store, which is in the trainer's process. All but the first raise
RuntimeError."""

from __future__ import annotations

import base64
import json
import os
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.distributed import PrefixStore  # pyright: ignore[reportPrivateImportUsage]

from actors.errors import first_lines

POLL_S = (0.0002, 0.002)  # at first, and in a long wait, as for the first bucket of an order
LOOK_S = 0.05  # between two looks at the other side's process
PEERS = {0: "the receiver", 1: "the sender"}  # of a rank: the other side
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")  # which host this is
REMEDY = "if this is not a passing fault, set weights.transport=object_store"
# Of the counter with which torch keeps memory that it has shared: a name that does not exist, see `CudaMemory`.
NO_COUNTER = b"/troupe-counts-nothing"


class Memory(Protocol):
    """How one process lets another read a bucket. `offer` and `fetch` return when the GPU is done."""

    def offer(self, flat: Tensor) -> str: ...

    def fetch(self, offer: str, into: Tensor) -> None: ...

    def forget(self) -> None:
        """Drops what `offer` and `fetch` keep for the next bucket in the same buffer."""
        ...

    def close(self) -> None: ...


class CudaMemory:
    """CUDA IPC by torch's own `_share_cuda_` and `_new_shared_cuda`, from which two things are left out.

    Torch's count of readers: torch keeps shared memory allocated until its reader has dropped it, so a reader that is
    killed would keep the sender's buffers allocated for good. Here `taken/i` says when a buffer may be reused. So the
    count is taken back as soon as it is made, and the reader is given the name of no counter; torch ignores a counter
    that it cannot find, as after the end of the process that shared. (The count is unsigned: were both sides to take
    it back, the memory would never be freed.)

    Torch's event: `offer` waits for the GPU, and torch never destroys the events that a reader opens.

    With `expandable_segments`, which ranks on GPUs use, torch makes a handle of another kind; the tests pass with it,
    too."""

    def __init__(self) -> None:
        self._offered: dict[tuple[int, int], list[Any]] = {}  # by address and size of the buffer
        self._opened: dict[tuple[bytes, int, int], torch.UntypedStorage] = {}
        self._used = False

    def offer(self, flat: Tensor) -> str:
        """What the reader needs: handle of the allocation, the buffer's bytes and offset in it, the bucket's offset in
        the buffer. The device is not among it: both sides number the same GPU in their own way."""
        torch.cuda.current_stream(flat.device).synchronize()
        if flat.numel() == 0:  # memory of no bytes has no handle
            return ""
        storage = flat.untyped_storage()
        key = storage.data_ptr(), storage.nbytes()
        if key not in self._offered:
            self._used = True
            _, handle, nbytes, offset, counter, position, _, _ = storage._share_cuda_()
            torch.UntypedStorage._release_ipc_counter_cuda(counter, position)
            self._offered[key] = [base64.b64encode(handle).decode(), nbytes, offset]
        return json.dumps([*self._offered[key], flat.storage_offset() * flat.element_size()])

    def fetch(self, offer: str, into: Tensor) -> None:
        if offer:
            encoded, nbytes, offset, start = json.loads(offer)
            key = base64.b64decode(encoded), int(nbytes), int(offset)
            buffer = torch.empty(0, dtype=into.dtype, device=into.device)
            storage: Any = self._open(*key, into.device)  # the stubs know no untyped storage here
            buffer.set_(storage, start // into.element_size(), into.shape, into.stride())
            into.copy_(buffer)
            torch.cuda.current_stream(into.device).synchronize()

    def _open(self, handle: bytes, nbytes: int, offset: int, device: torch.device) -> torch.UntypedStorage:
        key = handle, nbytes, offset
        if key not in self._opened:
            self._used = True
            self._opened[key] = torch.UntypedStorage._new_shared_cuda(
                device.index, handle, nbytes, offset, NO_COUNTER, 0, b"", False
            )
        return self._opened[key]

    def forget(self) -> None:
        self._offered.clear()
        self._opened.clear()

    def close(self) -> None:
        self.forget()
        if self._used:
            torch.cuda.ipc_collect()


def describe_process(pid: int | None = None) -> str:
    """A process of this process's pid namespace, by default this one: its id, and where that is an id."""
    return f"{os.getpid() if pid is None else pid} {_where()}"


def has_ended(process: str) -> bool:
    """Whether a process (see `describe_process`) is gone or a zombie. False where its id is another host's or another
    namespace's, and cannot be looked up here: then a deadline ends the wait."""
    pid, _, where = process.partition(" ")
    if where != _where():
        return False
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in ("Z", "X")
    except (FileNotFoundError, ProcessLookupError):
        return not _accepts_signals(int(pid))


@cache
def _where() -> str:
    """This process's pid namespace. Its number alone would not do: the first namespace has the same on every host."""
    return f"{os.readlink('/proc/self/ns/pid')} {BOOT_ID.read_text().strip()}"


def _accepts_signals(pid: int) -> bool:
    """/proc may be mounted such that it hides the processes of other users."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


@dataclass(frozen=True)
class Handover:
    """One bucket under way."""

    finish: Callable[[timedelta, float], None]  # within that time from that moment of the monotonic clock
    default: timedelta

    def wait(self, timeout: timedelta | None = None, began: float | None = None) -> None:
        """Trainer: until the bucket's memory may be reused. Engine: until the bucket is in its own memory. Raises
        RuntimeError, see the top of the file. `began`: when the timeout began; None: now."""
        self.finish(self.default if timeout is None else timeout, time.monotonic() if began is None else began)


class SameGpu:
    """One side of two. Both call `broadcast` in the same order, and `wait` in that order, too."""

    def __init__(
        self,
        store: PrefixStore,
        rank: int,
        device: torch.device,
        timeout: timedelta,
        *,
        peer: str,
        memory: Memory | None = None,
    ) -> None:
        """`peer`: the process of the other side, whose end ends the waits of this one, as `describe_process` says
        it."""
        self.device, self.timeout = device, timeout
        self._store, self._rank, self._memory = store, rank, memory or CudaMemory()
        self._next, self._pending = 0, 0
        self._left = threading.Event()
        self._peer_process, self._looked = peer, 0.0

    def broadcast(self, flat: Tensor) -> Handover:
        """`flat` is sent from rank 0, where it must not change before the `wait`, and received at rank 1."""
        index = self._next
        self._next += 1
        self._pending += 1
        if self._rank == 1:
            return Handover(lambda timeout, began: self._take(index, flat, timeout, began), self.timeout)
        try:
            self._store.set(f"bucket/{index}", self._memory.offer(flat))
        except RuntimeError as error:  # raised in `wait`, where it fails this group and not the other ones
            refused = (
                f"bucket {index} could not be offered to the receiver on the same GPU: {first_lines(error)}; {REMEDY}"
            )
            return Handover(lambda *_: _fail(refused), self.timeout)
        return Handover(lambda timeout, began: self._landed(index, timeout, began), self.timeout)

    def _landed(self, index: int, timeout: timedelta, began: float) -> None:
        key = f"taken/{index}"
        self._await(key, f"the receiver did not take bucket {index}", timeout, began)
        self._store.delete_key(key)
        self._done()

    def _take(self, index: int, flat: Tensor, timeout: timedelta, began: float) -> None:
        key = f"bucket/{index}"
        self._await(key, f"the sender did not send bucket {index}", timeout, began)
        self._check_sender(index)
        offer = self._store.get(key).decode()
        try:
            self._memory.fetch(offer, flat)
        except RuntimeError as error:
            why = f"bucket {index} of the sender on the same GPU could not be read: {first_lines(error)}; {REMEDY}"
            raise RuntimeError(why) from None
        self._check_sender(index)  # from when it leaves it may refill the buffer: then this may be half of another
        self._store.delete_key(key)
        self._done()  # first: the sender may free its buffers when the last one is taken
        self._store.set(f"taken/{index}", "")

    def _check_sender(self, index: int) -> None:
        if self._store.check(["left/0"]):
            raise RuntimeError(f"the sender left before bucket {index} was taken")

    def _done(self) -> None:
        """Buffers are reused within an order, and freed after it: the last of its buckets is when none is pending."""
        self._pending -= 1
        if self._pending == 0:
            self._memory.forget()

    def _await(self, key: str, otherwise: str, timeout: timedelta, began: float) -> None:
        """Until the other side has set the key. All links of a process share one connection to the store, so it is
        polled instead of waited on."""
        deadline, (pause, longest) = began + timeout.total_seconds(), POLL_S
        while True:
            over = self._why_over(deadline, timeout)
            if self._store.check([key]):  # after the look: what the other side did before it left, counts
                return
            if over:
                raise RuntimeError(f"{otherwise}: {over}")
            time.sleep(pause)
            pause = min(pause * 1.1, longest)

    def _why_over(self, deadline: float, timeout: timedelta) -> str:
        """Why the other side will not come any more; empty: it may."""
        peer = PEERS[self._rank]
        if self._left.is_set():
            return "this side has left"
        if self._store.check([f"left/{1 - self._rank}"]):
            return f"{peer} has left"
        if self._peer_has_ended():
            return f"the process of {peer} (pid {self._peer_process.partition(' ')[0]}) has ended"
        if time.monotonic() >= deadline:
            return f"waited for {timeout.total_seconds():g} s"
        return ""

    def _peer_has_ended(self) -> bool:
        if time.monotonic() - self._looked < LOOK_S:
            return False
        self._looked = time.monotonic()
        return has_ended(self._peer_process)

    def leave(self) -> None:
        """A pending `wait` of either side raises. What this side has offered or opened is dropped."""
        self._left.set()
        with suppress(RuntimeError):  # the store is gone with the trainer: the other side needs no word
            self._store.set(f"left/{self._rank}", "")
            # `set` does not wait for the store, `check` does. A receiver that does not see the key yet would accept
            # a bucket whose memory the sender has begun to refill.
            self._store.check([f"left/{self._rank}"])
        self._memory.close()


def _fail(why: str) -> None:
    raise RuntimeError(why)

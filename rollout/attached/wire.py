"""What a run and an attached engine say to each other: values as bytes, without pickle.

    8 bytes: length of the header │ header: JSON │ arrays, one after the other

Only the classes of `KNOWN` can be made on the other side, so whoever holds the token of an engine can make it sample,
and cannot make it run code.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import fields
from typing import Any, cast

import numpy as np

from actors.batch import Batch
from actors.errors import DataFailure, InfraFailure, RunError
from actors.worker import WorkerInfo
from rollout.engine import EngineSpec
from rollout.sampling import Finish, GroupMeta, Request, Sampling
from rollout.weights.protocol import Ack, Manifest, SyncOrder, TensorMeta

CLASSES = (Ack, Batch, EngineSpec, GroupMeta, Manifest, Request, Sampling, SyncOrder, TensorMeta, WorkerInfo)
KNOWN: dict[str, type] = {each.__name__: each for each in CLASSES}
PROTOCOL = 2  # of the messages; both sides must have the same
SESSION = "X-Troupe-Session"  # header: which run an engine is attached to
LENGTH_BYTES = 8
KINDS: dict[str, type[RunError]] = {"data": DataFailure, "infra": InfraFailure}  # of failures, as they are told
PLAIN = (str, int, float, bool, type(None))


class Malformed(ValueError):
    """These bytes are no message."""


def encode(value: Any) -> list[bytes | memoryview]:
    """The parts of a message; arrays are not copied unless they have gaps. Raises TypeError for what cannot be said."""
    arrays: list[np.ndarray] = []
    header = json.dumps(_said(value, arrays)).encode()
    parts: list[bytes | memoryview] = [len(header).to_bytes(LENGTH_BYTES, "little"), header]
    flat: list[Any] = [array.reshape(-1).view(np.uint8) for array in arrays if array.nbytes]
    return [*parts, *map(memoryview, flat)]


def decode(message: bytes | bytearray | memoryview) -> Any:
    """Its arrays are views of the message. Raises Malformed."""
    view = memoryview(message)
    start = LENGTH_BYTES + int.from_bytes(view[:LENGTH_BYTES], "little")
    if len(view) < start:
        raise Malformed("the message is cut off")
    try:
        value, end = _Reader(view).read(json.loads(bytes(view[LENGTH_BYTES:start])), start)
    except (KeyError, TypeError, AttributeError, IndexError, ValueError) as error:
        raise Malformed(f"{type(error).__name__}: {error}") from None
    if end != len(view):
        raise Malformed(f"{len(view)} bytes, of which {end} are said to be something")
    return value


def _said(value: Any, arrays: list[np.ndarray]) -> Any:
    """The value in JSON; its arrays are appended to `arrays`."""
    if isinstance(value, Finish):
        return {"finish": value.value}
    if isinstance(value, PLAIN):
        return value
    if isinstance(value, DataFailure | InfraFailure):  # of one request of several
        return {"failed": "data" if isinstance(value, DataFailure) else "infra", "why": str(value)}
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.ndarray):
        if value.dtype.hasobject:
            raise TypeError("an array of objects cannot be sent")
        arrays.append(np.ascontiguousarray(value))
        return {"array": value.dtype.str, "shape": list(value.shape)}
    if isinstance(value, list | tuple):
        kind = "list" if isinstance(value, list) else "tuple"
        return {kind: [_said(each, arrays) for each in cast("Sequence[Any]", value)]}
    if isinstance(value, dict):
        items = cast("dict[Any, Any]", value).items()
        return {"map": [[_said(key, arrays), _said(each, arrays)] for key, each in items]}
    name = type(value).__name__
    if KNOWN.get(name) is not type(value):
        raise TypeError(f"a {name} cannot be sent")
    return {"class": name, "fields": [_said(getattr(value, each.name), arrays) for each in fields(value)]}


class _Reader:
    def __init__(self, view: memoryview) -> None:
        self._view = view

    def read(self, said: Any, at: int) -> tuple[Any, int]:
        """(the value, where its last array ends). `at`: where its first one begins."""
        if isinstance(said, PLAIN):
            return said, at
        if "finish" in said:
            return Finish(said["finish"]), at
        if "failed" in said:
            return KINDS[said["failed"]](str(said["why"])), at
        if "array" in said:
            return self._array(np.dtype(said["array"]), [int(each) for each in said["shape"]], at)
        if "map" in said:
            flat, at = self._all([each for pair in said["map"] for each in pair], at)
            return dict(zip(flat[::2], flat[1::2], strict=True)), at
        if "class" in said:
            values, at = self._all(said["fields"], at)
            kind = KNOWN[said["class"]]
            return kind(**dict(zip([each.name for each in fields(kind)], values, strict=True))), at
        kind = "list" if "list" in said else "tuple"
        values, at = self._all(said[kind], at)
        return (values if kind == "list" else tuple(values)), at

    def _all(self, said: Sequence[Any], at: int) -> tuple[list[Any], int]:
        values: list[Any] = []
        for each in said:
            value, at = self.read(each, at)
            values.append(value)
        return values, at

    def _array(self, dtype: np.dtype[Any], shape: list[int], at: int) -> tuple[np.ndarray, int]:
        if dtype.hasobject or min(shape, default=0) < 0:
            raise ValueError(f"no array can be made of {dtype} {shape}")
        end = at + dtype.itemsize * int(np.prod(shape, dtype=object))
        if end > len(self._view):
            raise ValueError("an array is cut off")
        return np.frombuffer(self._view[at:end], dtype).reshape(shape), end

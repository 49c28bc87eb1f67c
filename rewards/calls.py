"""The samples of a prompt as one reward is given them, and its answer, checked.

Each reward is given copies of its own and a log of its own: what one does to them reaches no other.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np

from actors.batch import Array
from actors.errors import DataFailure, InfraFailure
from rewards.judging import Cases, as_text
from rewards.reward import AttemptFailed, FailureKind, Reward

Prompt = str | list[dict[str, Any]]
Conversation = list[dict[str, Any]]


@dataclass(frozen=True)
class TrainerState:
    """What a reward may know about the training: the version of the weights that sampled, in optimizer steps."""

    global_step: int


class Log:
    """What one function logs: a number for the run's metrics, a column beside the completions."""

    def __init__(self, count: int) -> None:
        self._count = count
        self.metrics: dict[str, float] = {}
        self.extra: dict[str, tuple[Any, ...]] = {}

    def log_extra(self, column: str, values: Sequence[Any]) -> None:
        if len(values) != self._count:
            raise ValueError(f"log_extra({column!r}, ...) needs {self._count} values, got {len(values)}")
        self.extra[str(column)] = tuple(map(plain, values))

    def log_metric(self, name: str, value: float) -> None:
        self.metrics[str(name)] = float(value)


def plain(value: Any) -> Any:
    """A value that any process can read: the driver need not have the packages that a function uses."""
    if isinstance(value, str):
        return str(value)
    if value is None or isinstance(value, bool | int | float):
        return value
    if isinstance(value, Mapping):
        return {str(key): plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [plain(part) for part in value]
    if hasattr(value, "tolist"):  # arrays, tensors and their scalars
        return value.tolist()
    return str(value)


def merged(logs: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """What all functions logged, in their order. A name that an earlier one used gets that of its function first."""
    merged: dict[str, Any] = {}
    for function, log in logs.items():
        merged |= {(f"{function}/{name}" if name in merged else name): value for name, value in log.items()}
    return merged


class Samples:
    """`n` samples: their prompts, texts and tokens, and the columns that the data set has beside the prompts."""

    def __init__(
        self,
        prompts: Sequence[Prompt],
        texts: Sequence[str],
        ids: list[list[int]],
        columns: Mapping[str, Sequence[Any]],
        state: TrainerState,
        conversations: Sequence[Conversation] | None = None,
    ) -> None:
        """`conversations`: what was said after each prompt, where samples are episodes; they are the completions."""
        self._count, self._state = len(texts), state
        self.texts = tuple(texts)
        self._columns, self._prompts = columns, prompts
        self._given: dict[str, Sequence[Any]] = {
            **columns,
            "prompts": prompts,
            "completions": conversations or list(map(_as_prompt, prompts, texts)),
            "completion_ids": ids,
        }

    def __len__(self) -> int:
        return self._count

    @property
    def cases(self) -> Cases:
        """As a judge reads them."""
        return Cases([as_text(prompt) for prompt in self._prompts], self.texts, self._columns)

    async def awaited(self, reward: Reward) -> tuple[Array, Log]:
        """[n] float32 of an async reward, NaN for None; and what it logged. Raises AttemptFailed."""
        log = Log(self._count)
        with _failures_of(reward.name):
            return _checked(await reward.call(**self._arguments(reward, log)), self._count), log

    def called(self, reward: Reward) -> tuple[Array, Log]:
        """The same of a sync one, in a thread. What is raised must be caught in it: a future cannot carry every
        exception to the loop (a StopIteration would leave the loop waiting for ever, a SystemExit would end it)."""
        log = Log(self._count)
        with _failures_of(reward.name):
            return _checked(reward.call(**self._arguments(reward, log)), self._count), log

    def _arguments(self, reward: Reward, log: Log) -> dict[str, Any]:
        offered = {"trainer_state": self._state, "log_extra": log.log_extra, "log_metric": log.log_metric}
        copies = {name: list(map(deepcopy, rows)) for name, rows in self._given.items() if reward.wants(name)}
        return {**copies, **{name: value for name, value in offered.items() if reward.wants(name)}}


def _as_prompt(prompt: Prompt, text: str) -> str | Conversation:
    """A completion in its prompt's form: text for text, a message for messages."""
    return text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]


@contextmanager
def _failures_of(name: str) -> Iterator[None]:
    """Turns any exception of a reward into an AttemptFailed with the reward's name. The message alone goes on: not
    every process can unpickle every exception."""
    try:
        yield
    except AttemptFailed as error:
        raise AttemptFailed(error.kind, f"reward {name}: {error}", error.retry_after_s) from None
    except InfraFailure as error:
        raise AttemptFailed(FailureKind.UNREACHABLE, f"reward {name}: {error}") from None
    except DataFailure as error:
        raise AttemptFailed(FailureKind.RAISED, f"reward {name}: {error}") from None
    except (KeyboardInterrupt, GeneratorExit):
        raise
    except asyncio.CancelledError:
        if _is_cancelled():
            raise
        raise AttemptFailed(FailureKind.RAISED, f"reward {name} raised CancelledError") from None
    except BaseException as error:  # SystemExit, too: a function does not end the process that others share
        raise AttemptFailed(FailureKind.RAISED, f"reward {name} raised {type(error).__name__}: {error}") from None


def _is_cancelled() -> bool:
    """Whether it is the call that was cancelled, and not something inside the function."""
    try:
        task = asyncio.current_task()
    except RuntimeError:  # in a thread
        return False
    return task is not None and task.cancelling() > 0


def _checked(result: Any, count: int) -> Array:
    """[n] float32. Raises AttemptFailed unless the result is a sequence of `count` finite numbers or Nones."""
    wanted = f"must return a list of {count} numbers or None"
    if isinstance(result, Mapping | Set | str | bytes):  # these iterate, too: over keys, in any order, over characters
        raise _invalid(f"{wanted}, in the order of the completions; it returned a {type(result).__name__}")
    try:
        found = list(islice(result, count + 1))
        values = np.array([_number(value) for value in found], np.float64)
    except (TypeError, ValueError, OverflowError) as error:
        raise _invalid(f"{wanted}: {error}") from None
    if len(found) != count:
        raise _invalid(f"returned {len(found) if len(found) < count else 'more'} rewards for {count} completions")
    nan = [row for row, value in enumerate(found) if value is not None and np.isnan(values[row])]
    if nan:
        raise _invalid(f"returned NaN for completion {nan[0]}; None says that it has no opinion")
    if (np.abs(values) > np.finfo(np.float32).max).any():
        raise _invalid("returned an infinite reward")
    return values.astype(np.float32)


def _number(value: Any) -> float:
    if isinstance(value, str | bytes):
        raise TypeError(f"{value!r} is text")
    return np.nan if value is None else float(value)


def _invalid(why: str) -> AttemptFailed:
    return AttemptFailed(FailureKind.INVALID, why)

"""The errors of Troupe, as a tree.

TroupeError
├── UserError          the user can fix it: a few lines, exit code 2, no traceback
│   ├── ConfigError        a key, a value, a method's option
│   ├── DataError          a data set or a row
│   ├── ModelError         a model folder or a tokenizer
│   └── PlacementError     the cluster lacks what the plan needs
├── Interrupted        a signal ended a run, which shut down cleanly
└── RunError           something broke during a run
    ├── NotDone            a run or a service did not do what it was asked for; the run itself need not have failed
    ├── DiskError          a disk is full or not writable
    ├── InfraFailure       an actor, an engine or a wait died: retry elsewhere, bounded
    │   ├── BlockLost          a value in the object store is gone: make it again, bounded
    │   └── NoAnswer           a worker died, is out of reach, or passed its deadline
    │       └── WorkerDied         it died
    ├── DataFailure        this sample always fails: drop it and count it
    │   └── Dropped            a prompt group that cannot be trained on, for a stated reason
    ├── WeightSyncError    an engine did not confirm (version, fingerprint)
    ├── StalenessError     a batch was older than the contract allows
    └── BudgetExhausted    more failures than the run allows

`InfraFailure` and `DataFailure` are raised *inside* the actor that knows which of the two it is, before the exception
crosses a process boundary. Neither is ever turned into a reward.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class TroupeError(Exception):
    """Root of every error that this package raises on purpose."""


class UserError(TroupeError):
    """What was given, what is allowed, where it was set, what to do. Shown without a traceback; exit code 2."""


class ConfigError(UserError):
    """A configuration key, value or method option is wrong."""


class DataError(UserError):
    """A data set cannot be used, or too many of its rows cannot."""


class ModelError(UserError):
    """A model folder or a tokenizer cannot be used."""


class PlacementError(UserError):
    """The cluster cannot hold the plan; the message names the role and what it lacks."""


class Interrupted(TroupeError):
    """SIGINT or SIGTERM ended the run, which shut down cleanly."""

    def __init__(self, signal: int) -> None:
        super().__init__(f"ended by signal {signal}")
        self.exit_code = 128 + signal  # the shell's convention


class RunError(TroupeError):
    """A run failed after it had started."""


class NotDone(RunError):
    """What a client asked of a run, or of a service, was not done. That is no failure of the run."""


class DiskError(RunError):
    """A disk is full, or cannot be written. Only the user can fix that."""


class InfraFailure(RunError):
    """The infrastructure failed, not the sample: the same work may succeed elsewhere."""


class BlockLost(InfraFailure):
    """A value in the object store is gone, with the node that held it. No other worker will find it either: only what
    made it can make it again."""


class NoAnswer(InfraFailure):
    """A worker did not answer a call: it died, is out of reach, or passed the call's deadline. An `InfraFailure` raised
    by the method itself does not count: it is an answer."""


class WorkerDied(NoAnswer):
    """The worker's process has ended."""


class DataFailure(RunError):
    """The sample itself fails, on every worker."""


class Dropped(DataFailure):
    """A prompt group cannot be trained on; it is counted under `reason`."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(reason, detail)
        self.reason, self.detail = reason, detail

    def __str__(self) -> str:
        return self.detail


class WeightSyncError(RunError):
    """An engine did not acknowledge the version and fingerprint that were sent."""


class StalenessError(RunError):
    """Tokens were older than `max_staleness` allows."""


class BudgetExhausted(RunError):
    """More failures than the configuration allows."""


def nearest(given: str, allowed: Iterable[str]) -> str | None:
    """The allowed word most similar to the given one; None if none is similar."""
    found = difflib.get_close_matches(given, list(allowed), n=1)
    return found[0] if found else None


def did_you_mean(given: str, allowed: Iterable[str]) -> str:
    """`; did you mean vllm?`, or nothing if no allowed word is similar."""
    meant = nearest(given, allowed)
    return f"; did you mean {meant}?" if meant else ""


def first_lines(error: BaseException, count: int = 1) -> str:
    """The first lines of an error's message, joined into one; its class if it has no message."""
    lines = str(error).strip().splitlines()[:count]
    return " ".join(line.strip() for line in lines if line.strip()) or type(error).__name__

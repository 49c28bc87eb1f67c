"""Whether the ranks of trained and frozen roles are alive and make progress. Pure; the clock is an argument.

    every rank ── ping: (verb, for how long) ──► seen ─┬─► overdue: lines for the console, after `cluster.watchdog_s`
               ── no answer, or dead ──► silent, died ─┴─► failure: what ends the run
                                                          - a rank died
                                                          - no answer for roles.ROLE.ping_timeout_s: it hangs
                                                          - in one verb for roles.ROLE.call_timeout_s: it hangs in it

Ranks of a role work together, so one that hangs keeps the others inside the same verb: the one that does not answer is
named before those that do.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

from actors.worker import Place

SILENT_AFTER_S = 15.0  # of several pings none was answered


@dataclass(frozen=True)
class RankLimits:
    """Of one role, in seconds: for how long a rank may leave pings unanswered, and be inside one verb."""

    ping_timeout_s: float
    call_timeout_s: float


@dataclass(frozen=True)
class Rank:
    """`where`: node and process, for messages; `place`: for programs."""

    role: str
    index: int
    where: str
    place: Place | None = None

    def __str__(self) -> str:
        return f"{self.role} rank {self.index} ({self.where})"


@dataclass
class _State:
    answered: float
    verb: str | None = None
    since: float = 0.0  # when the verb began
    death: str | None = None


class RankHealth:
    """What the pings of all ranks say together. `limits` of a role: roles may start later, with a later phase."""

    def __init__(self, limits: Callable[[str], RankLimits], *, report_after_s: float) -> None:
        self._limits, self._report_after_s = limits, report_after_s
        self._ranks: dict[Rank, _State] = {}
        self._reported: dict[str, float] = {}

    def expect(self, rank: Rank, now: float) -> None:
        """It is pinged from now on."""
        self._ranks.setdefault(rank, _State(now))

    def keep(self, ranks: Collection[Rank]) -> None:
        """Forget all others: their processes were ended on purpose."""
        self._ranks = {rank: state for rank, state in self._ranks.items() if rank in ranks}

    def seen(self, rank: Rank, verb: str | None, busy_s: float, now: float) -> None:
        """It answered: what it is doing, and for how long."""
        self._ranks[rank] = _State(now, verb, now - busy_s)

    def died(self, rank: Rank, why: str) -> None:
        self._ranks[rank].death = why

    def described(self, now: float) -> dict[str, list[dict[str, Any]]]:
        """For those who look from outside: role -> each rank with its `index`, `state`, node and process. `working`: in
        a `verb`, and for how many `seconds`; `silent`: for how many it has answered no ping."""
        found: dict[str, list[dict[str, Any]]] = {}
        for rank, state in sorted(self._ranks.items(), key=lambda each: each[0].index):
            place = {} if rank.place is None else {"node": rank.place.node, "pid": rank.place.pid}
            found.setdefault(rank.role, []).append({"index": rank.index, **place, **_described(state, now)})
        return found

    def failure(self, now: float) -> str | None:
        """Why the run cannot go on; None if it can."""
        dead = [f"{rank} died{_during(state)}: {state.death}" for rank, state in self._ranks.items() if state.death]
        silent: list[str] = []
        stuck: list[str] = []
        for rank, state in self._ranks.items():
            limits, key = self._limits(rank.role), f"roles.{rank.role}"
            if now - state.answered > limits.ping_timeout_s:
                silent.append(
                    f"{rank} hangs: no answer to a ping for {now - state.answered:.0f} s{_during(state)} "
                    f"({key}.ping_timeout_s={limits.ping_timeout_s:g})"
                )
            if state.verb is not None and now - state.since > limits.call_timeout_s:
                stuck.append(
                    f"{rank} hangs: in `{state.verb}` for {now - state.since:.0f} s "
                    f"({key}.call_timeout_s={limits.call_timeout_s:g})"
                )
        return next(iter([*dead, *silent, *stuck]), None)

    def overdue(self, now: float) -> list[str]:
        """One line for every rank that does not answer, and one for every verb that a role is inside, if it is so for
        longer than `report_after_s`, since it began or since its last line."""
        lines: dict[str, str] = {}  # what a line is about -> the line
        inside: dict[tuple[str, str], list[tuple[float, int]]] = {}
        for rank, state in self._ranks.items():
            if now - state.answered >= self._report_after_s:
                lines[f"silent {rank}"] = f"{rank} has not answered for {now - state.answered:.0f} s{_during(state)}"
            elif state.verb is not None and now - state.since >= self._report_after_s:
                inside.setdefault((rank.role, state.verb), []).append((state.since, rank.index))
        for (role, verb), found in inside.items():
            since = min(found)[0]
            ranks = ", ".join(str(index) for index in sorted(index for _, index in found))
            lines[f"{role} {verb} {since:.0f}"] = f"{role} is in `{verb}` for {now - since:.0f} s (rank {ranks})"
        self._reported = {about: when for about, when in self._reported.items() if about in lines}
        due = [about for about in lines if now - self._reported.get(about, -1e9) >= self._report_after_s]
        self._reported |= dict.fromkeys(due, now)
        return [lines[about] for about in due]


def _described(state: _State, now: float) -> dict[str, Any]:
    verb = {} if state.verb is None else {"verb": state.verb}
    if state.death is not None:
        return {"state": "dead", **verb}
    if now - state.answered > SILENT_AFTER_S:
        return {"state": "silent", **verb, "seconds": round(now - state.answered, 1)}
    return {"state": "working", **verb, "seconds": round(now - state.since, 1)} if verb else {"state": "idle"}


def _during(state: _State) -> str:
    return f", in `{state.verb}` when it last answered" if state.verb else ""

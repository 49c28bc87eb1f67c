"""Which waiting runs are started now, which running ones make room, and why the others wait. Pure.

The rule: the highest priority first, among equals the one that was submitted first. Nobody passes a run that could
start once others have ended, however little room it needs, so a large run is never starved by small ones. A run is
passed only while it cannot be started whatever ends: if the whole cluster is too small for it, and in its back-off, in
which the room that it had is kept for it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain

from orchestrator.planning.bundles import Bundle, ClusterView, Node, Resources, fit, shortages
from orchestrator.queueing.reasons import holders, lacking

Holding = Mapping[str, Resources]  # by the name of a node


@dataclass(frozen=True)
class Waiting:
    """A run that is to be started. `why`: what it says while `not_before` has not come."""

    run: str
    priority: int
    submitted: float
    bundles: tuple[Bundle, ...]
    not_before: float = 0.0
    why: str = ""


@dataclass(frozen=True)
class Active:
    """A run with a process. `holds`: what it has reserved, by node; empty until it has. `claims`: what it will
    reserve, and has not yet. `leaving`: it ends soon, and gives back what it holds."""

    run: str
    priority: int
    started: float
    holds: Holding = field(default_factory=dict[str, Resources])
    claims: tuple[Bundle, ...] = ()
    leaving: bool = False


@dataclass(frozen=True)
class Room:
    """The nodes of a cluster with all they have (`whole`), and with what nobody has reserved (`free`)."""

    whole: ClusterView
    free: ClusterView


@dataclass(frozen=True)
class Decision:
    """`start`: in this order. `preempt`: run -> the run that it makes room for. `reasons`: of those that wait on."""

    start: tuple[str, ...]
    preempt: Mapping[str, str]
    reasons: Mapping[str, str]


def decide(waiting: Iterable[Waiting], active: Sequence[Active], room: Room, now: float, *, preempt: bool) -> Decision:
    """`preempt`: whether a run may take the place of running ones of lower priority."""
    start: list[str] = []
    reasons: dict[str, str] = {}
    victims: dict[str, str] = {}
    with_room = list(active)  # and those that are started now, or will be after their back-off
    claims = list(chain.from_iterable(run.claims for run in active))
    first: Waiting | None = None  # that waits for others to end: nobody passes it
    for run in sorted(waiting, key=lambda each: (-each.priority, each.submitted, each.run)):
        if run.not_before > now:
            reasons[run.run] = run.why
            if first is None and _fits([*claims, *run.bundles], room.free):  # what it had is kept for it
                claims += run.bundles
                with_room.append(Active(run.run, run.priority, now, claims=run.bundles))
        elif never := shortages(run.bundles, room.whole):
            reasons[run.run] = (
                f"it can never start on the nodes that are there, and is passed by others: {'; '.join(never)}"
            )
        elif first is not None:
            reasons[run.run] = f"waits for its turn: run {first.run} is before it ({_order(first, run)})"
        elif _fits([*claims, *run.bundles], room.free):
            start.append(run.run)
            claims += run.bundles
            with_room.append(Active(run.run, run.priority, now, claims=run.bundles))
        else:
            first = run
            leaving = [other for other in active if other.leaving]
            if preempt and not _fits([*claims, *run.bundles], _without(leaving, room.free)):
                found = preempted_for(run, active, claims, room.free)
                victims = {other.run: run.run for other in found}
                leaving += found
            reasons[run.run] = _why(run, with_room, claims, room, [other.run for other in leaving])
    return Decision(tuple(start), victims, reasons)


def preempted_for(
    run: Waiting, active: Sequence[Active], claims: Sequence[Bundle], free: ClusterView
) -> tuple[Active, ...]:
    """The running runs of lower priority that have to end for `run` to start: the lowest priority first, among equals
    the one that was started last, and none that need not. Empty if that would not be enough. One that has not reserved
    anything yet is left alone until it has."""
    leaving = [other for other in active if other.leaving]
    able = [other for other in active if other.priority < run.priority and not other.leaving and other.holds]
    chosen: list[Active] = []
    wanted = [*claims, *run.bundles]
    for other in sorted(able, key=lambda each: (each.priority, -each.started, each.run)):
        chosen.append(other)
        if _fits(wanted, _without([*leaving, *chosen], free)):
            break
    else:
        return ()
    for other in reversed(chosen):  # the first ones may have been too small to matter
        rest = [each for each in chosen if each is not other]
        if _fits(wanted, _without([*leaving, *rest], free)):
            chosen = rest
    return tuple(chosen)


def _fits(bundles: Sequence[Bundle], free: ClusterView) -> bool:
    return None not in fit(bundles, free).nodes


def _without(runs: Sequence[Active], free: ClusterView) -> ClusterView:
    """What is free once these runs have ended."""

    def grown(node: Node) -> Node:
        back = [run.holds[node.name] for run in runs if node.name in run.holds]
        names = dict.fromkeys(chain(node.resources, *back))
        total = {name: sum(each.get(name, 0.0) for each in (node.resources, *back)) for name in names}
        return Node(node.name, total, node.labels)

    return ClusterView(tuple(map(grown, free.nodes)))


def _why(run: Waiting, active: Sequence[Active], claims: Sequence[Bundle], room: Room, leaving: Sequence[str]) -> str:
    held = {other.run: [*other.holds.values(), *(each.resources for each in other.claims)] for other in active}
    said = lacking(run.bundles, claims, room.whole, room.free, holders(held))
    makes = f"; {' and '.join(leaving)} {'makes' if len(leaving) == 1 else 'make'} room" if leaving else ""
    return f"waits for {said}{makes}"


def _order(first: Waiting, run: Waiting) -> str:
    if first.priority > run.priority:
        return f"priority {first.priority}, this one {run.priority}"
    return f"both have priority {run.priority}, and it was submitted earlier"

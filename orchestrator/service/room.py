"""The room that runs share, as the decisions take it: the nodes of a Ray, and a number of places if runs are counted.

A place is a resource like any other, of a node of its own, so that `--at-once` needs no rule of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from orchestrator.planning.bundles import Bundle, ClusterView, Node, Resources
from orchestrator.queueing.decisions import Active, Room
from orchestrator.queueing.entry import Entry, Stage
from orchestrator.service import observation
from orchestrator.service.jobs import Reserved

SERVICE, PLACE = "the service", "place"  # a node, and its resource


def bundles_to_place(entry: Entry, reserved: Reserved | None, at_once: int | None) -> tuple[Bundle, ...]:
    """What a run needs of the room: nothing of the nodes if they are not compared with."""
    place = (Bundle(("a run",), {PLACE: 1.0}),) if at_once is not None else ()
    return (*(entry.bundles if reserved is not None else ()), *place)


def active_runs(
    root: Path, found: Mapping[str, Entry], reserved: Reserved | None, *, at_once: int | None
) -> tuple[Active, ...]:
    """The runs that have a process. What one has not reserved yet it claims; the rest is as the Ray says, because a run
    may have been scaled since."""
    return tuple(
        _active(root / run, run, entry, reserved, at_once=at_once) for run, entry in found.items() if entry.active
    )


def _active(folder: Path, run: str, entry: Entry, reserved: Reserved | None, *, at_once: int | None) -> Active:
    holds: dict[str, dict[str, float]] = {SERVICE: {PLACE: 1.0}} if at_once is not None else {}
    for each in reserved.held if reserved is not None else ():
        if each.run == run:
            _add(holds.setdefault(each.node, {}), each.resources)
    waits = reserved is not None and not observation.has_reserved(folder, entry)
    claims = entry.bundles if waits else ()
    leaving = entry.stage is not Stage.STARTED
    return Active(run, entry.priority, entry.started, holds, claims, leaving)


def room_of(reserved: Reserved | None, active: tuple[Active, ...], *, at_once: int | None) -> Room:
    whole = list(reserved.nodes) if reserved is not None else []
    left = {node.name: dict(node.resources) for node in whole}
    for each in reserved.held if reserved is not None else ():
        _add(left[each.node], each.resources, sign=-1)
    free = [Node(node.name, left[node.name], node.labels) for node in whole]
    if at_once is not None:
        whole.append(Node(SERVICE, {PLACE: float(at_once)}))
        free.append(Node(SERVICE, {PLACE: float(max(0, at_once - len(active)))}))
    return Room(ClusterView(tuple(whole)), ClusterView(tuple(free)))


def _add(total: dict[str, float], more: Resources, sign: float = 1) -> None:
    for name, value in more.items():
        total[name] = total.get(name, 0.0) + sign * value

"""Bundles and nodes: the resources that a process needs, and whether a cluster has them. Pure.

A bundle is what one process reserves, or several that share it (colocation). `fit` computes where each would go, and
`shortages` which role lacks which resource. Both only model the scheduler; Ray decides."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from orchestrator.planning import node_selectors as labels
from orchestrator.planning.node_selectors import Labels, Selector

GIB = 2**30
NO_ROOM = "no room on the cluster"  # how a run says that it did not get what it was to reserve
SLACK = 1e-6  # of a resource: sums of fractions are not exact
DECIMALS = 4  # of an amount of a resource, in Ray's book-keeping

Resources = Mapping[str, float]


def together(*amounts: float) -> float:
    """The sum of amounts of a resource as it was meant: 0.1 + 0.2 + 0.7 is 1, which of floats it is not."""
    return round(math.fsum(amounts), DECIMALS)


@dataclass(frozen=True)
class Bundle:
    """What is reserved for one process of each of `roles`. Names of resources are Ray's: CPU, GPU, memory, ...
    `selectors`: choices of nodes, in order of preference; empty: any node."""

    roles: tuple[str, ...]
    resources: Resources
    selectors: tuple[Selector, ...] = ()

    def shared_with(self, role: str, more: Resources) -> Bundle:
        """The bundle with room for a process of another role as well."""
        names = dict.fromkeys([*self.resources, *more])
        total = {name: together(self.resources.get(name, 0.0), more.get(name, 0.0)) for name in names}
        return Bundle((*self.roles, role), total, self.selectors)

    @property
    def label(self) -> str:
        return " + ".join(self.roles)

    @property
    def needs(self) -> str:
        """`1 GPU and 2 CPU on a node with role=rollout`."""
        where = ", else ".join(labels.describe(selector) for selector in self.selectors)
        return describe(self.resources) + (f" on a node with {where}" if where else "")

    def takes(self, node: Node) -> bool:
        """Whether the node's labels are among those wanted."""
        return not self.selectors or any(labels.meets(node.labels, selector) for selector in self.selectors)


@dataclass(frozen=True)
class Node:
    name: str
    resources: Resources
    labels: Labels = field(default_factory=dict[str, str])


@dataclass(frozen=True)
class ClusterView:
    """The nodes that a plan is compared with."""

    nodes: tuple[Node, ...]

    @classmethod
    def of_machine(cls, *, cpus: float, gpus: float = 0) -> ClusterView:
        """This machine only, as a local Ray would offer it."""
        return cls((Node("this machine", {"CPU": cpus, "GPU": gpus}),))

    def total(self, resource: str) -> float:
        return sum(node.resources.get(resource, 0.0) for node in self.nodes)

    def largest(self, resource: str) -> float:
        return max((node.resources.get(resource, 0.0) for node in self.nodes), default=0.0)

    def __str__(self) -> str:
        kinds = dict.fromkeys(["GPU", "CPU", *(name for node in self.nodes for name in node.resources)])
        totals = [amount(kind, self.total(kind)) for kind in kinds if _worth_telling(kind)]
        return f"{', '.join(totals)} on {len(self.nodes)} node(s)"


@dataclass
class Fit:
    """The nodes of bundles: `nodes[i]` is that of bundle i, or None. `left`: what remains free on each node."""

    nodes: list[str | None]
    left: dict[str, dict[str, float]] = field(default_factory=dict[str, dict[str, float]])


def fit(bundles: Sequence[Bundle], cluster: ClusterView) -> Fit:
    """Places the largest bundles first, each on the fullest node that has room for it."""
    left = {node.name: dict(node.resources) for node in cluster.nodes}
    nodes = {node.name: node for node in cluster.nodes}
    found = Fit([None] * len(bundles), left)
    hungriest = sorted(range(len(bundles)), key=lambda index: _appetite(bundles[index]), reverse=True)
    for index in hungriest:
        needs = bundles[index].resources
        able = [name for name, free in left.items() if _covers(free, needs) and bundles[index].takes(nodes[name])]
        if able:
            node = min(able, key=lambda name: (left[name].get("GPU", 0.0), left[name].get("CPU", 0.0)))
            found.nodes[index] = node
            for resource, need in needs.items():
                left[node][resource] = left[node].get(resource, 0.0) - need
    return found


def how_many_fit(bundle: Bundle, cluster: ClusterView, *, at_most: int) -> int:
    """How many bundles like that one there is room for."""
    return sum(node is not None for node in fit([bundle] * at_most, cluster).nodes)


def shortages(bundles: Sequence[Bundle], cluster: ClusterView) -> list[str]:
    """One line for each role or group of roles with a bundle that does not fit: what it needs, and what is missing."""
    placed = fit(bundles, cluster).nodes
    homeless = dict.fromkeys(bundle.label for bundle, node in zip(bundles, placed, strict=True) if node is None)
    lines: list[str] = []
    for label in homeless:
        mine = [index for index, bundle in enumerate(bundles) if bundle.label == label]
        without = sum(placed[index] is None for index in mine)
        lacking = "; ".join(_lacking(bundles[mine[0]], bundles, cluster))
        lines.append(f"{label}: no place for {without} of {len(mine)}, each needs {bundles[mine[0]].needs}: {lacking}")
    return lines


def describe(resources: Resources) -> str:
    """`1 GPU and 2 CPU`."""
    return (
        " and ".join(amount(name, value) for name, value in sorted(resources.items(), reverse=True) if value)
        or "nothing"
    )


def amount(resource: str, value: float) -> str:
    return f"{value / GIB:.1f} GiB memory" if resource == "memory" else f"{value:g} {resource}"


def _lacking(bundle: Bundle, bundles: Sequence[Bundle], cluster: ClusterView) -> list[str]:
    """The reason: no node has the labels, or none with the labels is large enough, or all of them together are too
    small, or the free resources are spread over several nodes."""
    able = ClusterView(tuple(node for node in cluster.nodes if bundle.takes(node)))
    if not cluster.nodes:
        return ["there is no node"]
    if not able.nodes:
        found = [node.labels for node in cluster.nodes]
        missing = [reason for selector in bundle.selectors for reason in labels.lacking(found, selector)]
        return list(dict.fromkeys(missing)) or ["no node has all of these labels"]
    such = " with these labels" if bundle.selectors else ""
    rivals = [each for each in bundles if all(bundle.takes(node) for node in cluster.nodes if each.takes(node))]
    reasons: list[str] = []
    for resource, need in bundle.resources.items():
        wanted = sum(other.resources.get(resource, 0.0) for other in rivals)
        largest, total = able.largest(resource), able.total(resource)
        if need > largest + SLACK:
            reasons.append(f"the largest node{such} has {amount(resource, largest)}")
        elif wanted > total + SLACK:
            in_all, there, short = (amount(resource, value) for value in (wanted, total, wanted - total))
            where = f"the nodes{such} have" if such else "the cluster has"
            reasons.append(f"the plan needs {in_all} in all, {where} {there}: {short} short")
    return reasons or ["enough is free in all, but not on one node"]


def _covers(free: Resources, needs: Resources) -> bool:
    return all(free.get(resource, 0.0) + SLACK >= need for resource, need in needs.items())


def _appetite(bundle: Bundle) -> tuple[bool, float, float]:
    """Sort key: bundles that fit on few nodes come first."""
    return bool(bundle.selectors), bundle.resources.get("GPU", 0.0), bundle.resources.get("CPU", 0.0)


def _worth_telling(resource: str) -> bool:
    """Ray's own markers (`node:10.0.0.1`, `object_store_memory`) are never missing in a plan."""
    return not resource.startswith("node:") and resource not in ("memory", "object_store_memory")

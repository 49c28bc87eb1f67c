"""The broadcast tree: who sends to whom when weights are published. A pure plan; nothing here connects anything.

    trainer ──► a/0 ──► a/1 ──► b/0 ──► b/1        on one host: engines a and b with two processes each
                 └────► c                          on another host

Engines form a tree, and so do the processes of each: weights enter an engine once. An engine sends to at most FANOUT
others on its host, and all engines of a host together to at most FANOUT on other hosts: whatever the number of engines,
no network card carries the weights more often. The tree is kept from publish to publish, so that a join adds one link,
and a death replaces the links of those that it cut off."""

from __future__ import annotations

import heapq
import secrets
from collections import Counter, defaultdict, deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from rollout.weights.protocol import SENDER, Link

FANOUT = 2


@dataclass(frozen=True)
class Place:
    """Of a member: its host, and the names of its processes that receive weights."""

    host: str
    receivers: tuple[str, ...]


@dataclass(frozen=True)
class _Entry:
    """How weights reach a member. `link`: the name of the link, which is never used again."""

    parent: str
    link: str


class BroadcastTree:
    """Of members, by name; the trainer's is SENDER."""

    def __init__(self) -> None:
        self._places: dict[str, Place] = {}
        self._entries: dict[str, _Entry] = {}  # of all but the sender
        self._name, self._made = secrets.token_hex(4), 0  # a receiver may have links of an earlier tree

    def follow(self, sender_host: str, members: Mapping[str, Place]) -> tuple[Link, ...]:
        """The links that reach exactly these members. Those of members that stay, below members that stay, stay."""
        self.drop(self._places.keys() - members.keys() - {SENDER})
        self._places = {SENDER: Place(sender_host, (SENDER,)), **members}
        self._attach([name for name in members if name not in self._entries])
        return tuple(self._links())

    def drop(self, members: Iterable[str]) -> None:
        """Forget how weights reach these and the children of these: `follow` finds other links."""
        gone = set(members)
        self._entries = {
            name: entry for name, entry in self._entries.items() if name not in gone and entry.parent not in gone
        }

    def cut_off(self, failed: Iterable[str]) -> set[str]:
        """Those of the failed members that were to get their weights through another one of them."""
        lost = set(failed)
        return {name for name in lost if any(above in lost for above in self._above(name))}

    def _above(self, name: str) -> Iterator[str]:
        while (entry := self._entries.get(name)) is not None:
            name = entry.parent
            yield name

    def _attach(self, loose: list[str]) -> None:
        """Each as close to the sender as there is a place, and on its own host before all others. A member that comes
        with members below it is first."""
        children = self._children()
        places = _FreePlaces(self._places)
        self._offer(SENDER, 0, children, places)
        for name in sorted(loose, key=lambda name: name not in children):
            parent, depth = places.take(self._places[name].host)
            self._made += 1
            self._entries[name] = _Entry(parent, f"{self._name}/{self._made}")
            self._offer(name, depth + 1, children, places)

    def _offer(self, top: str, depth: int, children: Mapping[str, list[str]], free: _FreePlaces) -> None:
        """All that is connected with `top` can have children."""
        free.offer(top, depth)
        for child in children.get(top, ()):
            free.occupy(top, child)
            self._offer(child, depth + 1, children, free)

    def _children(self) -> dict[str, list[str]]:
        children = defaultdict[str, list[str]](list)
        for name, entry in self._entries.items():
            children[entry.parent].append(name)
        return children

    def _links(self) -> Iterator[Link]:
        """From the sender downwards, with their depths."""
        children, depths = self._children(), {SENDER: 0}  # of receivers
        members = deque([SENDER])
        while members:
            name = members.popleft()
            members.extend(children.get(name, ()))
            for link_name, parent, child in self._links_of(name):
                depths[child] = depths[parent] + 1
                yield Link(link_name, parent, child, depths[parent])

    def _links_of(self, name: str) -> Iterator[tuple[str, str, str]]:
        """(name, parent, child) of the links into a member and between its processes."""
        own, entry = self._places[name], self._entries.get(name)
        if entry is None:  # the sender
            return
        above = self._places[entry.parent]
        yield entry.link, above.receivers[-1 if above.host == own.host else 0], own.receivers[0]
        for rank, receiver in enumerate(own.receivers[1:], 1):
            yield f"{entry.link}.{rank}", own.receivers[(rank - 1) // FANOUT], receiver


class _FreePlaces:
    """Where another member can be attached, closest to the sender first."""

    def __init__(self, places: Mapping[str, Place]) -> None:
        self._hosts = {name: place.host for name, place in places.items()}
        self._near = Counter[str]()  # children on the same host, by parent
        self._far = Counter[str]()  # children on other hosts, by the parent's host
        self._here = defaultdict[str, list[tuple[int, str]]](list)  # heaps of (depth, member), by host
        self._anywhere: list[tuple[int, str]] = []

    def offer(self, member: str, depth: int) -> None:
        heapq.heappush(self._here[self._hosts[member]], (depth, member))
        heapq.heappush(self._anywhere, (depth, member))

    def occupy(self, parent: str, child: str) -> None:
        host = self._hosts[parent]
        if host == self._hosts[child]:
            self._near[parent] += 1
        else:
            self._far[host] += 1

    def take(self, host: str) -> tuple[str, int]:
        """(parent, its depth) for a member on that host. There is one: whoever was attached last has no children."""
        here = self._here[host]
        while here and self._near[here[0][1]] >= FANOUT:
            heapq.heappop(here)
        if here:
            depth, parent = here[0]
            self._near[parent] += 1
            return parent, depth
        while self._far[self._hosts[self._anywhere[0][1]]] >= FANOUT:
            heapq.heappop(self._anywhere)
        depth, parent = self._anywhere[0]
        self._far[self._hosts[parent]] += 1
        return parent, depth

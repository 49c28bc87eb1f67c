"""Who sends to whom, for any members that come and go."""

from __future__ import annotations

from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.publishing.tree import FANOUT, BroadcastTree, Place
from rollout.weights.protocol import SENDER, Link

Members = dict[str, Place]


@st.composite
def memberships(draw: st.DrawFn) -> list[Members]:
    """Several in a row, of engines that stay what they are."""
    count = draw(st.integers(1, 30))
    everybody = {
        f"m{index}": Place(
            f"host{draw(st.integers(0, 4))}", tuple(f"m{index}/{rank}" for rank in range(draw(st.integers(1, 5))))
        )
        for index in range(count)
    }
    subsets = draw(st.lists(st.sets(st.sampled_from(sorted(everybody))), min_size=1, max_size=5))
    return [{name: place for name, place in everybody.items() if name in subset} for subset in subsets]


def owner(receiver: str) -> str:
    return receiver.partition("/")[0]


@given(memberships())
@settings(max_examples=200, deadline=None)
def test_every_receiver_is_reached_once_and_nobody_sends_to_more_than_it_may(rounds: list[Members]) -> None:
    tree = BroadcastTree()
    for members in rounds:
        links = tree.follow("host0", members)
        hosts = {SENDER: "host0", **{name: place.host for name, place in members.items()}}
        depths = {SENDER: 0}
        for link in links:  # from the sender downwards
            assert link.depth == depths[link.parent] and link.child not in depths
            depths[link.child] = link.depth + 1
        assert depths.keys() - {SENDER} == {name for place in members.values() for name in place.receivers}
        between = [(owner(link.parent), owner(link.child)) for link in links if owner(link.parent) != owner(link.child)]
        assert len(between) == len(members), "weights enter each engine once"
        near = Counter(parent for parent, child in between if hosts[parent] == hosts[child])
        far = Counter(hosts[parent] for parent, child in between if hosts[parent] != hosts[child])
        assert max([0, *near.values(), *far.values()]) <= FANOUT
        within = Counter(link.parent for link in links if owner(link.parent) == owner(link.child))
        assert max([0, *within.values()]) <= FANOUT


@given(memberships())
@settings(max_examples=200, deadline=None)
def test_links_below_members_that_stay_stay_and_no_name_comes_back(rounds: list[Members]) -> None:
    tree, before, used = BroadcastTree(), dict[str, Link](), set[str]()
    for members in rounds:
        now = {link.child: link for link in tree.follow("host0", members)}
        for child, link in now.items():
            old = before.get(child)
            stays = old is not None and owner(old.parent) in {SENDER, *members}
            if owner(child) != owner(link.parent):
                assert (old is not None and old.id == link.id) == stays
            assert link.id not in used or (old is not None and old.id == link.id)
        used |= {link.id for link in now.values()}
        before = now


def places(count: int, host: str = "host0") -> Members:
    return {f"m{index}": Place(host, (f"m{index}",)) for index in range(count)}


def test_a_death_replaces_the_links_of_those_that_it_cut_off_alone() -> None:
    tree = BroadcastTree()
    before = tree.follow("host0", places(7))
    shape = {link.child: link.parent for link in before}
    assert shape == {"m0": SENDER, "m1": SENDER, "m2": "m0", "m3": "m0", "m4": "m1", "m5": "m1", "m6": "m2"}
    after = tree.follow("host0", {name: place for name, place in places(7).items() if name != "m0"})
    kept = {link.id for link in before} & {link.id for link in after}
    assert kept == {link.id for link in before if link.child in ("m1", "m4", "m5", "m6")}
    assert {link.child: link.parent for link in after}["m2"] == SENDER, "it has m6 below it, and comes first"


def test_members_that_failed_through_another_one_are_told_from_those_that_failed_by_themselves() -> None:
    tree = BroadcastTree()
    tree.follow("host0", places(7))
    assert tree.cut_off({"m0", "m2", "m6", "m5"}) == {"m2", "m6"}
    assert tree.cut_off({"m6"}) == set()
    tree.drop({"m0", "m2", "m6"})
    again = {link.child: link for link in tree.follow("host0", places(7))}
    assert again.keys() == places(7).keys()


def test_a_host_is_entered_once_where_there_is_room_for_its_members_below_each_other() -> None:
    members = {**places(2), **{f"far{index}": Place("host1", (f"far{index}/0", f"far{index}/1")) for index in range(5)}}
    links = BroadcastTree().follow("host0", members)
    entering = [link for link in links if link.child.startswith("far") and not link.parent.startswith("far")]
    assert len(entering) == 1


def test_two_trees_have_no_link_in_common() -> None:
    """A receiver that outlives the driver's tree may still have links of it."""
    first, second = (BroadcastTree().follow("host0", places(3)) for _ in range(2))
    assert not {link.id for link in first} & {link.id for link in second}

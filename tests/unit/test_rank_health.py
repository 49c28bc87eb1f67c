"""Which rank hangs, in what, since when, and when that ends a run."""

import asyncio
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from actors.errors import InfraFailure
from actors.worker import Place
from orchestrator.activity import Activity
from orchestrator.cluster.autoscaler import Autoscaler
from orchestrator.cluster.background_tasks import supervised
from orchestrator.cluster.control import RunFile, status
from orchestrator.cluster.failures import Watchdog
from orchestrator.cluster.rank_health import Rank, RankHealth, RankLimits
from orchestrator.cluster.requests import Requests
from orchestrator.cluster.run_lock import Driver
from orchestrator.config.schema import RunConfig

NODE = "pid 7 on node a"
POLICY = [Rank("policy", index, NODE) for index in range(3)]
REFERENCE = Rank("reference", 0, "pid 9 on node b")


def health() -> RankHealth:
    limits = {"policy": RankLimits(60, 3600), "reference": RankLimits(20, 100)}
    found = RankHealth(limits.__getitem__, report_after_s=30)
    for rank in (*POLICY, REFERENCE):
        found.expect(rank, 0.0)
    return found


def all_seen(found: RankHealth, now: float, *, verb: str | None = None, busy_s: float = 0.0) -> None:
    for rank in (*POLICY, REFERENCE):
        found.seen(rank, verb, busy_s, now)


def test_ranks_that_answer_and_work_are_neither_named_nor_do_they_end_a_run():
    found = health()
    all_seen(found, 19.0, verb="update", busy_s=15.0)
    assert found.failure(20.0) is None
    assert found.overdue(20.0) == []


def test_a_rank_that_answers_no_ping_is_named_with_what_it_did_and_ends_the_run_at_its_deadline():
    found = health()
    all_seen(found, 1.0, verb="update", busy_s=0.5)
    for rank in (*POLICY[:2], REFERENCE):
        found.seen(rank, "update", 39.5, 40.0)
    assert found.overdue(40.0) == [
        "policy rank 2 (pid 7 on node a) has not answered for 39 s, in `update` when it last answered",
        "policy is in `update` for 40 s (rank 0, 1)",
        "reference is in `update` for 40 s (rank 0)",
    ]
    assert found.failure(60.0) is None
    for rank in (*POLICY[:2], REFERENCE):
        found.seen(rank, "update", 61.5, 62.0)
    assert found.failure(62.0) == (
        "policy rank 2 (pid 7 on node a) hangs: no answer to a ping for 61 s, in `update` when it last answered "
        "(roles.policy.ping_timeout_s=60)"
    )


def test_a_rank_that_answers_pings_but_does_not_finish_its_verb_ends_the_run_at_its_roles_deadline():
    found = health()
    found.seen(REFERENCE, "logps", 101.0, 200.0)
    for rank in POLICY:
        found.seen(rank, "update", 3000.0, 200.0)
    assert found.failure(200.0) == (
        "reference rank 0 (pid 9 on node b) hangs: in `logps` for 101 s (roles.reference.call_timeout_s=100)"
    )


def test_an_idle_rank_never_times_out():
    found = health()
    all_seen(found, 100_000.0)
    assert found.failure(100_001.0) is None
    assert found.overdue(100_001.0) == []


def test_a_rank_that_died_is_named_before_those_that_wait_for_it():
    found = health()
    all_seen(found, 10_000.0, verb="update", busy_s=5000.0)
    found.died(POLICY[1], "its process is gone")
    assert found.failure(10_000.0) == (
        "policy rank 1 (pid 7 on node a) died, in `update` when it last answered: its process is gone"
    )


def test_a_long_verb_is_reported_once_per_interval():
    found = health()
    for now in range(2, 100, 2):
        for rank in POLICY:
            found.seen(rank, "save_state", now, float(now))
        found.seen(REFERENCE, None, 0.0, float(now))
        assert (found.overdue(float(now)) != []) is (now in (30, 60, 90))


def test_a_role_that_was_released_is_not_reported_as_lost():
    found = health()
    found.keep(POLICY)
    all_policy = [found.seen(rank, None, 0.0, 50.0) for rank in POLICY]
    assert len(all_policy) == 3 and found.failure(50.0) is None


class Answering:
    """A worker, as far as it is asked anything here."""

    where, place = NODE, Place("a", 7)

    def __init__(self, busy_s: float) -> None:
        self._busy_s = busy_s

    async def call(self, method: str, *_: Any, timeout_s: float) -> Any:
        return {"verb": "update", "busy_s": self._busy_s}


def test_each_rank_is_described_by_its_place_and_by_what_its_last_ping_said():
    limits = RankLimits(1000, 1000)
    found = RankHealth(lambda _: limits, report_after_s=30)
    ranks = [Rank("policy", index, NODE, Place("a", 7 + index)) for index in (1, 0, 2, 3)]
    for rank in ranks:
        found.expect(rank, 0.0)
    found.seen(ranks[0], "update", 2.0, 99.0)
    found.seen(ranks[1], None, 0.0, 99.0)
    found.died(ranks[3], "its process is gone")
    told: list[dict[str, Any]] = [
        {"state": "idle"},
        {"state": "working", "verb": "update", "seconds": 3.0},
        {"state": "silent", "seconds": 100.0},
        {"state": "dead"},
    ]
    placed = [{"index": index, "node": "a", "pid": 7 + index, **each} for index, each in enumerate(told)]
    assert found.described(100.0) == {"policy": placed}


async def test_the_status_of_a_run_has_its_ranks_from_its_first_second_on_and_none_that_is_gone(tmp_path: Path):
    groups = {role: SimpleNamespace(workers=[Answering(5.0)]) for role in ("policy", "reference")}
    roles: Any = SimpleNamespace(groups=groups, pools={}, activity=Activity())
    config = RunConfig.model_validate({"phases": {"main": {}}})
    requests, autoscaler = Requests(lambda: None), Autoscaler({}, lambda *_: None)
    run = RunFile("t-1", None, Driver.here())

    async def ranks(wanted: Callable[[Mapping[str, Any]], bool]) -> Mapping[str, Any]:
        async with asyncio.timeout(60):
            while not wanted(found := status(tmp_path).ranks):
                await asyncio.sleep(0.05)
        return found

    first = {"index": 0, "node": "a", "pid": 7, "state": "idle"}
    async with supervised(config, run, tmp_path, roles, requests, Watchdog(), print, autoscaler, ping_every_s=2.0):
        assert await ranks(bool) == {"policy": [first], "reference": [first]}
        pinged = await ranks(lambda found: found["policy"][0]["state"] != "idle")
        assert (pinged["policy"][0]["state"], pinged["policy"][0]["verb"]) == ("working", "update")
        del groups["reference"]
        assert (await ranks(lambda found: len(found) < 2)).keys() == {"policy"}


async def test_a_role_that_starts_with_a_later_phase_is_watched_by_the_limits_of_its_own(tmp_path: Path):
    groups = {"policy": SimpleNamespace(workers=[Answering(30.0)])}
    roles: Any = SimpleNamespace(groups=groups, pools={}, activity=Activity())
    config = RunConfig.model_validate({"phases": {"main": {}}, "roles": {"value": {"call_timeout_s": 20}}})
    run = RunFile("t-1", None, Driver.here())
    with pytest.raises(InfraFailure, match=r"value rank 0 .* in `update` for 30 s \(roles.value.call_timeout_s=20\)"):
        requests, autoscaler = Requests(lambda: None), Autoscaler({}, lambda *_: None)
        async with supervised(config, run, tmp_path, roles, requests, Watchdog(), print, autoscaler, ping_every_s=0.02):
            roles.groups["value"] = SimpleNamespace(workers=[Answering(30.0)])
            await asyncio.sleep(30)


async def test_a_role_that_is_released_between_two_pings_is_no_rank_that_hangs(tmp_path: Path):
    groups = {"policy": SimpleNamespace(workers=[Answering(0.0)]), "value": SimpleNamespace(workers=[Answering(0.0)])}
    roles: Any = SimpleNamespace(groups=groups, pools={}, activity=Activity())
    limits = {"roles": {"value": {"ping_timeout_s": 1}}}
    config = RunConfig.model_validate({"phases": {"main": {}}, **limits})
    requests, autoscaler = Requests(lambda: None), Autoscaler({}, lambda *_: None)
    run = RunFile("t-1", None, Driver.here())
    async with supervised(config, run, tmp_path, roles, requests, Watchdog(), print, autoscaler, ping_every_s=0.5):
        await asyncio.sleep(0.7)  # it was pinged once
        del groups["value"]
        await asyncio.sleep(2.5)

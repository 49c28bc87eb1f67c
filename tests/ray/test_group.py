"""Workers and groups over a real Ray: deadlines, deaths, errors, references and names."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import ray

from actors.errors import DataFailure, InfraFailure
from actors.group import RayGroup, RayObjects, RayWorker, start_ranks, start_worker
from actors.worker import Ref, WorkerInfo
from tests.own_ray import own_ray
from tests.waiting import until_true

READY_S = 300.0
CALL_S = 200.0


class Bench:
    """A synchronous target: what a trainer's rank looks like to its group."""

    def __init__(self, rank: int = 0, world_size: int = 1, master: tuple[str, int] | None = None) -> None:
        self.rank, self.world_size, self.master = rank, world_size, master

    def ready(self) -> WorkerInfo:
        return WorkerInfo(f"bench {self.rank}", os.getpid(), socket.gethostname(), "", {})

    def ping(self) -> str:
        return threading.current_thread().name

    def block(self, seconds: float) -> str:
        time.sleep(seconds)
        return threading.current_thread().name

    def block_until(self, begun: str, may_end: str) -> None:
        """Touches the file `begun`, and returns once there is the file `may_end`."""
        Path(begun).touch()
        deadline = time.monotonic() + CALL_S
        while not Path(may_end).exists() and time.monotonic() < deadline:
            time.sleep(0.01)

    def fail(self, error: Exception) -> None:
        raise error

    def report_and_array(self, size: int) -> tuple[int, np.ndarray]:
        return size, np.arange(size)

    def total(self, array: np.ndarray, scale: int = 1) -> int:
        return int(array.sum()) * scale

    def place(self) -> tuple[int, int, tuple[str, int] | None]:
        return self.rank, self.world_size, self.master

    def environment(self, name: str) -> str | None:
        return os.environ.get(name)

    def identity(self) -> tuple[str, str]:
        return repr(self), ray.get_runtime_context().get_actor_name() or ""

    def fail_or_die(self, dying: str) -> None:
        """Rank 1 dies; rank 0 reports the broken collective as soon as `dying` is there, before anybody can know of the
        death."""
        if self.rank == 1:
            Path(dying).touch()
            os.kill(os.getpid(), signal.SIGKILL)
        while not Path(dying).exists():  # ended by rank 1, or with the actor
            time.sleep(0.01)
        raise RuntimeError("connection closed by peer")


class Loop:
    """An asynchronous target: what a rollout worker looks like to its pool."""

    def __init__(self) -> None:
        self.begun = self.cancelled = 0

    def ping(self) -> tuple[int, int]:
        return self.begun, self.cancelled

    async def ready(self) -> WorkerInfo:
        return WorkerInfo("loop", os.getpid(), socket.gethostname(), "", {})

    async def wait(self, seconds: float) -> float:
        self.begun += 1
        try:
            await asyncio.sleep(seconds)
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        return seconds

    async def meet(self, others: int) -> int:
        """Returns once as many calls have begun."""
        self.begun += 1
        while self.begun < others:
            await asyncio.sleep(0.01)
        return others


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    with own_ray(8):
        yield


@pytest.fixture(scope="module")
def bench(cluster: None) -> RayWorker:
    worker = start_worker("troupe/test/bench/0", Bench, {}, env={"TROUPE_TEST_THREADS": "3"})
    asyncio.run(worker.call("ready", timeout_s=READY_S))
    return worker


@pytest.fixture(scope="module")
def gang(cluster: None) -> RayGroup:
    group = start_ranks("troupe/test/gang", Bench, [{}, {}, {}])
    asyncio.run(group.call("ready", timeout_s=READY_S))
    return group


def fresh(name: str) -> RayWorker:
    worker = start_worker(f"troupe/test/{name}", Bench, {})
    asyncio.run(worker.call("ready", timeout_s=READY_S))
    return worker


def test_ping_answers_while_the_main_group_blocks(bench: RayWorker, tmp_path: Path) -> None:
    begun, may_end = tmp_path / "begun", tmp_path / "may_end"

    async def scenario() -> bool:
        busy = asyncio.ensure_future(bench.call("block_until", str(begun), str(may_end), timeout_s=CALL_S))
        await until_true(begun.exists, "start of the call", timeout_s=CALL_S)
        await bench.call("ping", timeout_s=CALL_S / 2)
        unfinished = not busy.done()
        may_end.touch()
        await busy
        return unfinished

    assert asyncio.run(scenario())


def test_every_call_but_ping_runs_on_one_thread(bench: RayWorker) -> None:
    """torch's thread count and CUDA's current device belong to a thread."""

    async def scenario() -> tuple[set[str], str]:
        calls = await asyncio.gather(*(bench.call("block", 0.01, timeout_s=CALL_S) for _ in range(4)))
        return set(calls), await bench.call("ping", timeout_s=CALL_S)

    threads, health = asyncio.run(scenario())
    assert len(threads) == 1
    assert health not in threads


def test_a_call_of_a_gang_that_is_given_up_is_carried_out_by_all_ranks(gang: RayGroup, tmp_path: Path) -> None:
    """If it is a collective that one of them has begun, the others must come, or it waits for them to its deadline."""
    busy_begun, may_end = tmp_path / "busy", tmp_path / "may_end"
    begun = [tmp_path / f"rank {rank}" for rank in range(3)]

    async def scenario() -> None:
        last = gang.workers[-1]
        busy = asyncio.ensure_future(last.call("block_until", str(busy_begun), str(may_end), timeout_s=CALL_S))
        await until_true(busy_begun.exists, "start of the call of one rank", timeout_s=CALL_S)
        each = [str(file) for file in begun]
        together = asyncio.ensure_future(gang.call("block_until", str(may_end), per_rank=each, timeout_s=CALL_S))
        await until_true(lambda: all(file.exists() for file in begun[:-1]), "start of the others", timeout_s=CALL_S)
        together.cancel()
        with pytest.raises(asyncio.CancelledError):
            await together
        assert not begun[-1].exists(), "it still waits for its turn"
        may_end.touch()
        await busy
        await gang.call("place", timeout_s=CALL_S)

    asyncio.run(scenario())
    assert all(file.exists() for file in begun)


def test_a_killed_actors_call_raises_infra_failure_quickly(tmp_path: Path) -> None:
    worker, begun = fresh("killed/0"), tmp_path / "begun"

    async def scenario() -> float:
        call = asyncio.ensure_future(worker.call("block_until", str(begun), "/never", timeout_s=120))
        await until_true(begun.exists, "start of the call", timeout_s=CALL_S)
        began = time.monotonic()
        await worker.kill()
        await worker.kill()  # killing twice is fine
        with pytest.raises(InfraFailure, match=r"killed/0\.block_until: the worker died: .*pid \d+ on node"):
            await call
        return time.monotonic() - began

    assert asyncio.run(scenario()) < 30, "long before the call would have ended"


def test_calls_of_a_killed_actor_raise_infra_failure_once_the_kill_has_reached_it() -> None:
    worker = fresh("killed/1")
    asyncio.run(worker.kill())
    deadline = time.monotonic() + CALL_S
    with pytest.raises(InfraFailure, match="ping"):
        while time.monotonic() < deadline:  # Ray does not wait for the end of what it kills
            asyncio.run(worker.call("ping", timeout_s=CALL_S))
    with pytest.raises(InfraFailure, match="ping"):
        asyncio.run(worker.call("ping", timeout_s=CALL_S))


def test_a_deadline_raises_infra_failure_with_verb_and_age(bench: RayWorker) -> None:
    with pytest.raises(InfraFailure, match=r"bench/0\.block: no answer within 0\.2 s .*\d\.\d s into the call"):
        asyncio.run(bench.call("block", 0.6, timeout_s=0.2))


def test_a_call_that_outlived_its_deadline_leaves_the_worker_usable(bench: RayWorker) -> None:
    async def scenario() -> int:
        with pytest.raises(InfraFailure):
            await bench.call("block", 0.5, timeout_s=0.1)
        return await bench.call("total", np.arange(4), timeout_s=CALL_S)

    assert asyncio.run(scenario()) == 6


def test_an_async_call_nobody_waits_for_is_cancelled_in_the_actor() -> None:
    worker = start_worker("troupe/test/loop/0", Loop, {})

    async def scenario() -> None:
        await worker.call("ready", timeout_s=READY_S)

        async def until_there_are(begun: int, cancelled: int) -> None:
            deadline = time.monotonic() + CALL_S
            while (found := await worker.call("ping", timeout_s=CALL_S)) != (begun, cancelled):
                assert time.monotonic() < deadline, found
                await asyncio.sleep(0.02)

        late = asyncio.ensure_future(worker.call("wait", 600.0, timeout_s=3.0))
        await until_there_are(begun=1, cancelled=0)
        with pytest.raises(InfraFailure):
            await late
        await until_there_are(begun=1, cancelled=1)
        dropped = asyncio.ensure_future(worker.call("wait", 600.0, timeout_s=700))
        await until_there_are(begun=2, cancelled=1)
        dropped.cancel()
        await until_there_are(begun=2, cancelled=2)

    asyncio.run(scenario())


def test_async_calls_of_one_worker_overlap() -> None:
    worker = start_worker("troupe/test/loop/1", Loop, {})

    async def scenario() -> list[int]:
        await worker.call("ready", timeout_s=READY_S)
        return await asyncio.gather(*(worker.call("meet", 20, timeout_s=CALL_S) for _ in range(20)))

    assert asyncio.run(scenario()) == [20] * 20


@pytest.mark.parametrize(
    "error", [DataFailure("row 3 has no answer"), TimeoutError("of the method itself"), KeyError("k")]
)
def test_errors_of_the_method_keep_their_type_and_message(bench: RayWorker, error: Exception) -> None:
    with pytest.raises(type(error)) as caught:
        asyncio.run(bench.call("fail", error, timeout_s=CALL_S))
    assert type(caught.value) is type(error)
    assert caught.value.args == error.args
    assert "in fail" in str(caught.value.__cause__), "the remote traceback must survive"


def test_call_split_leaves_the_second_value_in_the_store(bench: RayWorker) -> None:
    async def scenario() -> tuple[int, Ref, int, np.ndarray]:
        size, ref = await bench.call_split("report_and_array", 200_000, timeout_s=CALL_S)
        total = await bench.call("total", ref, scale=2, timeout_s=CALL_S)
        return size, ref, total, await RayObjects().get(ref, timeout_s=CALL_S)

    size, ref, total, array = asyncio.run(scenario())
    assert size == 200_000
    assert isinstance(ref.target, ray.ObjectRef)
    assert total == 2 * sum(range(200_000))
    assert not array.flags.owndata, "a view of the object store, not a copy"


def test_values_that_an_actor_returned_survive_its_death() -> None:
    worker = fresh("short-lived/0")

    async def scenario() -> np.ndarray:
        _, ref = await worker.call_split("report_and_array", 200_000, timeout_s=CALL_S)
        await worker.kill()
        return await RayObjects().get(ref, timeout_s=CALL_S)

    assert asyncio.run(scenario())[-1] == 199_999


def test_put_values_reach_methods_as_values(bench: RayWorker) -> None:
    async def scenario() -> tuple[int, int]:
        ref = await RayObjects().put(np.ones(100_000, dtype=np.int64))
        return await bench.call("total", ref, timeout_s=CALL_S), await bench.call("total", array=ref, timeout_s=CALL_S)

    assert asyncio.run(scenario()) == (100_000, 100_000)


def test_names_and_reprs_say_role_and_index(bench: RayWorker) -> None:
    representation, name = asyncio.run(bench.call("identity", timeout_s=CALL_S))
    assert representation == "bench/0"
    assert name == "troupe/test/bench/0"
    assert repr(bench) == "RayWorker(troupe/test/bench/0)"
    assert bench.info is not None
    assert bench.info.pid != os.getpid()


def test_the_environment_is_set_before_the_actor_starts(bench: RayWorker) -> None:
    assert asyncio.run(bench.call("environment", "TROUPE_TEST_THREADS", timeout_s=CALL_S)) == "3"


def test_ranks_know_their_place_and_share_a_bound_store(gang: RayGroup) -> None:
    places = asyncio.run(gang.call("place", timeout_s=CALL_S))
    assert [(rank, size) for rank, size, _ in places] == [(0, 3), (1, 3), (2, 3)]
    masters = {master for _, _, master in places}
    assert len(masters) == 1
    with socket.create_connection(masters.pop(), timeout=CALL_S):
        pass  # somebody listens there already


def test_a_gang_of_one_has_no_store() -> None:
    group = start_ranks("troupe/test/alone", Bench, [{}])
    assert asyncio.run(group.call("place", timeout_s=READY_S)) == [(0, 1, None)]


def test_group_results_are_in_rank_order_whichever_rank_is_first(gang: RayGroup) -> None:
    arrays = [np.full(3, rank) for rank in range(3)]
    assert asyncio.run(gang.call("total", 10, per_rank=arrays, timeout_s=CALL_S)) == [0, 30, 60]
    assert len(asyncio.run(gang.call("block", per_rank=[0.4, 0.2, 0.0], timeout_s=CALL_S))) == 3


def test_a_group_call_with_too_few_arguments_is_refused(gang: RayGroup) -> None:
    with pytest.raises(ValueError, match="1 arguments for 3 ranks"):
        asyncio.run(gang.call("block", per_rank=[0.1], timeout_s=CALL_S))


def test_one_slow_rank_fails_the_group_call_at_its_deadline(gang: RayGroup) -> None:
    with pytest.raises(InfraFailure, match=r"gang/1\.block: no answer within"):
        asyncio.run(gang.call("block", per_rank=[0.0, 9.0, 0.0], timeout_s=2.0))


def test_the_death_of_a_rank_is_reported_rather_than_its_peers_broken_collective(tmp_path: Path) -> None:
    group = start_ranks("troupe/test/doomed", Bench, [{}, {}])
    asyncio.run(group.call("ready", timeout_s=READY_S))
    with pytest.raises(InfraFailure, match=r"doomed/1\.fail_or_die"):
        asyncio.run(group.call("fail_or_die", str(tmp_path / "dying"), timeout_s=CALL_S))

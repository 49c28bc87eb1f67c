"""The worker around an engine: results, deaths, stalls, aborts, weights, pauses. The engine is the scripted one."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from actors.errors import ConfigError, DataFailure, InfraFailure, ModelError
from rollout.engine import EngineSpec, Finished, build_engine
from rollout.sampling import Finish, Request, Sampling
from rollout.scripted_engine import ScriptedEngine
from rollout.weights import DiskWrite, ManifestOf
from rollout.weights.collective import CollectiveSender
from rollout.weights.protocol import (
    SENDER,
    Link,
    Manifest,
    Rendezvous,
    SendReport,
    SyncOrder,
    TensorMeta,
    TransferFailed,
)
from rollout.worker import RolloutWorker
from tests.waiting import until_true

PROMPT = (5, 6, 7)
SCRIPT = {"5 6 7": [[8, 9, 1], [10, 1]]}
ENDLESS = {"5 6 7": [[8] * 100_000]}
WEIGHTS = [("w", torch.arange(6.0).reshape(2, 3))]


def request(name: str = "a", n: int = 2, max_tokens: int = 100_000) -> Request:
    return Request(name, PROMPT, n, Sampling(max_tokens), seed=3, group=7)


class Waiting(ScriptedEngine):
    """Has no token after some steps until it is given new weights."""

    after = 5
    taken = 0
    waits = threading.Event()  # the newest one does
    calls = 0  # of `step`, of all of them

    def step(self) -> list[Finished]:
        Waiting.calls += 1
        if self.taken == self.after and not self.loads:
            self.waits.set()
            time.sleep(0.001)
            return []
        self.taken += 1
        return super().step()


@asynccontextmanager
async def worker(engine: str = "scripted", stall_s: float = 60.0, **options: Any) -> AsyncIterator[RolloutWorker]:
    spec = EngineSpec(engine, "no model", max_model_len=200_000, options={"completions": SCRIPT, **options})
    subject = RolloutWorker("rollout/3", spec, initial_version=4, stall_s=stall_s)
    try:
        await subject.ready()
        yield subject
    finally:
        subject.close()


def sync(folder: Path, version: int, name: str = "") -> tuple[SyncOrder, SendReport]:
    """An order that the disk transport has sent."""
    manifest = Manifest((TensorMeta("w", "float32", (2, 3)),), bucket_bytes=1024)
    order = SyncOrder(
        name or f"publish-{version}", version, "disk", manifest, folder=str(folder / f"version-{version}")
    )
    return order, DiskWrite(order)(iter(WEIGHTS))


async def test_a_group_comes_with_its_samples_and_what_the_driver_needs_of_them() -> None:
    async with worker() as subject:
        meta, batch = await subject.generate(request())
        assert (meta.request_id, meta.worker, meta.lengths) == ("a", "rollout/3", (3, 2))
        assert meta.finishes == (Finish.STOP, Finish.STOP)
        assert (meta.oldest_version, meta.newest_version) == (4, 4)
        assert batch["tokens"].tolist() == [5, 6, 7, 8, 9, 1, 5, 6, 7, 10, 1]
        assert batch["group"].tolist() == [7, 7]


async def test_a_second_call_with_the_same_id_joins_the_first() -> None:
    async with worker(seconds_per_step=0.01) as subject:
        first, second = await asyncio.gather(subject.generate(request()), subject.generate(request()))
        assert first[1]["tokens"].tolist() == second[1]["tokens"].tolist()
        assert subject.ping()["tokens"] == 5, "generated once"


async def test_a_request_that_nobody_waits_for_any_longer_is_aborted_but_not_before() -> None:
    async with worker(completions=ENDLESS, seconds_per_step=0.001) as subject:
        calls = [asyncio.ensure_future(subject.generate(request())) for _ in range(2)]
        await until_true(lambda: subject.ping()["requests"] == 1, "such state of the worker")
        calls[0].cancel()
        await asyncio.sleep(0.05)
        assert subject.ping()["requests"] == 1
        calls[1].cancel()
        await until_true(lambda: subject.ping()["requests"] == 0, "such state of the worker")


async def test_an_aborted_request_is_an_infra_failure_and_the_others_go_on() -> None:
    def script(asked: Request, index: int) -> list[int]:
        return (ENDLESS if asked.id == "doomed" else SCRIPT)["5 6 7"][index % 2 if asked.id == "kept" else 0]

    async with worker(completions=script, seconds_per_step=0.001) as subject:
        doomed, kept = (asyncio.ensure_future(subject.generate(request(name))) for name in ("doomed", "kept"))
        await asyncio.sleep(0)  # both are with the engine
        assert await subject.abort(["doomed", "unknown"]) == 1
        with pytest.raises(InfraFailure, match="doomed was aborted"):
            await doomed
        assert (await kept)[0].lengths == (3, 2)


async def test_a_request_that_can_never_run_is_a_data_failure_and_one_that_fails_here_an_infra_failure() -> None:
    async with worker(data_failures="bad-*", infra_failures="unlucky-*") as subject:
        with pytest.raises(DataFailure, match="bad-1"):
            await subject.generate(request("bad-1"))
        with pytest.raises(InfraFailure, match="unlucky-1"):
            await subject.generate(request("unlucky-1"))
        await subject.generate(request("good"))
        assert subject.ping()["alive"]


@pytest.mark.parametrize("fault", [{"break_at_step": 2}, {"break_at_request": 2}])
async def test_when_the_engine_breaks_everybody_who_waits_is_told_and_so_is_everybody_later(
    fault: dict[str, int],
) -> None:
    async with worker(seconds_per_step=0.02, **fault) as subject:
        calls = [subject.generate(request(f"r{i}")) for i in range(4)]
        results = await asyncio.gather(*calls, return_exceptions=True)
        assert all(isinstance(r, InfraFailure) and "scripted to break" in str(r) for r in results)
        with pytest.raises(InfraFailure, match="scripted to break"):
            await subject.generate(request("later"))
        with pytest.raises(InfraFailure, match="scripted to break"):
            await subject.pause()
        assert not subject.ping()["alive"]
        assert "scripted to break" in subject.ping()["death"]


async def test_an_engine_that_stands_still_fails_its_requests_and_its_ping() -> None:
    async with worker(hang_at_step=2, stall_s=0.2) as subject:
        with pytest.raises(InfraFailure, match=r"not finished a step for 0\.2 s"):
            await subject.generate(request())
        assert subject.ping()["death"] is None, "it may come back"
        assert not subject.ping()["alive"]


async def test_an_engine_that_slept_for_long_is_not_taken_for_one_that_stands_still() -> None:
    async with worker(stall_s=1.0, seconds_per_step=0.01) as subject:
        await asyncio.sleep(1.1)
        call = asyncio.ensure_future(subject.generate(request()))
        await asyncio.sleep(0)
        assert subject.ping()["alive"]
        await call


async def test_closing_ends_every_wait() -> None:
    async with worker(completions=ENDLESS, seconds_per_step=0.001) as subject:
        call = asyncio.ensure_future(subject.generate(request()))
        await until_true(lambda: subject.ping()["requests"] == 1, "such state of the worker")
        await asyncio.to_thread(subject.close)
        with pytest.raises(InfraFailure, match="closed"):
            await call
        subject.close()


async def test_weights_that_arrive_while_decoding_are_used_from_the_next_token_on(tmp_path: Path) -> None:
    async with worker("tests.unit.test_rollout_worker:Waiting", completions={"5 6 7": [[8] * 60]}) as subject:
        Waiting.waits.clear()
        call = asyncio.ensure_future(subject.generate(request(n=1)))
        await until_true(Waiting.waits.is_set, "such state of the worker")
        order, report = sync(tmp_path, 5)
        ack = await subject.receive(order)
        meta, batch = await call
        versions = batch["version"][3:].tolist()
        assert (ack.member, ack.version, ack.fingerprint) == ("rollout/3", 5, report.fingerprint)
        assert (meta.oldest_version, meta.newest_version) == (4, 5)
        assert versions == [4] * Waiting.after + [5] * (60 - Waiting.after)
        assert subject.ping()["version"] == 5


async def test_an_order_that_was_carried_out_is_acknowledged_again_and_nothing_is_loaded(tmp_path: Path) -> None:
    async with worker(break_at_load=2, load_seconds=0.1) as subject:
        order, _ = sync(tmp_path, 5)
        first, joined = await asyncio.gather(subject.receive(order), subject.receive(order))
        assert first == joined == await subject.receive(order) and first.stall_seconds >= 0.1
        meta, _ = await subject.generate(request())
        assert meta.newest_version == 5, "another load would have broken the engine"


async def test_a_transfer_that_brings_nothing_leaves_the_old_weights_in_use(tmp_path: Path) -> None:
    async with worker() as subject:
        order, _ = sync(tmp_path, 5)
        broken = SyncOrder("other", 6, "disk", order.manifest, folder=str(tmp_path / "nowhere"))
        with pytest.raises(TransferFailed):
            await subject.receive(broken)
        meta, _ = await subject.generate(request())
        assert meta.newest_version == 4
        assert (await subject.receive(order)).version == 5


async def test_a_transfer_that_ends_half_way_stops_decoding_until_all_weights_are_there(tmp_path: Path) -> None:
    waiting = "tests.unit.test_rollout_worker:Waiting"
    async with worker(waiting, completions={"5 6 7": [[8] * 20]}, stall_s=0.2) as subject:
        Waiting.waits.clear()
        call = asyncio.ensure_future(subject.generate(request(n=1)))
        await until_true(Waiting.waits.is_set, "such state of the worker")
        order, _ = sync(tmp_path, 5)
        manifest = Manifest((*order.manifest.tensors, TensorMeta("more", "float32", (9,))), bucket_bytes=24)
        with pytest.raises(TransferFailed) as caught:
            await subject.receive(SyncOrder("longer", 5, "disk", manifest, folder=order.folder))
        assert caught.value.begun
        steps = Waiting.calls
        await asyncio.sleep(0.3)
        assert Waiting.calls == steps and not call.done() and subject.ping()["alive"], "it waits, and is not stuck"
        await subject.receive(order)
        meta, _ = await call
        assert (meta.oldest_version, meta.newest_version) == (4, 5)


async def test_the_time_that_an_order_waited_for_the_engine_is_part_of_its_deadline() -> None:
    """The driver counts from when it gave the order."""
    sender = CollectiveSender()
    manifest = Manifest((TensorMeta("w", "float32", (2, 3)),), bucket_bytes=1024)
    rendezvous = Rendezvous(*sender.open(), (Link("1", SENDER, "rollout/3"),), timeout_s=3.0)
    async with worker() as subject:
        busy = subject._loop.submit(lambda _: time.sleep(2.5))
        with pytest.raises(TransferFailed, match=r"the trainer did not come within (0|0\.\d+) s"):
            await subject.receive(SyncOrder("order", 5, "collective", manifest, rendezvous))
        assert busy.done()
    sender.close()


async def test_an_engine_that_waits_for_new_weights_is_not_taken_for_one_that_stands_still() -> None:
    """They come when the trainer sends them: whoever ordered them has a deadline."""
    waiting, sender = "tests.unit.test_rollout_worker:Waiting", CollectiveSender()
    address, manifest = sender.open(), ManifestOf(None, 24)(iter(WEIGHTS))
    async with worker(waiting, completions={"5 6 7": [[8] * 20]}, stall_s=0.2) as subject:
        Waiting.waits.clear()
        call = asyncio.ensure_future(subject.generate(request(n=1)))
        await until_true(Waiting.waits.is_set, "such state of the worker")
        links = (Link("link", SENDER, subject.name),)
        order = SyncOrder("late", 5, "collective", manifest, rendezvous=Rendezvous(*address, links, 60.0))
        receiving = asyncio.ensure_future(subject.receive(order))
        await asyncio.sleep(0.5)
        assert subject.ping()["alive"] and not call.done() and not receiving.done()
        report = await asyncio.to_thread(sender.send, order, iter(WEIGHTS))
        assert (await receiving).fingerprint == report.fingerprint
        meta, _ = await call
        assert (meta.oldest_version, meta.newest_version) == (4, 5)
    sender.close()


async def test_an_order_is_carried_out_again_if_another_one_left_a_mixture_in_between(tmp_path: Path) -> None:
    """A worker that was started elsewhere outlives a run, and the orders of the next one may have the same names."""
    async with worker() as subject:
        order, _ = sync(tmp_path, 5)
        assert (await subject.receive(order)).version == 5
        manifest = Manifest((*order.manifest.tensors, TensorMeta("more", "float32", (9,))), bucket_bytes=24)
        with pytest.raises(TransferFailed) as caught:
            await subject.receive(SyncOrder("longer", 5, "disk", manifest, folder=order.folder))
        assert caught.value.begun
        assert (await subject.receive(order)).version == 5
        meta, _ = await asyncio.wait_for(subject.generate(request()), 60)
        assert meta.newest_version == 5


async def test_an_engine_that_cannot_apply_weights_is_dead(tmp_path: Path) -> None:
    async with worker(break_at_load=1) as subject:
        with pytest.raises(InfraFailure, match="scripted to break at load"):
            await subject.receive(sync(tmp_path, 5)[0])
        await until_true(lambda: not subject.ping()["alive"], "such state of the worker")


async def test_a_paused_worker_keeps_its_requests_takes_weights_and_goes_on(tmp_path: Path) -> None:
    order, _ = sync(tmp_path, 9)
    waiting = "tests.unit.test_rollout_worker:Waiting"  # is not done before it is paused
    async with worker(waiting, completions={"5 6 7": [[8] * 20]}, stall_s=1.0) as subject:
        call = asyncio.ensure_future(subject.generate(request(n=1)))
        await until_true(lambda: subject.ping()["requests"] == 1, "such state of the worker")
        await subject.pause()
        await subject.receive(order)
        await asyncio.sleep(1.1)
        assert not call.done(), "a pause is no stall"
        await subject.resume()
        meta, _ = await call
        assert meta.newest_version == 9


async def test_a_worker_does_not_sleep_while_it_generates() -> None:
    async with worker(completions=ENDLESS, seconds_per_step=0.001) as subject:
        await subject.sleep()
        await subject.wake()
        call = asyncio.ensure_future(subject.generate(request()))
        await until_true(lambda: subject.ping()["requests"] == 1, "such state of the worker")
        with pytest.raises(InfraFailure, match="cannot sleep"):
            await subject.sleep()
        call.cancel()


async def test_a_model_folder_that_is_none_is_the_users_error(tmp_path: Path) -> None:
    subject = RolloutWorker("rollout/0", EngineSpec("hf", str(tmp_path)))
    with pytest.raises(ModelError, match="is not a model folder"):
        await subject.ready()
    assert not subject.ping()["alive"]
    subject.close()


def test_an_unknown_engine_or_option_is_refused_with_what_there_is() -> None:
    with pytest.raises(ConfigError, match=r"'vlm'.*vllm, hf, scripted"):
        build_engine(EngineSpec("vlm", "m"))
    with pytest.raises(ConfigError, match=r"secs_per_step.*seconds_per_step"):
        build_engine(EngineSpec("scripted", "m", options={"secs_per_step": 1}))


def test_an_engine_of_ones_own_is_named_by_module_and_class() -> None:
    engine = build_engine(EngineSpec("rollout.scripted_engine:ScriptedEngine", "m"))
    assert engine.version == -1

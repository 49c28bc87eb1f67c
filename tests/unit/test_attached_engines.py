"""An engine behind HTTP: what is sent arrives as it was, the same requests have the same samples as in this process,
and nobody without the token, and nobody but the run that attached it, is served."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from actors.batch import Batch
from actors.errors import ConfigError, DataFailure, InfraFailure, WorkerDied
from actors.worker import LocalObjects
from orchestrator.cluster.attached_worker import AttachedWorker
from orchestrator.cluster.control import address_of
from rollout.attached.server import Offer, served
from rollout.attached.wire import Malformed, decode, encode
from rollout.engine import EngineSpec
from rollout.sampling import Finish, GroupMeta, Request, Sampling
from rollout.weights.buckets import fill
from rollout.weights.protocol import Manifest, SyncOrder, TensorMeta
from rollout.worker import RolloutWorker
from tests.unit.tiny import tiny_model_folder

TOKEN = "t" * 32
SCRIPTED = EngineSpec("scripted", "none", options={"seconds_per_step": 0.001})


@asynccontextmanager
async def engine(**offer: Any) -> AsyncIterator[str]:
    async with served(Offer(TOKEN, **offer), "127.0.0.1", 0, lambda _: None) as (host, port):
        yield f"http://{host}:{port}"


@asynccontextmanager
async def attached(address: str, spec: EngineSpec = SCRIPTED, token: str = TOKEN) -> AsyncIterator[AttachedWorker]:
    worker = AttachedWorker("rollout/7", address, token, LocalObjects())
    try:
        await worker.attach(spec, timeout_s=60)
        yield worker
    finally:
        await worker.kill()


def request(name: str = "a", **changed: Any) -> Request:
    sampling = Sampling(max_tokens=6, **changed.pop("sampling", {}))
    return Request(**{"id": name, "prompt": (5, 6, 7), "n": 3, "sampling": sampling, "seed": 11, "group": 4, **changed})


def same(one: Batch, other: Batch) -> bool:
    equal = one.columns.keys() == other.columns.keys() and np.array_equal(one.lengths, other.lengths)
    return equal and all(
        one[name].dtype == other[name].dtype and np.array_equal(one[name], other[name]) for name in one.columns
    )


arrays = st.builds(
    lambda dtype, shape: np.arange(int(np.prod(shape))).astype(dtype).reshape(shape),
    st.sampled_from(["uint8", "int32", "int64", "float32", "bool"]),
    st.lists(st.integers(0, 3), max_size=3),
)
plain = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()
values = st.recursive(
    plain | arrays | st.sampled_from(Finish),
    lambda inner: st.lists(inner) | st.lists(inner).map(tuple) | st.dictionaries(st.text() | st.integers(), inner),
    max_leaves=12,
)


def equal(one: Any, other: Any) -> bool:
    if isinstance(one, np.ndarray):
        return one.dtype == other.dtype and one.shape == other.shape and bool(np.all(one == other))
    if isinstance(one, list | tuple):
        pairs = zip(one, other, strict=False)
        return type(one) is type(other) and len(one) == len(other) and all(equal(a, b) for a, b in pairs)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(one[key], other[key]) for key in one)
    return type(one) is type(other) and one == other


@given(values)
def test_what_is_sent_arrives_with_its_types(value: Any) -> None:
    assert equal(decode(b"".join(encode(value))), value)


def test_the_values_of_an_engine_arrive_and_others_are_not_sent() -> None:
    meta = GroupMeta("a", "w", (3, 4), (Finish.STOP, Finish.LENGTH), 1, 2, 0.5)
    order = SyncOrder("o", 3, "object_store", Manifest((TensorMeta("w", "bfloat16", (2, 3)),), 64))
    for value in (request(sampling={"stop": ("x",)}), meta, order, SCRIPTED):
        assert decode(b"".join(encode([value]))) == [value]
    for failed in (DataFailure("too long"), WorkerDied("gone")):
        [found] = decode(b"".join(encode([failed])))
        assert (isinstance(found, DataFailure), str(found)) == (isinstance(failed, DataFailure), str(failed))
    for value in (object(), lambda: None, Path("a"), np.array([object()])):
        with pytest.raises(TypeError, match="cannot be sent"):
            encode(value)


@given(st.binary(max_size=60), st.integers(0, 200), st.integers(0, 255))
def test_bytes_that_are_no_message_are_refused_and_make_nothing(noise: bytes, at: int, byte: int) -> None:
    whole = bytearray(b"".join(encode([request(), np.arange(5)])))
    whole[at % len(whole)] = byte
    for message in (noise, bytes(whole), bytes(whole[: at % len(whole)])):
        try:
            found = decode(message)
        except Malformed:
            continue
        assert isinstance(found, list | tuple | dict | str | int | float | type(None)), "a value after all"


@pytest.mark.parametrize(
    "header",
    [
        b'{"class": "Popen", "fields": []}',
        b'{"class": "Request", "fields": [1]}',
        b'{"array": "|O", "shape": [1]}',
        b'{"array": "<i8", "shape": [99999999999999]}',
        b'{"array": "<i8", "shape": [-1]}',
    ],
)
def test_a_class_or_an_array_that_may_not_be_is_refused(header: bytes) -> None:
    with pytest.raises(Malformed):
        decode(len(header).to_bytes(8, "little") + header)


async def test_the_samples_are_those_of_an_engine_in_this_process_bit_for_bit(tmp_path: Path) -> None:
    folder = str(tiny_model_folder(tmp_path))
    spec = EngineSpec("hf", folder, max_model_len=32)
    here = RolloutWorker("here", spec)
    await here.ready()
    expected_meta, expected = await here.generate(request())
    _, other = await here.generate(request("b", seed=12))
    here.close()
    async with engine() as address, attached(address, spec) as worker:
        info = await worker.call("ready", timeout_s=60)
        meta, block = await worker.call_split("generate", request(), timeout_s=60)
        failing = request("c", prompt=tuple(range(2, 40)))
        outcomes, shared, none = await worker.call("generate_all", [request(), failing], timeout_s=60)
        assert same(shared, expected) and outcomes[0].lengths == expected_meta.lengths
        assert isinstance(outcomes[1], DataFailure) and len(none.lengths) == 0
        with pytest.raises(DataFailure):
            await worker.call("generate", failing, timeout_s=60)
    assert same(block.target, expected) and not same(block.target, other)
    assert meta == replace(expected_meta, worker="rollout/7", seconds=meta.seconds)
    assert info.detail["address"] == address


async def test_weights_arrive_with_their_fingerprint_and_are_used(tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    folder = str(tiny_model_folder(tmp_path))
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.7)
    named = [(name, each.detach()) for name, each in model.named_parameters()]
    manifest = Manifest(tuple(TensorMeta(name, "float32", tuple(each.shape)) for name, each in named), 2**16)
    payload = [flat.numpy().copy() for flat in fill(manifest, named)]
    order = SyncOrder("o", 5, "object_store", manifest)
    async with engine() as address, attached(address, EngineSpec("hf", folder, max_model_len=32)) as worker:
        await worker.call("ready", timeout_s=60)
        _, before = await worker.call("generate", request(), timeout_s=60)
        ref = await LocalObjects().put(payload)
        ack = await worker.call("receive", order, ref, timeout_s=60)
        _, after = await worker.call("generate", request("b"), timeout_s=60)
        assert (await worker.call("ping", timeout_s=60))["version"] == 5
    direct = RolloutWorker("here", EngineSpec("hf", folder, max_model_len=32))
    await direct.ready()
    expected = await direct.receive(order, payload)
    _, same_weights = await direct.generate(request())
    direct.close()
    assert (ack.version, ack.fingerprint) == (5, expected.fingerprint)
    assert np.array_equal(after["sample_logps"], same_weights["sample_logps"])
    assert not np.array_equal(after["sample_logps"], before["sample_logps"])


async def test_nothing_is_answered_without_the_token_or_to_another_run() -> None:
    async with engine() as address:
        with pytest.raises(InfraFailure, match="answered 401"):
            async with attached(address, token="x" * 32):
                pass
        async with attached(address) as first:
            with pytest.raises(InfraFailure, match=r"serves another run \(rollout/7\)"):
                async with attached(address):
                    pass
            with pytest.raises(InfraFailure, match="does not know __class__"):
                await first.call("__class__", timeout_s=5)
            assert (await first.call("ping", timeout_s=5))["alive"]
        async with attached(address) as second:  # it was given back
            assert (await second.call("ping", timeout_s=5))["alive"]
            with pytest.raises(InfraFailure, match="detached"):
                await first.call("ping", timeout_s=5)
        async with aiohttp.ClientSession() as http:
            headers = {"Authorization": f"Bearer {TOKEN}"}
            async with http.post(f"{address}/v1/attach", data=b"\x80\x04.", headers=headers) as answer:
                assert answer.status == 400


@pytest.mark.parametrize(
    "spec",
    [
        replace(SCRIPTED, kind="mine.py:Engine"),
        replace(SCRIPTED, trust_remote_code=True),
        EngineSpec("vllm", "m", options={"worker_cls": "a.B"}),
    ],
    ids=["class", "remote code", "options"],
)
async def test_an_engine_runs_no_code_of_the_run_that_attaches_it(spec: EngineSpec) -> None:
    async with engine() as address:
        with pytest.raises(InfraFailure, match="runs no code of its run"):
            async with attached(address, spec):
                pass


async def test_a_call_that_is_cancelled_is_aborted_there_and_one_of_an_engine_that_ends_fails() -> None:
    slow = replace(SCRIPTED, options={"seconds_per_step": 0.2}, max_model_len=200)
    endless = request(sampling={"stop": ()}, n=200)
    async with engine() as address, attached(address, replace(slow, max_concurrency=1)) as worker:
        await worker.call("ready", timeout_s=60)

        async def running(count: int) -> None:
            async with asyncio.timeout(30):
                while (await worker.call("ping", timeout_s=5))["requests"] != count:
                    await asyncio.sleep(0.01)

        call = asyncio.ensure_future(worker.call("generate", endless, timeout_s=60))
        await running(1)
        call.cancel()
        await running(0)
        call = asyncio.ensure_future(worker.call("generate", replace(endless, id="b"), timeout_s=60))
        await running(1)
        await worker.kill()
        with pytest.raises(InfraFailure):
            await call


@pytest.mark.parametrize("waits", [True, False], ids=["waits for the end", "goes away before it"])
async def test_an_engine_is_attached_again_when_the_last_one_has_ended_and_not_before(waits: bool) -> None:
    """Between two steps, which last so long that the engine is still there when its run gives it back."""
    slow = replace(SCRIPTED, options={"seconds_per_step": 1.5}, max_model_len=200)
    refusals: list[str] = []
    async with asyncio.timeout(60), engine() as address, attached(address, slow) as first:
        await first.call("ready", timeout_s=60)
        call = asyncio.ensure_future(first.call("generate", request(sampling={"stop": ()}, n=200), timeout_s=60))
        while (await first.call("ping", timeout_s=5))["requests"] != 1:
            await asyncio.sleep(0.01)
        assert engines() == 1
        given_back = asyncio.ensure_future(first.kill())
        with pytest.raises(InfraFailure, match="attached to another run, or to none"):
            while True:
                await first._post("ping", [], 5.0, last=True)  # pyright: ignore[reportPrivateUsage]
        if not waits:
            given_back.cancel()
        while True:
            try:
                async with attached(address):
                    assert engines() == 0
                break
            except InfraFailure as error:
                refusals.append(str(error))
                await asyncio.sleep(0.05)
        await asyncio.wait({call, given_back})
        if not waits and first._http is not None:  # pyright: ignore[reportPrivateUsage]
            await first._http.close()  # pyright: ignore[reportPrivateUsage]
        assert isinstance(call.exception(), InfraFailure)
    assert bool(refusals) is not waits
    assert all("is still ending the engine of its last run (rollout/7)" in refusal for refusal in refusals)


def engines() -> int:
    return sum(thread.name.startswith("engine ") for thread in threading.enumerate())


def test_an_address_is_a_server_s_and_nothing_else() -> None:
    assert [address_of(each) for each in ("h:1", "http://h:1/", "https://10.0.0.1:2", "http://[::1]:3")] == [
        "http://h:1",
        "http://h:1",
        "https://10.0.0.1:2",
        "http://[::1]:3",
    ]
    for text in ("h", "ftp://h:1", "h:1/path", "u:p@h:1", "h:1?x", "h:99999", "", "h :1", "h:1#x"):
        with pytest.raises(ConfigError, match="is no address of an engine"):
            address_of(text)

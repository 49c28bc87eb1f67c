"""Adapters from a trainer to its engines, and nothing else: with every transport, several engines and a late one."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from actors.lora import full_tensors
from actors.model import ModelSpec
from actors.model_worker import ModelWorker
from actors.specs import BackendSpec, LoraSpec, OptimSpec
from actors.worker import LocalGroup, LocalObjects, LocalWorker
from orchestrator.cluster.failures import Watchdog
from orchestrator.cluster.fleet import State
from orchestrator.cluster.pool import Pool, PoolPolicy
from orchestrator.config.schema import WeightsConfig
from orchestrator.publishing.publisher import Publisher, SyncReport
from rollout.engine import EngineSpec
from rollout.sampling import Request, Sampling
from rollout.weights import TRANSPORTS
from rollout.worker import RolloutWorker
from tests.unit.tiny import tiny_model_folder

LORA = LoraSpec(r=4)
PROMPT = (5, 9, 14, 20, 33)
POLICY = PoolPolicy(
    slots=8, max_attempts=1, call_timeout_s=200.0, start_timeout_s=200.0, max_restarts=0, ping_every_s=0.05
)


class Run:
    """A trainer with adapters in this process, and a pool of engines that follow it."""

    def __init__(self, folder: Path, transport: Any, scratch: Path) -> None:
        self.folder = folder
        model = ModelSpec(str(folder), lora=LORA)
        self.worker = ModelWorker("policy/0", model, BackendSpec(optim=OptimSpec(1e-3, total_steps=9)), threads=1)
        self.worker.ready()
        self.group = LocalGroup("policy", LocalWorker("policy/0", self.worker))

        async def start(index: int) -> LocalWorker:
            spec = EngineSpec("hf", str(folder), lora=LORA, max_model_len=128)
            return LocalWorker(f"rollout/{index}", RolloutWorker(f"rollout/{index}", spec))

        self.pool = Pool(
            "rollout", 2, POLICY, start=start, stop=lambda w: w.kill(), event=lambda *_: None, watchdog=Watchdog()
        )
        self.publisher = Publisher(
            self.group,
            self.pool,
            LocalObjects(),
            WeightsConfig(),
            role="rollout",
            source="policy",
            dtype="float32",
            folder=str(scratch),
            event=lambda *_: None,
            transport=transport,
            bucket_bytes=2**20,
            part="adapters",
        )
        self.pool.admit = self.publisher.admit

    def train(self, seed: int) -> Any:
        """Other adapters; transformers' model with these merged."""
        from transformers import AutoModelForCausalLM

        torch.manual_seed(seed)
        causal: Any = self.worker.backend.model.causal
        for name, parameter in causal.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.2)
        merged: Any = AutoModelForCausalLM.from_pretrained(self.folder, dtype=torch.float32).eval()
        merged.load_state_dict({name: each.clone() for name, each in full_tensors(causal, 1 << 20)}, strict=False)
        return merged

    async def publish(self, version: int) -> SyncReport:
        async with self.publisher.changing:
            return await self.publisher.publish(version)

    async def check(self, merged: Any, version: int) -> list[int]:
        """Every engine samples what the merged model does; returns that."""
        sampled: list[list[int]] = []
        for index in self.pool.indices(State.SERVING):
            request = Request(f"{index}/{version}", PROMPT, 1, Sampling(24, temperature=0), seed=1)
            _, batch = await self.pool.workers[index].call("generate", request, timeout_s=200)
            tokens = torch.tensor(batch["tokens"].astype(np.int64))[None]
            with torch.no_grad():
                logps = merged(tokens).logits[0, len(PROMPT) - 1 : -1].log_softmax(-1)
            found = batch["tokens"][len(PROMPT) :].tolist()
            assert found == logps.argmax(-1).tolist()
            own = logps.gather(1, tokens[0, len(PROMPT) :, None])[:, 0]
            assert np.abs(batch["sample_logps"][len(PROMPT) :] - own.numpy()).max() < 1e-4
            assert set(batch["version"][len(PROMPT) :].tolist()) == {version}
            sampled.append(found)
        assert len(sampled) == self.pool.fleet.desired and all(each == sampled[0] for each in sampled)
        return sampled[0]


@pytest.mark.parametrize("transport", TRANSPORTS)
async def test_engines_that_are_sent_adapters_alone_sample_as_the_merged_model_does(
    tmp_path: Path, transport: str
) -> None:
    run = Run(tiny_model_folder(tmp_path), transport, tmp_path / "weights")
    adapters = sum(p.numel() for name, p in run.worker.backend.model.named_parameters() if ".lora_" in name)
    await run.pool.open()
    first = run.train(1)
    report = await run.publish(0)
    assert (report.members, report.nbytes) == ((0, 1), 4 * adapters)
    assert report.fingerprint is not None
    before = await run.check(first, 0)
    second = run.train(2)
    later = await run.publish(1)
    assert later.fingerprint != report.fingerprint
    run.pool.resize(3)  # it joins between two publishes
    deadline = asyncio.get_running_loop().time() + 60
    while len(run.pool.indices(State.SERVING)) < 3:
        assert asyncio.get_running_loop().time() < deadline, "the third engine did not join"
        await asyncio.sleep(0.02)
    after = await run.check(second, 1)
    assert before != after, "the adapters change nothing: this test shows nothing"
    await run.pool.close()
    await run.group.kill()

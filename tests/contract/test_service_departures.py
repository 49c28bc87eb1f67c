"""A client that goes away ends what is done for it, and probes of a service that is not ready hold up nobody."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from orchestrator.cluster.control import RunFile
from orchestrator.cluster.run_lock import Driver, driving
from orchestrator.data import synthetic_examples
from orchestrator.service import planning
from orchestrator.service.app import create_app
from orchestrator.service.errors import Problem
from orchestrator.service.jobs import ProcessJobs
from orchestrator.service.recipes import config_of
from orchestrator.service.schemas import Recipe
from orchestrator.service.settings import Settings
from rollout.sampling import Request
from tests.chat_engine import Engine, door_of
from tests.service_client import AUTHORIZED, TOKEN, listening, write_run
from tests.waiting import ended, until, until_true

THREADS = 40  # that the server has for reads


class SilentEngine(Engine):
    """Samples until it is told to abort."""

    def __init__(self) -> None:
        tokenizer = synthetic_examples.tokenizer()
        tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
        super().__init__(tokenizer)
        self.aborted = 0

    async def sample(self, role: str, request: Request) -> tuple[Any, Any]:
        self.asked.append(role)
        try:
            return await asyncio.Future()
        finally:
            self.aborted += 1


@pytest.mark.parametrize("stream", [False, True])
async def test_a_chat_whose_client_has_gone_is_not_sampled_any_further(tmp_path: Path, stream: bool):
    folder, engine = write_run(tmp_path, "run"), SilentEngine()
    body = {"model": "run", "messages": [{"role": "user", "content": "1+1="}], "stream": stream}
    with listening(create_app(Settings(tmp_path, token=TOKEN))) as url, driving(folder):
        async with door_of(engine) as door, httpx.AsyncClient(headers=AUTHORIZED, timeout=200) as client:
            RunFile("run", None, Driver.here(), chat=door.removesuffix("/v1"), models=("run",)).write(folder)
            asked = [asyncio.create_task(client.post(f"{url}/v1/chat/completions", json=body)) for _ in range(3)]
            await until_true(lambda: len(engine.asked) == 3, "chat at the engine")
            asked[0].cancel()
            await until_true(lambda: engine.aborted > 0, "end of the chat", timeout_s=30)
            await client.get(f"{url}/v1/runs")
            assert engine.aborted == 1 and not asked[1].done(), "those who wait are served"
            for each in asked:
                each.cancel()
            await until_true(lambda: engine.aborted == 3, "end of the chats", timeout_s=30)


@pytest.fixture
def endless(tmp_path: Path) -> Iterator[dict[str, Any]]:
    """A recipe whose plan comes to no end: its reward function is not loaded."""
    (tmp_path / "mine.py").write_text("import time\ntime.sleep(600)\n")
    yield {
        "method": "grpo",
        "rewards": [{"fn": f"{tmp_path}/mine.py:reward"}],
        "data": {"path": "no.jsonl"},
        "train": {"steps": 1},
    }
    for each in plans():
        each.kill()


def plans() -> list[psutil.Process]:
    """The processes that make plans for this one."""
    return [each for each in psutil.Process().children() if not ended(each) and "plan" in each.cmdline()]


async def test_a_plan_whose_client_has_gone_leaves_its_place_to_others(tmp_path: Path, endless: dict[str, Any]):
    with listening(create_app(Settings(tmp_path / "runs", token=TOKEN, allow_code=True))) as url:
        async with httpx.AsyncClient(base_url=url, headers=AUTHORIZED, timeout=200) as client:
            asked = [asyncio.create_task(client.post("/v1/plan", json={"recipe": endless})) for _ in range(3)]
            await until_true(lambda: len(plans()) == planning.AT_ONCE == len(asked) - 1, "plans")
            for each in asked:
                each.cancel()
            await until_true(lambda: not plans(), "end of the plans", timeout_s=30)
            ends = {**endless, "rewards": [{"fn": "exact_match"}]}
            answer = await client.post("/v1/plan", json={"recipe": ends})
    assert answer.status_code == 422 and "no.jsonl" in answer.json()["error"]["message"]


async def test_a_plan_that_finds_no_place_in_time_is_refused(tmp_path: Path, endless: dict[str, Any]):
    config = config_of(Recipe(recipe=endless), runs=tmp_path, allow_code=True)
    held = [asyncio.create_task(planning.plan(config, None)) for _ in range(planning.AT_ONCE)]
    try:
        await until_true(lambda: len(plans()) == planning.AT_ONCE, "plans")
        with pytest.raises(Problem, match="2 plans are being made already") as refused:
            await planning.plan(config, None, queue_s=0.01)
        assert refused.value.status == 429 and len(plans()) == planning.AT_ONCE
    finally:
        for each in held:
            each.cancel()
        await asyncio.gather(*held, return_exceptions=True)
    assert plans() == []


class HangingJobs(ProcessJobs):
    """A dashboard that takes connections and does not answer."""

    def __init__(self) -> None:
        super().__init__()
        self.answers, self.asked, self.most = threading.Event(), 0, 0

    def ready(self) -> None:
        self.asked += 1
        self.most = max(self.most, self.asked)
        self.answers.wait(200)
        self.asked -= 1


def test_reads_are_answered_and_probes_refused_while_the_dashboard_hangs(tmp_path: Path):
    jobs = HangingJobs()
    write_run(tmp_path, "t")
    with listening(create_app(Settings(tmp_path, token=TOKEN, fresh_s=0.0), jobs)) as url:
        with ThreadPoolExecutor(THREADS + 5) as pool:
            try:
                probes = [pool.submit(httpx.get, f"{url}/readyz", timeout=200) for _ in range(THREADS + 5)]
                until(lambda: jobs.asked, "probe")
                for path in ("/v1/runs", "/v1/runs/t", "/v1/runs/t/events"):
                    assert httpx.get(url + path, headers=AUTHORIZED, timeout=30).status_code == 200, path
                answers = [each.result() for each in probes]
            finally:
                jobs.answers.set()
        assert {each.status_code for each in answers} == {503}
        assert {each.json()["error"]["type"] for each in answers} == {"unavailable"}
        assert "was not found out in" in answers[0].json()["error"]["message"]
        assert 1 <= jobs.most <= 2
        until(lambda: not jobs.asked, "end of the calls")
        assert httpx.get(f"{url}/readyz", timeout=200).json() == {"status": "ready"}, "as soon as it answers again"

"""A driver that trains nothing: it drives a run's folder, does at once what it is asked for, and answers chats.

requests/*.json ──► a thread ──► events.jsonl, status.json, checkpoints/
chat            ──► an event loop in another ──► `tests.chat_engine`
"""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from orchestrator.checkpoint import MANIFEST, STATE
from orchestrator.cluster.control import Desired, RunFile, put_status, take_requests
from orchestrator.cluster.run_lock import Driver, driving
from orchestrator.data import synthetic_examples
from tests.chat_engine import Engine, door_of
from tests.service_client import add_events
from tests.waiting import until

LOOK_EVERY_S = 0.02
STEP = 3
RANK = {"index": 0, "node": "a", "pid": 7, "state": "working", "verb": "update", "seconds": 0.5}
MEMBER = {"index": 0, "state": "serving", "calls": 1, "node": "a", "pid": 8, "version": STEP}


@contextmanager
def live(folder: Path) -> Iterator[None]:
    """While the block lasts the run in that folder is in progress. A request to stop is taken and not carried out."""
    ended, ready = threading.Event(), threading.Event()
    threads = [
        threading.Thread(target=lambda: asyncio.run(_chat(folder, ready, ended)), daemon=True),
        threading.Thread(target=_drive, args=(folder, ended), daemon=True),
    ]
    with driving(folder):
        put_status(folder, {})
        threads[0].start()
        until(ready.is_set, "the chat of the run")
        threads[1].start()
        try:
            yield
        finally:
            ended.set()
            for thread in threads:
                thread.join(60)


async def _chat(folder: Path, ready: threading.Event, ended: threading.Event) -> None:
    tokenizer = synthetic_examples.tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    engine = Engine(tokenizer)
    engine.says = ["2"] * 100_000
    async with door_of(engine, folder.name) as url:
        chat, models = url.removesuffix("/v1"), (folder.name,)
        can = {"elastic": ("rollout",), "autoscaled": ("rollout",), "attachable": ("rollout",)}
        RunFile(folder.name, "10.0.0.1:6379", Driver.here(), chat=chat, models=models, **can).write(folder)
        ready.set()
        while not ended.is_set():
            await asyncio.sleep(LOOK_EVERY_S)


def _drive(folder: Path, ended: threading.Event) -> None:
    workers, engines = 1, dict[str, int]()  # address -> worker
    while not ended.wait(LOOK_EVERY_S):
        desired = Desired(("rollout",), ("rollout",), ("rollout",))
        for request in take_requests(folder):
            desired.add(request)
        workers = desired.workers.get("rollout", workers)
        for ticket, hold in desired.pauses.items():
            add_events(
                folder, {"event": "paused" if hold else "unpaused", "time": 1.0, "step": STEP, "asked": [ticket]}
            )
        for ticket in desired.checkpoints:
            path = str(_saved(folder))
            add_events(folder, {"event": "checkpoint", "time": 1.0, "step": STEP, "path": path, "asked": [ticket]})
        for each in desired.engines:
            said = {"role": each.role, "address": each.address, "asked": [each.ticket], "time": 1.0}
            if each.token is not None:
                worker = {"worker": engines.setdefault(each.address, 1 + len(engines))}
                add_events(folder, {"event": "attached", **said, **worker}, {"event": "joined", **said, **worker})
            elif each.address in engines:
                add_events(folder, {"event": "detached", **said, "worker": engines[each.address]})
            else:
                add_events(folder, {"event": "refused", **said, "why": "there is none"})
        scaled = {"min": 0, "max": 8, "held": True, "said": ""}
        told = {"desired": workers, "serving": workers, "members": [MEMBER] * min(workers, 1), "autoscale": scaled}
        put_status(folder, {"rollout": told}, ranks={"policy": [RANK]}, phase="grpo")


def _saved(folder: Path) -> Path:
    path = folder / "checkpoints" / f"step-{STEP:08d}"
    path.mkdir(parents=True, exist_ok=True)
    (path / STATE).write_text(json.dumps({"total_step": STEP, "phase": "grpo"}))
    (path / MANIFEST).write_text(json.dumps({"model": {"bytes": 5}}))
    return path

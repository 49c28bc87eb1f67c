"""The service in this process, over folders of runs that a test writes."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import uvicorn
from fastapi import FastAPI
from fastapi.testclient import TestClient

from orchestrator.reporting.metrics import MetricsLog
from orchestrator.reporting.token_tables import TokenLimits, TokenRow
from orchestrator.service.app import create_app
from orchestrator.service.settings import Settings

TOKEN = "a-token-of-the-tests-0123456789"
AUTHORIZED = {"Authorization": f"Bearer {TOKEN}"}


def client(runs: Path, **settings: Any) -> TestClient:
    """With the token; each answer is made anew. An error that nobody expected is an answer with status 500, as a client
    sees it."""
    app = create_app(Settings(runs, **{"token": TOKEN, "fresh_s": 0.0, **settings}))
    return TestClient(app, base_url="http://127.0.0.1", headers=AUTHORIZED, raise_server_exceptions=False)


@contextmanager
def listening(app: FastAPI) -> Iterator[str]:
    """The URL of the application behind a real socket, for clients that read a stream while it is written."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        server = uvicorn.Server(uvicorn.Config(app, log_level="error", timeout_graceful_shutdown=1))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [taken]}, daemon=True)
        thread.start()
        deadline = time.monotonic() + 200
        while not server.started:
            assert thread.is_alive() and time.monotonic() < deadline, "the server did not start"
            time.sleep(0.01)
        try:
            yield f"http://127.0.0.1:{taken.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join(60)


def write_run(
    runs: Path, name: str, *, events: Sequence[dict[str, Any]] = (), metrics: Sequence[dict[str, Any]] = ()
) -> Path:
    """A run's folder as `troupe run` leaves it."""
    folder = runs / name
    folder.mkdir(parents=True)
    config = {"name": "t", "phases": {"grpo": {"method": "grpo"}}, "checkpoint": {"grace_s": 15.0}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "run.json").write_text("{}")
    add_events(folder, {"event": "prepared", "time": 1000.0}, *events)
    log = MetricsLog(folder)
    for line in metrics:
        values = {key: value for key, value in line.items() if key not in ("step", "phase")}
        log.write(line["step"], line.get("phase", "grpo"), values)
    log.close()
    return folder


def add_events(folder: Path, *events: dict[str, Any]) -> None:
    with (folder / "events.jsonl").open("a") as stream:
        stream.write("".join(json.dumps(event) + "\n" for event in events))


def write_samples(folder: Path, step: int, rewards: Sequence[float | None]) -> None:
    log = MetricsLog(folder)
    rows = [{"prompt": "1+1=", "completion": str(n), "reward": reward} for n, reward in enumerate(rewards)]
    log.write_completions(step, rows)
    log.close()


def write_tokens(folder: Path, step: int, rows: Mapping[int, Sequence[dict[str, Any]]], **more: int) -> None:
    """Of lines of the step's samples, sequences of tokens: `pieces`, `mask` and columns, NaN where nothing is known."""
    texts = list(dict.fromkeys(piece for found in rows.values() for each in found for piece in each["pieces"]))

    class Pieces:
        def of(self, tokens: Sequence[int]) -> list[str]:
            return [texts[token] for token in tokens]

    found = [
        TokenRow(
            line,
            more.get("start", 0),
            more.get("total", len(each["pieces"])),
            np.array([texts.index(piece) for piece in each["pieces"]]),
            np.array(each["mask"], np.bool_),
            {name: np.array(of, np.float32) for name, of in each.items() if name not in ("pieces", "mask")},
        )
        for line, sequences in rows.items()
        for each in sequences
    ]
    pieces: Any = Pieces()
    log = MetricsLog(folder)
    log.write_tokens(step, found, pieces, TokenLimits(rows=100, tokens=10**6, steps=100))
    log.close()

"""What the service gives under load, and what the load costs the run that trains beside it.

    python tests/benchmarks/service_load.py --rounds 3
    python tests/benchmarks/service_load.py --local

`troupe up` is started as a user starts it, with a `grpo` run as its job and finished runs beside it (`--local`: `troupe
serve --local`, with the run in one process and no Ray). Windows of time
with and without load alternate: in `reads` the read routes are asked at a fixed rate, whether or not earlier answers
have come (a late answer's time counts from when it was due); in `chats` so many streams are always open.

    quiet │ reads │ quiet │ chats │ quiet │ both │ quiet │ reads ...    a window's step time against its neighbours'

The client runs on the same cores, so what it and the service use is printed. Prints tables, then one JSON line.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import psutil
import yaml
from load_windows import WINDOWS, Seen, Window, ratio, report, show
from processes import processor

from orchestrator.service.priority import preempt_nobody
from orchestrator.service.private_ray import Up
from orchestrator.service.service_folder import ADDRESS_FILE, service_folder

TROUPE = Path(sys.executable).parent / "troupe"
DEADLINE_S = 240.0
SETTLE_S = 1.0  # at the beginning of a window: requests of the one before it end
LEAST_NICE = 19
FINISHED_LINES = 2000  # of metrics, of each finished run
TEMPLATE = "{% for m in messages %}{{ m.content }}{% endfor %}"
# What a page that shows a run asks for, and what asks for the service itself.
READS = (
    "/v1/runs",
    "/v1/runs/{run}",
    "/v1/runs/{run}/metrics?limit=100",
    "/v1/runs/{run}/metrics?after_step={step}",
    "/v1/runs/{run}/metrics?name=reward&name=loss",
    "/v1/runs/{run}/events?after=10",
    "/v1/runs/{run}/samples?order=-reward&limit=20",
    "/v1/runs/{run}/logs",
    "/v1/runs/{run}/checkpoints",
    "/v1/models",
    "/metrics",
    "/healthz",
)


@dataclass(frozen=True)
class Service:
    url: str
    pid: int


def main() -> None:
    options = _options()
    with tempfile.TemporaryDirectory() as folder, served(options, Path(folder)) as (service, runs):
        with ProcessPoolExecutor(1, initializer=as_if_elsewhere) as client:
            windows, seen = client.submit(client_of, options, service, runs).result()
        add_step_times(windows, runs / "live")
    ratios = {kind: ratio(windows, kind) for kind in WINDOWS}
    show(windows, seen, ratios, options.rounds * options.window_s)
    print(json.dumps({"benchmark": "service_load", "processor": processor(), "results": report(windows, seen, ratios)}))


def as_if_elsewhere() -> None:
    """On the user's machine the client would be elsewhere, so it takes what nobody wants of the cores: a session of its
    own, and the policy for idle time (`orchestrator/service/priority.py` says why both)."""
    os.setsid()
    os.nice(LEAST_NICE)
    with contextlib.suppress(FileNotFoundError):
        Path("/proc/self/autogroup").write_text(str(LEAST_NICE))
    preempt_nobody(os.getpid())


def client_of(options: argparse.Namespace, service: Service, runs: Path) -> tuple[list[Window], dict[str, Seen]]:
    return asyncio.run(measure(options, service, runs))


@contextmanager
def served(options: argparse.Namespace, folder: Path) -> Iterator[tuple[Service, Path]]:
    """A service with a run in progress, `live`, that has made its first steps, and finished runs."""
    runs = folder / "runs"
    recipe = folder / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(_recipe(options, folder)))
    service = None
    try:
        service = _alone(runs) if options.local else _beside_ray(runs)
        _troupe("submit", recipe, "--runs", runs, "--name", "live")
        _until(lambda: len(_steps(runs / "live")) >= options.warm_up, "the first steps", runs / "live")
        for number in range(options.finished):
            write_finished(runs / "live", runs / f"finished-{number}")
        yield service, runs
    except BaseException:
        for log in sorted((runs / ".service").glob("*.log")):
            print(f"{log.name}: {log.read_text()[-3000:]}", file=sys.stderr)
        raise
    finally:
        if not options.local:
            _troupe("down", "--runs", runs)
        elif service is not None:
            _troupe("stop", runs / "live")
            psutil.Process(service.pid).terminate()


def _beside_ray(runs: Path) -> Service:
    _troupe("up", "--runs", runs, "--port", "0", "--cpus", "8", "--object-store-mib", "200")
    up = Up.read(runs)
    assert up is not None
    return Service(up.service, up.server.pid)


def _alone(runs: Path) -> Service:
    folder = service_folder(runs)
    with (folder / "service.log").open("w") as log:
        process = subprocess.Popen(
            [TROUPE, "serve", "--local", "--runs", runs, "--port", "0"], stdout=log, stderr=log, start_new_session=True
        )
    _until((folder / ADDRESS_FILE).exists, "service", runs)
    return Service(json.loads((folder / ADDRESS_FILE).read_text())["url"], process.pid)


def write_finished(live: Path, folder: Path) -> None:
    """A run that is over, with what `live` has and a longer history."""
    folder.mkdir()
    for name in ("recipe.json", "config.json", "run.json", "console.log", "events.jsonl"):
        shutil.copy(live / name, folder / name)
    shutil.copytree(live / "completions", folder / "completions", ignore=shutil.ignore_patterns("*.tmp"))
    with (folder / "events.jsonl").open("a") as stream:
        stream.write(json.dumps({"time": time.time(), "event": "finished", "scores": {}}) + "\n")
    lines = [line for line in _lines(live / "metrics.jsonl") if "loss" in line]
    with (folder / "metrics.jsonl").open("w") as stream:
        for step, line in zip(range(1, FINISHED_LINES + 1), itertools.cycle(lines)):
            stream.write(json.dumps({**line, "step": step}) + "\n")


async def measure(options: argparse.Namespace, service: Service, runs: Path) -> tuple[list[Window], dict[str, Seen]]:
    token = (runs / ".service" / "token").read_text()
    seen = {kind: Seen() for kind in WINDOWS}
    windows: list[Window] = []
    connector = aiohttp.TCPConnector(limit=options.streams + 64)
    headers = {"Authorization": f"Bearer {token}"}
    timeout = aiohttp.ClientTimeout(total=DEADLINE_S)
    async with aiohttp.ClientSession(service.url, headers=headers, connector=connector, timeout=timeout) as http:
        loads: dict[str, Callable[[Seen], list[Any]]] = {
            "quiet": lambda _: [],
            "reads": lambda into: [reads(http, options, runs, into)],
            "chats": lambda into: [chats(http, options, into)],
            "both": lambda into: [reads(http, options, runs, into), chats(http, options, into)],
        }
        for kind in (*itertools.chain(*(("quiet", kind) for kind in WINDOWS * options.rounds)), "quiet"):
            if kind in options.leave_out:
                continue
            into = Seen()
            windows.append(await window(kind, loads[kind](into), service.pid, options.window_s))
            if kind != "quiet":
                seen[kind].merge(into)
    return windows, seen


async def window(kind: str, load: list[Any], server: int, seconds: float) -> Window:
    tasks = [asyncio.create_task(each) for each in load]
    await asyncio.sleep(SETTLE_S)
    began, service, client = time.time(), _cpu_s(server), time.process_time()
    await asyncio.sleep(seconds)
    ended = time.time()
    used = (_cpu_s(server) - service) / (ended - began), (time.process_time() - client) / (ended - began)
    for task in tasks:
        task.cancel()
    for failed in await asyncio.gather(*tasks, return_exceptions=True):
        if not isinstance(failed, asyncio.CancelledError | None):
            raise failed
    return Window(kind, began, ended, *used)


async def reads(http: aiohttp.ClientSession, options: argparse.Namespace, runs: Path, seen: Seen) -> None:
    """Open loop: requests leave when they are due. Half of them ask for the run in progress."""
    draw, began = random.Random(0), time.perf_counter()
    names = ["live"] * options.finished + [f"finished-{number}" for number in range(options.finished)]
    under_way = set[asyncio.Task[None]]()
    try:
        for number in itertools.count():
            due = began + number / options.rate
            await asyncio.sleep(max(0.0, due - time.perf_counter()))
            route = draw.choice(READS)
            path = route.format(run=draw.choice(names or ["live"]), step=draw.randrange(FINISHED_LINES))
            task = asyncio.create_task(read(http, route, path, due, seen))
            under_way.add(task)
            task.add_done_callback(under_way.discard)
    finally:  # those that were sent are answered, and count
        await asyncio.wait_for(asyncio.gather(*under_way), DEADLINE_S)


async def read(http: aiohttp.ClientSession, route: str, path: str, due: float, seen: Seen) -> None:
    try:
        async with http.get(path) as answer:
            body = await answer.read()
            if answer.status != 200 or not body:
                seen.errors[f"{route}: {answer.status}"] += 1
    except (aiohttp.ClientError, TimeoutError) as error:
        seen.errors[f"{route}: {type(error).__name__}"] += 1
    seen.add(route, time.perf_counter() - due)


async def chats(http: aiohttp.ClientSession, options: argparse.Namespace, seen: Seen) -> None:
    await asyncio.gather(*(chat(http, number, seen) for number in range(options.streams)))


async def chat(http: aiohttp.ClientSession, number: int, seen: Seen) -> None:
    """One stream after another. A stream is an error if it does not come to its end."""
    for turn in itertools.count():
        message = {"role": "user", "content": f"question {number}, {turn}"}
        body = {"model": "live", "messages": [message], "max_tokens": 32, "stream": True, "temperature": 1.0}
        began, first = time.perf_counter(), None
        try:
            async with http.post("/v1/chat/completions", json=body) as answer:
                text = b""
                async for part in answer.content.iter_any():
                    first = first or time.perf_counter()
                    text += part
                if answer.status != 200 or not text.endswith(b"data: [DONE]\n\n") or b'"error"' in text:
                    seen.errors[f"chat: {answer.status} {text[-200:]!r}"] += 1
        except (aiohttp.ClientError, TimeoutError) as error:
            seen.errors[f"chat: {type(error).__name__}"] += 1
        seen.add("chat, to its end", time.perf_counter() - began)
        seen.add("chat, to its first part", (first or time.perf_counter()) - began)


def add_step_times(windows: list[Window], run: Path) -> None:
    """Mean seconds of the steps that lie within a window."""
    times = _steps(run)
    for each in windows:
        inside = [at for at in times if each.began <= at <= each.ended]
        if len(inside) > 1:
            each.step_s = (inside[-1] - inside[0]) / (len(inside) - 1)


def _steps(run: Path) -> list[float]:
    """When each training step was logged."""
    return [line["time"] for line in _lines(run / "metrics.jsonl") if "loss" in line]


def _lines(file: Path) -> list[dict[str, Any]]:
    if not file.exists():
        return []
    return [json.loads(line) for line in file.read_text().splitlines(keepends=True) if line.endswith("\n")]


def _cpu_s(pid: int) -> float:
    times = psutil.Process(pid).cpu_times()
    return times.user + times.system


def _troupe(*arguments: Any) -> None:
    done = subprocess.run(
        [TROUPE, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
    )
    if done.returncode:
        raise RuntimeError(f"`troupe {arguments[0]}` ended with {done.returncode}: {done.stdout}{done.stderr}")


def _until(condition: Callable[[], Any], what: str, run: Path) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        if time.monotonic() > deadline:
            console = run / "console.log"
            raise RuntimeError(f"no {what}: {console.read_text()[-3000:] if console.exists() else 'it never started'}")
        time.sleep(0.2)


def _recipe(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    (folder / "template.jinja").write_text(TEMPLATE)
    room = {} if options.local else {"threads": 1, "kv_cache_gib": 0.1}
    return {
        "name": "load",
        "model": {"path": f"example:skewed-{options.size}", "chat_template": str(folder / "template.jinja")},
        "method": "grpo",
        "options": {"num_generations": 4},
        "data": {"path": "example:skewed"},
        "train": {"steps": 100_000, "batch_size": 8, "learning_rate": 1e-6},
        "sampling": {"max_tokens": 64},
        "rewards": [{"fn": "completion_length"}],
        "roles": {"rollout": {"engine": "hf" if options.local else options.engine, "workers": 1, **room}},
        "checkpoint": {"every": 50},
        "logging": {"completions_every": 10, "trackers": []},
    }


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=("2.6m", "26m"), default="2.6m")
    parser.add_argument("--engine", choices=("vllm", "hf"), default="vllm")
    parser.add_argument("--rate", type=float, default=200.0, help="Reads a second.")
    parser.add_argument("--streams", type=int, default=32, help="Chats at the same time.")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--window-s", type=float, default=15.0)
    parser.add_argument("--warm-up", type=int, default=5, help="Steps before the first window.")
    parser.add_argument("--finished", type=int, default=20, help="Runs beside it that are over.")
    parser.add_argument("--local", action="store_true", help="Without Ray, and with the hf engine.")
    parser.add_argument("--leave-out", nargs="*", default=[], choices=WINDOWS)
    return parser.parse_args()


if __name__ == "__main__":
    main()

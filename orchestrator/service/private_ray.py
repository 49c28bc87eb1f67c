"""A Ray and a service for one folder of runs, which live until they are told to end: `troupe up`, `troupe down`.

    troupe up ──► ray start --head --block     127.0.0.1, a token of its own, its dashboard and Job API
              └─► troupe serve --dashboard ... runs are its jobs

RUNS/.service/up.json    both processes, and where they are reached
RUNS/.service/up.lock    of the one `troupe up` or `troupe down` that is at work
RUNS/.service/ray-token  Ray's token; *.log: what the two print
RUNS/.service/grafana/   dashboards for Grafana: Ray's own and Troupe's, where Ray's configuration of it looks for them

The ports are chosen here, because Ray wants to be told all of them. Another program may take one before Ray does: then
others are tried.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeVar

import httpx
import psutil

from actors.errors import ConfigError, NotDone
from orchestrator.cluster.control import RUN_FILE, RunFile
from orchestrator.cluster.private_temp import private_temp
from orchestrator.cluster.ray_address import AUTH_MODE, TOKEN_PATH
from orchestrator.cluster.run_lock import Driver, not_seen, only_one
from orchestrator.planning.machine import Machine
from orchestrator.planning.plan import HEADROOM_CPUS
from orchestrator.reporting.grafana import as_file
from orchestrator.restarts import COMMAND
from orchestrator.run_handle import RunHandle
from orchestrator.service.priority import preempt_nobody, yield_to_runs
from orchestrator.service.service_folder import ADDRESS_FILE, kept_token, service_folder, url_of_process, write_whole

UP_FILE, UP_LOCK, RAY_TOKEN = "up.json", "up.lock", "ray-token"
DASHBOARDS = "RAY_METRICS_GRAFANA_DASHBOARD_OUTPUT_DIR"  # Ray writes its own there, and names it in its configuration
ATTEMPTS = 3
OBJECT_STORE_MIB = 512
STOP_TIMEOUT_S = 60.0
START_TIMEOUT_S, END_TIMEOUT_S, POLL_S = 120.0, 40.0, 0.2
PORTS = ("port", "dashboard-port", "dashboard-agent-listen-port", "dashboard-agent-grpc-port",
         "runtime-env-agent-port", "metrics-export-port", "ray-client-server-port")  # fmt: skip
SHOWN_LINES = 15
T = TypeVar("T")


@dataclass(frozen=True)
class Up:
    """What `troupe up` has started. `address`: HOST:PORT of Ray; `dashboard`, `service`: URLs."""

    ray: Driver
    server: Driver
    address: str
    dashboard: str
    service: str

    def write(self, runs: Path) -> None:
        write_whole(service_folder(runs) / UP_FILE, asdict(self))

    @classmethod
    def read(cls, runs: Path) -> Up | None:
        try:
            read = json.loads((service_folder(runs) / UP_FILE).read_text())
            return cls(Driver(**read.pop("ray")), Driver(**read.pop("server")), **read)
        except (OSError, ValueError, TypeError, KeyError):
            return None

    @property
    def lives(self) -> bool:
        return self.ray.may_live or self.server.may_live


def up(runs: Path, *, cpus: int | None, object_store_mib: int | None, serve: Sequence[str]) -> tuple[Up, bool]:
    """Start both, or the service alone where its Ray lives; the runs there go on. Returns them, and whether Ray was
    started. `serve`: further arguments of `troupe serve`. Raises ConfigError if both run already, or if another `up` or
    `down` is at work; NotDone with the last lines of the one that does not start."""
    with _one_at_a_time(runs):
        return _up(runs, cpus=cpus, object_store_mib=object_store_mib, serve=serve)


def _one_at_a_time(runs: Path) -> AbstractContextManager[None]:
    """Two at the same time would not know of what the other starts, and leave a Ray that nobody ends."""
    file = service_folder(runs) / UP_LOCK

    def refusal(other: Driver | None) -> str:
        by = f", {other}," if other else ""
        advice = not_seen(file, other) or "wait for it, then ask again"
        return f"another `troupe up` or `troupe down`{by} is at work for {runs}: {advice}"

    return only_one(file, refusal)


def _up(runs: Path, *, cpus: int | None, object_store_mib: int | None, serve: Sequence[str]) -> tuple[Up, bool]:
    folder = service_folder(runs)
    environment = environment_of(folder)
    install_dashboard(Path(environment[DASHBOARDS]))
    kept = _ray_that_lives(runs, cpus, object_store_mib)
    if kept is not None:
        server, url = _start_service(runs, environment, kept.address, kept.dashboard, serve)
        return _written(runs, Up(kept.ray, server, kept.address, kept.dashboard, url)), False
    ray = start_ray(folder, environment, cpus=cpus, object_store_mib=object_store_mib or OBJECT_STORE_MIB)
    try:
        server, url = _start_service(runs, environment, ray.address, ray.dashboard, serve)
    except BaseException:
        end(ray.process.pid)
        raise
    return _written(runs, Up(Driver.of(ray.process.pid), server, ray.address, ray.dashboard, url)), True


def _ray_that_lives(runs: Path, cpus: int | None, object_store_mib: int | None) -> Up | None:
    """What was started before, if its Ray lives without its service. Raises ConfigError if the service lives, too, or
    alone, or if this Ray is to have another size."""
    known = Up.read(runs)
    if known is None or not known.lives:
        return None
    if known.server.may_live and known.ray.may_live:
        raise ConfigError(f"a Ray and a service for {runs} run already, at {known.service}; `troupe down` ends them")
    if known.server.may_live:
        raise ConfigError(
            f"the service for {runs} runs at {known.service}, but its Ray at {known.address} has died: `troupe down` "
            "ends the service, and then `troupe up` starts both"
        )
    for option, given in (("--cpus", cpus), ("--object-store-mib", object_store_mib)):
        if given is not None:
            raise ConfigError(
                f"{option} {given}: the Ray for {runs}, at {known.address}, lives, so only its service is started. "
                f"Leave {option} out, or end Ray and its runs by `troupe down` first"
            )
    return known


def _start_service(
    runs: Path, environment: dict[str, str], address: str, dashboard: str, serve: Sequence[str]
) -> tuple[Driver, str]:
    """The process and its URL, once it answers. Raises NotDone with its last lines if it does not start."""
    folder = service_folder(runs)
    options = ["--runs", str(runs), "--dashboard", dashboard, "--ray-address", address, *serve]
    (folder / ADDRESS_FILE).unlink(missing_ok=True)
    server = _started([*COMMAND, "serve", *options], folder / "service.log", environment)
    yield_to_runs(server.pid)
    try:
        # Another service of the folder may write the address, too: it is not the one that `troupe down` would end.
        url = _until(lambda: url_of_process(runs, server.pid), server, folder / "service.log", "the service")
        preempt_nobody(server.pid)
        return Driver.of(server.pid), url
    except BaseException:
        end(server.pid)
        raise


def _written(runs: Path, started: Up) -> Up:
    started.write(runs)
    return started


def down(runs: Path) -> bool:
    """End the runs, the service and Ray. False if neither of the two ran. Raises ConfigError if an `up` or another
    `down` is at work."""
    with _one_at_a_time(runs):
        return _down(runs)


def _down(runs: Path) -> bool:
    known = Up.read(runs)
    if known is None or not known.lives:
        return False
    if known.server.may_live:  # first: its queue would start other runs in the room of those that end
        end(known.server.pid)
    _stop_runs(runs, known.address)
    if known.ray.may_live:
        end(known.ray.pid)
    (service_folder(runs) / UP_FILE).unlink(missing_ok=True)
    (service_folder(runs) / ADDRESS_FILE).unlink(missing_ok=True)
    return True


def _stop_runs(runs: Path, address: str) -> None:
    """Those on this Ray: each ends after its step and a checkpoint. One that does not in time ends with its Ray."""
    handles = [RunHandle(file.parent, None) for file in runs.glob(f"*/{RUN_FILE}")]
    here = [each for each in handles if each.reachable and _port(RunFile.read(each.folder).address) == _port(address)]
    deadline = time.monotonic() + STOP_TIMEOUT_S
    with ThreadPoolExecutor(max_workers=32) as pool:
        for handle in here:
            pool.submit(handle.stop, timeout_s=deadline - time.monotonic())


def _port(address: str | None) -> str:
    return (address or "").rpartition(":")[2]


def install_dashboard(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "troupe.json").write_text(as_file())


def environment_of(folder: Path) -> dict[str, str]:
    """What both are started with, and whoever wants to reach this Ray needs."""
    token = folder / RAY_TOKEN
    kept_token(token, secrets.token_hex(32))
    inherited = {name: value for name, value in os.environ.items() if name not in ("RAY_ADDRESS", "RAY_AUTH_TOKEN")}
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    drain = {"RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0"}  # there is nowhere to drain to
    own = {"PATH": path, AUTH_MODE: "token", TOKEN_PATH: str(token.resolve())}
    return {DASHBOARDS: str((folder / "grafana" / "dashboards").resolve()), **inherited, **drain, **own}


@dataclass(frozen=True)
class StartedRay:
    """`ports`: each of PORTS."""

    process: subprocess.Popen[bytes]
    ports: Mapping[str, int]

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.ports['port']}"

    @property
    def dashboard(self) -> str:
        return f"http://127.0.0.1:{self.ports['dashboard-port']}"


def start_ray(folder: Path, environment: dict[str, str], *, cpus: int | None, object_store_mib: int) -> StartedRay:
    """A head, once it answers and has a node. `folder`: for its log; no other head has it. Raises NotDone with the
    last lines of that."""
    command = shutil.which("ray", path=environment["PATH"])
    if command is None:
        raise NotDone("the command `ray` is not installed beside this Python")
    token = Path(environment[TOKEN_PATH]).read_text()
    for attempt in range(1, ATTEMPTS + 1):
        ports: dict[str, int] = dict(zip(PORTS, _free_ports(len(PORTS))))
        arguments = [
            command, "start", "--head", "--block", "--node-ip-address=127.0.0.1", "--dashboard-host=127.0.0.1",
            f"--temp-dir={private_temp(folder)}", f"--object-store-memory={object_store_mib * 2**20}",
            f"--num-cpus={cpus or Machine.here().cores + HEADROOM_CPUS}", "--disable-usage-stats",
            *(f"--{name}={port}" for name, port in ports.items()),
        ]  # fmt: skip
        ray = StartedRay(_started(arguments, folder / "ray.log", environment), ports)
        try:
            _until(lambda url=ray.dashboard: answers(url, token), ray.process, folder / "ray.log", "Ray")
            return ray
        except BaseException as error:
            end(ray.process.pid)
            if attempt == ATTEMPTS or not isinstance(error, NotDone):
                raise
    raise AssertionError


def answers(url: str, token: str) -> bool:
    """Whether the dashboard does, and knows of a living node: on a busy machine a raylet may give up before that."""
    headers = {"Authorization": f"Bearer {token}"}
    try:
        answer = httpx.get(f"{url}/api/v0/nodes?limit=100", headers=headers, timeout=5, trust_env=False)
        nodes = answer.json()["data"]["result"]["result"] if answer.status_code == 200 else []
        return any(node["state"] == "ALIVE" for node in nodes)
    except (httpx.HTTPError, ValueError, KeyError, TypeError):
        return False


def _started(command: Sequence[str], log: Path, environment: dict[str, str]) -> subprocess.Popen[bytes]:
    """A process that outlives this one. It runs in the folder of its log: Ray's processes would import what is called
    as a module of Python's own in the user's."""
    with log.open("wb") as stream:
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=stream,
            env=environment,
            cwd=log.parent,
            start_new_session=True,
        )


def _until(found: Callable[[], T | None], process: subprocess.Popen[bytes], log: Path, what: str) -> T:
    """What is found, once it is true. Raises NotDone if the process ends before that."""
    deadline = time.monotonic() + START_TIMEOUT_S
    while (ended := process.poll()) is None and time.monotonic() < deadline:
        if answer := found():
            return answer
        time.sleep(POLL_S)
    why = f"ended with exit code {ended}" if ended is not None else f"did not answer in {START_TIMEOUT_S:g} s"
    said = "\n".join(log.read_text(errors="replace").splitlines()[-SHOWN_LINES:])
    raise NotDone(f"{what} {why}; {log} ends with:\n{said}")


def end(pid: int) -> None:
    """SIGTERM, and SIGKILL for its whole session after END_TIMEOUT_S."""
    try:
        process = psutil.Process(pid)
        process.terminate()
        process.wait(END_TIMEOUT_S)
    except psutil.TimeoutExpired:
        os.killpg(pid, signal.SIGKILL)  # each was started as the leader of a session
    except psutil.NoSuchProcess:
        pass


def _free_ports(count: int) -> list[int]:
    """On no address of this machine does anybody listen: two control stores on one port, at different addresses, would
    share it, and answer each other's clients."""
    probes = [socket.socket() for _ in range(count)]
    try:
        for probe in probes:
            probe.bind(("", 0))
        return [probe.getsockname()[1] for probe in probes]
    finally:
        for probe in probes:
            probe.close()

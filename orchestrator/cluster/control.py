"""Control of a running job from outside, through its folder.

    troupe scale RUN rollout=4 ──► RUN/requests/*.json ──► the driver looks twice a second, and takes each file once
    RunHandle.pause() ...      ──►
    troupe status RUN          ◄── RUN/status.json     ◄── the driver, every second
    who drives it, and how     ◄── RUN/run.json        ◄── the driver, when its roles start

A folder and not an actor, because whoever controls a run has its folder anyway: the events that answer a request are
there. So a client needs no connection to Ray and no token of it (which is root on the cluster), it is not ended by a
Ray that dies, and a run in one process (`--local`) is no special case.
"""

from __future__ import annotations

import json
import re
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from actors.errors import ConfigError, RunError, UserError
from orchestrator.cluster.run_lock import Driver
from orchestrator.json_lines import all_lines

RUN_FILE = "run.json"
EVENTS_FILE = "events.jsonl"
REQUESTS = "requests"
STATUS_FILE = "status.json"
Workers = int | Literal["auto"]  # how many a role is to have; auto: as many as its `autoscale` decides
TOKEN = r"[\w.~+/=-]{16,200}"  # of an engine
SILENT_S = 60.0  # a driver that has put up no status for so long does not answer


@dataclass(frozen=True)
class Attachment:
    """An engine that was started elsewhere. `token`: None to detach it."""

    role: str
    address: str
    ticket: str
    token: str | None = field(repr=False)


@dataclass
class Desired:
    """What was asked of a run since its driver started. `elastic`: the roles that it can scale; `autoscaled`: those of
    them that it scales by itself. A ticket is any name that no other request has: the event that answers a request has
    it in its `asked`."""

    elastic: Sequence[str] = ()
    autoscaled: Sequence[str] = ()
    attachable: Sequence[str] = ()  # those of them that take in engines from elsewhere
    workers: dict[str, int] = field(default_factory=dict[str, int])  # by elastic role; until it is to be automatic
    engines: list[Attachment] = field(default_factory=list["Attachment"])  # in the order in which they were asked for
    pauses: dict[str, bool] = field(default_factory=dict[str, bool])  # ticket -> whether to hold; the last one counts
    checkpoints: list[str] = field(default_factory=list[str])  # tickets
    stop: bool = False

    def add(self, request: Any) -> None:
        """Raises ConfigError for what is no request, or of a role that the run cannot scale."""
        match request:
            case ["scale", str(role), int(count)] if count >= 0:
                refuse_fixed(role, self.elastic)
                self.workers[role] = count
            case ["scale", str(role), "auto"]:
                refuse_fixed(role, self.elastic)
                refuse_manual(role, self.autoscaled)
                self.workers.pop(role, None)
            case ["attach", str(role), str(address), str(token), str(ticket)]:
                refuse_attachment(role, self.attachable, address, token)
                self.engines.append(Attachment(role, address, ticket, token))
            case ["detach", str(role), str(address), str(ticket)]:
                refuse_attachment(role, self.attachable, address, None)
                self.engines.append(Attachment(role, address, ticket, None))
            case ["pause", bool(hold), str(ticket)]:
                self.pauses.setdefault(ticket, hold)
            case ["checkpoint", str(ticket)]:
                if ticket not in self.checkpoints:
                    self.checkpoints.append(ticket)
            case ["stop"]:
                self.stop = True
            case _:
                raise ConfigError(f"{json.dumps(request)[:200]} is no request to a run")


def refuse_fixed(role: str, elastic: Sequence[str]) -> None:
    """Raises ConfigError for a role that a run with these elastic roles cannot scale."""
    if role not in elastic:
        can = f"it can scale {', '.join(sorted(elastic))}" if elastic else "it has none at all"
        raise ConfigError(f"this run has no role {role} whose workers come and go; {can}")


def refuse_manual(role: str, autoscaled: Sequence[str]) -> None:
    """Raises ConfigError for a role that a run with these autoscaled roles does not scale by itself."""
    if role not in autoscaled:
        raise ConfigError(
            f"{role}=auto: this run was started without roles.{role}.autoscale; `troupe resume RUN "
            f"roles.{role}.autoscale.max=N` continues it with one once it has ended, and {role}=N sets a number now"
        )


def refuse_attachment(role: str, attachable: Sequence[str], address: str, token: str | None) -> None:
    """Raises ConfigError for a role that a run with these roles lets no engine join, for an address that is none
    (`address_of`), or a token that could not be one."""
    if role not in attachable:
        can = f"engines can be attached to {', '.join(attachable)}" if attachable else "it has none"
        raise ConfigError(
            f"no engine from elsewhere can be attached to {role}: it must be an engine role without `mixes` that takes "
            "no turns on a device and gets whole models, not adapters alone, in a run without episodes and without "
            f"distillation from its engines; {can}"
        )
    if address_of(address) != address:
        raise ConfigError(f"{address!r} is no address of an engine; write {address_of(address)}")
    if token is not None:
        refuse_token(token)


def refuse_token(token: str) -> None:
    """Raises ConfigError for a text that could not be an engine's token."""
    if not re.fullmatch(TOKEN, token):
        raise ConfigError("the engine's token must be 16 to 200 letters, digits and . _ ~ + / = -")


def address_of(text: str) -> str:
    """`host:1234` -> `http://host:1234`. Raises ConfigError for a text that is no address of a server."""
    try:
        parts = urlsplit(text if "://" in text else f"http://{text}")
        port = parts.port
    except ValueError:
        parts, port = urlsplit(""), None
    plain = re.fullmatch(r"[\w.:-]+", parts.hostname or "") and parts.path in ("", "/") and "@" not in parts.netloc
    if parts.scheme not in ("http", "https") or not plain or port is None or parts.query or parts.fragment:
        raise ConfigError(f"{text!r} is no address of an engine; write HOST:PORT or https://HOST:PORT")
    host = f"[{parts.hostname}]" if ":" in str(parts.hostname) else parts.hostname
    return f"{parts.scheme}://{host}:{port}"


@dataclass(frozen=True)
class RunFile:
    """`run.json` in a run's folder: who drives it, and what can be asked of it."""

    name: str
    address: str | None  # of Ray; None for a run in one process
    driver: Driver
    elastic: tuple[str, ...] = ()  # roles whose workers come and go
    chat: str | None = None  # where its policy is chatted with: a URL that nobody can guess
    models: tuple[str, ...] = ()  # what can be named there
    autoscaled: tuple[str, ...] = ()  # of the elastic roles, those that it scales by itself
    attachable: tuple[str, ...] = ()  # of the elastic roles, those that take in engines from elsewhere

    def write(self, folder: Path) -> None:
        _replace(folder / RUN_FILE, asdict(self))

    @classmethod
    def read(cls, folder: Path) -> RunFile:
        try:
            read: dict[str, Any] = json.loads((folder / RUN_FILE).read_text())
            driver = Driver(**read.pop("driver"))
            lists = {name: tuple(read.pop(name, ())) for name in ("elastic", "models", "autoscaled", "attachable")}
            return cls(driver=driver, **lists, **read)
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise ConfigError(
                f"{folder} is not a run's folder ({error}); give the folder that `troupe run` printed"
            ) from None


@dataclass(frozen=True)
class Standing:
    """What a driver says of itself every second. `roles`: elastic role -> desired, serving, members. `ranks`: other
    role -> each rank, as `RankHealth.described` tells it. `phase`: the one
    under way. `at_work`: those of its stages, as `Activity.observed` tells them. `waits`: what the driver waits for,
    and since how many seconds."""

    roles: Mapping[str, Any] = field(default_factory=dict[str, Any])
    ranks: Mapping[str, Sequence[Mapping[str, Any]]] = field(default_factory=dict[str, Sequence[Mapping[str, Any]]])
    phase: str | None = None
    at_work: Sequence[Mapping[str, Any]] = ()
    waits: Sequence[Mapping[str, Any]] = ()


def events(folder: Path) -> list[dict[str, Any]]:
    """The complete lines of a run's `events.jsonl`, which are not to be changed."""
    return all_lines(folder / EVENTS_FILE)


def parse_scale(text: str) -> tuple[str, Workers]:
    """`rollout=4` -> ("rollout", 4); `rollout=auto` -> ("rollout", "auto")."""
    match = re.fullmatch(r"(\w+)=(\d+|auto)", text)
    if match is None:
        raise ConfigError(
            f"cannot scale {text!r}; write ROLE=N with the name of a role and a number of workers, e.g. rollout=4, or "
            "ROLE=auto for a role with `autoscale`"
        )
    return match[1], "auto" if match[2] == "auto" else int(match[2])


class InOneProcess(UserError):
    """A run without Ray (`--local`) has no workers that come and go."""


class Silent(RunError):
    """The driver of a run seems to live, and has put up no status for SILENT_S."""


def ask(folder: Path, method: str, *arguments: Any) -> Path:
    """Put a request where the driver looks, in the notation of `Desired.add`. Returns its file, which is gone once the
    driver has taken it. Raises what `refuse` does."""
    refuse(folder, method, *arguments)
    requests = folder / REQUESTS
    requests.mkdir(mode=0o700, exist_ok=True)
    file = requests / f"{time.time_ns()}-{uuid.uuid4().hex[:8]}.json"
    _replace(file, [method, *arguments])
    return file


def refuse(folder: Path, method: str, *arguments: Any) -> None:
    """Raises ConfigError or InOneProcess for a request that the run of that folder would not take: of a role that
    cannot be scaled, or that no engine can join."""
    if method == "scale":
        run = RunFile.read(folder)
        if run.address is None:
            raise InOneProcess(f"{run.name} runs in one process (--local): it has no workers that come and go")
        refuse_fixed(arguments[0], run.elastic)
        if arguments[1] == "auto":
            refuse_manual(arguments[0], run.autoscaled)
    if method in ("attach", "detach"):
        role, address, *rest = arguments
        token = rest[0] if method == "attach" else None
        refuse_attachment(role, RunFile.read(folder).attachable, address, token)


def take_requests(folder: Path) -> Iterator[Any]:
    """The driver's side: what was asked, in the order of arrival; each is taken once."""
    for file in sorted((folder / REQUESTS).glob("*.json")):
        text = file.read_text()
        file.unlink()
        try:
            yield json.loads(text)
        except ValueError:
            yield text


def put_status(folder: Path, roles: Mapping[str, Any], **more: Any) -> None:
    """The driver's side: the elastic roles, and what else `Standing` has. Raises OSError if the disk does not take
    it."""
    _replace(folder / STATUS_FILE, {"time": round(time.time(), 3), **asdict(Standing(roles, **more))})


def status(folder: Path) -> Standing:
    """How a run stands, as its driver put it up. Raises Silent if that was long ago."""
    try:
        found: dict[str, Any] = json.loads((folder / STATUS_FILE).read_text())
    except (OSError, ValueError):
        return Standing()  # it has just started
    age = time.time() - found["time"]
    if age > SILENT_S:
        raise Silent(f"its driver has written nothing to {folder / STATUS_FILE} for {age:.0f} s")
    return Standing(**{field.name: found[field.name] for field in fields(Standing) if field.name in found})


def forget_requests(folder: Path) -> None:
    """What was asked of a driver before this one, and how that one stood."""
    list(take_requests(folder))
    (folder / STATUS_FILE).unlink(missing_ok=True)


def _replace(file: Path, content: Any) -> None:
    """Write a JSON file as a whole or not at all."""
    temporary = file.with_name(f".{file.name}.tmp")
    temporary.write_text(json.dumps(content, indent=2))
    temporary.replace(file)

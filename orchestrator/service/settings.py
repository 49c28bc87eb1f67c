"""What the service is started with, and what it refuses to be started with."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass, field
from pathlib import Path

from actors.errors import ConfigError
from orchestrator.queueing.progress import Budget

SHORTEST_TOKEN = 16  # characters
MAX_BODY_BYTES = 4 * 2**20
FRESH_S = 1.0  # a run writes its state that often


@dataclass(frozen=True)
class Settings:
    """`runs`: the folder that holds the runs' folders. `token`: None lets every process of this machine in.
    `allow_code`: a recipe may name code, and environment variables.

    `dashboard`: URL of the dashboard of the Ray that runs are jobs of, `ray_address`: HOST:PORT of that Ray, for plans;
    without them each run is a process of this machine that starts a Ray of its own, or none if `local`.

    `at_once`: how many runs may have a process; None: as many as find room. `autoscaling`: the Ray adds nodes for what
    waits in it, so a run is not compared with those that are there. `preempt`: runs take the place of running ones of
    lower priority. `budget`: of failures, after which a run is resumed. `fresh_s`: how old an answer to a read may be,
    in seconds."""

    runs: Path
    host: str = "127.0.0.1"
    port: int = 8400
    token: str | None = field(default=None, repr=False)
    allow_code: bool = False
    dashboard: str | None = None
    ray_address: str | None = None
    local: bool = False
    at_once: int | None = None
    autoscaling: bool = False
    preempt: bool = False
    budget: Budget = field(default_factory=Budget)
    max_body_bytes: int = MAX_BODY_BYTES
    fresh_s: float = FRESH_S

    def __post_init__(self) -> None:
        if self.token is None and not is_loopback(self.host):
            raise ConfigError(
                f"--host {self.host} can be reached from other machines, and there is no token: whoever reaches the "
                "port could run jobs here. Leave out --no-token, or give --host 127.0.0.1"
            )
        if self.token is not None and (len(self.token) < SHORTEST_TOKEN or not self.token.isascii()):
            raise ConfigError(f"the token must have at least {SHORTEST_TOKEN} characters, all ASCII")


def is_loopback(host: str) -> bool:
    """Whether only processes of this machine can reach a server that is bound to `host`."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:  # a name may resolve to anything
        return False

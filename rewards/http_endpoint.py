"""A reward that is an HTTP endpoint: JSON in, scores out.

    POST URL   {"version": 1, "prompts": [n], "completions": [n], "columns": {name: [n]}, "options": {...}}
    200        {"version": 1, "scores": [n numbers or null]}

`prompts` and `completions` are texts or lists of messages, as in the data; `columns` are those of the data set,
`options` the reward's. Other keys of an answer are ignored. 408, 425, 429, 5xx, and a connection that fails or breaks
mean "again, or another replica", after `Retry-After` seconds if the server says so; another 4xx, and a redirect,
"never". Anything else than that answer is a failure and no score.

    call ─► the replica that did not just fail, with the fewest calls ─► answer, at most `MAX_ANSWER` bytes

Addresses that are not of the public Internet (loopback, private networks, a cloud's metadata service) are refused
unless `allow_private`, each time a name is resolved: what it resolves to may change. Redirects are not followed and
proxies of the environment not used, because either would lead around that.
"""

from __future__ import annotations

import asyncio
import ipaddress
import json
import os
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import aiohttp
from aiohttp.abc import AbstractResolver, ResolveResult
from yarl import URL

from actors.errors import ConfigError, first_lines
from rewards.calls import plain
from rewards.options import SENT, not_sent, refuse_offered, sent
from rewards.reward import AttemptFailed, FailureKind, Handling, Reward

VERSION = 1  # of the format above
BUSY = (408, 425, 429)  # of the client errors, those that may be none the next time
REST_S = 10.0  # for which a replica that failed is the last choice
MAX_ANSWER = 4 * 2**20  # bytes
SHOWN = 200  # characters of a server's complaint
CLOSE_TIMEOUT_S = 5.0


@dataclass(frozen=True)
class EndpointSpec:
    """Which replicas, and what they are sent. `variables`: header -> the environment variable that holds its value, so
    that no secret is in a recipe. Once `located`, `headers` are the values; they travel to the workers. Picklable."""

    urls: tuple[str, ...]
    weight: float = 1.0
    name: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict[str, Any])
    handling: Handling = field(default_factory=Handling)
    columns: tuple[str, ...] | None = None
    variables: Mapping[str, str] = field(default_factory=dict[str, str])
    allow_private: bool = False
    headers: Mapping[str, str] = field(default_factory=dict[str, str], repr=False)

    @property
    def label(self) -> str:
        """What it is called in metrics."""
        return self.name or URL(self.urls[0]).host or self.urls[0]

    @property
    def needs(self) -> frozenset[str]:
        """Columns that the data set must have for it."""
        return frozenset(self.columns or ())

    def located(self) -> EndpointSpec:
        """The same, with its headers. Raises ConfigError for addresses that are none, or are private."""
        for url in self.urls:
            _refuse_address(url, allow_private=self.allow_private)
        refuse_offered(self.options, self.urls[0])
        missing = [variable for variable in self.variables.values() if variable not in os.environ]
        if missing:
            raise ConfigError(
                f"reward {self.urls[0]}: a header is to have the value of the environment variable {missing[0]}, which "
                "is not set; set it where the run is started"
            )
        return replace(self, headers={name: os.environ[variable] for name, variable in self.variables.items()})

    def load(self) -> Reward:
        """Connects to nothing yet."""
        endpoint = HttpEndpoint(self)
        return Reward(
            self.label,
            self.weight,
            endpoint,
            sent(self.columns),
            True,
            not_sent(),
            self.handling,
            endpoint.close,
        )


@dataclass(eq=False)
class _Replica:
    url: str
    calls: int = 0
    rests_until: float = 0.0  # on the monotonic clock
    turn: int = 0  # of its last call: among equals, the one that was asked longest ago


class HttpEndpoint:
    """The replicas as one async function. Used from one event loop."""

    def __init__(self, spec: EndpointSpec) -> None:
        self._spec = spec
        self._replicas = [_Replica(url) for url in spec.urls]
        self._turns = 0
        self._session: aiohttp.ClientSession | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    async def __call__(self, **given: Any) -> Any:
        """What a replica answers as `scores`, unchecked. Raises AttemptFailed."""
        body = self._body(given)
        replica = min(self._replicas, key=lambda each: (time.monotonic() < each.rests_until, each.calls, each.turn))
        self._turns += 1
        replica.turn = self._turns
        replica.calls += 1
        answered = False
        try:
            scores = await self._ask(replica.url, body)
            answered = True
            return scores
        finally:  # a deadline ends this by cancelling it
            replica.calls -= 1
            replica.rests_until = 0.0 if answered else time.monotonic() + REST_S

    def close(self) -> None:
        if self._session is not None and self._loop is not None and self._loop.is_running():
            asyncio.run_coroutine_threadsafe(self._session.close(), self._loop).result(timeout=CLOSE_TIMEOUT_S)

    def _body(self, given: Mapping[str, Any]) -> bytes:
        columns = {name: [plain(value) for value in values] for name, values in given.items()}
        message = {
            "version": VERSION,
            **{name: columns.pop(name) for name in SENT},
            "columns": columns,
            "options": dict(self._spec.options),
        }
        try:
            return json.dumps(message, allow_nan=False).encode()
        except (TypeError, ValueError) as error:
            raise AttemptFailed(
                FailureKind.REFUSED,
                f"what it is to be sent cannot be JSON: {error}; columns=[...] names what it is sent",
            ) from None

    async def _ask(self, url: str, body: bytes) -> Any:
        try:
            # Ended by the attempt's deadline, which cancels it wherever it is.
            async with self._opened().post(url, data=body, allow_redirects=False) as response:
                text = await _read(response)
                _refuse_status(response, text, url)
                return _scores(text, url)
        except (PrivateAddress, aiohttp.InvalidURL) as error:
            raise AttemptFailed(FailureKind.REFUSED, f"{url}: {type(error).__name__}: {error}") from None
        except (aiohttp.ClientError, OSError) as error:
            why = f"{url}: {type(error).__name__}: {first_lines(error)}"
            raise AttemptFailed(FailureKind.UNREACHABLE, why) from None

    def _opened(self) -> aiohttp.ClientSession:
        """The session, made on the loop that it is used from. Connections are kept for later calls."""
        if self._session is None:
            self._loop = asyncio.get_running_loop()
            resolver = aiohttp.ThreadedResolver() if self._spec.allow_private else PublicResolver()
            self._session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=0, resolver=resolver),  # the limit is `concurrency`
                cookie_jar=aiohttp.DummyCookieJar(),
                headers={"Content-Type": "application/json", "Accept": "application/json", **self._spec.headers},
                timeout=aiohttp.ClientTimeout(total=None),  # see `_ask`
            )
        return self._session


async def _read(response: aiohttp.ClientResponse) -> bytes:
    found = bytearray()
    async for chunk in response.content.iter_any():
        found += chunk
        if len(found) > MAX_ANSWER:
            raise AttemptFailed(FailureKind.INVALID, f"{response.url}: the answer has more than {MAX_ANSWER} bytes")
    return bytes(found)


def _refuse_status(response: aiohttp.ClientResponse, text: bytes, url: str) -> None:
    status = response.status
    if status == 200:
        return
    said = f"{url}: HTTP {status} {response.reason or ''}: {text[:SHOWN].decode(errors='replace').strip()}"
    if status in BUSY or status >= 500:
        raise AttemptFailed(FailureKind.UNREACHABLE, said, _seconds(response.headers.get("Retry-After")))
    if 300 <= status < 400:
        said = f"{url}: it redirects to {response.headers.get('Location')}, which is not followed; give that address"
    raise AttemptFailed(FailureKind.REFUSED, said)


def _seconds(text: str | None) -> float:
    """Of `Retry-After`; a date is taken for no answer."""
    return float(text) if text is not None and text.isdigit() else 0.0


def _scores(text: bytes, url: str) -> Any:
    try:
        answer: Any = json.loads(text)
    except (ValueError, RecursionError) as error:
        shown = text[:SHOWN].decode(errors="replace")
        raise AttemptFailed(FailureKind.INVALID, f"{url}: the answer is no JSON ({error}): {shown}") from None
    if not isinstance(answer, Mapping) or "scores" not in answer:
        raise AttemptFailed(FailureKind.INVALID, f"{url}: the answer has no `scores`: {text[:SHOWN].decode()}")
    if answer.get("version") != VERSION:
        raise AttemptFailed(
            FailureKind.INVALID, f"{url}: an answer of version {answer.get('version')!r}; this Troupe reads {VERSION}"
        )
    if not isinstance(answer["scores"], list):
        raise AttemptFailed(FailureKind.INVALID, f"{url}: `scores` is no list: {text[:SHOWN].decode()}")
    return answer["scores"]


class PrivateAddress(Exception):
    """An address that is not of the public Internet."""


class PublicResolver(AbstractResolver):
    """Resolves names, and leaves out addresses that are not of the public Internet."""

    def __init__(self) -> None:
        self._resolver = aiohttp.ThreadedResolver()

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
    ) -> list[ResolveResult]:
        """Raises PrivateAddress if no other is left."""
        found = await self._resolver.resolve(host, port, family)
        public = [each for each in found if is_public(each["host"])]
        if found and not public:
            raise PrivateAddress(_private(host, found[0]["host"]))
        return public

    async def close(self) -> None:
        await self._resolver.close()


def is_public(address: str) -> bool:
    """Whether an IP address is of the public Internet, also where a version 4 address is written inside one of
    version 6."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        inside = ip.ipv4_mapped or ip.sixtofour or _translated(ip)
        if inside is not None:
            return is_public(str(inside))
    return ip.is_global and not ip.is_multicast


def _translated(ip: ipaddress.IPv6Address) -> ipaddress.IPv4Address | None:
    """The address of version 4 that a gateway (NAT64, RFC 6052) makes of it."""
    if ip in ipaddress.IPv6Network("64:ff9b::/96"):
        return ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
    return None


def _private(host: str, address: str) -> str:
    which = address if host == address else f"{host} is {address}, which"
    return (
        f"{which} is not an address of the public Internet; if it is the server that is meant, set allow_private=true "
        "for this reward"
    )


def _refuse_address(url: str, *, allow_private: bool) -> None:
    """Raises ConfigError for what can be seen without asking anybody. Names are resolved when they are called."""
    try:
        parsed = URL(url)
    except ValueError as error:
        raise ConfigError(f"reward {url!r} is no address: {error}") from None
    if parsed.scheme not in ("http", "https") or not parsed.host:
        raise ConfigError(f"reward {url!r} is no address of an HTTP server; write https://HOST[:PORT]/PATH")
    if parsed.user is not None or parsed.password is not None:
        raise ConfigError(
            f"reward {parsed.with_user(None)}: a password in an address is in every log; give it as a header: "
            "headers_from_env={Authorization: VARIABLE}"
        )
    if allow_private:
        return
    host = "127.0.0.1" if parsed.host == "localhost" else parsed.host
    try:
        public = is_public(host)
    except ValueError:  # a name
        return
    if not public:
        raise ConfigError(f"reward {url}: {_private(parsed.host, host)}")

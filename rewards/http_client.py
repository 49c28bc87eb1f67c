"""JSON over HTTP to one of several replicas, with every failure as an `AttemptFailed` of the right kind.

    call ─► the replica that did not just fail, with the fewest calls ─► answer, at most `MAX_ANSWER` bytes

408, 425, 429, 5xx, and a connection that fails or breaks mean "again, or another replica", after `Retry-After` seconds
if the server says so; another 4xx, and a redirect, "never".

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
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import aiohttp
from aiohttp.abc import AbstractResolver, ResolveResult
from yarl import URL

from actors.errors import ConfigError, first_lines
from rewards.reward import AttemptFailed, FailureKind

T = TypeVar("T")

BUSY = (408, 425, 429)  # of the client errors, those that may be none the next time
REST_S = 10.0  # for which a replica that failed is the last choice
MAX_ANSWER = 4 * 2**20  # bytes
SHOWN = 200  # characters of a server's complaint
CLOSE_TIMEOUT_S = 5.0
SECRET_LENGTH = 6  # characters of the shortest value of a header that is taken for a secret


@dataclass(eq=False)
class _Replica:
    url: str
    calls: int = 0
    rests_until: float = 0.0  # on the monotonic clock
    turn: int = 0  # of its last call: among equals, the one that was asked longest ago


class HttpClient:
    """The replicas of one service. Used from one event loop. Values of `headers` are secrets: where a server repeats
    one in its complaint, it is blotted out."""

    def __init__(self, urls: Sequence[str], headers: Mapping[str, str], *, allow_private: bool) -> None:
        self._headers, self._allow_private = dict(headers), allow_private
        self._replicas = [_Replica(url) for url in urls]
        self._turns = 0
        self._session: aiohttp.ClientSession | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    async def post(self, body: bytes, read: Callable[[bytes, str], T]) -> T:
        """What `read(answer, address)` makes of a replica's answer with status 200. Raises AttemptFailed, as `read`
        does for an answer that is none."""
        replica = min(self._replicas, key=lambda each: (time.monotonic() < each.rests_until, each.calls, each.turn))
        self._turns += 1
        replica.turn = self._turns
        replica.calls += 1
        answered = False
        try:
            found = read(await self._answer(replica.url, body), replica.url)
            answered = True
            return found
        except AttemptFailed as failed:
            raise AttemptFailed(failed.kind, self._without_secrets(str(failed)), failed.retry_after_s) from None
        finally:  # a deadline ends this by cancelling it
            replica.calls -= 1
            replica.rests_until = 0.0 if answered else time.monotonic() + REST_S

    def close(self) -> None:
        if self._session is not None and self._loop is not None and self._loop.is_running():
            asyncio.run_coroutine_threadsafe(self._session.close(), self._loop).result(timeout=CLOSE_TIMEOUT_S)

    async def _answer(self, url: str, body: bytes) -> bytes:
        try:
            # Ended by the attempt's deadline, which cancels it wherever it is.
            async with self._opened().post(url, data=body, allow_redirects=False) as response:
                text = await _read(response)
                _refuse_status(response, text, url)
                return text
        except (PrivateAddress, aiohttp.InvalidURL) as error:
            raise AttemptFailed(FailureKind.REFUSED, f"{url}: {type(error).__name__}: {error}") from None
        except (aiohttp.ClientError, OSError) as error:
            why = f"{url}: {type(error).__name__}: {first_lines(error)}"
            raise AttemptFailed(FailureKind.UNREACHABLE, why) from None

    def _opened(self) -> aiohttp.ClientSession:
        """The session, made on the loop that it is used from. Connections are kept for later calls."""
        if self._session is None:
            self._loop = asyncio.get_running_loop()
            resolver = aiohttp.ThreadedResolver() if self._allow_private else PublicResolver()
            self._session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=0, resolver=resolver),  # the limit is `concurrency`
                cookie_jar=aiohttp.DummyCookieJar(),
                headers={"Content-Type": "application/json", "Accept": "application/json", **self._headers},
                timeout=aiohttp.ClientTimeout(total=None),  # see `_answer`
            )
        return self._session

    def _without_secrets(self, text: str) -> str:
        for value in self._headers.values():
            for secret in (value, value.removeprefix("Bearer ")):
                text = text.replace(secret, "***") if len(secret) >= SECRET_LENGTH else text
        return text


def from_environment(variables: Mapping[str, str], url: str) -> dict[str, str]:
    """{header: value} of {header: environment variable}. Raises ConfigError for one that is not set."""
    missing = [variable for variable in variables.values() if variable not in os.environ]
    if missing:
        raise ConfigError(
            f"reward {url}: a header is to have the value of the environment variable {missing[0]}, which is not set; "
            "set it where the run is started"
        )
    return {name: os.environ[variable] for name, variable in variables.items()}


def json_of(text: bytes, url: str) -> Any:
    """Raises AttemptFailed for what is no JSON."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        shown = text[:SHOWN].decode(errors="replace")
        raise AttemptFailed(FailureKind.INVALID, f"{url}: the answer is no JSON ({error}): {shown}") from None


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


def refuse_address(url: str, *, allow_private: bool) -> None:
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

"""An address is asked for its Ray before Ray's client is, and what is wrong with it is said within seconds."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest

from actors.errors import PlacementError
from orchestrator.cluster.ray_address import AUTH_MODE, CHECK_ALIVE, TOKEN, TOKEN_PATH, refuse_unreachable

Answer = Callable[[Any], bytes]


@contextmanager
def control_store(answer: Answer) -> Iterator[str]:
    """The address of a server that answers Ray's question; `answer` gets the call."""
    handler = grpc.unary_unary_rpc_method_handler(lambda _, context: answer(context))
    service, method = CHECK_ALIVE.strip("/").split("/")
    server = grpc.server(ThreadPoolExecutor(1))
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, {method: handler}),))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        server.stop(None).wait(10)


def wants(token: str) -> Answer:
    def answer(context: Any) -> bytes:
        if dict(context.invocation_metadata()).get("authorization") != f"Bearer {token}":
            context.abort(grpc.StatusCode.UNAUTHENTICATED, "Authentication token is missing or incorrect")
        return b""

    return answer


@contextmanager
def nobody() -> Iterator[str]:
    """An address at which nothing listens, as long as the block lasts."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield f"127.0.0.1:{taken.getsockname()[1]}"


@contextmanager
def mute() -> Iterator[str]:
    """An address that takes connections and never says a word."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"127.0.0.1:{server.getsockname()[1]}"


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user without a token."""
    for name in (AUTH_MODE, TOKEN, TOKEN_PATH):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


def refusal(address: str, timeout_s: float = 5.0) -> str:
    with pytest.raises(PlacementError) as caught:
        refuse_unreachable(address, "RAY_ADDRESS", timeout_s)
    return str(caught.value)


def test_a_ray_that_answers_is_not_refused():
    with control_store(lambda _: b"") as address:
        refuse_unreachable(address, "RAY_ADDRESS")


def test_an_address_where_nothing_listens_is_refused_with_the_reason_and_where_it_was_set():
    with nobody() as address:
        message = refusal(address)
    assert f"no Ray answers at RAY_ADDRESS={address}" in message
    assert "Connection refused" in message


def test_an_address_that_accepts_the_connection_and_sends_nothing_is_refused_at_the_deadline():
    with mute() as address:
        assert "nothing was heard for 0.2 s" in refusal(address, 0.2)


@pytest.mark.parametrize("address", ["head", "head:port", ":6379"])
def test_an_invalid_address_is_refused_with_the_expected_form(address: str):
    assert "write HOST:PORT" in refusal(address)


def test_a_host_that_does_not_exist_is_named():
    assert "host.invalid:6379" in refusal("host.invalid:6379")


def test_a_ray_that_requires_a_token_is_distinguished_from_a_missing_ray():
    with control_store(wants("secret")) as address:
        message = refusal(address)
    assert "wants a token" in message
    assert f"export {AUTH_MODE}=token" in message


def test_the_token_of_the_users_file_is_sent_where_the_mode_asks_for_it(home: Path, monkeypatch: pytest.MonkeyPatch):
    (home / ".ray").mkdir()
    (home / ".ray" / "auth_token").write_text("secret\n")
    monkeypatch.setenv(AUTH_MODE, "token")
    with control_store(wants("secret")) as address:
        refuse_unreachable(address, "RAY_ADDRESS")
    with control_store(wants("another")) as address:
        assert "takes another token than the one in ~/.ray/auth_token" in refusal(address)


def test_a_token_is_not_sent_to_an_address_unless_the_mode_asks_for_it(home: Path):
    """An address that was mistyped may be anybody's."""
    (home / ".ray").mkdir()
    (home / ".ray" / "auth_token").write_text("secret\n")
    seen: list[str] = []

    def answer(context: Any) -> bytes:
        seen.extend(dict(context.invocation_metadata()))
        return b""

    with control_store(answer) as address:
        refuse_unreachable(address, "RAY_ADDRESS")
    assert seen
    assert "authorization" not in seen


def test_token_mode_without_a_token_is_an_error_that_names_its_path(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(AUTH_MODE, "token")
    with control_store(wants("secret")) as address:
        assert "put it into ~/.ray/auth_token" in refusal(address)

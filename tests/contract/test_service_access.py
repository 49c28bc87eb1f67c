"""Whom the service answers, and what it refuses: tokens, paths, addresses, bodies; every error has one shape."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import httpx
import pytest
from fastapi import FastAPI
from fastapi.routing import APIRoute
from fastapi.testclient import TestClient

from actors.errors import ConfigError
from orchestrator.service.app import create_app
from orchestrator.service.gate import PUBLIC, is_open
from orchestrator.service.settings import Settings
from tests.contract.service_stage import http, runs
from tests.service_client import AUTHORIZED, TOKEN, client, listening

__all__ = ["http", "runs"]  # fixtures


OUTSIDE = [  # written into a path where a run's id belongs
    "..", "../", "../secret", "..%2fsecret", "..%252fsecret", "%2e%2e", "%2e%2e%2fsecret", ".%2e/secret",
    "....//secret", "/etc", "%2fetc%2fpasswd", "..\\secret", "..%5csecret", "a%2f..%2f..%2fsecret", "secret%00",
    ".service", "a%0a", "~", "C:%5csecret", "%c0%ae%c0%ae%2fsecret", "a/../../secret", "link",
]  # fmt: skip


def routes() -> list[tuple[str, str]]:
    """(method, path) of every route there is."""
    app = create_app(Settings(Path("."), token=TOKEN))
    found = [(method, route) for route in app.routes for method in sorted(getattr(route, "methods", None) or ())]
    return [(method, route.path.replace("{run}", "t-1")) for method, route in found if isinstance(route, APIRoute)] + [
        (method, getattr(route, "path", "")) for method, route in found if not isinstance(route, APIRoute)
    ]


WRONG: dict[str, dict[str, Any]] = {
    "none": {},
    "another": {"Authorization": "Bearer another-token-of-the-tests"},
    "empty": {"Authorization": "Bearer "},
    "no scheme": {"Authorization": TOKEN},
    "basic": {"Authorization": f"Basic {TOKEN}"},
    "a part": {"Authorization": f"Bearer {TOKEN[:-1]}"},
    "more": {"Authorization": f"Bearer {TOKEN}x"},
    "not ascii": {"Authorization": "Bearer ä".encode("latin-1")},
    "elsewhere": {"X-Token": TOKEN},
}


@pytest.mark.parametrize(("method", "path"), [each for each in routes() if not is_open(each[1])])
def test_a_route_answers_401_to_everybody_without_the_token(runs: Path, method: str, path: str):
    http = client(runs)
    http.headers.pop("Authorization")
    for what, headers in WRONG.items():
        answer = http.request(method, path, headers=headers)
        assert answer.status_code == 401, what
        assert answer.headers["www-authenticate"] == "Bearer"
    assert http.request(method, path, params={"token": TOKEN}).status_code == 401, "a token in a URL ends up in logs"
    assert http.request(method, path, headers=AUTHORIZED).status_code not in (401, 403, 500)


def test_only_health_is_open_and_says_nothing_of_the_runs(runs: Path):
    http = client(runs)
    http.headers.pop("Authorization")
    assert {path: http.get(path).json() for path in PUBLIC} == {
        "/healthz": {"status": "ok"},
        "/readyz": {"status": "ready"},
    }
    assert {path for _, path in routes()} >= set(PUBLIC)
    assert http.get("/v1/no-such-route").status_code == 401, "nor which routes there are"


def test_the_service_is_not_ready_without_its_folder(tmp_path: Path):
    answer = client(tmp_path / "gone").get("/readyz")
    assert (answer.status_code, answer.json()["error"]["type"]) == (503, "unavailable")


def test_an_id_never_leads_out_of_the_folder_of_the_runs(runs: Path):
    app = create_app(Settings(runs, token=TOKEN))
    for rest in ("", "/events", "/metrics", "/samples", "/checkpoints", "/logs"):
        assert raw_get(app, f"/v1/runs/t-1{rest}")[0] == 200, "what is inside is found"
        for outside in OUTSIDE:
            status, body = raw_get(app, f"/v1/runs/{outside}{rest}")
            assert status in (404, 422), (outside, rest, status)
            assert b"finished" not in body and b"root:" not in body


def raw_get(app: FastAPI, path: str) -> tuple[int, bytes]:
    """(status, body) of a request for exactly this path: a client would make it a shorter one."""
    sent: list[dict[str, Any]] = []
    headers = [(name.lower().encode(), value.encode()) for name, value in AUTHORIZED.items()]
    scope = {"type": "http", "method": "GET", "path": unquote(path), "raw_path": path.encode(), "query_string": b""}
    scope |= {"headers": headers, "http_version": "1.1", "scheme": "http", "root_path": "", "server": ("127.0.0.1", 80)}

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": b""}

    async def send(message: Any) -> None:
        sent.append(message)

    asyncio.run(app(scope, receive, send))
    return sent[0]["status"], b"".join(message.get("body", b"") for message in sent)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.1", "example.org"])
def test_an_address_that_others_reach_is_refused_without_a_token(tmp_path: Path, host: str):
    with pytest.raises(ConfigError, match="can be reached from other machines, and there is no token"):
        Settings(tmp_path, host)
    assert Settings(tmp_path, host, token=TOKEN).host == host
    with pytest.raises(ConfigError, match="at least 16 characters"):
        Settings(tmp_path, host, token="short")


def test_without_a_token_only_the_names_of_this_machine_are_answered(runs: Path):
    http = client(runs, token=None)
    assert http.get("/v1/runs", headers={"Host": "localhost:8400"}).status_code == 200
    for foreign in ("evil.example", "evil.example:8400", "127.0.0.1.evil.example", ""):
        assert http.get("/v1/runs", headers={"Host": foreign}).status_code == 403, foreign


def test_a_body_that_is_too_large_is_refused_whether_or_not_it_says_so(runs: Path):
    http = client(runs, max_body_bytes=1000)
    large = json.dumps({"recipe": "x" * 2000}).encode()
    assert http.post("/v1/plan", content=large).status_code == 413
    with listening(create_app(Settings(runs, token=TOKEN, max_body_bytes=1000))) as url:
        chunks = (large[at : at + 100] for at in range(0, len(large), 100))  # sent without a length
        answer = httpx.post(f"{url}/v1/plan", content=chunks, headers=AUTHORIZED, timeout=200)
        assert answer.status_code == 413 and answer.json()["error"]["type"] == "too_large"
        small = httpx.post(f"{url}/v1/plan", content=b'{"recipe": "no such"}', headers=AUTHORIZED, timeout=200)
        assert small.status_code == 422


def test_every_error_has_the_one_shape_and_is_in_the_schema(http: TestClient):
    asked = {
        404: http.get("/v1/runs/none"),
        405: http.delete("/v1/runs/t-1"),
        422: http.get("/v1/runs/t-1/metrics?limit=0"),
    }
    for status, answer in asked.items():
        assert answer.status_code == status
        assert answer.json()["error"].keys() == {"message", "type", "param", "code"}
    assert asked[422].json()["error"]["param"] == "query.limit"
    schema = http.get("/openapi.json").json()
    for path, operations in schema["paths"].items():
        for method, operation in operations.items():
            if path not in PUBLIC:
                assert "401" in operation["responses"], (method, path)
                assert operation["security"] == [{"HTTPBearer": []}], (method, path)
    refused = schema["paths"]["/v1/runs/{run}/metrics"]["get"]["responses"]["422"]
    assert refused["content"]["application/json"]["schema"] == {"$ref": "#/components/schemas/ErrorBody"}

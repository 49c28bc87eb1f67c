"""The OpenAI protocol: runs in progress are models. A request is passed on to the run's driver, which has its engines.

client ── /v1/chat/completions {"model": RUN} ──► the driver of RUN (`orchestrator/cluster/chat_door.py`)
       ◄──────────── the answer, or its stream ──┘
"""

from __future__ import annotations

import json
import ssl
from collections.abc import AsyncIterator
from typing import Any

import httpx
from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.concurrency import run_in_threadpool

from orchestrator.cluster.control import RunFile
from orchestrator.service.departures import while_it_waits
from orchestrator.service.errors import Problem, documented
from orchestrator.service.event_stream import EVENT_STREAM
from orchestrator.service.reading_routes import Runs
from orchestrator.service.run_folders import RunFolders
from orchestrator.service.schemas import ChatRequest, Model, ModelList
from rewards.environments.openai_protocol import type_of

TIMEOUTS = httpx.Timeout(30.0, read=600.0)  # a chat may wait for a free worker
# A driver's endpoint speaks plain HTTP. For each client httpx would read all certificates, which takes 16 ms; this one
# has none, and trusts nobody.
NO_TLS = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
router = APIRouter(prefix="/v1", tags=["chat"], responses=documented(401))


@router.get("/models")
def list_models(runs: Runs) -> ModelList:
    """What can be chatted with: the policies of runs in progress, and their other engine roles as RUN/ROLE."""
    found: list[Model] = []
    for summary in runs.summaries():
        if not summary.state.over and runs.handle(summary.id).reachable:
            names = RunFile.read(runs.folder(summary.id)).models
            found += [Model(id=name, created=int(summary.created)) for name in names]
    return ModelList(data=found)


@router.post(
    "/chat/completions",
    responses={
        200: {
            "description": "A chat completion, or a stream of its chunks.",
            "content": {"application/json": {"schema": {"type": "object"}}, **EVENT_STREAM},
        },
        **documented(400, 404, 409, 413, 422, 429, 503, 504),
    },
)
async def chat(asked: ChatRequest, request: Request, runs: Runs) -> Any:
    """Chat with the policy of a run as it is now. Messages, tools, stream, temperature, top_p, max_tokens, stop, seed;
    one choice. An answer that a publication of weights interrupts goes on with the new ones."""
    return await while_it_waits(request, _answer(runs, asked.model, await request.body()))


async def _answer(runs: RunFolders, model: str, body: bytes) -> Response:
    """The driver's, whole or as its stream. If this is cancelled the request to the driver ends."""
    url = await run_in_threadpool(_door, runs, model)
    client = httpx.AsyncClient(timeout=TIMEOUTS, trust_env=False, verify=NO_TLS)
    try:
        sent = client.build_request("POST", f"{url}/v1/chat/completions", content=body)
        answer = await client.send(sent, stream=True)
        if answer.headers.get("content-type", "").startswith("text/event-stream"):
            return StreamingResponse(_passed_on(client, answer), media_type="text/event-stream")
        content = json.loads(await answer.aread())
    except httpx.TimeoutException:
        await client.aclose()
        raise Problem(504, f"run {model} did not answer in time") from None
    except httpx.HTTPError as error:
        await client.aclose()
        raise Problem(503, f"the driver of {model} does not answer: {type(error).__name__}") from None
    except ValueError:  # an error that nobody expected
        await client.aclose()
        raise Problem(503, f"the driver of {model} failed at this request; the run's log says why") from None
    except BaseException:
        await client.aclose()
        raise
    await client.aclose()
    return JSONResponse(content, answer.status_code)


async def _passed_on(client: httpx.AsyncClient, answer: httpx.Response) -> AsyncIterator[bytes]:
    """Ends the request to the driver when the client goes away, and says so if the driver does."""
    try:
        async for part in answer.aiter_raw():
            yield part
    except httpx.HTTPError as error:
        problem = {"error": {"message": f"the run ended: {type(error).__name__}", "type": type_of(503)}}
        yield b"data: " + json.dumps(problem).encode() + b"\n\n"
    finally:
        await answer.aclose()
        await client.aclose()


def _door(runs: RunFolders, model: str) -> str:
    """Raises Problem 404 for what is no run, 409 for one that cannot be chatted with now."""
    run = model.partition("/")[0]
    handle = runs.handle(run)
    if not handle.reachable:
        state = runs.summary(run).state
        raise Problem(409, f"run {run} is {state}: only a run in progress can be chatted with", "model")
    url = RunFile.read(handle.folder).chat
    if url is None:
        raise Problem(409, f"run {run} samples nothing, so it has no engine to chat with", "model")
    return url

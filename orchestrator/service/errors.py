"""Errors of the service: one shape for all of them, which is that of the OpenAI protocol, and each documented.

{"error": {"message": "there is no run t-1", "type": "not_found", "param": null, "code": null}}
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from actors.errors import RunError, UserError
from orchestrator.run_handle import NoAnswerInTime
from rewards.environments.openai_protocol import type_of

log = logging.getLogger(__name__)

WHEN = {
    400: "the body cannot be read",
    401: "no bearer token, or not the service's",
    403: "a recipe that runs code, and the service was started without --allow-code",
    404: "there is no such run, or no such part of it",
    409: "the run is in a state in which this cannot be done, or another run has its name",
    413: "the body is larger than the service takes",
    422: "a parameter or the body is not what the route takes; the message names it",
    429: "too many of these requests are going on",
    502: "Ray's Job API answered with an error",
    503: "Ray's Job API, the run's driver, or the folder of the runs cannot be reached",
    504: "the run did not answer in time",
}


class Error(BaseModel):
    """What went wrong, for people (`message`) and for programs (`type`)."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorBody(BaseModel):
    error: Error


class Problem(Exception):
    """Ends a request with this status and message."""

    def __init__(self, status: int, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.status, self.param = status, param


def documented(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """For `responses` of a route: the errors that it may answer with."""
    return {status: {"model": ErrorBody, "description": WHEN[status]} for status in statuses}


def body_of(status: int, message: str, param: str | None = None) -> dict[str, Any]:
    return ErrorBody(error=Error(message=message, type=type_of(status), param=param)).model_dump()


def answer(status: int, message: str, param: str | None = None, headers: Mapping[str, str] | None = None) -> Any:
    return JSONResponse(body_of(status, message, param), status, headers=dict(headers or {}))


def handle_errors(app: FastAPI) -> None:
    """Every error of `app` is answered in the one shape. Only those of ours are shown to the client in full; of
    one that nobody expected the class is, and its traceback is in the service's log."""

    @app.exception_handler(Problem)
    def problem(_: Request, error: Problem) -> Any:
        return answer(error.status, str(error), error.param)

    @app.exception_handler(HTTPException)
    def http(_: Request, error: HTTPException) -> Any:
        return answer(error.status_code, str(error.detail), headers=error.headers)

    @app.exception_handler(RequestValidationError)
    def invalid(_: Request, error: RequestValidationError) -> Any:
        first: dict[str, Any] = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        return answer(422, f"{where}: {first['msg']}", where)

    @app.exception_handler(UserError)
    def refused(_: Request, error: UserError) -> Any:
        return answer(422, str(error))

    @app.exception_handler(NoAnswerInTime)
    def late(_: Request, error: NoAnswerInTime) -> Any:
        return answer(504, f"{error}; what was asked still holds")

    @app.exception_handler(RunError)
    def broken(_: Request, error: RunError) -> Any:
        return answer(409, str(error))

    @app.exception_handler(OSError)
    def disk(request: Request, error: OSError) -> Any:
        log.error("a request failed", exc_info=error)
        if isinstance(error, TimeoutError | ConnectionError):
            return unexpected(request, error)
        return answer(503, f"the service cannot use the folder of the runs: {error.strerror or type(error).__name__}")

    @app.exception_handler(Exception)
    def unexpected(_: Request, error: Exception) -> Any:
        return answer(500, f"the service failed with {type(error).__name__}; its log has the traceback")


def encoded(status: int, message: str) -> bytes:
    """The body of an error, for where there is no request object yet."""
    return json.dumps(body_of(status, message)).encode()

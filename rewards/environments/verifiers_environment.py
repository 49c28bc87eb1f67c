"""An environment of the library `verifiers` (https://github.com/PrimeIntellect-ai/verifiers), as one of ours.

Its `Environment` runs whole rollouts with a client of the OpenAI protocol; so it is an agent (`openai_agent`), with the
score of its rubric as the reward. A user's file has

    def wordle(): return of_verifiers(lambda: verifiers.load_environment("wordle"))

and its data set is the environment's own, `load_environment("wordle").get_dataset().to_json("rows.jsonl")`. Rubrics
that compare the samples of a group (`score_group`) are not called: an episode is scored by itself.

Written for the `Environment` of verifiers 0.1.12. Version 0.4 has another interface, and none of that name.
"""

# pyright: basic
# (a library that is not installed with Troupe)

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Lock
from typing import Any

from actors.errors import ConfigError
from rewards.environments.chat_endpoint import MODEL
from rewards.environments.openai_agent import AgentEnvironment

COLUMNS = ("prompt", "example_id", "task", "answer", "info")  # of the library's rows
TIMEOUT_S = 3600.0  # of one answer; the limits of the episode are shorter
# The model said nothing at all, which is its own doing and has a score; every other error is not the model's.
EMPTY = "EmptyModelResponseError"


_constructing = Lock()


def of_verifiers(load: Callable[[], Any]) -> AgentEnvironment:
    """`load` returns the environment. Raises ConfigError for something that is no `verifiers.Environment`."""
    try:
        from openai import AsyncOpenAI
        from verifiers import Environment  # pyright: ignore[reportMissingImports]
        from verifiers.clients import OpenAIChatCompletionsClient  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ConfigError(
            f"of_verifiers needs the package `verifiers`, version 0.1.12 or one like it, and `openai`: {error}"
        ) from None
    with _constructing, _own_signal_handlers():
        environment = load()
    if not isinstance(environment, Environment):
        raise ConfigError(f"of_verifiers takes a verifiers.Environment, not a {type(environment).__name__}")

    async def run(row: dict[str, Any], base_url: str, api_key: str) -> float | None:
        given = {"example_id": 0, "task": "default", **{name: row[name] for name in COLUMNS if name in row}}
        async with AsyncOpenAI(base_url=base_url, api_key=api_key, max_retries=0, timeout=TIMEOUT_S) as client:
            found = await environment.run_rollout(given, OpenAIChatCompletionsClient(client), MODEL, {})
        failed = found.get("error")
        if failed and EMPTY not in str(failed):
            raise RuntimeError(f"the rollout of {type(environment).__name__} failed: {failed}")
        return found["reward"]

    return AgentEnvironment(run)


@contextmanager
def _own_signal_handlers() -> Iterator[None]:
    """The library's constructor replaces the handlers of SIGINT and SIGTERM. They are this process's own; and it runs
    in a thread, where Python allows no such thing, so that it would fail."""
    install = signal.signal
    signal.signal = lambda number, handler: signal.getsignal(number)
    try:
        yield
    finally:
        signal.signal = install

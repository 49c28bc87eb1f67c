"""A client of the service, for commands."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx

from actors.errors import ConfigError, NotDone
from orchestrator.config import overrides as syntax
from orchestrator.config.loading import find_recipe, recipes
from orchestrator.config.schema import RunConfig
from orchestrator.run_handle import RunHandle
from orchestrator.service.service_folder import found_service

CHAT_TIMEOUT_S = 600.0  # it may wait for a free worker
TIMEOUT_S = 120.0  # a young Ray takes a minute until it takes jobs


class Client:
    def __init__(self, url: str, token: str | None) -> None:
        self._url = url
        self._headers = {"Authorization": f"Bearer {token}"} if token else {}

    def submit(
        self, recipe: str | RunConfig, overrides: Sequence[str], name: str | None, priority: int = 0
    ) -> dict[str, Any]:
        """`recipe`: the name of a shipped one, a YAML file here, whose content is sent, or a configuration. Raises
        ConfigError if the service refuses it."""
        named = {"name": name} if name else {}
        sent = {"recipe": _sent(recipe), "overrides": list(overrides), "priority": priority, **named}
        return self._call("POST", "/v1/runs", sent)

    def _call(self, method: str, path: str, body: Any = None) -> Any:
        try:
            answer = httpx.request(
                method, self._url + path, json=body, headers=self._headers, timeout=TIMEOUT_S, trust_env=False
            )
        except httpx.HTTPError as error:
            raise NotDone(f"the service at {self._url} does not answer: {type(error).__name__}: {error}") from None
        if answer.is_success:
            return answer.json()
        try:
            said = answer.json()["error"]["message"]
        except (ValueError, KeyError, TypeError):
            said = answer.text[:500]
        refused = answer.status_code < 500
        raise (ConfigError if refused else NotDone)(f"the service at {self._url} says: {said}")


def submit(
    config: str | RunConfig,
    overrides: Sequence[str] = (),
    *,
    name: str | None = None,
    priority: int = 0,
    runs: str | Path = "runs",
    url: str | None = None,
) -> RunHandle:
    """Submit a run to the service of the folder `runs` (`troupe up`, `troupe serve`), which starts it as soon as there
    is room. `priority`: its place in the queue, the higher ones first. `name`: its id; the same again is the same run.

    The handle reads the run's folder, so `runs` must be the service's folder, also with a `url`. Raises ConfigError if
    the service refuses the run, NotDone if it does not answer."""
    client = Client(*found_service(Path(runs), url))
    return RunHandle(Path(runs) / client.submit(config, overrides, name, priority)["id"], None)


def _sent(recipe: str | RunConfig) -> Any:
    if isinstance(recipe, RunConfig):
        tree = recipe.model_dump(mode="json")
        cluster = {key: value for key, value in tree["cluster"].items() if key != "address"}
        return {**{key: value for key, value in tree.items() if key != "output"}, "cluster": cluster}
    if recipe in recipes() and not Path(recipe).is_file():
        return recipe
    file = find_recipe(recipe)
    return syntax.load_yaml(file.read_text(), str(file))[0]


def chat(url: str, model: str, messages: Sequence[dict[str, str]], **settings: Any) -> Iterator[str]:
    """The answer of a live policy behind `url`, in parts. Raises NotDone if it does not come to its end."""
    body = {"model": model, "messages": list(messages), "stream": True, **settings}
    address = f"{url}/v1/chat/completions"
    try:
        with httpx.stream("POST", address, json=body, timeout=CHAT_TIMEOUT_S, trust_env=False) as answer:
            if answer.status_code != 200:
                raise NotDone(json.loads(answer.read())["error"]["message"])
            for line in answer.iter_lines():
                if line.startswith("data: {"):
                    yield _text(json.loads(line.removeprefix("data: ")))
    except httpx.HTTPError as error:
        raise NotDone(f"the run does not answer: {type(error).__name__}: {error}") from None


def _text(event: dict[str, Any]) -> str:
    if "error" in event:
        raise NotDone(event["error"]["message"])
    return "".join(choice["delta"].get("content") or "" for choice in event["choices"])

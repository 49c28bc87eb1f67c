"""A reward that is an HTTP endpoint: JSON in, scores out.

    POST URL   {"version": 1, "prompts": [n], "completions": [n], "columns": {name: [n]}, "options": {...}}
    200        {"version": 1, "scores": [n numbers or null]}

`prompts` and `completions` are texts or lists of messages, as in the data; `columns` are those of the data set,
`options` the reward's. Other keys of an answer are ignored. Anything else than that answer is a failure and no score.
How a replica is chosen, what a status means and which addresses are refused: `http_client`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from yarl import URL

from rewards.calls import plain
from rewards.http_client import SHOWN, HttpClient, from_environment, json_of, refuse_address
from rewards.options import SENT, not_sent, refuse_offered, sent
from rewards.reward import AttemptFailed, FailureKind, Handling, Reward

VERSION = 1  # of the format above


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
            refuse_address(url, allow_private=self.allow_private)
        refuse_offered(self.options, self.urls[0])
        return replace(self, headers=from_environment(self.variables, self.urls[0]))

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


class HttpEndpoint:
    """The replicas as one async function. Used from one event loop."""

    def __init__(self, spec: EndpointSpec) -> None:
        self._options = dict(spec.options)
        self._client = HttpClient(spec.urls, spec.headers, allow_private=spec.allow_private)

    async def __call__(self, **given: Any) -> Any:
        """What a replica answers as `scores`, unchecked. Raises AttemptFailed."""
        return await self._client.post(self._body(given), _scores)

    def close(self) -> None:
        self._client.close()

    def _body(self, given: Mapping[str, Any]) -> bytes:
        columns = {name: [plain(value) for value in values] for name, values in given.items()}
        message = {
            "version": VERSION,
            **{name: columns.pop(name) for name in SENT},
            "columns": columns,
            "options": self._options,
        }
        try:
            return json.dumps(message, allow_nan=False).encode()
        except (TypeError, ValueError) as error:
            raise AttemptFailed(
                FailureKind.REFUSED,
                f"what it is to be sent cannot be JSON: {error}; columns=[...] names what it is sent",
            ) from None


def _scores(text: bytes, url: str) -> Any:
    answer = json_of(text, url)
    if not isinstance(answer, Mapping) or "scores" not in answer:
        raise AttemptFailed(FailureKind.INVALID, f"{url}: the answer has no `scores`: {text[:SHOWN].decode()}")
    if answer.get("version") != VERSION:
        raise AttemptFailed(
            FailureKind.INVALID, f"{url}: an answer of version {answer.get('version')!r}; this Troupe reads {VERSION}"
        )
    if not isinstance(answer["scores"], list):
        raise AttemptFailed(FailureKind.INVALID, f"{url}: `scores` is no list: {text[:SHOWN].decode()}")
    return answer["scores"]

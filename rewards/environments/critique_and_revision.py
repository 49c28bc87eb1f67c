"""A model criticises and revises its own answer by written principles: the conversation of constitutional AI."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from hashlib import blake2b
from typing import Any, cast

CRITIQUE = "Say where your last answer falls short of this principle, if it does: {principle}"
REVISION = (
    "Now write the whole answer anew, so that it keeps to this principle: {principle} Write nothing but the answer."
)
REQUESTS = {"critique": CRITIQUE, "revision": REVISION}


class CritiqueAndRevision:
    """Asks for a critique of the answer, then for a revision, `revisions` times; the model's last turn is then the last
    revision. `critiques`: false asks for revisions at once.

    Each of `principles` is a text, which stands in the requests that come with Troupe, or has the two requests
    themselves: {critique: ..., revision: ...}. Which principle a revision goes by depends on the prompt and its number
    alone, so an episode that is generated again is asked the same.
    Source: arXiv:2212.08073 (Constitutional AI), section 3."""

    def __init__(
        self, principles: Sequence[str | Mapping[str, str]], revisions: int = 1, critiques: bool = True
    ) -> None:
        if isinstance(principles, str) or not principles:
            raise ValueError(f"principles must be a list of at least one, got {principles!r}")
        if revisions < 1:
            raise ValueError(f"revisions={revisions}; ask for at least 1")
        self._kinds = ("critique", "revision") if critiques else ("revision",)
        self._principles = [_requests(each, self._kinds) for each in principles]
        self._revisions = revisions
        self._prompt, self._asked = "", 0

    def reset(self, row: dict[str, Any]) -> None:
        """The prompt stands as it is."""
        self._prompt, self._asked = repr(row["prompt"]), 0

    def step(self, message: dict[str, Any]) -> tuple[str | None, None, bool]:
        number, kind = divmod(self._asked, len(self._kinds))
        if number == self._revisions:
            return None, None, True
        self._asked += 1
        digest = blake2b(f"{self._prompt}/{number}".encode(), digest_size=8).digest()
        principle = self._principles[int.from_bytes(digest) % len(self._principles)]
        return principle[self._kinds[kind]], None, False


def _requests(principle: str | Mapping[str, str], kinds: Sequence[str]) -> Mapping[str, str]:
    """By kind."""
    if isinstance(principle, str):
        return {kind: REQUESTS[kind].format(principle=principle) for kind in kinds}
    given = cast(Mapping[Any, Any], principle)
    if missing := [kind for kind in kinds if not isinstance(given.get(kind), str)]:
        raise ValueError(f"the principle {dict(given)!r} must have a text {missing[0]!r}; or write it as one text")
    return given

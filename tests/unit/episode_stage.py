"""Requests of episodes, and completions, for tests without an engine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from rollout.episode import EpisodeRequest, Limits
from rollout.sampling import Completion, Finish, Sampling

LIMITS = Limits(turns=4, tokens=200, prompt_tokens=2000, timeout_s=60.0, call_timeout_s=30.0)

USER = [{"role": "user", "content": "2+3?"}]
CALL = '<tool_call>{"name": "add", "arguments": {"a": 2, "b": 3}}</tool_call>'


def request_of(limits: Limits = LIMITS, **changes: Any) -> EpisodeRequest:
    request = EpisodeRequest("e", "a", USER, {}, Sampling(limits.tokens), seed=3, limits=limits)
    return replace(request, **changes)


def completion(tokens: Sequence[int], version: int = 0, finish: Finish = Finish.STOP) -> Completion:
    count = len(tokens)
    logps = np.full(count, -0.5 - version, np.float32)
    return Completion(0, np.asarray(tokens, np.int32), logps, np.full(count, version, np.int32), finish)

"""A file of reward functions as a user would write it, and a worker that scores two completions with them. No Ray."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from actors.batch import Batch
from actors.sharding import Shard
from actors.worker import LocalWorker
from rewards.loading import RewardSpec
from rewards.worker import RewardWorker, ScoredTexts, ScoreResult
from tests.unit.tiny import tiny_tokenizer


def load_reward(fn: str, options: Mapping[str, Any] | None = None) -> Any:
    """A reward as its workers have it, in this process."""
    return RewardSpec(fn, options=options or {}).located().load()


SCORING = """
import asyncio

def length(completions, **kwargs):
    return [float(len(text)) for text in completions]

async def half(completions, factor=0.5):
    await asyncio.sleep(0)
    return [factor * len(text) for text in completions]

def moody(completions, mood, log_extra, log_metric):
    log_extra("mood", mood)
    log_metric("moods", len(set(mood)))
    return [None if text.startswith("x") else 1.0 for text in completions]

def broken(completions):
    raise RuntimeError("no such theorem")

def unreachable(completions):
    from actors.errors import InfraFailure
    raise InfraFailure("the judge's server is down")

def short(completions):
    return [1.0]

def words(completions):
    return ["good"] * len(completions)

def step(trainer_state, completion_ids):
    return [float(trainer_state.global_step)] * len(completion_ids)

def role_of(completions, prompts):
    return [float(c[0]["role"] == "assistant" and p[0]["role"] == "user") for c, p in zip(completions, prompts)]

class Threshold:
    def __init__(self, at): self.at = at
    def __call__(self, completion_ids): return [float(len(ids) > self.at) for ids in completion_ids]

class Silent:
    pass

def leaves(completions):
    import sys
    sys.exit(3)

async def leaves_later(completions):
    raise SystemExit("no more")

def stops(completions):
    return [next(iter(()))]

def cancels(completions):
    raise asyncio.CancelledError

async def cancels_later(completions):
    raise asyncio.CancelledError

def by_name(completions):
    return {"1": 0.0, "2": 0.0}

def unordered(completions):
    return {1.0, 2.0}

def digits(completions):
    return "12"

def digit_texts(completions):
    return ["1", "2"]

def undefined(completions):
    return [0.0, float("nan")]

def endless(completions):
    while True:
        yield 1.0

def huge(completions):
    return [1e39] * len(completions)

def large(completions):
    return [3e38] * len(completions)

def judge(completions):
    class Special(Exception):
        def __init__(self, *, detail): super().__init__(detail)
    raise Special(detail="no verdict")

def vandal(prompts, completions, completion_ids, facts):
    prompts[0].append("x")
    completions[0][0]["content"] = "changed"
    completions.clear()
    completion_ids[0].clear()
    facts[0].clear()
    return [0.0, 0.0]

def witness(prompts, completions, completion_ids, facts):
    same = completions[0][0]["content"] == "abc" and facts[0] == {"a": 1}
    return [float(same and len(prompts[0]) == len(facts[0]) == 1 and len(completion_ids[0]) == 3)] * len(completions)

def logs(completions, log_extra, log_metric):
    import numpy as np
    log_extra("length", np.array([len(text) for text in completions]))
    log_extra("parts", [{"first": text[0], "of": Ellipsis} for text in completions])
    log_metric("seen", 2)
    return [0.0] * len(completions)

def logs_too(completions, log_extra, log_metric):
    log_extra("length", ["long", "short"])
    log_metric("seen", 4)
    return [0.0] * len(completions)

NOT_CALLABLE = 3
"""


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("user") / "rewards.py"  # our own package's name, on purpose
    path.write_text(SCORING)
    return path


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("tokenizer")
    tiny_tokenizer().save_pretrained(folder)
    return str(folder)


def samples(*texts: str) -> Shard:
    """Completions of the prompt `q`, one token per character, sampled by weights of version 3."""
    tokenizer = tiny_tokenizer()
    ids = [tokenizer.encode("q" + text) for text in texts]
    flat = np.concatenate(ids).astype(np.int32)
    starts = np.cumsum([0, *(len(row) for row in ids)])[:-1]
    mask = np.ones(len(flat), bool)
    mask[starts] = False
    version = np.where(mask, 3, -1).astype(np.int32)
    batch = Batch.build([len(row) for row in ids], tokens=flat, mask=mask, version=version)
    return Shard(batch, (tuple(range(len(ids))),))


async def scored(tokenizer: str, *specs: RewardSpec, prompt: Any = "q", **columns: Any) -> ScoreResult:
    return (await scored_with_texts(tokenizer, *specs, prompt=prompt, **columns))[0]


async def scored_with_texts(
    tokenizer: str, *specs: RewardSpec, prompt: Any = "q", **columns: Any
) -> tuple[ScoreResult, ScoredTexts]:
    worker = LocalWorker("reward/0", RewardWorker("reward/0", specs, tokenizer))
    await worker.call("ready", timeout_s=60)
    return await worker.call("score", samples("abc", "xy"), prompt, columns, timeout_s=60)

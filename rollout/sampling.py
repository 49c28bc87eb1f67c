"""Sampling requests and their results: the values that the driver and a rollout worker exchange."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from hashlib import blake2b

import numpy as np

from actors.batch import Batch
from actors.columns import ADMITTED, ROUTES


@dataclass(frozen=True)
class Sampling:
    """How completions are sampled. `temperature=0` is greedy. Lengths are in tokens."""

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = -1
    min_p: float = 0.0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    replay_routing: bool = False  # say of each token which experts it was sent to
    replay_truncation: bool = False  # say of each token which ones it could have been, `top_k` at most

    @property
    def truncates_distribution(self) -> bool:
        """True if the sampler renormalises over a subset, so that its log-probabilities are not the policy's."""
        return self.temperature > 0 and (self.top_p < 1 or self.top_k > 0 or self.min_p > 0)

    @property
    def records_admitted(self) -> bool:
        """True if each sampled token comes with the tokens that it could have been."""
        return self.replay_truncation and self.truncates_distribution


@dataclass(frozen=True)
class Request:
    """`n` completions of one prompt: the unit of collection. `id` is unique in a run; the same id is never completed
    twice. `seed` fixes every sample: sample i draws from `sample_seed(seed, i)`, whichever worker runs it."""

    id: str
    prompt: tuple[int, ...]
    n: int
    sampling: Sampling
    seed: int
    group: int = 0  # written into the `group` column
    mixture: float = 0.0  # share of the engine's second model in the logits that every token is drawn from
    prompt_top_k: int = 0  # say of each token of the prompt which ones were this many likeliest there; 0: say nothing


class Finish(StrEnum):
    STOP = "stop"  # an end-of-sequence token, a stop token or a stop string
    LENGTH = "length"  # max_tokens


@dataclass(frozen=True)
class PromptTopK:
    """Of the P - 1 tokens of a prompt that have others before them: the k likeliest tokens in their places, in
    descending order, their log-probabilities, and the token's own. At temperature 1, over the model's vocabulary."""

    ids: np.ndarray  # int32 [P-1, k]
    logps: np.ndarray  # float32 [P-1, k]
    own: np.ndarray  # float32 [P-1]


@dataclass(frozen=True)
class Completion:
    """One finished sample. Arrays are [C], C completion tokens (the stop token included, if one was sampled)."""

    index: int
    tokens: np.ndarray  # int32
    logps: np.ndarray  # float32, of the distribution that was sampled from (after temperature and truncation)
    versions: np.ndarray  # int32, weights version that produced each token
    finish: Finish
    admitted: np.ndarray | None = None  # int32 [C, top_k], if asked for: what truncation left; -1 fills up
    routes: np.ndarray | None = (
        None  # int16 [P + C, layers x k], if asked for: experts of prompt and completion; -1: not known
    )
    prompt: PromptTopK | None = None  # if asked for


@dataclass(frozen=True)
class EpisodeFacts:
    """What is counted of one episode."""

    turns: int  # of the model
    calls: int  # of tools
    failures: int  # calls that were answered with an error
    answer_tokens: int  # after the prompt, not written by the model
    engine_s: float  # waiting for the engine
    environment_s: float  # waiting for the environment, its tools included
    reward: float | None  # by the environment, over all turns


@dataclass(frozen=True)
class TurnRow:
    """A turn of an episode that is a row of its own."""

    tokens: int  # of the row
    written: int  # by the model
    earlier_reward: float  # what the environment gave for earlier turns, weighted


@dataclass(frozen=True)
class GroupMeta:
    """What the driver keeps of a finished group; its tokens stay in the object store."""

    request_id: str
    worker: str
    lengths: tuple[int, ...]  # tokens that the model wrote, per sample
    finishes: tuple[Finish, ...]
    oldest_version: int
    newest_version: int
    seconds: float
    failures: tuple[str, ...] = field(default=())  # samples that failed permanently, each with its reason
    totals: tuple[int, ...] | None = None  # tokens of each row; None: the request's prompt and `lengths`
    episodes: tuple[EpisodeFacts, ...] = ()  # one per sample, if the samples are episodes
    turn_rows: tuple[TurnRow, ...] | None = None  # of the only sample, if each of its turns is a row of its own


def sample_seed(seed: int, index: int) -> int:
    """A 63-bit seed for sample `index` of a request, the same on every worker and in every process."""
    digest = blake2b(f"{seed}/{index}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def to_batch(request: Request, completions: list[Completion]) -> Batch:
    """Rows of prompt + completion, ordered by sample index, with the sampler's log-probability and version of each
    token."""
    ordered = sorted(completions, key=lambda completion: completion.index)
    prompt = np.asarray(request.prompt, dtype=np.int32)

    def flat(on_prompt: float, name: str, dtype: type) -> np.ndarray:
        parts = [np.concatenate([np.full(len(prompt), on_prompt, dtype), getattr(c, name)]) for c in ordered]
        return np.concatenate(parts) if parts else np.zeros(0, dtype)

    def admitted() -> dict[str, np.ndarray]:
        if not request.sampling.records_admitted:
            return {}
        on_prompt = np.full((len(prompt), request.sampling.top_k), -1, np.int32)
        recorded = [completion.admitted for completion in ordered if completion.admitted is not None]
        assert len(recorded) == len(ordered), "the engine did not record what truncation left"
        parts = [part for admitted in recorded for part in (on_prompt, admitted)]
        return {ADMITTED: np.concatenate(parts) if parts else on_prompt[:0]}

    routes = [completion.routes for completion in ordered if completion.routes is not None]
    lengths = [len(prompt) + len(completion.tokens) for completion in ordered]
    tokens = [np.concatenate([prompt, completion.tokens]) for completion in ordered]
    mask = [np.arange(length) >= len(prompt) for length in lengths]
    return Batch.build(
        lengths,
        tokens=np.concatenate(tokens) if tokens else np.zeros(0, np.int32),
        mask=np.concatenate(mask) if mask else np.zeros(0, bool),
        sample_logps=flat(0.0, "logps", np.float32),
        version=flat(-1, "versions", np.int32),
        group=np.full(len(ordered), request.group, dtype=np.int64),
        truncated=[completion.finish is Finish.LENGTH for completion in ordered],
        **admitted(),
        **({ROUTES: np.concatenate(routes)} if routes else {}),
    )

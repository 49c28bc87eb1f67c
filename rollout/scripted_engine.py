"""An engine without a model: completions from a script, with latency and faults, for tests and dry runs.

options: {"completions": {"5 6 7": [[8, 9, 1], [8, 1]]}, "seconds_per_step": 0.01, "break_at_step": 40}
"""

from __future__ import annotations

import math
import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from fnmatch import fnmatchcase

import numpy as np
import torch
from torch import Tensor

from actors.errors import ConfigError, DataFailure, InfraFailure
from rollout.engine import Ability, EngineSpec, Finished
from rollout.sampling import Completion, Finish, Request, sample_seed
from rollout.stopping import token_budget

A_DAY_S = 86_400.0
EXIT_CODE = 70  # of a process that exits at `exit_at_step`


@dataclass(frozen=True)
class Script:
    """Samples, latencies and faults. Steps and requests are counted from 1, over the engine's lifetime.

    `completions`: prompt (ids with blanks between) -> token lists, sample i takes list i modulo their number; or a
    function of (request, index). Without `completions`, or for a prompt that is not in it: random tokens, seeded per
    sample, which end with `eos` at random. `echo`: the prompt is repeated."""

    completions: Mapping[str, Sequence[Sequence[int]]] | Callable[[Request, int], Sequence[int]] = field(
        default_factory=dict
    )
    echo: bool = False
    lengths: Sequence[int] = ()  # of random completions with their end, each as likely; none: uniform up to the limit
    vocab: int = 64
    eos: int = 1
    seconds_per_step: float = 0.0
    load_seconds: float = 0.0
    break_at_step: int | None = None  # the engine raises
    break_at_request: int | None = None
    break_at_load: int | None = None
    exit_at_step: int | None = None  # the process exits
    hang_at_step: int | None = None  # the step takes a day
    data_failures: str | None = None  # requests whose id matches this pattern raise DataFailure
    infra_failures: str | None = None  # requests whose id matches raise InfraFailure

    @classmethod
    def from_options(cls, options: Mapping[str, object]) -> Script:
        allowed = [field.name for field in fields(cls)]
        unknown = sorted(set(options) - set(allowed))
        if unknown:
            raise ConfigError(
                f"scripted engine: unknown option(s) {', '.join(unknown)}; there are {', '.join(allowed)}"
            )
        return cls(**options)  # pyright: ignore[reportArgumentType]: options come untyped from the configuration

    def tokens(self, request: Request, index: int) -> list[int]:
        """The whole completion, before it is truncated to the budget."""
        if callable(self.completions):
            return list(self.completions(request, index))
        scripted = self.completions.get(" ".join(map(str, request.prompt)))
        if scripted is not None:
            return list(scripted[index % len(scripted)])
        return list(request.prompt) if self.echo else self._random(request, index)

    def _random(self, request: Request, index: int) -> list[int]:
        draw = np.random.default_rng(sample_seed(request.seed, index))
        if self.lengths:
            body = draw.integers(2, self.vocab, size=max(0, int(draw.choice(self.lengths)) - 1))
            return [*map(int, body), self.eos]
        longest = request.sampling.max_tokens * 5 // 4  # one in five reaches its limit
        body = draw.integers(2, self.vocab, size=draw.integers(1, longest, endpoint=True))
        return [*map(int, body), self.eos]


@dataclass
class _Sample:
    """One running completion: `script` has all of its tokens, `versions` those of the tokens sampled so far."""

    request: Request
    index: int
    script: list[int]
    finish: Finish
    versions: list[int] = field(default_factory=list)

    def completion(self, logp: float) -> Completion:
        tokens = np.asarray(self.script, dtype=np.int32)
        logps = np.full(len(tokens), logp, dtype=np.float32)
        return Completion(self.index, tokens, logps, np.asarray(self.versions, dtype=np.int32), self.finish)


class ScriptedEngine:
    """Results are a function of (script, request). Log-probabilities are those of a uniform distribution. `loads` lists
    the weights loaded so far: (version, number of tensors, sum over all of them)."""

    abilities = frozenset[Ability]()

    def __init__(self, spec: EngineSpec) -> None:
        self.version = -1
        self.device = torch.device("cpu")
        self.loads: list[tuple[int, int, float]] = []
        self._script = Script.from_options(spec.options)
        self._spec = spec
        self._samples: deque[_Sample] = deque()  # the first `max_concurrency` are running
        self._done: dict[str, list[Completion]] = {}
        self._steps = 0
        self._requests = 0

    def add(self, request: Request) -> None:
        self._requests += 1
        self._fail_on_request(request)
        budget = token_budget(request, self._spec.max_model_len)
        self._done[request.id] = []
        for index in range(request.n):
            self._samples.append(_cut(request, index, self._script.tokens(request, index), budget))

    def abort(self, request_id: str) -> None:
        self._done.pop(request_id, None)
        self._samples = deque(sample for sample in self._samples if sample.request.id != request_id)

    @property
    def busy(self) -> bool:
        return bool(self._samples)

    def step(self) -> list[Finished]:
        self._steps += 1
        time.sleep(self._script.seconds_per_step)
        self._fail_on_step()
        running = [self._samples.popleft() for _ in range(min(len(self._samples), self._spec.max_concurrency))]
        finished: list[Finished] = []
        for sample in running:
            sample.versions.append(self.version)
            if len(sample.versions) == len(sample.script):
                finished += self._finish(sample)
        self._samples.extendleft(sample for sample in reversed(running) if len(sample.versions) < len(sample.script))
        return finished

    def load(self, weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        tensors = [tensor for _, tensor in weights]
        time.sleep(self._script.load_seconds)
        self.loads.append((version, len(tensors), sum(float(tensor.double().sum()) for tensor in tensors)))
        if len(self.loads) == self._script.break_at_load:
            raise RuntimeError(f"scripted to break at load {len(self.loads)}")
        self.version = version

    def load_adapters(self, weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        raise InfraFailure("the scripted engine has no adapters")

    def load_second(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        raise InfraFailure("the scripted engine has no second model")

    def sleep(self) -> None: ...

    def wake(self) -> None: ...

    def close(self) -> None: ...

    def _finish(self, sample: _Sample) -> list[Finished]:
        completions = self._done[sample.request.id]
        completions.append(sample.completion(-math.log(self._script.vocab)))
        if len(completions) < sample.request.n:
            return []
        del self._done[sample.request.id]
        return [Finished(sample.request, completions)]

    def _fail_on_request(self, request: Request) -> None:
        if self._script.data_failures and fnmatchcase(request.id, self._script.data_failures):
            raise DataFailure(f"request {request.id}: scripted never to run")
        if self._script.infra_failures and fnmatchcase(request.id, self._script.infra_failures):
            raise InfraFailure(f"request {request.id}: scripted to fail here")

    def _fail_on_step(self) -> None:
        if self._steps == self._script.exit_at_step:
            os._exit(EXIT_CODE)
        if self._steps == self._script.hang_at_step:
            time.sleep(A_DAY_S)
        at = self._script.break_at_request
        if self._steps == self._script.break_at_step or (at is not None and self._requests >= at):
            raise RuntimeError(f"scripted to break at step {self._steps}, request {self._requests}")


def _cut(request: Request, index: int, tokens: list[int], budget: int) -> _Sample:
    """A sample's script up to its first stop token or its budget. An empty script is refused."""
    if not tokens:
        raise ConfigError(f"scripted engine: the completion {index} of request {request.id} is empty; it takes a token")
    stops = [place for place, token in enumerate(tokens, 1) if token in request.sampling.stop_token_ids]
    length = min([*stops[:1], len(tokens)])
    finish = Finish.STOP if length <= budget else Finish.LENGTH
    return _Sample(request, index, tokens[: min(length, budget)], finish)

"""transformers in this process: it has only the trainer's dependencies, and results are reproducible bit for bit.
Samples are a function of (weights, request, threads) only, whatever else is queued and whichever worker runs it.

The unit of decoding is one request. Its samples share the prompt, which is computed once and whose keys and values are
copied to every row; all rows have the same length, so there is no padding; a row that ends leaves the batch. Nothing
else is in that batch. Requests run one after the other: interleaving them would not make batches larger, would keep
more caches at a time, and would finish the first group later, with which scoring and training can begin.

Short samples of a small model on a CPU are decoded with those of other requests, in passes of one shape
(`fixed_rows.py`). Which of the two ways a request takes follows from the engine and the request alone."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from actors.errors import ConfigError, DataFailure
from actors.lora import set_adapters
from actors.routing import Routers
from rollout.engine import Ability, EngineSpec, Finished
from rollout.fixed_rows import FixedRows, prepare_for_fixed_rows
from rollout.running import Row
from rollout.sampling import Completion, PromptTopK, Request, Sampling, sample_seed
from rollout.short_samples import Shape, shape_of
from rollout.stopping import StopRule, end_token_ids, token_budget
from rollout.transformers_model import add_adapters, copy_weights, read_model

OWN, SECOND = 0, 1  # the model that the engine follows, and the one that is mixed in


@dataclass
class _Part:
    """Samples of one request that are decoded together and have the same length. `caches` has one for each model that
    has read them; it is None until their first step, and again after new weights."""

    request: Request
    rows: list[Row]
    caches: list[Any] = field(default_factory=lambda: [None, None])


class HfEngine:
    """`options` are keyword arguments of `from_pretrained`. A request of more than `max_concurrency` samples is decoded
    in parts of that many."""

    abilities = frozenset(
        {
            Ability.ADAPTERS,
            Ability.ADMITTED,
            Ability.FLOAT32_HEAD,
            Ability.MIXES,
            Ability.PROMPT_TOP_K,
            Ability.ROUTES,
        }
    )

    def __init__(self, spec: EngineSpec) -> None:
        if spec.tensor_parallel != 1:
            raise ConfigError("roles.rollout.tensor_parallel: the hf engine runs on one device; use engine: vllm, or 1")
        torch.set_num_threads(spec.threads)  # of the calling thread, which owns the engine
        self.version = -1
        self._spec = spec
        self.device = torch.device("cuda" if spec.gpus > 0 else "cpu")
        paths = [spec.model, *([spec.mixes] if spec.mixes is not None else [])]
        self._models = [read_model(spec, path, spec.options) for path in paths]
        if spec.lora is not None:
            add_adapters(self._models[OWN], spec.lora)
        for model in self._models:
            model.to(self.device)
        self._stop = StopRule(spec.model, end_token_ids(spec.model, spec.trust_remote_code), spec.trust_remote_code)
        self._routers: Routers | None = None  # of the own model, once they are asked
        self._waiting: deque[_Part] = deque()  # the first one is running
        self._fixed: dict[Shape, FixedRows] | None = None  # if the model can have any
        if prepare_for_fixed_rows(self._models[OWN], self.device):
            self._fixed = {}
        self._done: dict[str, list[Completion]] = {}

    def add(self, request: Request) -> None:
        budget = token_budget(request, self._spec.max_model_len)
        vocab = self._models[OWN].config.get_text_config().vocab_size
        if request.mixture and len(self._models) == 1:
            raise DataFailure(f"request {request.id}: it mixes two models, and the engine was built with one")
        strays = [token for token in request.prompt if not 0 <= token < vocab]
        if strays:
            raise DataFailure(f"request {request.id}: token {strays[0]} is not in the vocabulary of {vocab}")
        self._done[request.id] = []
        rows = [Row(request, budget, index, _generator(request, index, self.device)) for index in range(request.n)]
        shape = shape_of(len(request.prompt), budget)
        if self._fixed is not None and shape and not request.mixture and not request.sampling.replay_routing:
            if shape not in self._fixed:
                self._fixed[shape] = FixedRows(self._models[OWN], shape, self._spec.max_concurrency)
            self._fixed[shape].add(rows)
            return
        for start in range(0, request.n, self._spec.max_concurrency):
            self._waiting.append(_Part(request, rows[start : start + self._spec.max_concurrency]))

    def abort(self, request_id: str) -> None:
        self._done.pop(request_id, None)
        self._waiting = deque(part for part in self._waiting if part.request.id != request_id)
        for fixed in self._all_fixed:
            fixed.remove(lambda row: row.request.id == request_id)

    @property
    def busy(self) -> bool:
        return bool(self._waiting) or any(fixed.busy for fixed in self._all_fixed)

    @torch.inference_mode()
    def step(self) -> list[Finished]:
        finished: list[Finished] = []
        for fixed in self._all_fixed:
            if fixed.busy:
                rows, logits = fixed.next_logits()
                self._sample(rows, logits)
                fixed.remove(lambda row: row.finish is not None)
                finished += self._ended(rows)
        if self._waiting:
            part = self._waiting[0]
            self._sample(part.rows, self._next_logits(part))
            finished += self._retire(part)
        return finished

    @property
    def _all_fixed(self) -> list[FixedRows]:
        return list((self._fixed or {}).values())

    def _sample(self, rows: list[Row], logits: Tensor) -> None:
        """A token for each row, from its row of `logits` [R, V]."""
        by_sampling: dict[Sampling, list[int]] = {}
        for _, group in groupby(enumerate(rows), key=lambda pair: pair[1].request.id):
            places, (row, *_) = zip(*group, strict=True)
            by_sampling.setdefault(row.request.sampling, []).extend(places)
        for sampling, places in by_sampling.items():
            chosen = [rows[place] for place in places]
            theirs = logits if len(chosen) == len(rows) else logits[places]
            tokens, logps = draw(theirs, sampling, [row.draw for row in chosen])
            if sampling.records_admitted:
                for row, ids in zip(chosen, admitted(theirs, sampling, tokens).tolist(), strict=True):
                    row.admitted.append(ids)
            for row, token, logp in zip(chosen, tokens.tolist(), logps.tolist(), strict=True):
                row.tokens.append(token)
                row.logps.append(logp)
                row.versions.append(self.version)
                row.finish = self._stop.finish(row.tokens, sampling, row.budget)

    def load(self, weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Running samples compute their keys and values again under the new weights: every token's log-probability is
        that of one version alone."""
        self._replace_weights(OWN, weights)
        self.version = version

    def load_adapters(self, weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        set_adapters(self._models[OWN], dict(weights))
        self._forget_caches(OWN)
        self.version = version

    def load_second(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        self._replace_weights(SECOND, weights)

    def sleep(self) -> None:
        for model in self._models:
            model.to("cpu")
        if self.device.type != "cpu":
            torch.cuda.empty_cache()  # otherwise the allocator keeps it for this process

    def wake(self) -> None:
        for model in self._models:
            model.to(self.device)

    def close(self) -> None:
        self._waiting.clear()
        self._fixed = None

    def _replace_weights(self, which: int, weights: Iterable[tuple[str, Tensor]]) -> None:
        copy_weights(self._models[which], weights)
        self._forget_caches(which)

    def _forget_caches(self, which: int) -> None:
        for part in self._waiting:
            part.caches[which] = None
        for fixed in self._all_fixed if which == OWN else ():
            fixed.forget()

    def _next_logits(self, part: _Part) -> Tensor:
        """[R, V] float32: logits of each row's next token, for a request with a mixture those of both models."""
        logits, share = self._logits_of(OWN, part), part.request.mixture
        return mixed(logits, self._logits_of(SECOND, part), share) if share else logits

    def _logits_of(self, which: int, part: _Part) -> Tensor:
        """[R, V] float32: what one model says of each row's next token."""
        if part.caches[which] is not None:
            last = torch.tensor([[row.tokens[-1]] for row in part.rows], device=self.device)
            return self._forward(which, last, part)
        if part.rows[0].tokens:  # new weights have arrived: compute the whole prefix again
            texts = [[*part.request.prompt, *row.tokens] for row in part.rows]
            return self._forward(which, torch.tensor(texts, device=self.device), part)
        return self._read_prompt(which, part)

    def _read_prompt(self, which: int, part: _Part) -> Tensor:
        """Once for all rows."""
        logits = self._forward(which, torch.tensor([part.request.prompt], device=self.device), part)
        part.caches[which].batch_repeat_interleave(len(part.rows))
        return logits.expand(len(part.rows), -1)

    def _forward(self, which: int, ids: Tensor, part: _Part) -> Tensor:
        model, cache = self._models[which], part.caches[which]
        if which == OWN and part.request.sampling.replay_routing:
            self._routers = self._routers or Routers(model)
        output = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        part.caches[which] = output.past_key_values
        if which == OWN and part.request.sampling.replay_routing:
            self._record_routes(part, len(ids), afresh=cache is None)
        return output.logits[:, -1].float()

    def _record_routes(self, part: _Part, read: int, *, afresh: bool) -> None:
        """The experts of the tokens that were just read, in `read` rows: of the prompt, one stands for all."""
        assert self._routers is not None
        routes = self._routers.chosen.flatten(1).unflatten(0, (read, -1)).expand(len(part.rows), -1, -1)
        for row, mine in zip(part.rows, routes, strict=True):
            row.routes = [mine] if afresh else [*row.routes, mine]

    def _of_prompt(self, request: Request) -> PromptTopK:
        """In a pass of its own over the whole prompt, which sampling does not ask for."""
        logits = self._models[OWN](input_ids=torch.tensor([request.prompt], device=self.device)).logits[0, :-1]
        logps = logits.float().log_softmax(-1)
        found = logps.topk(request.prompt_top_k)
        own = logps.gather(1, torch.tensor(request.prompt[1:], device=self.device)[:, None])[:, 0]
        return PromptTopK(found.indices.int().cpu().numpy(), found.values.cpu().numpy(), own.cpu().numpy())

    def _retire(self, part: _Part) -> list[Finished]:
        """Removes the rows that ended, and the part if none remains."""
        going = [place for place, row in enumerate(part.rows) if row.finish is None]
        if len(going) == len(part.rows):
            return []
        ended = [row for row in part.rows if row.finish is not None]
        if going:
            part.rows = [part.rows[place] for place in going]
            for cache in (cache for cache in part.caches if cache is not None):
                cache.batch_select_indices(torch.tensor(going, device=self.device))
        else:
            self._waiting.popleft()
        return self._ended(ended)

    def _ended(self, rows: list[Row]) -> list[Finished]:
        """Takes the samples of those rows that have ended, and what was asked of their prompts; the requests that have
        all of theirs now."""
        finished: list[Finished] = []
        for row in rows:
            if row.finish is None:
                continue
            request, completions = row.request, self._done[row.request.id]
            completions.append(row.completion())
            if len(completions) == request.n:
                said = self._of_prompt(request) if request.prompt_top_k else None
                finished.append(Finished(request, [replace(each, prompt=said) for each in self._done.pop(request.id)]))
        return finished


def draw(logits: Tensor, sampling: Sampling, generators: list[torch.Generator]) -> tuple[Tensor, Tensor]:
    """One token per row of `logits` [R, V], each from its row's generator, and its log-probability under the
    distribution that it was drawn from; for greedy ones, under the unscaled distribution."""
    if sampling.temperature == 0:
        logps = logits.log_softmax(-1)
        tokens = logits.argmax(-1)
    else:
        logps = truncate(logits / sampling.temperature, sampling).log_softmax(-1)
        noise = torch.empty_like(logps)
        for row, generator in zip(noise, generators, strict=True):
            row.exponential_(generator=generator)
        tokens = (logps - noise.log()).argmax(-1)  # the Gumbel trick: argmax of p / Exp(1)
    return tokens, logps.gather(-1, tokens[:, None])[:, 0]


def mixed(own: Tensor, second: Tensor, share: float) -> Tensor:
    """[R, V]: logits of the geometric mixture, `(1 - share) own + share second`: the distribution is the normalised
    product of the two, to these powers. Rows of a padded vocabulary that one of the models lacks stand for no token and
    are left out.

    Source: arXiv:2312.00886 (Nash-MD, the mixture taken one token at a time)."""
    size = min(own.shape[-1], second.shape[-1])
    return own[:, :size].lerp(second[:, :size], share)


def truncate(logits: Tensor, sampling: Sampling) -> Tensor:
    """Minus infinity for tokens outside min_p, top_k and top_p; the likeliest token is always kept."""
    if sampling.min_p > 0:
        probs = logits.softmax(-1)
        logits = logits.masked_fill(probs < sampling.min_p * probs.amax(-1, keepdim=True), -torch.inf)
    if sampling.top_k > 0:
        smallest = logits.topk(min(sampling.top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < smallest, -torch.inf)
    if sampling.top_p < 1:
        ordered, order = logits.sort(-1, descending=True)
        before = ordered.softmax(-1).cumsum(-1) - ordered.softmax(-1)
        outside = (before >= sampling.top_p).scatter(-1, order, before >= sampling.top_p)
        logits = logits.masked_fill(outside, -torch.inf)
    return logits


def admitted(logits: Tensor, sampling: Sampling, drawn: Tensor) -> Tensor:
    """[R, top_k]: the tokens that truncation leaves, the likeliest first; -1 fills up. The `drawn` one [R] is among
    them also where several tokens are as likely as the last of them."""
    found = truncate(logits / sampling.temperature, sampling).topk(min(sampling.top_k, logits.shape[-1]))
    ids = found.indices.masked_fill(found.values == -torch.inf, -1)
    ids = F.pad(ids, (0, sampling.top_k - ids.shape[1]), value=-1)
    missing = (ids != drawn[:, None]).all(1)
    return torch.where(missing[:, None] & (torch.arange(ids.shape[1]) == ids.shape[1] - 1), drawn[:, None], ids)


def _generator(request: Request, index: int, device: torch.device) -> torch.Generator:
    return torch.Generator(device).manual_seed(sample_seed(request.seed, index))

"""`ModelWorker`, a plain class: one rank of a trained or frozen role. It executes objectives and knows no method.

All ranks of a role are called at once with the same verb, each with its own shard; every verb but `ping` is collective.

    driver ──update(shard r, objective)──► rank r:  fetches the blocks of its shard
                                                    a pass of its micro-batches (`actors/train_step.py`)
                                                    one optimizer step
           ◄──────────UpdateReport──────── metrics combined over micro-batches and ranks
"""

from __future__ import annotations

import contextlib
import os
import platform
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import actors
from actors import saved_state
from actors.backends import Placement, build_backend
from actors.backends.protocol import Backend
from actors.background_save import BackgroundSave, StateFile
from actors.batch import Batch
from actors.checkpoint_parts import Part, RankState, causal_of
from actors.columns import Head
from actors.distributions import TopK
from actors.errors import RunError
from actors.lora import entries
from actors.metrics import combine
from actors.model import LanguageModel, ModelSpec, load_model
from actors.objective import Objective, Stat
from actors.other_prompts import OtherPrompts, exchanged, returned
from actors.reproducibility import CUBLAS_WORKSPACE, deterministic, random_stream
from actors.retokenise import exchanged_in, retokeniser_of, returned_from
from actors.saved_state import Seal
from actors.sharding import Shard
from actors.specs import BackendSpec, OptimSpec, WeightsForm
from actors.train_step import Pass, infer
from actors.weight_averaging import Average, AverageSpec
from actors.weight_shares import Slice, cut, joined
from actors.worker import WorkerInfo

# Verbs that change no weight and no moment, or wait before they do: they run while a save copies these.
LEAVES_TENSORS = ("begin_save", "credit", "evaluate", "export", "hold", "infer", "shares", "update")
CreditCall = Callable[..., tuple[dict[str, np.ndarray], dict[str, Stat]]]


@dataclass(frozen=True)
class UpdateReport:
    """The result of one optimizer step, equal on all ranks except for `seconds`: forward, backward, step and, if rows
    are coupled, statistics, in this process."""

    metrics: dict[str, float]
    grad_norm: float
    learning_rate: float
    tokens: int  # of the whole batch, all ranks
    seconds: dict[str, float]


class ModelWorker:
    """Cheap to construct; `ready` loads the model. The same calls with the same number of threads give the same bits.

    Random numbers of an update (dropout, noise) depend only on seed, rank and the number of updates before it, so that
    a resumed rank draws the same ones."""

    def __init__(
        self,
        name: str,
        model: ModelSpec,
        backend: BackendSpec,
        threads: int,
        rank: int = 0,
        world_size: int = 1,
        master: tuple[str, int] | None = None,
        seed: int = 0,
    ) -> None:
        self.name = name
        self._model_spec = model
        self._backend_spec = backend
        self._threads = threads
        self._placement = Placement(rank, world_size, master)
        self._seed = seed
        self._backend: Backend | None = None
        self._companion: LanguageModel | None = None
        self._objective_states: dict[str, dict[str, Any]] = {}
        self._average: Average | None = None
        self._steps_done = 0
        self._asleep = False
        self._save: BackgroundSave | None = None  # the last one
        self._busy: tuple[str, float] | None = None

    def ready(self) -> WorkerInfo:
        """Load the model, once. Returns the worker's description. Raises ModelError or ConfigError."""
        with self._doing("ready"):
            if self._backend is None:
                torch.set_num_threads(self._threads)
                if self._backend_spec.deterministic:
                    os.environ.setdefault(*CUBLAS_WORKSPACE)  # read at the first matrix product
                with random_stream(self._seed):  # the same on all ranks: new adapters must be equal
                    self._backend = build_backend(self._model_spec, self._backend_spec, self._placement)
            packages = str(Path(actors.__file__).parent)
            return WorkerInfo(self.name, os.getpid(), platform.node(), packages, self._detail())

    def ping(self) -> dict[str, Any]:
        """The running verb and its duration; another thread answers while one is running."""
        busy = self._busy
        return {
            "verb": busy[0] if busy else None,
            "busy_s": time.monotonic() - busy[1] if busy else 0.0,
            "steps_done": self._steps_done,
            "asleep": self._asleep,
        }

    def reset(self, optim: OptimSpec, average: AverageSpec | None = None) -> None:
        """A new phase: fresh optimizer, schedule, objective states and average on the same weights."""
        with self._doing("reset"):
            self.backend.reset_optimizer(optim)
            self._objective_states.clear()
            self._average = None if average is None else Average(average, self.backend.world)
            if self._average is not None:
                self._average.begin(self.backend.trained_weights())

    def set_companion(self, model: ModelSpec | None) -> None:
        """Load a second model, frozen and whole on every rank, for objectives that compare with it; None: drop it.
        Raises ModelError."""
        with self._doing("set_companion"):
            self._companion = None  # first: there may be no room for two
            if model is not None:
                self._companion = load_model(model, self.backend.device, trainable=False)

    def infer(
        self,
        shard: Shard,
        into: tuple[str, ...],
        head: Head,
        temperature: float,
        adapters: bool,
        top_k: TopK | None = None,
        other_prompts: OtherPrompts | None = None,
        *blocks: Batch,
    ) -> tuple[float, Batch]:
        """The head's outputs for the shard's rows, from a pass without gradient: (seconds, a block with the columns
        `into`, rows in the shard's order). 0 at unmasked tokens. `adapters=False` uses the base model. `top_k`: `into`
        are the columns for the most likely tokens (`actors.distributions.TOP_K`). `other_prompts`: of the completions
        behind the rows' teacher prompts (`actors/other_prompts.py`)."""
        with self._doing("infer"), contextlib.nullcontext() if adapters else self.backend.adapters_off():
            began = time.perf_counter()
            shard = shard.fetched(blocks)
            read, put_back = _as_asked(shard.batch, other_prompts)
            block = put_back(infer(self.backend, replace(shard, batch=read), into, head, temperature, top_k))
            return time.perf_counter() - began, block

    def credit(
        self, shard: Shard, call: CreditCall, options: dict[str, Any], stage: str, learning: bool, *blocks: Batch
    ) -> tuple[dict[str, float], Batch]:
        """Calls `call(batch, world, state, **options)` on the shard's rows. Returns (metrics over all ranks, a block of
        columns). `stage` names the call's state, which is checkpointed, and changes only if `learning`."""
        with self._doing("credit"):
            batch, state = shard.fetched(blocks).batch, self._objective_states.setdefault(stage, {})
            columns, metrics = call(batch, self.backend.world, state if learning else deepcopy(state), **options)
            return combine([metrics], self.backend.world, self.backend.device), Batch.build(batch.lengths, **columns)

    def update(
        self, shard: Shard, objective: Objective, temperature: float, stage: str, *blocks: Batch
    ) -> UpdateReport:
        """One optimizer step on a batch; `shard` is this rank's part of it, `blocks` are those that the shard refers
        to. `stage` names the objective's state.

        The loss is the sum of `objective.loss` over all micro-batches and ranks. Raises RunError if the gradient is not
        finite, or if there is nothing to learn from."""
        with self._doing("update"), self._drawing():
            if self._backend_spec.optim is None:
                raise RunError(f"{self.name} is frozen: it was built without an optimizer")
            state = self._objective_states.setdefault(stage, {})
            batch_pass = Pass(self.backend, shard.fetched(blocks), objective, temperature, state, self._companion)
            batch_pass.learn(self._drawing)
            with batch_pass.clock.measure("step"):
                self._wait_copied()
                info = self.backend.step()
            metrics = batch_pass.metrics()
            if not np.isfinite(info.grad_norm):
                raise RunError(f"{self.name}: the gradient norm of step {self._steps_done + 1} is {info.grad_norm}")
            self._steps_done += 1
            if self._average is not None:
                with batch_pass.clock.measure("step"):
                    self._average.after_step(self.backend.trained_weights)
            real, computed = batch_pass.tokens["real"], batch_pass.tokens["computed"]
            metrics |= {"num_tokens": real, "padding_share": 1 - real / computed}
            return UpdateReport(metrics, info.grad_norm, info.learning_rate, int(real), batch_pass.clock.seconds)

    def evaluate(
        self, shard: Shard, objective: Objective, temperature: float, stage: str, *blocks: Batch
    ) -> dict[str, float]:
        """The metrics that `update` would report for this batch, including its loss, from a pass without gradient,
        dropout and noise. Weights, optimizer and the objective's state do not change."""
        with self._doing("evaluate"):
            state = deepcopy(self._objective_states.get(stage, {}))
            return Pass(self.backend, shard.fetched(blocks), objective, temperature, state, self._companion).measure()

    def hold(self, *blocks: Batch) -> None:
        """Nothing: that it was called means that the blocks have reached this rank's node."""

    def export(
        self,
        consumer: Callable[[Iterator[tuple[str, Tensor]]], Any],
        bucket_bytes: int,
        form: WeightsForm = "merged",
    ) -> Any:
        """Passes all (name, full tensor) to `consumer` on rank 0 and returns its result; None on other ranks. The form
        is `merged` for an engine that holds the model alone, `adapters` for one that holds these apart.

        Gathering is collective, so the iterator is always exhausted, even if the consumer fails."""
        with self._doing("export"):
            weights = self.backend.full_weights(bucket_bytes, form)
            try:
                return consumer(weights) if self._placement.rank == 0 else None
            finally:
                for _ in weights:
                    pass

    def shares(self, receivers: int, bucket_bytes: int) -> tuple[int, *tuple[list[Slice], ...]]:
        """This rank's share of the weights, cut for the ranks of another role that `mix` them: (bytes, a block for each
        receiver)."""
        with self._doing("shares"):
            weights = self.backend.full_weights(bucket_bytes, "in_memory")
            total = sum(entry.nbytes for entry in entries(causal_of(self.backend)))
            where = self._placement
            blocks = cut(weights, total, rank=where.rank, ranks=where.world_size, receivers=receivers)
            return sum(each.values.nbytes for block in blocks for each in block), *blocks

    def mix(self, share: float, bucket_bytes: int, *blocks: list[Slice]) -> None:
        """Move this role's weights towards another's: each becomes `share` times the other's plus `1 - share` times its
        own. `blocks` are those that all ranks of the other role have cut for this one. Raises RunError if this role is
        trained, or if the models differ."""
        with self._doing("mix"):
            if self._backend_spec.optim is not None:
                raise RunError(f"{self.name} is trained: its optimizer belongs to the weights that it has")
            self.backend.mix(joined(blocks), share, bucket_bytes)

    def run(self, task: Callable[[], Any]) -> Any:
        """Call a function in this process, for example to open a transport's port."""
        with self._doing("run"):
            return task()

    def begin_save(self, folder: str, parts: Sequence[Part]) -> None:
        """Begin to save `parts` below `folder`: their values are those of now. A thread copies and writes them while
        training goes on; `finish_save` says what was written. Raises RunError if a part does not exist."""
        with self._doing("begin_save"):
            self._wait_copied()
            self._save = self._rank_state().begin(Path(folder), parts)

    def finish_save(self, timeout_s: float) -> dict[str, Seal]:
        """What this rank has written for the last `begin_save`: by its path in the folder, size and hash. Runs beside
        other verbs. Raises RunError if a trained weight is not finite: no run could continue from it. DiskError if the
        disk is full."""
        if self._save is None:
            raise RunError(f"{self.name}: no save has begun")
        return self._save.result(timeout_s)

    def save_state(self, folder: str) -> None:
        """Everything that exact resumption needs, into an existing folder; each rank writes its share. Raises as
        `finish_save`."""
        with self._doing("save_state"):
            self._rank_state().save(Path(folder), Part("state"))

    def save_model(self, folder: str, averaged: bool = False) -> None:
        """A Hugging Face folder: merged weights, config, generation config, tokenizer with the chat template of the
        training; each rank writes its share. The weights are the current ones, or their average in this phase. Raises
        RunError if there is no average."""
        with self._doing("save_model"):
            self._rank_state().save(Path(folder), Part("model", averaged=averaged))

    def save_adapter(self, folder: str, averaged: bool = False) -> None:
        """The LoRA adapters only, as a PEFT folder. Raises RunError if there are none."""
        with self._doing("save_adapter"):
            self._rank_state().save(Path(folder), Part("adapter", averaged=averaged))

    def load_state(self, folder: str) -> None:
        """Continue from the state that `save_state` wrote, with the settings of the last `reset`. Only data is read,
        whoever wrote the folder: raises RunError for a file that contains anything else."""
        with self._doing("load_state"):
            self.backend.load_state(Path(folder))
            state = saved_state.load(Path(folder) / self._own_file)
            self._seed, self._steps_done = state["seed"], state["steps_done"]
            self._objective_states = state["objectives"]
            if self._average is not None:
                self._average.load(state.get("average"))

    def load_model(self, folder: str) -> None:
        """Load the weights of that Hugging Face folder. Raises RunError if this role is trained."""
        with self._doing("load_model"):
            if self._backend_spec.optim is not None:
                raise RunError(f"{self.name} is trained: its optimizer belongs to the weights that it has")
            self._model_spec = replace(self._model_spec, path=folder)
            self._backend = None  # first: there may be no room for two
            self._backend = build_backend(self._model_spec, self._backend_spec, self._placement)

    def sleep(self) -> None:
        """Release the accelerator's memory and keep the state. Until `wake`, every other verb raises RunError."""
        with self._doing("sleep"):
            self.backend.sleep()
            self._asleep = True
            if self._companion is not None:
                self._companion.to("cpu")

    def wake(self) -> None:
        with self._doing("wake"):
            self.backend.wake()
            self._asleep = False
            if self._companion is not None:
                self._companion.to(self.backend.device)

    def close(self) -> None:
        """Release the model. Closing twice has no effect."""
        self._backend = self._companion = None

    @property
    def backend(self) -> Backend:
        if self._backend is None:
            raise RunError(f"{self.name}: not ready; `ready` loads the model")
        return self._backend

    def _rank_state(self) -> RankState:
        """What passes change (states of objectives) is copied here, the rest by a save."""
        own = {"seed": self._seed, "steps_done": self._steps_done, "objectives": deepcopy(self._objective_states)}
        own["average"] = None if self._average is None else self._average.state()
        file = StateFile(self._own_file, own)
        where = self._placement
        return RankState(self.name, self.backend, self._model_spec, where, self._steps_done, self._average, file)

    @property
    def _own_file(self) -> str:
        return f"trainable-rank{self._placement.rank}.pt"

    def _drawing(self) -> contextlib.AbstractContextManager[None]:
        """The random numbers of this update (dropout, noise), from the beginning of their stream."""
        return random_stream(self._seed, self._placement.rank, self._steps_done)

    def _detail(self) -> dict[str, Any]:
        backend = self.backend
        return {
            "parameters": sum(getattr(p, "ds_numel", p.numel()) for p in backend.model.parameters()),
            "dtype": self._model_spec.dtype,
            "device": str(backend.device),
            "backend": self._backend_spec.kind,
            "kernels": getattr(getattr(backend.model, "module", backend.model), "kernels", ""),
            "trained": self._backend_spec.optim is not None,
            "threads": self._threads,
            "torch": torch.__version__,
        }

    def _wait_copied(self) -> None:
        """Before anything changes a tensor that a save may be copying."""
        if self._save is not None:
            self._save.wait_copied()

    @contextlib.contextmanager
    def _doing(self, verb: str) -> Generator[None]:
        if self._asleep and verb not in ("sleep", "wake"):
            raise RunError(f"{self.name} sleeps, and its weights are not on its device: `wake` comes before `{verb}`")
        if verb not in LEAVES_TENSORS:
            self._wait_copied()
        self._busy = (verb, time.monotonic())
        try:
            with deterministic(self._backend_spec.deterministic):
                yield
        finally:
            self._busy = None


def _as_asked(batch: Batch, asked: OtherPrompts | None) -> tuple[Batch, Callable[[Batch], Batch]]:
    """(what the model reads, how what it says of that becomes columns of the batch)."""
    if asked is None:
        return batch, lambda found: found
    if asked.ours is None or asked.theirs is None:
        return exchanged(batch), partial(returned, batch=batch)
    retokeniser = retokeniser_of(asked.ours, asked.theirs, asked.trust_remote_code)
    other, places = exchanged_in(batch, retokeniser)
    return other, partial(returned_from, batch=batch, places=places, in_ours=retokeniser.in_ours)

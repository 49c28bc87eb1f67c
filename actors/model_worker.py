"""`ModelWorker`: one rank of a trained or frozen role, a plain class. It executes objectives and knows no method.

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
from collections.abc import Callable, Generator, Iterator
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import actors
from actors import saved_state
from actors.backends import Placement, build_backend
from actors.backends.protocol import Backend
from actors.batch import Batch
from actors.columns import Head
from actors.distributions import TopK
from actors.errors import RunError
from actors.metrics import combine
from actors.model import LanguageModel, ModelSpec, load_model, tokenizer_of
from actors.objective import Objective, Stat
from actors.sharding import Shard
from actors.specs import BackendSpec, OptimSpec
from actors.train_step import Pass, infer
from actors.weight_averaging import Average, AverageSpec
from actors.worker import WorkerInfo

CreditCall = Callable[..., tuple[dict[str, np.ndarray], dict[str, Stat]]]


@dataclass(frozen=True)
class UpdateReport:
    """What one optimizer step did; equal on all ranks but for `seconds`: forward, backward, step and, where rows are
    coupled, statistics, in this process."""

    metrics: dict[str, float]
    grad_norm: float
    learning_rate: float
    tokens: int  # of the whole batch, all ranks
    seconds: dict[str, float]


class ModelWorker:
    """Cheap to construct; `ready` loads the model. Same calls and thread count, same bits.

    What an update draws at random (dropout, noise) depends on seed, rank and the number of updates before it, and on
    nothing else that goes on in the process; so a resumed rank draws what it would have drawn.
    """

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
        self._busy: tuple[str, float] | None = None

    def ready(self) -> WorkerInfo:
        """Load the model, once; who this worker is. Raises ModelError or ConfigError."""
        with self._doing("ready"):
            if self._backend is None:
                torch.set_num_threads(self._threads)
                with _random_stream(self._seed):  # the same on all ranks: new adapters must start equal
                    self._backend = build_backend(self._model_spec, self._backend_spec, self._placement)
            packages = str(Path(actors.__file__).parent)
            return WorkerInfo(self.name, os.getpid(), platform.node(), packages, self._detail())

    def ping(self) -> dict[str, Any]:
        """Which verb is going on and for how long; answered from another thread while one is."""
        busy = self._busy
        return {
            "verb": busy[0] if busy else None,
            "busy_s": time.monotonic() - busy[1] if busy else 0.0,
            "steps_done": self._steps_done,
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
        """Hold that model beside the own one from now on, frozen and whole on every rank, for objectives that compare
        with it; None for none. Raises ModelError."""
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
        *blocks: Batch,
    ) -> tuple[float, Batch]:
        """What the head says of the shard's rows, from a pass without gradient: (seconds, a block with the columns
        `into`, rows in the shard's order). 0 at tokens that the mask leaves out. `adapters=False` computes the base
        model's. `top_k`: `into` are three columns, for the most likely tokens (`actors.distributions.TOP_K`)."""
        with self._doing("infer"), contextlib.nullcontext() if adapters else self.backend.adapters_off():
            began = time.perf_counter()
            shard = shard.fetched(blocks)
            block = infer(self.backend, shard, into, head, temperature, top_k)
            return time.perf_counter() - began, block

    def credit(
        self, shard: Shard, call: CreditCall, options: dict[str, Any], stage: str, learning: bool, *blocks: Batch
    ) -> tuple[dict[str, float], Batch]:
        """What `call(batch, world, state, **options)` makes of the shard's rows: (metrics over all ranks, a block of
        columns). `stage` names the call's state, which is checkpointed, and stays as it is unless `learning`."""
        with self._doing("credit"):
            batch, state = shard.fetched(blocks).batch, self._objective_states.setdefault(stage, {})
            columns, metrics = call(batch, self.backend.world, state if learning else deepcopy(state), **options)
            return combine([metrics], self.backend.world, self.backend.device), Batch.build(batch.lengths, **columns)

    def update(
        self, shard: Shard, objective: Objective, temperature: float, stage: str, *blocks: Batch
    ) -> UpdateReport:
        """One optimizer step on the batch of which `shard` is this rank's share; `blocks` are those that it refers to.
        `stage` names the objective's state.

        The loss is the sum of `objective.loss` over all micro-batches and ranks. Raises RunError if the gradient is not
        finite, or if there is nothing to learn from."""
        with self._doing("update"), self._drawing():
            if self._backend_spec.optim is None:
                raise RunError(f"{self.name} is frozen: it was built without an optimizer")
            state = self._objective_states.setdefault(stage, {})
            batch_pass = Pass(self.backend, shard.fetched(blocks), objective, temperature, state, self._companion)
            metrics = batch_pass.learn(self._drawing)
            with batch_pass.clock.measure("step"):
                info = self.backend.step()
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
        """The metrics that `update` would report of this batch, its loss among them, from a pass without gradient,
        dropout and noise. Weights, optimizer and the objective's state stay as they are."""
        with self._doing("evaluate"):
            state = deepcopy(self._objective_states.get(stage, {}))
            return Pass(self.backend, shard.fetched(blocks), objective, temperature, state, self._companion).measure()

    def export(
        self, consumer: Callable[[Iterator[tuple[str, Tensor]]], Any], bucket_bytes: int, as_saved: bool = True
    ) -> Any:
        """How weights leave: on rank 0, what `consumer` makes of all (Hugging Face name, full tensor); elsewhere None.
        Without `as_saved` they are those of the model in memory, which is what `mix` takes.

        Gathering is collective, so what the consumer leaves over is drawn all the same, even if it fails."""
        with self._doing("export"):
            weights = self.backend.full_weights(bucket_bytes, as_saved=as_saved)
            try:
                return consumer(weights) if self._placement.rank == 0 else None
            finally:
                for _ in weights:
                    pass

    def mix(
        self, payload: Any, reader: Callable[[Any], Iterator[tuple[str, Tensor]]], share: float, bucket_bytes: int
    ) -> None:
        """Move this role's weights towards another's: each becomes `share` of the other's and the rest of its own.
        `reader` makes the other's `export` of `payload`. Raises RunError if this role is trained, or is another model.
        """
        with self._doing("mix"):
            if self._backend_spec.optim is not None:
                raise RunError(f"{self.name} is trained: its optimizer belongs to the weights that it has")
            self.backend.mix(reader(payload), share, bucket_bytes)

    def run(self, task: Callable[[], Any]) -> Any:
        """Call something in this process: a transport opening its port, say."""
        with self._doing("run"):
            return task()

    def save_state(self, folder: str) -> None:
        """Everything that exact resumption needs, into an existing folder; each rank writes its share. Raises RunError
        on every rank if a trained weight is not finite: no run could continue from it. DiskError if the disk is full.
        """
        with self._doing("save_state"), saved_state.writing(Path(folder)):
            self._refuse_what_is_not_finite()
            self.backend.save_state(Path(folder))
            state = {"seed": self._seed, "steps_done": self._steps_done, "objectives": self._objective_states}
            state["average"] = None if self._average is None else self._average.state()
            saved_state.save(state, Path(folder) / self._own_file)

    def load_state(self, folder: str) -> None:
        """Continue where `save_state` left off, with the settings of the last `reset`. What is read is data, whoever
        wrote the folder: raises RunError for a file that holds anything else."""
        with self._doing("load_state"):
            self.backend.load_state(Path(folder))
            state = saved_state.load(Path(folder) / self._own_file)
            self._seed, self._steps_done = state["seed"], state["steps_done"]
            self._objective_states = state["objectives"]
            if self._average is not None:
                self._average.load(state.get("average"))

    def save_model(self, folder: str, averaged: bool = False) -> None:
        """A Hugging Face folder: merged weights, config, generation config, tokenizer with the chat template of the
        training. The weights are those of now, or their average since the phase began. Raises RunError if none is
        taken."""
        with self._doing("save_model"), saved_state.writing(Path(folder)):
            self.backend.save_model(Path(folder), self._taken().whole if averaged else None)
            if self._placement.rank == 0:
                tokenizer_of(self._model_spec).save_pretrained(folder)

    def save_adapter(self, folder: str, averaged: bool = False) -> None:
        """The LoRA adapters that `save_model` merges, alone, as a PEFT folder. Raises RunError if there are none."""
        with self._doing("save_adapter"), saved_state.writing(Path(folder)):
            if self._model_spec.lora is None:
                raise RunError(f"{self.name} has no LoRA adapters to save")
            self.backend.save_adapter(Path(folder), self._taken().whole if averaged else None)

    def load_model(self, folder: str) -> None:
        """Hold the weights of that Hugging Face folder from now on. Raises RunError if this role is trained."""
        with self._doing("load_model"):
            if self._backend_spec.optim is not None:
                raise RunError(f"{self.name} is trained: its optimizer belongs to the weights that it has")
            self._model_spec = replace(self._model_spec, path=folder)
            self._backend = None  # first: there may be no room for two
            self._backend = build_backend(self._model_spec, self._backend_spec, self._placement)

    def sleep(self) -> None:
        """Give the accelerator's memory back, keeping the state. Until `wake`, every other verb is a RunError."""
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
        """Let go of the model. Closing twice is fine."""
        self._backend = self._companion = None

    @property
    def backend(self) -> Backend:
        if self._backend is None:
            raise RunError(f"{self.name}: not ready; `ready` loads the model")
        return self._backend

    def _refuse_what_is_not_finite(self) -> None:
        dtype = getattr(torch, self._model_spec.dtype)  # as which it is computed with: float16 ends at 65504
        for name, weight in self.backend.trained_weights():
            if not torch.isfinite(weight.to(dtype)).all():
                raise RunError(
                    f"{self.name}: {name} holds numbers that are not finite in {self._model_spec.dtype} after step "
                    f"{self._steps_done}; they are not saved. Lower train.learning_rate, or set train.max_grad_norm"
                )

    def _taken(self) -> Average:
        if self._average is None:
            raise RunError(f"{self.name}: no average of its weights is taken in this phase")
        return self._average

    @property
    def _own_file(self) -> str:
        return f"trainable-rank{self._placement.rank}.pt"

    def _drawing(self) -> contextlib.AbstractContextManager[None]:
        """What this update draws at random (dropout, noise), from its beginning."""
        return _random_stream(self._seed, self._placement.rank, self._steps_done)

    def _detail(self) -> dict[str, Any]:
        backend = self.backend
        return {
            "parameters": sum(getattr(p, "ds_numel", p.numel()) for p in backend.model.parameters()),
            "dtype": self._model_spec.dtype,
            "device": str(backend.device),
            "backend": self._backend_spec.kind,
            "trained": self._backend_spec.optim is not None,
            "threads": self._threads,
            "torch": torch.__version__,
        }

    @contextlib.contextmanager
    def _doing(self, verb: str) -> Generator[None]:
        if self._asleep and verb not in ("sleep", "wake"):
            raise RunError(f"{self.name} sleeps, and its weights are not on its device: `wake` comes before `{verb}`")
        self._busy = (verb, time.monotonic())
        try:
            yield
        finally:
            self._busy = None


@contextlib.contextmanager
def _random_stream(*key: int) -> Generator[None]:
    """Torch's random numbers in this context are a function of `key`; outside, they go on as if it had not been."""
    with torch.random.fork_rng():
        torch.manual_seed(
            int(np.random.SeedSequence([part % 2**63 for part in key]).generate_state(1, np.uint64)[0] >> 1)
        )
        yield

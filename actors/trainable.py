"""`Trainable`: one rank of a trained or frozen role, a plain class. It executes objectives and knows no method.

All ranks of a role are called at once with the same verb, each with its own chunk; every verb but `ping` is collective.

    driver ──update(chunk r, objective)──► rank r:  counts, summed over micro-batches and ranks
                                                    [outputs without gradient -> statistics]    if rows are coupled
                                                    per micro-batch: forward, loss, backward
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
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import actors
from actors.backends import BackendSpec, Placement, build_backend
from actors.backends.optimizer import OptimSpec
from actors.backends.protocol import Backend
from actors.batch import Batch
from actors.errors import RunError
from actors.forward import forward
from actors.metrics import combine, sum_counts
from actors.model import ModelSpec, load_tokenizer
from actors.objective import Counts, MicroBatch, Objective, Outputs, Stat
from actors.packing import Chunk
from actors.worker import WorkerInfo


@dataclass(frozen=True)
class UpdateReport:
    """What one optimizer step did; equal on all ranks but for `seconds` (forward, backward, step, in this process)."""

    metrics: dict[str, float]
    grad_norm: float
    learning_rate: float
    tokens: int  # of the whole batch, all ranks
    seconds: dict[str, float]


@dataclass
class _Clock:
    """Seconds by phase of an update."""

    seconds: dict[str, float] = field(default_factory=lambda: {"forward": 0.0, "backward": 0.0, "step": 0.0})

    @contextlib.contextmanager
    def measure(self, phase: str) -> Generator[None]:
        start = time.perf_counter()
        yield
        self.seconds[phase] += time.perf_counter() - start


class Trainable:
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
        self._objective_states: dict[str, dict[str, Any]] = {}
        self._steps_done = 0
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

    def reset(self, optim: OptimSpec) -> None:
        """A new phase: fresh optimizer, schedule and objective states on the same weights."""
        with self._doing("reset"):
            self.backend.reset_optimizer(optim)
            self._objective_states.clear()

    def logps(self, chunk: Chunk, into: str, temperature: float, adapters: bool = True) -> dict[str, np.ndarray]:
        """`{into: [T] float32}` for the rows of `chunk.batch` in their order, from a pass without gradient.

        0 at tokens that the mask leaves out. `adapters=False` computes the base model's."""
        with self._doing("logps"), contextlib.nullcontext() if adapters else self.backend.adapters_off():
            values = np.zeros(chunk.batch.num_tokens, np.float32)
            micros = self._micro_batches(chunk)
            for rows, outputs in zip(chunk.micro_batches, self._without_gradient(micros, temperature)):
                if outputs is not None:
                    values[chunk.batch.token_index(np.asarray(rows, np.int64))] = outputs.logps.cpu().numpy()
            return {into: values}

    def update(self, chunk: Chunk, objective: Objective, temperature: float, stage: str) -> UpdateReport:
        """One optimizer step on the batch of which `chunk` is this rank's share. `stage` names the objective's state.

        The loss is the sum of `objective.loss` over all micro-batches and ranks. Raises RunError if the gradient is not
        finite, or if there is nothing to learn from."""
        with self._doing("update"), _random_stream(self._seed, self._placement.rank, self._steps_done):
            if self._backend_spec.optim is None:
                raise RunError(f"{self.name} is frozen: it was built without an optimizer")
            clock = _Clock()
            micros = self._micro_batches(chunk)
            counts = sum_counts([objective.counts(micro) for micro in micros], self.backend.world, self.backend.device)
            tokens = sum_counts([_sizes(micro) for micro in micros], self.backend.world, self.backend.device)
            if not tokens.get("real"):
                raise RunError(f"{self.name}: an update was asked for with an empty batch")
            statistics = self._statistics(micros, objective, temperature, stage)
            pass_ = _Pass(objective, temperature, counts, statistics, tokens["real"])
            stats = [self._learn(micro, pass_, clock, last=micro is micros[-1]) for micro in micros]
            with clock.measure("step"):
                info = self.backend.step()
            if not np.isfinite(info.grad_norm):
                raise RunError(f"{self.name}: the gradient norm of step {self._steps_done + 1} is {info.grad_norm}")
            self._steps_done += 1
            metrics = combine(stats, self.backend.world, self.backend.device)
            metrics |= {"num_tokens": tokens["real"], "padding_share": 1 - tokens["real"] / tokens["computed"]}
            return UpdateReport(metrics, info.grad_norm, info.learning_rate, int(tokens["real"]), clock.seconds)

    def evaluate(self, chunk: Chunk, objective: Objective, temperature: float, stage: str) -> dict[str, float]:
        """The metrics that `update` would report of this batch, its loss among them, from a pass without gradient,
        dropout and noise. Weights, optimizer and the objective's state stay as they are."""
        with self._doing("evaluate"), torch.no_grad():
            world, device = self.backend.world, self.backend.device
            micros = self._micro_batches(chunk)
            counts = sum_counts([objective.counts(micro) for micro in micros], world, device)
            tokens = sum_counts([_sizes(micro) for micro in micros], world, device)
            if not tokens.get("real"):
                raise RunError(f"{self.name}: an evaluation was asked for with an empty batch")
            found = list(self._without_gradient(micros, temperature, objective.needs))
            seen = [(micro, outputs) for micro, outputs in zip(micros, found) if outputs is not None]
            statistics: dict[str, Any] = {}
            if objective.coupled:
                state = deepcopy(self._objective_states.get(stage, {}))
                statistics = objective.statistics([m for m, _ in seen], [o for _, o in seen], world, state)
            pass_ = _Pass(objective, temperature, counts, statistics, tokens["real"])
            return combine([_measured(*pass_.loss(*each)) for each in seen], world, device)

    def export(self, consumer: Callable[[Iterator[tuple[str, Tensor]]], Any], bucket_bytes: int) -> Any:
        """How weights leave: on rank 0, what `consumer` makes of all (Hugging Face name, full tensor); elsewhere None.

        Gathering is collective, so what the consumer leaves over is drawn all the same, even if it fails."""
        with self._doing("export"):
            weights = self.backend.full_weights(bucket_bytes)
            try:
                return consumer(weights) if self._placement.rank == 0 else None
            finally:
                for _ in weights:
                    pass

    def run(self, task: Callable[[], Any]) -> Any:
        """Call something in this process: a transport opening its port, say."""
        with self._doing("run"):
            return task()

    def save_state(self, folder: str) -> None:
        """Everything that exact resumption needs, into an existing folder; each rank writes its share."""
        with self._doing("save_state"):
            self.backend.save_state(Path(folder))
            state = {"seed": self._seed, "steps_done": self._steps_done, "objectives": self._objective_states}
            torch.save(state, Path(folder) / self._own_file)

    def load_state(self, folder: str) -> None:
        """Continue where `save_state` left off. The folder must be one of our own: it is unpickled."""
        with self._doing("load_state"):
            self.backend.load_state(Path(folder))
            state = torch.load(Path(folder) / self._own_file, weights_only=False)
            self._seed, self._steps_done = state["seed"], state["steps_done"]
            self._objective_states = state["objectives"]

    def save_model(self, folder: str) -> None:
        """A Hugging Face folder: merged weights, config, generation config, tokenizer."""
        with self._doing("save_model"):
            self.backend.save_model(Path(folder))
            if self._placement.rank == 0:
                load_tokenizer(self._model_spec).save_pretrained(folder)

    def load_model(self, folder: str) -> None:
        """Hold the weights of that Hugging Face folder from now on. Raises RunError if this role is trained."""
        with self._doing("load_model"):
            if self._backend_spec.optim is not None:
                raise RunError(f"{self.name} is trained: its optimizer belongs to the weights that it has")
            self._model_spec = replace(self._model_spec, path=folder)
            self._backend = None  # first: there may be no room for two
            self._backend = build_backend(self._model_spec, self._backend_spec, self._placement)

    def sleep(self) -> None:
        """Give the accelerator's memory back, keeping the state."""
        with self._doing("sleep"):
            self.backend.sleep()

    def wake(self) -> None:
        with self._doing("wake"):
            self.backend.wake()

    def close(self) -> None:
        """Let go of the model. Closing twice is fine."""
        self._backend = None

    @property
    def backend(self) -> Backend:
        if self._backend is None:
            raise RunError(f"{self.name}: not ready; `ready` loads the model")
        return self._backend

    @property
    def _own_file(self) -> str:
        return f"trainable-rank{self._placement.rank}.pt"

    def _micro_batches(self, chunk: Chunk) -> list[MicroBatch]:
        return [MicroBatch.of(chunk.batch.select(rows), self.backend.device) for rows in chunk.micro_batches]

    def _without_gradient(
        self, micros: list[MicroBatch], temperature: float, needs: frozenset[str] = frozenset()
    ) -> Iterator[Outputs | None]:
        """Outputs per micro-batch, without dropout and noise; None where it is empty, but it was run all the same."""
        training = self.backend.model.training
        self.backend.model.eval()
        try:
            with torch.no_grad():
                for micro in micros:
                    outputs = forward(self.backend.model, _filled(micro), temperature=temperature, needs=needs)
                    yield outputs if len(micro) else None
        finally:
            self.backend.model.train(training)

    def _statistics(
        self, micros: list[MicroBatch], objective: Objective, temperature: float, stage: str
    ) -> dict[str, Any]:
        if not objective.coupled:
            return {}
        outputs = list(self._without_gradient(micros, temperature, objective.needs))
        filled = [(micro, output) for micro, output in zip(micros, outputs) if output is not None]
        state = self._objective_states.setdefault(stage, {})
        return objective.statistics([m for m, _ in filled], [o for _, o in filled], self.backend.world, state)

    def _learn(self, micro: MicroBatch, pass_: _Pass, clock: _Clock, *, last: bool) -> dict[str, Stat]:
        """Forward and backward of one micro-batch. An empty one takes part too: the ranks move in step."""
        with clock.measure("forward"):
            outputs = forward(
                self.backend.model, _filled(micro), temperature=pass_.temperature, needs=pass_.objective.needs
            )
            loss, stats = pass_.loss(micro, outputs) if len(micro) else (outputs.logps.sum() * 0, {})
        with clock.measure("backward"):
            self.backend.backward(loss, last=last)
        return _measured(loss, stats)

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
        self._busy = (verb, time.monotonic())
        try:
            yield
        finally:
            self._busy = None


@dataclass(frozen=True)
class _Pass:
    """What the micro-batches of one update share."""

    objective: Objective
    temperature: float
    counts: Counts
    statistics: dict[str, Any]
    tokens: float  # of the whole batch, all ranks

    def loss(self, micro: MicroBatch, outputs: Outputs) -> tuple[Tensor, dict[str, Stat]]:
        """The objective's, plus the experts' balancing loss weighted by this micro-batch's share of tokens."""
        loss, stats = self.objective.loss(micro, outputs, self.counts, self.statistics)
        if outputs.aux_loss is None:
            return loss, stats
        size = _sizes(micro)["real"]
        balancing = Stat(outputs.aux_loss.detach() * size, size)
        return loss + outputs.aux_loss * (size / self.tokens), {**stats, "aux_loss": balancing}


def _measured(loss: Tensor, stats: dict[str, Stat]) -> dict[str, Stat]:
    """A micro-batch's metrics with its share of the loss."""
    return {**stats, "loss": Stat(loss.detach(), combine="sum")}


def _sizes(micro: MicroBatch) -> Counts:
    """Tokens of a micro-batch, and how many of them go through the model."""
    real = float(micro.lengths.sum())
    return {"real": real, "computed": max(real, 1.0)}


def _filled(micro: MicroBatch) -> MicroBatch:
    """The same, or one token with nothing to predict: what a rank runs whose micro-batch is empty."""
    return micro if len(micro) else MicroBatch.of(Batch.build([1], tokens=[0]), micro.lengths.device)


@contextlib.contextmanager
def _random_stream(*key: int) -> Generator[None]:
    """Torch's random numbers in this context are a function of `key`; outside, they go on as if it had not been."""
    with torch.random.fork_rng():
        torch.manual_seed(
            int(np.random.SeedSequence([part % 2**63 for part in key]).generate_state(1, np.uint64)[0] >> 1)
        )
        yield

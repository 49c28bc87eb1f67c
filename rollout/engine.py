"""The contract of an engine that samples. `tests/contract/test_engine*.py` run on every engine, and on a user's own.

One thread owns an engine (see `rollout/worker.py`): it adds requests, steps, and applies weights between two steps, so
no engine needs a lock. Requests in flight keep running across a weight update; their tokens carry the version that
produced each of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from importlib import import_module
from typing import TYPE_CHECKING, Any, Protocol

from actors.errors import ConfigError
from actors.specs import LoraSpec
from rollout.sampling import Completion, Request

if TYPE_CHECKING:  # the configuration reads `EngineSpec` without importing torch
    import torch
    from torch import Tensor

    from rollout.weights.protocol import SyncOrder

ENGINES: dict[str, str] = {  # kind -> class, imported when it is built: importing an engine takes seconds
    "vllm": "rollout.vllm_engine:VllmEngine",
    "hf": "rollout.hf_engine:HfEngine",
    "scripted": "rollout.scripted_engine:ScriptedEngine",
}


class Ability(StrEnum):
    """What some engines can do and others cannot. An engine's class names its own in `abilities`; a run that needs one
    which its engine lacks is refused before anything starts."""

    ADMITTED = "admitted"  # reports for each token which tokens truncated sampling allowed (`replay_truncation`)
    FLOAT32_HEAD = "float32_head"  # computes logits in float32 (`EngineSpec.lm_head_fp32`)
    ROUTES = "routes"  # reports which experts each token was sent to (`replay_routing`)
    PROMPT_TOP_K = "prompt_top_k"  # reports the likeliest tokens at each place of a prompt (`Request.prompt_top_k`)
    MIXES = "mixes"  # holds a second model, and samples from the geometric mixture of both
    SHARDED = "sharded"  # its tensor-parallel processes receive weights each for itself (`ShardedEngine`)
    ADAPTERS = "adapters"  # holds LoRA adapters beside the weights of the model's folder, and takes new ones alone


CPU_KV_CACHE_GIB = 0.25  # on a CPU the cache is taken from memory that all processes share


@dataclass(frozen=True)
class EngineSpec:
    """How to build an engine. `kind` is a key of `rollout.engine.ENGINES`."""

    kind: str  # vllm | hf | scripted, or `package.module:Class` of your own
    model: str  # a Hugging Face folder or hub name; the engine reads config and tokenizer from it
    dtype: str = "float32"
    max_model_len: int = 1024  # tokens, prompt and completion
    max_concurrency: int = 256  # sequences decoded at the same time
    threads: int = 1
    tensor_parallel: int = 1
    gpus: float = 0.0
    alone_on_gpu: bool = False  # the other roles on its GPU sleep while it is awake
    kv_cache_gib: float | None = None  # None: on a GPU, what the engine finds left; on a CPU, CPU_KV_CACHE_GIB
    seed: int = 0
    trust_remote_code: bool = False
    lora: LoraSpec | None = None  # adapters beside the model, which are published alone; None: there are none
    mixes: str | None = None  # a second model, in the logits of requests with a `mixture`; None: there is none
    lm_head_fp32: bool = False  # compute logits in float32, whatever the dtype
    max_admitted: int = 0  # the largest `top_k` of requests with `replay_truncation`, or `prompt_top_k`
    options: dict[str, Any] = field(default_factory=dict)  # passed to the engine itself, e.g. vLLM's EngineArgs


@dataclass(frozen=True)
class Finished:
    """A request whose samples have all ended."""

    request: Request
    completions: list[Completion]


class Engine(Protocol):
    """Not thread-safe: one thread owns it."""

    abilities: frozenset[Ability]
    version: int  # of the weights in use; -1 until the first `load`
    device: torch.device  # where it computes, and where `load` gets new weights

    def add(self, request: Request) -> None:
        """Queue a request. Raises DataFailure for one that can never run (prompt too long for the model, say)."""
        ...

    def abort(self, request_id: str) -> None:
        """Forget a request: no later `step` returns it. Unknown ids are ignored."""
        ...

    @property
    def busy(self) -> bool:
        """True while a request is unfinished."""
        ...

    def step(self) -> list[Finished]:
        """Advance every running request by one token (or an engine's own quantum). Returns the requests that
        finished."""
        ...

    def load(self, weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Replace all weights, given under Hugging Face names. They are drawn as they arrive: an engine that collects
        them holds a second model for a while. Running requests continue with the new ones. Nothing that was computed
        with the old ones (keys and values, a prefix cache) is used again: the log-probability of a token is that of its
        one version. Raises if a parameter of the model is missing; the engine must not be used afterwards. What
        `weights` raises is passed on (TransferFailed: they did not arrive): a later `load` makes the engine whole."""
        ...

    def load_adapters(self, weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        """`load` for the adapters alone, under the names of a PEFT folder; the model's other weights are those of
        `EngineSpec.model`. Called only on an engine with the ability `ADAPTERS` that was built with `EngineSpec.lora`.
        """
        ...

    def load_second(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """`load` for the second model, that of `EngineSpec.mixes`. Tokens keep the version of the first one's weights.
        Called only on an engine with the ability `MIXES`."""
        ...

    def sleep(self) -> None:
        """Release the accelerator's memory. Called only while not busy; no effect on a CPU."""
        ...

    def wake(self) -> None:
        """Undo `sleep`: the engine has the same weights as before. No effect on an engine that is awake: where a role
        fell asleep in part, all of it is woken."""
        ...

    def close(self) -> None:
        """Release what the engine holds. It is not used afterwards."""
        ...


class ShardedEngine(Engine, Protocol):
    """Of several processes, with the ability `SHARDED`."""

    def receive(self, names: Sequence[str], order: SyncOrder, payload: Any) -> str:
        """`load` of what arrives in each process, which is the receiver of that name (`rollout/weights/protocol.py`),
        by rank. Returns the fingerprint, of which all must have the same. Raises TransferFailed, as `load` does."""
        ...


def build_engine(spec: EngineSpec) -> Engine:
    """The engine that the specification asks for, ready to take requests, with the weights of `spec.model`."""
    return _class_of(spec.kind)(spec)


def abilities_of(kind: str) -> frozenset[Ability]:
    """What engines of that kind can do beyond the contract: nothing, if the class has no `abilities`."""
    return frozenset(getattr(_class_of(kind), "abilities", ()))


def _class_of(kind: str) -> Any:
    path = ENGINES.get(kind, kind)
    if ":" not in path:
        raise ConfigError(f"roles.rollout.engine: {kind!r} is none of {', '.join(ENGINES)}, nor `package.module:Class`")
    module, name = path.split(":")
    return getattr(import_module(module), name)

"""New weights in the processes of a vLLM engine.

With one process the engine's thread draws them and puts them in. With several, each of them is a receiver of its own,
and puts the whole tensors in, of which vLLM keeps its part:

    engine's thread ── SyncOrder ──► process 0 ◄── buckets ── its parent in the broadcast tree, or the file
                          └────────► process 1 ◄── buckets ── process 0, or the file

What came with the call, from the object store, is in the engine's own process: that one broadcasts it to the others.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from actors.errors import InfraFailure
from rollout.weights import Receiver, receiver
from rollout.weights.collective import CollectiveSender
from rollout.weights.protocol import SENDER, Link, Rendezvous, SyncOrder, TransferFailed

if TYPE_CHECKING:
    from vllm.v1.engine.llm_engine import LLMEngine

LOCAL_TIMEOUT_S = 120.0  # of a broadcast within an engine


def put(worker: Any, weights: Iterable[tuple[str, Tensor]]) -> None:
    """Runs in every process of an engine that puts weights in. Raises InfraFailure if a parameter of the model was not
    among them, and what `weights` raises, after which another `put` is possible."""
    model: nn.Module = worker.get_model()
    expected = {name for name, _ in model.named_parameters()}
    with _reloading(model, worker.model_config):
        loaded = model.load_weights(iter(weights))  # pyright: ignore[reportCallIssue]: every model of vLLM has it
    missing = sorted(expected - loaded)
    if missing:
        raise InfraFailure(f"{len(missing)} of {len(expected)} parameters not sent: {', '.join(missing[:5])}")


@contextmanager
def _reloading(model: nn.Module, config: Any) -> Iterator[None]:
    """Layer by layer, because kernels keep copies in their own layout; a plain `load_weights` fails on a CPU. vLLM
    holds on to the tensors of a layer until it has all of them. A *tied* output head has no weights of its own to load,
    and would silently keep using the old embedding on a CPU."""
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
    from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

    initialize_layerwise_reload(model)
    try:
        yield
    finally:
        finalize_layerwise_reload(model, config)  # also if only a part has come: the next reload begins at its start
        for module in model.modules():
            if isinstance(module, ParallelLMHead) and hasattr(module, "cpu_linear"):
                module.quant_method.process_weights_after_loading(module)


def receive(llm: LLMEngine, names: Sequence[str], order: SyncOrder, payload: Any) -> str:
    """Every process of the engine receives the weights of an order, under its name, by rank, and puts them in. Returns
    their fingerprint. Raises TransferFailed if they did not reach all, and InfraFailure if not all got the same."""
    if order.transport == "object_store":
        outcomes = _broadcast(llm, names, order, payload)
    else:
        outcomes = llm.collective_rpc(partial(_receive_here, names=tuple(names), order=order))
    fingerprints = [outcome for outcome in outcomes if isinstance(outcome, str)]
    failed = [outcome for outcome in outcomes if isinstance(outcome, _Failed)]
    if failed:
        begun = bool(fingerprints) or any(each.begun for each in failed)
        raise TransferFailed("; ".join(each.why for each in failed), begun)
    if len(set(fingerprints)) > 1:
        raise InfraFailure(f"the processes of one engine received weights with other fingerprints: {fingerprints}")
    return fingerprints[0]


class _Failed:
    """A TransferFailed on its way through vLLM, which passes on no exceptions but only their text."""

    def __init__(self, why: str, begun: bool) -> None:
        self.why, self.begun = why, begun


def _receive_here(worker: Any, names: tuple[str, ...], order: SyncOrder, keep: bool = True) -> str | _Failed:
    """Runs in every process. `keep`: the receiver, with its connections, stays for the next order."""
    kept: dict[str, Receiver] = worker.__dict__.setdefault("troupe_receivers", {})
    ours = kept.get(order.transport) if keep else None
    ours = ours or receiver(order.transport, names[worker.rank], worker.device)
    if keep:
        kept[order.transport] = ours
    try:
        with ours.receive(order) as incoming:
            put(worker, incoming)
            return incoming.finish()
    except TransferFailed as error:
        return _Failed(str(error), error.begun)
    finally:
        if not keep:
            ours.close()


def _broadcast(llm: LLMEngine, names: Sequence[str], order: SyncOrder, payload: Any) -> list[str | _Failed]:
    """The buckets of the payload, from this process to those of the engine."""
    if not isinstance(payload, list):
        raise TransferFailed(f"{names[0]}: order {order.id} came without its weights")
    sender = CollectiveSender()
    host, port = sender.open()
    links = tuple(
        Link(f"{order.id}/{rank}", names[rank - 1] if rank else SENDER, name, rank) for rank, name in enumerate(names)
    )
    order = replace(order, transport="collective", rendezvous=Rendezvous(host, port, links, LOCAL_TIMEOUT_S))
    with closing(sender), ThreadPoolExecutor(1) as thread:
        sending = thread.submit(sender.send_buckets, order, map(torch.tensor, payload))
        outcomes = llm.collective_rpc(partial(_receive_here, names=tuple(names), order=order, keep=False))
        sending.result(LOCAL_TIMEOUT_S)
        return outcomes

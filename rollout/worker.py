"""A rollout worker: an engine with the threads around it. A plain class; `actors/group.py` makes a Ray actor of it.

    event loop                        engine thread
    ──────────                        ─────────────
    generate(request) ── queue ─────► add
                                      step, step, step ...
    receive(order) ───── queue ─────► take the weights, bucket by bucket as they arrive, between two steps
    Ack(version, fingerprint) ◄────── step, step, step ...
    generate ◄── future ───────────── finished
    ping(), from any thread: reads counters, never waits

`rollout/engine_loop.py` is the engine thread. Every wait here ends when the engine thread settles the future, or at its
deadline. A request has no deadline here (its caller has one), but it fails if the engine completes no step for
`stall_s`.
"""

from __future__ import annotations

import asyncio
import os
import platform
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

import actors
from actors.batch import Batch
from actors.errors import DataFailure, InfraFailure, TroupeError
from actors.sharding import Shard
from actors.worker import Worker, WorkerInfo, consume_exception
from rollout.conversation import Conversation, ConversationSpec
from rollout.engine import Ability, Engine, EngineSpec, ShardedEngine, abilities_of, build_engine
from rollout.engine_loop import EngineLoop
from rollout.episode import Dialogue, EnvironmentLost, EpisodeRequest, Lost, Transcript
from rollout.sampling import Completion, Finish, GroupMeta, Request, to_batch
from rollout.teaching import columns_of, requests_of
from rollout.tool_calls import parser_of
from rollout.weights.protocol import Ack, Part, SyncOrder, receivers

if TYPE_CHECKING:
    from rollout.weights import Receiver

T = TypeVar("T")

START_TIMEOUT_S = 600.0  # callers have a shorter one; a model of a hundred gibibytes takes minutes to read
VERB_TIMEOUT_S = 120.0  # a command waits for the current step
TRANSFER_TIMEOUT_S = 600.0  # if the order has none
CLOSE_TIMEOUT_S = 10.0
STALL_S = 120.0


class RolloutWorker:
    """Used from one event loop; `ping` and `close` from any thread."""

    def __init__(
        self,
        name: str,
        spec: EngineSpec,
        initial_version: int = -1,
        stall_s: float = STALL_S,
        conversation: ConversationSpec | None = None,
    ) -> None:
        """`conversation`: how episodes are rendered; None for a worker that is asked for none."""
        self.name = name
        self._spec = spec
        self._conversation_spec = conversation
        self._conversation: Conversation | None = None
        self._episodes: dict[str, asyncio.Task[Any]] = {}
        self._initial_version = initial_version
        self._stall_s = stall_s
        self._loop = EngineLoop(name, self._build)
        self._waiters: Counter[str] = Counter()  # calls of `generate` per request id
        self._receivers: dict[tuple[str, Part], Receiver] = {}
        self._receiving = asyncio.Lock()
        self._applied: tuple[str, Ack] | None = None  # the last order, by id
        self._asleep = False

    async def ready(self) -> WorkerInfo:
        """Build the engine, once. Returns the worker's description. Raises ModelError or ConfigError."""
        began = time.monotonic()
        await self._within(self._loop.start(), START_TIMEOUT_S, "the engine's start")
        if self._conversation_spec is not None:
            self._conversation = await asyncio.to_thread(self._conversation_spec.load)
        detail = {
            "engine": self._spec.kind,
            "dtype": self._spec.dtype,
            "start_seconds": time.monotonic() - began,
            "receivers": self._processes(),  # of the weights of its own model
        }
        return WorkerInfo(self.name, os.getpid(), platform.node(), str(Path(actors.__file__).parent), detail)

    async def generate(self, request: Request) -> tuple[GroupMeta, Batch]:
        """All samples of a request. A second call with its id, while it runs, waits for the same samples; when the last
        waiting call is cancelled, the request is aborted. Raises InfraFailure if the engine broke, made no progress or
        aborted the request, DataFailure if this request can never run."""
        began = time.monotonic()
        completions = await self._completions(request)
        return self._meta(request, completions, time.monotonic() - began), to_batch(request, completions)

    async def generate_all(
        self, requests: Sequence[Request]
    ) -> tuple[list[GroupMeta | TroupeError], *tuple[Batch, ...]]:
        """`generate` of several requests at the same time: what each brings, or with an empty block the DataFailure or
        InfraFailure that it raised. They end when the call is cancelled."""
        found = await asyncio.gather(*map(self.generate, requests), return_exceptions=True)
        outcomes: list[GroupMeta | TroupeError] = []
        blocks: list[Batch] = []
        for each in found:
            if isinstance(each, BaseException) and not isinstance(each, (DataFailure, InfraFailure)):
                raise each
            outcome, block = (each, Batch.empty()) if isinstance(each, (DataFailure, InfraFailure)) else each
            outcomes.append(outcome)
            blocks.append(block)
        return outcomes, *blocks

    async def top_k(
        self, name: str, shard: Shard, into: tuple[str, ...], k: int, vocabulary: int | None, *blocks: Batch
    ) -> tuple[None, Batch]:
        """What the engine's model finds likeliest in the place of each token of a shard's rows, as columns: see
        `rollout/teaching.py`. Raises as `generate` does, and RunError for entries beyond the `vocabulary`."""
        batch = shard.fetched(blocks).batch
        asked = requests_of(name, batch, k)
        found = await asyncio.gather(*(self._completions(request) for request in asked))
        return None, columns_of(batch, [completion for (completion,) in found], into, vocabulary)

    async def episode(
        self, request: EpisodeRequest, environment: Worker
    ) -> tuple[GroupMeta | EnvironmentLost, Batch, Transcript]:
        """One episode with the environment in that worker, from its start to its end; a call with the id of one that is
        under way ends that one. Raises as `generate` does; a failure of the environment is returned, because it says
        nothing about this worker."""
        assert self._conversation is not None, "the worker was started without a conversation"
        began = time.monotonic()
        parser = parser_of(request.parser, self._conversation.tokenizer)
        dialogue = Dialogue(request, self._conversation, parser, self._turn, environment)
        await self._abort_episodes([request.id])
        task = self._episodes[request.id] = asyncio.ensure_future(dialogue.run())
        try:
            episode, transcript, facts = await task
        except Lost as error:
            return error.lost, Batch.empty(), Transcript([], [])
        except asyncio.CancelledError:
            if self._episodes.get(request.id) is task:  # it is this call that was cancelled
                raise
            raise InfraFailure(f"{self.name}: episode {request.id} was aborted") from None
        finally:
            task.cancel()
            if self._episodes.get(request.id) is task:
                del self._episodes[request.id]
        rows = episode.rows()
        versions = rows["version"][rows["mask"]]
        meta = GroupMeta(
            request_id=request.id,
            worker=self.name,
            lengths=(episode.written,),
            finishes=(Finish.LENGTH if episode.truncated else Finish.STOP,),
            oldest_version=int(versions.min()),
            newest_version=int(versions.max()),
            seconds=time.monotonic() - began,
            totals=(rows.num_tokens,),
            episodes=(facts,),
            turn_rows=episode.turn_rows(),
        )
        return meta, rows, transcript

    async def abort(self, request_ids: list[str]) -> int:
        """End requests and episodes; their `generate` and `episode` raise InfraFailure. Returns how many of them were
        running; unknown ids are ignored."""
        episodes = await self._abort_episodes(request_ids)
        return episodes + await self._within(self._loop.abort(request_ids), VERB_TIMEOUT_S, "abort")

    async def receive(self, order: SyncOrder, payload: Any = None) -> Ack:
        """Receive new weights and apply them between two steps. An order that was already carried out is acknowledged
        again without a transfer. Raises TransferFailed if not all arrive: if some have been replaced by then, requests
        wait, as in a pause, until another order brings all. Raises InfraFailure if applying them fails: the engine is
        dead then."""
        async with self._receiving:
            if self._applied is None or self._applied[0] != order.id:
                self._refuse_asleep(f"the weights of version {order.version}")
                self._applied = None  # if this fails, the engine may not hold any more what it acknowledged before
                self._applied = (order.id, await self._receive(order, payload))
            return self._applied[1]

    def ping(self) -> dict[str, Any]:
        """The worker's state, without waiting. `alive` is false if the engine broke or makes no progress."""
        stuck_s = self._loop.stuck_seconds
        return {
            "alive": self._loop.death is None and stuck_s < self._stall_s,
            "death": self._loop.death,
            "version": self._loop.version,
            "requests": self._loop.requests,
            "tokens": self._loop.tokens.total,
            "tokens_per_s": self._loop.tokens.per_second(),
            "stuck_s": stuck_s,
            "paused": self._loop.paused,
            "kv_cache_use": self._loop.kv_cache_use,
            "asleep": self._asleep,
        }

    async def pause(self) -> None:
        """Stop decoding after the current step. Requests are kept and accepted; weights can be received."""
        await self._within(self._loop.pause(True), VERB_TIMEOUT_S, "pause")

    async def resume(self) -> None:
        await self._within(self._loop.pause(False), VERB_TIMEOUT_S, "resume")

    async def sleep(self) -> None:
        """Release the accelerator's memory. Raises InfraFailure while requests are running. Until `wake`, requests and
        new weights are refused with an InfraFailure."""

        def sleep(engine: Engine) -> None:
            if engine.busy:
                raise InfraFailure(f"{self.name} cannot sleep while it generates: abort its requests, or let them end")
            engine.sleep()

        await self._within(self._loop.submit(sleep), VERB_TIMEOUT_S, "sleep")
        self._asleep = True

    async def wake(self) -> None:
        await self._within(self._loop.submit(lambda engine: engine.wake()), VERB_TIMEOUT_S, "wake")
        self._asleep = False

    def _refuse_asleep(self, what: str) -> None:
        if self._asleep:
            raise InfraFailure(f"{self.name} sleeps, and its weights are not on its device: `wake` comes before {what}")

    @property
    def has_ended(self) -> bool:
        """Whether its engine is gone, which it need not be after `close`: that waits no longer than CLOSE_TIMEOUT_S."""
        return self._loop.has_ended

    def close(self) -> None:
        """End the threads and the engine. Calls in flight raise InfraFailure. Closing twice is fine."""
        self._loop.close(min(self._stall_s, CLOSE_TIMEOUT_S))
        for receiver in self._receivers.values():
            receiver.close()

    async def _completions(self, request: Request) -> list[Completion]:
        """A request's samples. When the last call that waits for them is cancelled, the request is aborted."""
        self._refuse_asleep(f"request {request.id}")
        future = self._loop.generate(request)
        self._waiters[request.id] += 1
        try:
            return await self._while_it_moves(future, f"request {request.id}")
        finally:
            self._waiters[request.id] -= 1
            if not self._waiters[request.id]:
                del self._waiters[request.id]
                if not future.done():
                    self._loop.abort([request.id])

    async def _turn(self, request: Request, seconds: float) -> Completion | None:
        """A turn of an episode; None if it is not there within so many seconds, and then it is aborted."""
        try:
            async with asyncio.timeout(seconds):
                (completion,) = await self._completions(request)
                return completion
        except TimeoutError:
            return None

    async def _abort_episodes(self, ids: list[str]) -> int:
        """End those of the episodes that are under way, and wait until they have ended."""
        tasks = [task for each in ids if (task := self._episodes.pop(each, None)) is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        return len(tasks)

    def _build(self) -> Engine:
        engine = build_engine(self._spec)
        engine.version = self._initial_version
        return engine

    def _meta(self, request: Request, completions: list[Completion], seconds: float) -> GroupMeta:
        ordered = sorted(completions, key=lambda completion: completion.index)
        return GroupMeta(
            request_id=request.id,
            worker=self.name,
            lengths=tuple(len(completion.tokens) for completion in ordered),
            finishes=tuple(completion.finish for completion in ordered),
            oldest_version=min(int(completion.versions.min()) for completion in ordered),
            newest_version=max(int(completion.versions.max()) for completion in ordered),
            seconds=seconds,
        )

    async def _receive(self, order: SyncOrder, payload: Any) -> Ack:
        began = time.monotonic()
        deadline = (order.rendezvous.timeout_s if order.rendezvous else TRANSFER_TIMEOUT_S) + VERB_TIMEOUT_S
        loading = self._loop.load(
            lambda engine: self._take(engine, order.after(time.monotonic() - began), payload), order.part
        )
        fingerprint, stall = await self._within(loading, deadline, f"the weights of version {order.version}")
        return Ack(self.name, order.version, fingerprint, time.monotonic() - began, stall)

    def _take(self, engine: Engine, order: SyncOrder, payload: Any) -> str:
        """Give the engine the weights of an order as they arrive; their fingerprint. On the engine's thread."""
        if order.part == "own" and len(self._processes()) > 1:
            return cast(ShardedEngine, engine).receive(self._processes(), order, payload)
        with self._receiver(order, engine).receive(order, payload) as incoming:
            if order.part == "second":
                engine.load_second(incoming)
            elif order.part == "adapters":
                engine.load_adapters(incoming, order.version)
            else:
                engine.load(incoming, order.version)
            return incoming.finish()

    def _processes(self) -> tuple[str, ...]:
        sharded = Ability.SHARDED in abilities_of(self._spec.kind)
        return receivers(self.name, self._spec.tensor_parallel if sharded else 1)

    def _receiver(self, order: SyncOrder, engine: Engine) -> Receiver:
        from rollout.weights import receiver

        way = order.transport, order.part  # the two models have senders of their own
        if way not in self._receivers:
            self._receivers[way] = receiver(order.transport, self.name, engine.device)
        return self._receivers[way]

    async def _while_it_moves(self, future: Future[T], what: str) -> T:
        """The future's result. Raises InfraFailure once the engine has made no progress for `stall_s`."""
        return await self._settled(
            future,
            lambda: self._loop.stuck_seconds < self._stall_s,
            self._stall_s / 4,
            f"{what}: the engine has not finished a step for {self._stall_s:g} s",
        )

    async def _within(self, future: Future[T], timeout_s: float, what: str) -> T:
        return await self._settled(future, lambda: False, timeout_s, f"{what} took longer than {timeout_s:g} s")

    async def _settled(self, future: Future[T], patient: Callable[[], bool], interval_s: float, complaint: str) -> T:
        """The future's result. Every `interval_s` without one, raises InfraFailure unless `patient()`."""
        waiter = asyncio.wrap_future(future)
        waiter.add_done_callback(consume_exception)
        while not (await asyncio.wait({waiter}, timeout=interval_s))[0]:
            if not patient():
                raise InfraFailure(f"{self.name}: {complaint}")
        return waiter.result()

"""Weights as a versioned, verified resource: every serving rollout worker has acknowledged (version, fingerprint).

Membership is reconciled before every publish. Joining workers that are up take part. After the transfer exactly those
members are promoted whose acknowledgement equals what the trainer sent; the others are evicted and replaced, except
those that a lost member has cut off from the broadcast: they get another one. A worker that comes up between two
publishes catches up through the object store, before it gets any work.
"""

from __future__ import annotations

import asyncio
import platform
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from actors.errors import InfraFailure, WeightSyncError
from actors.specs import WeightsForm
from actors.worker import Group, Objects, Ref, WorkerInfo
from orchestrator.cluster.fleet import State
from orchestrator.cluster.pool import Event, Pool
from orchestrator.config.schema import WeightsConfig
from orchestrator.publishing.transfer import export_payload
from orchestrator.publishing.tree import BroadcastTree, Place
from rollout.weights import CollectiveSend, DiskWrite, ManifestOf, OpenCollective, PackBuckets
from rollout.weights.meeting import report_losses
from rollout.weights.protocol import SENDER, Ack, Manifest, Part, Rendezvous, SendReport, SyncOrder

REPORT_S = 10.0  # to reach the store in the sender's process
MARGIN_S = 30.0  # of the driver's deadlines: whoever takes part in a transfer gives up at `timeout_s`, and says so


@dataclass(frozen=True)
class SyncReport:
    """One publish: who has the version now, how long it took, and for how long decoding stood still at most.
    `fingerprint`: of the weights, as the members confirmed them; None if there was no member."""

    role: str  # of the engines
    source: str  # the role whose weights they are
    version: int
    fingerprint: str | None
    members: tuple[int, ...]
    seconds: float
    stall_seconds: float
    nbytes: int


class Publisher:
    """Moves the weights of the role `source` to the members of the engine role `role`. One sync at a time.

    The part `adapters` sends a model's adapters alone, to engines that have the rest from the model's folder. Engines
    that mix two models have two publishers: that of the `second` part promotes nobody, and the other one, which knows
    it, promotes members that hold both."""

    def __init__(
        self,
        policy: Group,
        pool: Pool,
        objects: Objects,
        config: WeightsConfig,
        *,
        role: str,
        source: str,
        dtype: str,
        folder: str,
        event: Event,
        transport: str,
        bucket_bytes: int,
        part: Part = "own",
        second: Publisher | None = None,
    ) -> None:
        self.version = -1
        self.outdated = False  # whether the source has other weights than the ones published as `version`
        self.role, self.source = role, source
        self._part: Part = part
        self._transport = transport
        self._form: WeightsForm = "adapters" if part == "adapters" else "merged"
        self._second = second
        self._store = role if part == "own" else f"{role}, {part}"  # of rendezvous, in the sender's process
        self._policy, self._pool, self._objects, self._config = policy, pool, objects, config
        self._dtype, self._folder, self._event = dtype, folder, event
        self._bucket_bytes = bucket_bytes
        self.changing = asyncio.Lock()  # held while the policy is updated and published: no worker catches up meanwhile
        self._published = asyncio.Event()
        self._held: dict[int, int] = {}  # member -> version that it acknowledged
        self._unconfirmed: dict[int, InfraFailure] = {}  # member that lived when it failed in this publish -> why
        self._address: tuple[str, str, int] | None = None
        self._tree = BroadcastTree()
        self._manifest: Manifest | None = None
        self._snapshot: tuple[SendReport, Ref] | None = None

    async def publish(self, version: int) -> SyncReport:
        """Bring every healthy member to `version`, which the policy's weights are. The caller holds `changing`. Raises
        WeightSyncError if no member confirmed and one that lives failed to; if all of them died or were scaled down
        meanwhile, their replacements catch up."""
        assert self.changing.locked()
        began = time.monotonic()
        members = self._pool.indices(State.JOINING, State.SERVING)
        if self._second is not None:
            for index in members:
                await self._second.catch_up(index)
            members = [index for index in members if self._second.holds(index)]
        apart = [index for index in members if self._pool.is_attached(index)]
        together = [index for index in members if index not in apart]
        self._unconfirmed.clear()
        acks = await self._transfer(version, together) if together else []
        acks += await self._transfer_apart(version, apart) if apart else []
        if self._unconfirmed and not acks:
            whys = "".join(f"; worker {index} lives: {why}" for index, why in sorted(self._unconfirmed.items()))
            raise WeightSyncError(
                f"version {version}: none of {len(members)} rollout worker(s) confirmed the weights{whys}"
            )
        if self._snapshot is not None and self._snapshot[0].version != version:  # of the weights before
            self._snapshot = None
        self.version, self.outdated = version, False
        self._published.set()
        stall = max((ack.stall_seconds for ack in acks), default=0.0)
        promoted = tuple(index for index in members if self._held.get(index) == version)
        fingerprint = acks[0].fingerprint if acks else None
        seconds, nbytes = time.monotonic() - began, (await self._get_manifest()).nbytes
        return SyncReport(self.role, self.source, version, fingerprint, promoted, seconds, stall, nbytes)

    def source_replaced(self) -> None:
        """The source was given other weights, and the version is still the one that was published last: it must be
        published again, and nobody may catch up with what was packed of it. The caller holds `changing`."""
        self.outdated = True
        self._snapshot = None

    async def admit(self, index: int) -> None:
        """Returns once the member holds the current weights; the pool calls this before it gives out work. Before the
        first publish it waits, without a deadline: what a run does before that may take hours."""
        if self._second is not None:
            await self._second.admit(index)
        await self._published.wait()
        async with self.changing:
            await self.catch_up(index)

    def holds(self, index: int) -> bool:
        """Whether a member has confirmed the current weights."""
        return self._held.get(index) == self.version

    async def catch_up(self, index: int) -> None:
        """Bring one member to the current weights, unless it holds them. The caller holds `changing`."""
        if self.holds(index):
            return
        report, payload = await self._packed()
        manifest, name = await self._get_manifest(), f"late-{self.version}-{self._part}-{index}"
        order = SyncOrder(name, self.version, "object_store", manifest, part=self._part)
        await self._each_receives([index], order, report, payload)

    async def _transfer(self, version: int, members: Sequence[int]) -> list[Ack]:
        """The acks of those that confirmed the version."""
        if self._transport == "collective":
            return await self._broadcast(version, members)
        order = await self._order(version)
        if self._transport == "disk":
            order = replace(order, folder=self._folder)
            report, payload = await self._export(DiskWrite(order), f"publish v{version}"), None
        else:
            self._snapshot = None
            report, payload = await self._packed(version)
        return await self._each_receives(members, order, report, payload)

    async def _broadcast(self, version: int, members: Sequence[int]) -> list[Ack]:
        """Send and receive at the same time, in the turn of both sides: an engine that is ordered to receive decodes no
        more until it has. Members that a lost one has cut off get another broadcast, by other links; each round loses
        at least one member, so this ends. Nobody waits for a member that is lost before it has joined its links."""
        acks: list[Ack] = []
        blank, address = await self._order(version), await self._get_address()  # members may go meanwhile
        while members := [index for index in members if index in self._pool.workers]:
            infos = {index: self._pool.infos[index] for index in members}
            names = {info.name: index for index, info in infos.items()}
            order = replace(blank, id=self._new_id(version), rendezvous=self._rendezvous(address, infos.values()))
            send = CollectiveSend(order.seen_by({SENDER}), self._store)
            async with self._pool.turn(), self._policy.turn() as policy:
                sending = asyncio.ensure_future(self._export(send, f"publish v{version}", policy))
                receiving = (self._takes_part(index, infos[index], order, sending) for index in members)
                _, *results = await asyncio.gather(sending, *receiving)
            acks += [result for result in results if isinstance(result, Ack)]
            failed = {n: r for n, r in zip(names, results, strict=True) if isinstance(r, InfraFailure)}
            lost = [name for name, r in zip(names, results, strict=True) if not isinstance(r, Ack)]  # some were stopped
            cut_off = self._tree.cut_off(lost)
            self._tree.drop(lost)
            await self._evict({names[n]: why for n, why in failed.items() if n not in cut_off}, version)
            members = [index for name, index in names.items() if name in cut_off]
        return acks

    async def _takes_part(
        self, index: int, info: WorkerInfo, order: SyncOrder, sending: asyncio.Future[SendReport]
    ) -> Ack | InfraFailure | None:
        """`_receive` of a broadcast. If it fails, the other ends of the member's links are told, and what the sender
        says of it is part of the failure."""
        result, receivers = await self._receive(index, order, sending), self._receivers_of(info)
        if isinstance(result, Ack):
            return result
        if not sending.done():
            await self._report_losses(order, receivers)
        dropped = (await sending).failed
        why = "; ".join(dropped[name] for name in receivers if name in dropped)
        return InfraFailure(f"{result}; {self.source} gave it up: {why}") if result and why else result

    async def _report_losses(self, order: SyncOrder, receivers: tuple[str, ...]) -> None:
        """If that is not possible, the other ends wait until their deadlines."""
        assert order.rendezvous is not None
        address = order.rendezvous.host, order.rendezvous.port
        try:
            reporting = asyncio.to_thread(report_losses, address, order.id, receivers, REPORT_S)
            why = await asyncio.wait_for(reporting, REPORT_S + 1)
        except TimeoutError:
            why = f"no answer within {REPORT_S:g} s"
        if why:
            self._event("loss_not_reported", {"receivers": receivers, "version": order.version, "why": why})

    async def _transfer_apart(self, version: int, members: Sequence[int]) -> list[Ack]:
        """To members that were started elsewhere: whichever the transport of the others, theirs is the call itself."""
        if self._snapshot is not None and self._snapshot[0].version != version:
            self._snapshot = None
        order = replace(await self._order(version), transport="object_store")
        return await self._each_receives(members, order, *await self._packed(version))

    async def _each_receives(
        self, members: Sequence[int], order: SyncOrder, report: SendReport, payload: Ref | None
    ) -> list[Ack]:
        """Of what was sent before. Each member fails by itself."""
        async with self._pool.turn():
            results = await asyncio.gather(*(self._receive(index, order, report, payload) for index in members))
        failed = {i: result for i, result in zip(members, results, strict=True) if isinstance(result, InfraFailure)}
        await self._evict(failed, order.version)
        return [result for result in results if isinstance(result, Ack)]

    async def _receive(
        self, index: int, order: SyncOrder, sent: SendReport | asyncio.Future[SendReport], payload: Ref | None = None
    ) -> Ack | InfraFailure | None:
        """One member's side: its ack, or why it failed. None if the member is gone."""
        worker = self._pool.workers.get(index)
        if worker is None:
            return None
        try:
            own = order.seen_by(self._receivers_of(self._pool.infos[index])) if order.rendezvous else order
            deadline, name = self._config.timeout_s + MARGIN_S, f"{self.role}.receive v{order.version}"
            ack: Ack = await worker.call("receive", own, payload, timeout_s=deadline, task_name=name)
            report = await sent if isinstance(sent, asyncio.Future) else sent
            if (ack.version, ack.fingerprint) != (report.version, report.fingerprint):
                raise InfraFailure(
                    f"acknowledged {ack.version}/{ack.fingerprint}, sent {report.version}/{report.fingerprint}"
                )
        except InfraFailure as error:
            return error
        self._held[index] = ack.version
        if self._part != "second" and self._pool.fleet.members.get(index) is not None:
            self._pool.fleet.joined(index, time.monotonic())
        return ack

    async def _evict(self, failed: Mapping[int, InfraFailure], version: int) -> None:
        own = [i for i in self._pool.indices(State.JOINING, State.SERVING) if not self._pool.is_attached(i)]
        asked = [index for index in failed if index in own]  # the others come and go as they like
        answers = await asyncio.gather(*map(self._pool.answers, asked))
        self._unconfirmed |= {index: failed[index] for index, lives in zip(asked, answers, strict=True) if lives}
        for index, why in failed.items():
            self._event("sync_failed", {"worker": index, "version": version, "why": str(why)})
            await self._pool.evict(index, f"weights of version {version} not confirmed: {why}")

    async def _order(self, version: int) -> SyncOrder:
        manifest = await self._get_manifest()
        return SyncOrder(self._new_id(version), version, self._transport, manifest, part=self._part)

    def _new_id(self, version: int) -> str:
        return f"publish-{version}-{time.monotonic_ns()}"

    def _rendezvous(self, address: tuple[str, str, int], members: Iterable[WorkerInfo]) -> Rendezvous:
        node, host, port = address
        links = self._tree.follow(node, {info.name: Place(info.node, self._receivers_of(info)) for info in members})
        return Rendezvous(host, port, links, self._config.timeout_s)

    def _receivers_of(self, member: WorkerInfo) -> tuple[str, ...]:
        """Only an engine's own model is spread over its processes."""
        return member.detail["receivers"] if self._part == "own" else (member.name,)

    async def _get_address(self) -> tuple[str, str, int]:
        """(node, host, port) of the policy's first rank: it keeps the store at which the ends of links meet."""
        if self._address is None:
            opened = await self._policy.call("run", OpenCollective(self._store), timeout_s=self._config.timeout_s)
            node = await self._policy.call("run", platform.node, timeout_s=self._config.timeout_s)
            self._address = node[0], *opened[0]
        return self._address

    async def _get_manifest(self) -> Manifest:
        manifest = self._manifest
        if manifest is None:
            manifest = await self._export(ManifestOf(self._dtype, self._bucket_bytes), "weights manifest")
            self._manifest = manifest
        return manifest

    async def _packed(self, version: int | None = None) -> tuple[SendReport, Ref]:
        """All weights as one object in the object store, made once per version."""
        if self._snapshot is None:
            packed = PackBuckets(await self._get_manifest(), self.version if version is None else version)
            deadline = self._config.timeout_s + MARGIN_S
            self._snapshot = await export_payload(
                self._policy, packed, self._bucket_bytes, self._form, timeout_s=deadline
            )
        return self._snapshot

    async def _export(self, consumer: Any, task_name: str, policy: Group | None = None) -> Any:
        """`policy`: the group in its turn, from whoever holds it."""
        results = await (policy or self._policy).call(
            "export",
            consumer,
            self._bucket_bytes,
            self._form,
            timeout_s=self._config.timeout_s + MARGIN_S,
            task_name=task_name,
        )
        return results[0]

"""A sampler and a rank that know nothing but tokens, for samples that are lost with their node. In a module of their
own, because an actor's process imports the module of its class, and that of a test imports torch and transformers."""

from __future__ import annotations

import numpy as np
import ray

from actors.batch import Batch
from rollout.sampling import Finish, GroupMeta, Request
from tests.resident import Resident

MANY_TOKENS = 40_000  # of a sample: Ray leaves a block so large on the node that made it


class Sampler(Resident):
    """Stands in for a rollout worker: what it samples is a function of the request's seed."""

    def generate(self, request: Request) -> tuple[GroupMeta, Batch]:
        node = ray.get_runtime_context().get_node_id()
        finishes = (Finish.STOP,) * request.n
        meta = GroupMeta(request.id, node, (MANY_TOKENS - 1,) * request.n, finishes, 0, 0, 0.0)
        return meta, sampled(request.seed, request.n)


class Holder(Resident):
    """Stands in for a rank of the policy, on a node that stays."""

    def hold(self, *blocks: Batch) -> None:
        pass


def sampled(seed: int, count: int) -> Batch:
    tokens = np.random.default_rng(seed).integers(0, 1000, count * MANY_TOKENS)
    rest = {"sample_logps": np.zeros(len(tokens)), "version": np.zeros(len(tokens), np.int32)}
    return Batch.build([MANY_TOKENS] * count, tokens=tokens, mask=tokens > 0, **rest)

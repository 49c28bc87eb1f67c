"""Which experts a token is sent to: recorded where it was sampled, and taken again where it is trained.

Sampling and training compute the same weights a little differently, and where two experts are nearly as good, one of
the two sides may choose the other: the distributions then differ by far more than rounding. Replaying the sampler's
choice takes that away; how much each chosen expert counts is the trained router's own, and has a gradient.

Source: arXiv:2510.11370 (rollout routing replay).
"""

from __future__ import annotations

import inspect
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from actors.errors import ModelError

KIND = "TopKRouter"  # how transformers' routers are called that weigh the chosen experts by a softmax


def check_routers(config: Any, path: str) -> None:
    """Raises ModelError for a model at `path` whose experts cannot be chosen for it."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    model = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    names = vars(inspect.getmodule(model)) if model is not None else {}
    if not any(name.endswith(KIND) for name in names):
        raise ModelError(
            f"sampling.replay_routing: {path} has no experts, or routers of a kind whose choice cannot be replayed "
            f"(known: transformers' classes *{KIND}); leave it out"
        )


class Routers:
    """The routers of a model, in the order of its layers. `given` [R, L, k]: the experts of each computed row and layer
    in the place of the routers' own choice, until they are replaced; -1: their own. It stays set after a forward pass,
    because checkpointing computes layers again in the backward pass."""

    def __init__(self, causal: nn.Module) -> None:
        modules = [module for module in causal.modules() if type(module).__name__.endswith(KIND)]
        self.given: Tensor | None = None
        self._chosen: list[Tensor | None] = [None] * len(modules)
        for index, module in enumerate(modules):
            module.register_forward_hook(partial(self._hook, index))

    @property
    def chosen(self) -> Tensor:
        """[R, L, k]: the experts of the last forward pass."""
        return torch.stack([each for each in self._chosen if each is not None], dim=1)

    @property
    def layers(self) -> int:
        return len(self._chosen)

    def _hook(self, index: int, router: Any, _: Any, output: tuple[Tensor, Tensor, Tensor]) -> Any:
        logits, weights, chosen = output
        if self.given is not None:
            given = self.given[:, index].long()
            chosen = torch.where((given >= 0).all(-1, keepdim=True), given, chosen)
            weights = torch.softmax(logits, dim=-1, dtype=torch.float32).gather(1, chosen)
            if getattr(router, "norm_topk_prob", True):
                weights = weights / weights.sum(dim=-1, keepdim=True)
            weights = weights.to(output[1].dtype)
        self._chosen[index] = chosen.detach()
        return logits, weights, chosen

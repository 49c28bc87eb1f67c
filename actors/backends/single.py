"""Plain PyTorch in one process: the default on a laptop, and the reference for the other backends.

Precision: in float32 everything is float32. In bfloat16 the model computes in bfloat16 (as its engine does), while
gradients are summed in float32 and the optimizer steps float32 master weights, from which the bfloat16 weights are
rounded after each step. That equals autocast over float32 weights, without casting every weight in every pass. On a CPU
without bfloat16 instructions (AVX2 only) bfloat16 products run at a fiftieth of float32's speed: use float32 there."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from actors import saved_state
from actors.backends.optimizer import StepInfo, Stepper
from actors.backends.parking import Sleeper
from actors.backends.placement import Placement, device_of
from actors.background_save import StateFile
from actors.errors import ConfigError
from actors.lora import EXPORTS, adapter_weights, adapters_off, resident
from actors.model import ModelSpec, load_model
from actors.specs import BackendSpec, OptimSpec, WeightsForm
from actors.weight_shares import Slices
from actors.weight_swap import Instead, mix_in, replaced

STATE_FILE = "single.pt"


class SoloWorld:
    """The statistics of a world of one."""

    rank = 0
    size = 1

    def sum(self, values: Tensor) -> Tensor:
        return values

    def gather(self, values: Tensor) -> Tensor:
        return values


class SingleBackend:
    """See `actors.backends.protocol.Backend`. Same inputs and thread count, same bits; resumption is exact."""

    partitioned = False

    def __init__(self, model: ModelSpec, spec: BackendSpec, placement: Placement) -> None:
        if placement.world_size != 1:
            raise ConfigError(
                f"backend 'single' is one process and was given {placement.world_size} ranks; use 'deepspeed'"
            )
        if spec.optim is not None and model.dtype == "float16":
            raise ConfigError(
                "backend 'single' does not train in float16, which needs loss scaling; use bfloat16 or float32"
            )
        self.device = device_of(spec.gpus, available=torch.cuda.is_available())
        self._sleeper = Sleeper(self.device)
        self.world = SoloWorld()
        self.model = load_model(model, self.device, trainable=spec.optim is not None)
        trained = ((name, p) for name, p in self.model.causal.named_parameters() if p.requires_grad)
        self._weights = {name: Weight(parameter) for name, parameter in trained}
        self._stepper: Stepper | None = None
        if spec.optim is not None:
            self.reset_optimizer(spec.optim)

    def reset_optimizer(self, optim: OptimSpec) -> None:
        self._stepper = Stepper(((name, weight.master) for name, weight in self._weights.items()), optim)

    @property
    def stepper(self) -> Stepper:
        if self._stepper is None:
            raise RuntimeError("this role is frozen: it was built without an optimizer")
        return self._stepper

    def backward(self, loss: Tensor, *, last: bool) -> None:
        loss.backward()
        hand_over([weight for weight in self._weights.values() if weight.master is not weight.parameter])

    def step(self) -> StepInfo:
        info = self.stepper.step()
        self._round_weights()
        return info

    def full_weights(
        self, bucket_bytes: int, form: WeightsForm = "merged", instead: Instead | None = None
    ) -> Iterator[tuple[str, Tensor]]:
        causal = self.model.causal
        return EXPORTS[form](causal, bucket_bytes, replaced(resident, causal, instead))

    def adapter_weights(self, instead: Instead | None = None) -> dict[str, Tensor]:
        causal = self.model.causal
        return adapter_weights(causal, replaced(resident, causal, instead))

    def trained_weights(self) -> Iterator[tuple[str, Tensor]]:
        return ((name, weight.master.detach()) for name, weight in self._weights.items())

    def own_weights(self) -> Iterator[tuple[str, Tensor]]:
        return self.trained_weights()

    def mix(self, slices: Slices, share: float, bucket_bytes: int) -> None:
        mix_in(self.model.causal, slices, share, bucket_bytes, resident, self.world, lambda _: False)

    def adapters_off(self) -> AbstractContextManager[None]:
        return adapters_off(self.model)

    def state(self, folder: Path) -> list[StateFile]:
        """Trained weights (the float32 ones), moments and steps; frozen weights stay in the model's own folder."""
        return [StateFile(STATE_FILE, self.stepper.state_dict())]

    def load_state(self, folder: Path) -> None:
        if not (folder / STATE_FILE).exists():
            raise ConfigError(f"{folder} holds no state of backend 'single'; resume with the backend that saved it")
        state = saved_state.load(folder / STATE_FILE, self.device)
        if state["weights"].keys() != self._weights.keys():
            raise ConfigError(f"{folder} holds the state of a model whose trained weights are not this one's")
        self.stepper.load_state_dict(state)
        self._round_weights()

    def sleep(self) -> None:
        self._sleeper.sleep(*self.held)

    def wake(self) -> None:
        self._sleeper.wake()

    @property
    def held(self) -> tuple[Any, ...]:
        """All objects with tensors: model, float32 weights, moments."""
        return self.model, self._weights, self._stepper

    @torch.no_grad()
    def _round_weights(self) -> None:
        """Sets each parameter to its rounded master, all of them by a few launches of a kernel."""
        halves = [weight for weight in self._weights.values() if weight.master is not weight.parameter]
        if halves:
            torch._foreach_copy_(  # pyright: ignore[reportPrivateImportUsage]
                [weight.parameter for weight in halves], [weight.master for weight in halves]
            )


class Weight:
    """A trained parameter and its float32 master, which is the parameter itself if that is float32."""

    def __init__(self, parameter: nn.Parameter) -> None:
        self.parameter = parameter
        self.master: Tensor = parameter
        if parameter.dtype != torch.float32:
            self.master = parameter.detach().float().requires_grad_()


@torch.no_grad()
def hand_over(weights: list[Weight]) -> None:
    """After the backward pass of a micro-batch: adds half-precision gradients to float32 sums and frees them. Not in
    hooks of the parameters, which would call Python from within the backward pass, and all of them at once: a GPU that
    computes a small model waits for launches."""
    found = [(weight, weight.parameter.grad) for weight in weights]
    added = [(weight, grad) for weight, grad in found if grad is not None and weight.master.grad is not None]
    if added:
        sums: Any = [weight.master.grad for weight, _ in added]
        torch._foreach_add_(sums, [grad for _, grad in added])  # pyright: ignore[reportPrivateImportUsage]
    first = [(weight, grad) for weight, grad in found if grad is not None and weight.master.grad is None]
    if first:
        flat = torch.empty(sum(grad.numel() for _, grad in first), dtype=torch.float32, device=first[0][1].device)
        pieces = flat.split([grad.numel() for _, grad in first])
        sums = [piece.view_as(grad) for piece, (_, grad) in zip(pieces, first, strict=True)]
        torch._foreach_copy_(  # pyright: ignore[reportPrivateImportUsage]
            sums, [grad for _, grad in first]
        )
        for (weight, _), total in zip(first, sums, strict=True):
            weight.master.grad = total
    for weight in weights:
        weight.parameter.grad = None

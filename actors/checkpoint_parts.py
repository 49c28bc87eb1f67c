"""What a rank has for a checkpoint: training state, model, adapters; saved in the background or at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from actors import saved_state
from actors.backends.placement import Placement
from actors.backends.protocol import Backend
from actors.background_save import BackgroundSave, Piece, StateFile, StatePiece
from actors.errors import RunError
from actors.model import ModelSpec, tokenizer_of
from actors.saved_model import SMALLEST_FILE, AdapterPiece, ModelPiece
from actors.weight_averaging import Average

GATHER_BYTES = 256 * 2**20  # of weights that are gathered at a time


@dataclass(frozen=True)
class Part:
    """`folder` is where, below that of the checkpoint; `averaged`: with the weights' average in the place of the
    weights. The model is a Hugging Face folder, the adapters a PEFT folder. `smallest_file`: bytes of a model's weights
    that are one file whatever the number of ranks."""

    kind: Literal["state", "model", "adapter"]
    folder: str = ""
    averaged: bool = False
    smallest_file: int = SMALLEST_FILE


def causal_of(backend: Backend) -> Any:
    """The transformers model, without the wrappers of the backend (DeepSpeed's engine) and of its head."""
    return getattr(backend.model, "module", backend.model).causal


@dataclass(frozen=True)
class RankState:
    """A rank of a role as it is now. `own` is what of its training state is not the backend's."""

    name: str
    backend: Backend
    model: ModelSpec
    placement: Placement
    steps_done: int
    average: Average | None
    own: StateFile

    def begin(self, folder: Path, parts: Sequence[Part]) -> BackgroundSave:
        """Save the parts below a folder; a thread copies them, and those that are gathered from all ranks are copied
        here, in the order that all ranks have."""
        later, now = list[Piece](), list[Piece]()
        for part in parts:
            gathered = part.kind == "model" and (self.backend.partitioned or part.averaged)
            (now if gathered else later).append(self._piece(folder / part.folder, part))
        with torch.no_grad():
            for piece in now:
                piece.copy()
        return BackgroundSave(self.name, folder, later, self.backend.device, copied=now)

    def save(self, folder: Path, part: Part) -> None:
        """Save one part and wait for it."""
        with torch.no_grad(), saved_state.writing(folder):
            piece = self._piece(folder / part.folder, part)
            piece.copy()
            if self.backend.device.type == "cuda":
                torch.cuda.current_stream(self.backend.device).synchronize()
            piece.write()

    def _piece(self, folder: Path, part: Part) -> Piece:
        """Nothing large is copied yet, adapters aside."""
        backend, rank = self.backend, self.placement.rank
        if part.kind == "state":
            return StatePiece(folder, [*backend.state(folder), self.own], self._refuse_what_is_not_finite)
        causal = causal_of(backend)
        instead = self._taken().whole if part.averaged else None
        if part.kind == "adapter":
            if self.model.lora is None:
                raise RunError(f"{self.name} has no LoRA adapters to save")
            adapters = backend.adapter_weights(instead)
            return AdapterPiece(folder, causal, adapters if rank == 0 else None)
        weights = backend.full_weights(GATHER_BYTES, instead=instead)
        save_tokenizer = tokenizer_of(self.model).save_pretrained
        ranks, smallest_file = self.placement.world_size, part.smallest_file
        return ModelPiece(folder, causal, weights, save_tokenizer, rank=rank, ranks=ranks, smallest_file=smallest_file)

    def _taken(self) -> Average:
        if self.average is None:
            raise RunError(f"{self.name}: no average of its weights is taken in this phase")
        return self.average

    def _refuse_what_is_not_finite(self) -> None:
        dtype = getattr(torch, self.model.dtype)  # the type of the forward pass: float16 ends at 65504
        for name, weight in self.backend.own_weights():
            if not torch.isfinite(weight.to(dtype)).all():
                raise RunError(
                    f"{self.name}: {name} holds numbers that are not finite in {self.model.dtype} after step "
                    f"{self.steps_done}; they are not saved. Lower train.learning_rate, or set train.max_grad_norm"
                )

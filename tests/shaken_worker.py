"""A trainer whose weights change without training, for tests of weight transfers."""

from __future__ import annotations

import torch

from actors.model_worker import ModelWorker


class Shaken(ModelWorker):
    """A trainer whose weights can be changed without training."""

    def shake(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in self.backend.model.parameters():
                noise = torch.randn(parameter.shape, generator=generator) * 0.05
                parameter.add_(noise.to(parameter.device, parameter.dtype))

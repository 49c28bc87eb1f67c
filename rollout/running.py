"""A sample that an engine of our own is decoding."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from rollout.sampling import Completion, Finish, Request


@dataclass(eq=False)
class Row:
    """One running sample of a request."""

    request: Request
    budget: int  # tokens that it may have
    index: int
    draw: torch.Generator
    tokens: list[int] = field(default_factory=list)
    logps: list[float] = field(default_factory=list)
    versions: list[int] = field(default_factory=list)
    admitted: list[list[int]] = field(default_factory=list)
    routes: list[Tensor] = field(default_factory=list)  # [tokens, layers x k] of what was read, piece by piece
    finish: Finish | None = None

    def completion(self) -> Completion:
        assert self.finish is not None
        return Completion(
            self.index,
            np.asarray(self.tokens, dtype=np.int32),
            np.asarray(self.logps, dtype=np.float32),
            np.asarray(self.versions, dtype=np.int32),
            self.finish,
            np.asarray(self.admitted, dtype=np.int32) if self.admitted else None,
            self._all_routes(),
        )

    def _all_routes(self) -> np.ndarray | None:
        """[P + C, layers x k]: the last token was sampled, and never read."""
        if not self.routes:
            return None
        read = torch.cat(self.routes).to(torch.int16).cpu().numpy()
        return np.concatenate([read, np.full((1, read.shape[1]), -1, np.int16)])

"""How a model's weights are held, differentiated and stepped: one protocol, several backends."""

from __future__ import annotations

from collections.abc import Callable

from actors.backends.placement import Placement
from actors.backends.protocol import Backend
from actors.errors import ConfigError
from actors.model import ModelSpec
from actors.specs import BackendSpec


def _single(model: ModelSpec, spec: BackendSpec, placement: Placement) -> Backend:
    from actors.backends.single import SingleBackend

    return SingleBackend(model, spec, placement)


def _deepspeed(model: ModelSpec, spec: BackendSpec, placement: Placement) -> Backend:
    from actors.backends.deepspeed import DeepSpeedBackend

    return DeepSpeedBackend(model, spec, placement)


BACKENDS: dict[str, Callable[[ModelSpec, BackendSpec, Placement], Backend]] = {
    "single": _single,
    "deepspeed": _deepspeed,
}


def build_backend(model: ModelSpec, spec: BackendSpec, placement: Placement) -> Backend:
    """The backend that `spec.kind` names, with the model loaded. Raises ConfigError for a kind that does not exist."""
    if spec.kind not in BACKENDS:
        raise ConfigError(f"backend {spec.kind!r} does not exist; there are {', '.join(sorted(BACKENDS))}")
    return BACKENDS[spec.kind](model, spec, placement)

"""Fewer kernels for the same layers, in a model that is loaded on a GPU.

    norms                       torch's own fused kernel, where a norm is what `torch.nn.functional.rms_norm` computes
    gated activations, rotary   Liger's kernels, an optional dependency, where it knows the architecture

Liger has norms, too. A small micro-batch leaves a GPU waiting for launches, and those are slow ones (Triton, from
Python): of a step of 10,000 tokens at 0.5B parameters, Liger's norms took a fifth of the host's time.

Liger replaces classes and functions of transformers' module as well as parts of the given model. Other models of this
process (an engine on a CPU, with `--local`) must keep theirs, so what it changed in the module is put back; only the
rotary embedding, which layers look up there, stays replaced, for tensors on a GPU.
"""

from __future__ import annotations

import functools
import importlib.util
import inspect
from collections.abc import Callable
from types import MethodType, ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from actors.errors import ConfigError

LIGER = "liger"
ROTARY = "apply_rotary_pos_emb"  # what transformers' modules call it
NOT_OURS = ("cross_entropy", "fused_linear_cross_entropy", "rms_norm")  # the head is `actors/heads.py`
PROBE = 8  # values in a vector that a norm is tried on


def use(causal: Any, device: torch.device, wanted: bool | None) -> str:
    """Puts the kernels into `causal`; the name of what is used, "" for nothing of Liger's. `wanted=None`: if the model
    is on a GPU, Liger is installed and it knows the architecture. Raises ConfigError if they are `wanted` and cannot
    be."""
    if wanted is False:
        return ""
    if device.type == "cuda":
        use_fused_norms(causal)
    reason = _why_not(causal, device)
    if reason is None:
        _apply(causal)
        return LIGER
    if wanted:
        raise ConfigError(f"model.fused_kernels=true, but {reason}; set it to false, or leave it out")
    return ""


def use_fused_norms(causal: Any) -> int:
    """Each norm of `causal` that torch's function can compute is computed by it; how many that are."""
    alike = functools.cache(_is_plain_norm)
    found = [module for module in causal.modules() if alike(type(module))]
    for norm in found:
        norm.forward = MethodType(_fused_norm, norm)
    return len(found)


def _fused_norm(norm: Any, hidden_states: Tensor) -> Tensor:
    return F.rms_norm(hidden_states, (hidden_states.shape[-1],), norm.weight, norm.variance_epsilon)


def _is_plain_norm(kind: type[nn.Module]) -> bool:
    """Whether an RMS norm of that class scales by its weight as torch's does (Gemma's adds 1), which is tried out."""
    if not kind.__name__.endswith("RMSNorm") or not kind.__module__.startswith("transformers."):
        return False
    with torch.device("cpu"):
        norm: Any = kind(PROBE)  # they all take their size first
        if getattr(norm, "variance_epsilon", None) is None or getattr(norm, "weight", None) is None:
            return False
        weight, values = torch.linspace(0.5, 2.0, PROBE), torch.linspace(-1.0, 3.0, 2 * PROBE).view(2, PROBE)
        norm.weight = nn.Parameter(weight)
        with torch.no_grad():
            return torch.allclose(norm(values), _fused_norm(norm, values), rtol=1e-5)


def _why_not(causal: Any, device: torch.device) -> str | None:
    if device.type != "cuda":
        return f"the kernels are for GPUs, and the model is on {device.type}"
    if importlib.util.find_spec("liger_kernel") is None:
        return "the package liger-kernel is not installed"
    kind = causal.config.model_type
    return None if kind in _known() else f"liger-kernel knows no architecture {kind}"


def _known() -> dict[str, Any]:
    from liger_kernel.transformers.monkey_patch import (  # pyright: ignore[reportMissingImports]
        MODEL_TYPE_TO_APPLY_LIGER_FN,
    )

    return MODEL_TYPE_TO_APPLY_LIGER_FN


def _apply(causal: Any) -> None:
    function = _known()[causal.config.model_type]
    off = {name: False for name in NOT_OURS if name in inspect.signature(function).parameters}
    module = inspect.getmodule(type(causal))
    assert module is not None
    before = dict(vars(module))
    function(model=causal, **off)
    changed = {name: was for name, was in before.items() if vars(module)[name] is not was}
    liger_rotary: Any = getattr(module, ROTARY, None)
    for name, was in changed.items():
        setattr(module, name, was)
    if ROTARY in changed:
        _rotate_on_gpus(module, liger_rotary)


def _rotate_on_gpus(module: ModuleType, fused: Callable[..., Any]) -> None:
    plain = getattr(module, ROTARY)
    if hasattr(plain, "fused"):  # another model of this process came first
        return

    @functools.wraps(plain)
    def rotate(query: Tensor, key: Tensor, *args: Any, **kwargs: Any) -> Any:
        return (fused if query.is_cuda else plain)(query, key, *args, **kwargs)

    setattr(rotate, "fused", fused)  # noqa: B010
    setattr(module, ROTARY, rotate)

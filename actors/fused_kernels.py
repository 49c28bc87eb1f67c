"""Fewer kernels for the same layers, in a model that is loaded on a GPU.

    norms               torch's own fused kernel
    gated activations   `actors/layer_kernels.py`, in Triton
    rotary positions    the same
    head                `actors/head_kernels.py`, in Triton

No list of architectures: a layer's code is replaced if, tried on a few numbers, it computes what the kernel computes.
Why not Liger, which has kernels for the same: a small micro-batch leaves a GPU waiting for launches. Of a step of
10,000 tokens at 0.5B parameters, some 100 ms, the wrappers around its norms took 20, those around its activations and
rotary positions another 20.
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

ROTARY = "apply_rotary_pos_emb"  # what transformers' modules call it
PROBE = 8  # values in a vector that a layer is tried on
GATED = ("gate_proj", "up_proj", "down_proj", "act_fn")
ACTIVATIONS: tuple[Callable[[Tensor], Tensor], ...] = (  # as `actors/layer_kernels.py` counts them
    F.silu,
    functools.partial(F.gelu, approximate="tanh"),
)


def use(causal: Any, device: torch.device, wanted: bool | None) -> str:
    """Puts the kernels into `causal`; which, as words for a reader, "" for none. `wanted=None`: if the model is on a
    GPU. Raises ConfigError if they are `wanted` and cannot be used."""
    if wanted is False:
        return ""
    if device.type != "cuda":
        return _without(f"the kernels are for GPUs, and the model is on {device.type}", wanted)
    found = {"norms": use_fused_norms(causal) > 0}
    if importlib.util.find_spec("triton") is not None:
        layers = {"activations": use_gated_activations(causal) > 0, "rotary": use_rotation(causal)}
        found |= {**layers, "head": causal.get_output_embeddings() is not None}
    elif wanted:
        return _without("the package triton, which comes with torch for CUDA, is not installed", wanted)
    names = [name for name, used in found.items() if used]
    return ", ".join(names) if names else _without("no layer of this architecture is one that they compute", wanted)


def _without(reason: str, wanted: bool | None) -> str:
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


def use_gated_activations(causal: Any) -> int:
    """Each layer of `causal` that is down(activation(gate(x)) * up(x)) multiplies by a kernel; how many that are."""
    known: dict[tuple[Any, ...], int | None] = {}  # each layer has an activation of its own, and all are alike
    count = 0
    for module in causal.modules():
        if all(isinstance(getattr(module, name, None), nn.Module) for name in GATED):
            kind = type(module), type(module.act_fn), repr(module.act_fn)
            if kind not in known:
                known[kind] = _gated_activation(type(module), module.act_fn)
            activation = known[kind]
            if activation is not None:
                module.forward = MethodType(functools.partial(_gated_layer, activation), module)
                count += 1
    return count


def _gated_layer(activation: int, layer: Any, hidden_states: Tensor) -> Tensor:
    from actors.layer_kernels import gated

    return layer.down_proj(gated(layer.gate_proj(hidden_states), layer.up_proj(hidden_states), activation))


def _gated_activation(kind: type[nn.Module], act_fn: nn.Module) -> int | None:
    """The activation of a layer of that class, if it is one that there is a kernel for, which is tried out."""
    layer: Any = kind.__new__(kind)
    nn.Module.__init__(layer)
    with torch.device("cpu"), torch.no_grad():
        for name in GATED[:3]:
            weight = torch.linspace(-1.0, 2.0, PROBE * PROBE).view(PROBE, PROBE).roll(len(name), 1)
            projection = nn.Linear(PROBE, PROBE, bias=False)
            projection.weight = nn.Parameter(weight)
            setattr(layer, name, projection)
        layer.act_fn = act_fn
        values = torch.linspace(-1.0, 1.0, 2 * PROBE).view(1, 2, PROBE)
        try:
            computed = layer(values)
            gate, up = layer.gate_proj(values), layer.up_proj(values)
            alike = [torch.allclose(computed, layer.down_proj(act(gate) * up), rtol=1e-5) for act in ACTIVATIONS]
        except Exception:  # of the layer's own code: it needs or makes something else
            return None
    return alike.index(True) if any(alike) else None


def use_rotation(causal: Any) -> bool:
    """The function by which the module of `causal` rotates queries and keys uses a kernel from now on, for tensors on a
    GPU: other models of this process (an engine on a CPU, with `--local`) keep theirs. False if it is another
    rotation, or of a part of each head in every layer."""
    module = inspect.getmodule(type(causal))
    plain = getattr(module, ROTARY, None)
    if module is None or plain is None or not (hasattr(plain, "fused") or _is_plain_rotation(plain)):
        return False
    if _takes_wider_heads(plain) and not _rotates_whole_heads(causal):
        return False
    if not hasattr(plain, "fused"):  # else another model of this process came first
        _rotate_on_gpus(module, plain)
    return True


def _rotate_on_gpus(module: ModuleType, plain: Callable[..., Any]) -> None:
    @functools.wraps(plain)
    def rotate(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, *args: Any, **kwargs: Any) -> Any:
        whole = cos.shape == sin.shape == (1, query.shape[2], query.shape[3]) and query.shape[0] == 1
        whole = whole and cos.is_contiguous() and sin.is_contiguous()
        if args or kwargs or not whole or not query.is_cuda:
            return plain(query, key, cos, sin, *args, **kwargs)
        from actors.layer_kernels import rotate as fused

        return fused(query, key, cos, sin)

    setattr(rotate, "fused", True)  # noqa: B010
    setattr(module, ROTARY, rotate)


def _takes_wider_heads(function: Callable[..., Any]) -> bool:
    """Whether it rotates the first values of a head where `cos` has fewer than the head (Phi3's does), so that the
    kernel, which rotates whole heads, may be asked for less. Other models cut that part out before they call it."""
    with torch.device("cpu"):
        query, key, cos, sin = _heads_and_angles(PROBE // 2)
        try:
            return [after.shape for after in function(query, key, cos, sin)] == [query.shape, key.shape]
        except Exception:  # of the model's own code
            return False


def _rotates_whole_heads(causal: Any) -> bool:
    """Whether it does in any layer: there is a frequency for every two values of a head."""
    text = causal.config.get_text_config()
    size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads  # as transformers reads it
    return any(2 * len(values) == size for name, values in causal.named_buffers() if name.endswith("inv_freq"))


def _heads_and_angles(size: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Queries of two heads and keys of one, of three tokens, and the cosines and sines of `size` angles for each."""
    query, key = (torch.linspace(-1.0, 1.0, heads * 3 * PROBE).view(1, heads, 3, PROBE) for heads in (2, 1))
    cos, sin = (torch.linspace(at, at + 1, 3 * size).view(1, 3, size) for at in (0.1, -0.8))
    return query, key, cos, sin


def _is_plain_rotation(function: Callable[..., Any]) -> bool:
    """Whether it is x * cos + rotate_half(x) * sin, with the halves of a head's values as pairs."""
    with torch.device("cpu"):
        query, key, cos, sin = _heads_and_angles(PROBE)
        try:
            found = function(query, key, cos, sin)
            return len(found) == 2 and all(
                torch.allclose(after, _rotated(before, cos, sin))
                for before, after in zip((query, key), found, strict=True)
            )
        except Exception:  # of the model's own code: it takes or makes something else
            return False


def _rotated(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = states.chunk(2, -1)
    return states * cos[:, None] + torch.cat((-second, first), -1) * sin[:, None]

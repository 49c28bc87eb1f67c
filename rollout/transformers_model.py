"""A model of transformers in an engine's process, whose weights can be replaced."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from actors.errors import InfraFailure
from actors.lora import attach
from actors.pretrained import check_folder, load_config, load_pretrained
from actors.specs import LoraSpec
from rollout.engine import EngineSpec


def read_model(spec: EngineSpec, path: str, arguments: Mapping[str, Any] | None = None) -> Any:
    """The model in a folder, in the specification's dtype, in evaluation mode, on the CPU. `arguments` of
    `from_pretrained` win over what is derived from the specification."""
    check_folder(path)
    config = load_config(path, spec.trust_remote_code).get_text_config()
    capped = getattr(config, "attn_logit_softcapping", None) is not None
    # transformers would choose sdpa, which silently ignores the cap: another policy than the trainer's
    attention = {"attn_implementation": "eager"} if capped else {}
    options: dict[str, Any] = {"dtype": getattr(torch, spec.dtype), **attention, **(arguments or {})}
    model = load_pretrained(path, spec.trust_remote_code, **options).eval()
    if spec.lm_head_fp32:
        head = model.get_output_embeddings()
        head.forward = partial(_float32_projection, head)
    return model


def add_adapters(model: Any, lora: LoraSpec) -> None:
    """Adapters that change nothing until `actors.lora.set_adapters`."""
    with torch.random.fork_rng(devices=[]):
        attach(model, lora)
    model.eval()


def _float32_projection(head: Any, states: Tensor) -> Tensor:
    bias = None if head.bias is None else head.bias.float()
    return F.linear(states.float(), head.weight.float(), bias)


@torch.no_grad()
def copy_weights(model: nn.Module, weights: Iterable[tuple[str, Tensor]]) -> None:
    """Copy into the model's own tensors, each as it is drawn. Raises InfraFailure unless every parameter is given (a
    tied one once), and nothing that the model does not have; the model holds a mixture then.

    Weights have the names of the model's files. Where transformers keeps several of these in one parameter, as of
    experts, each goes to its part of it."""
    own = dict(model.named_parameters(remove_duplicate=False))
    left: dict[str, Tensor] = {}
    reached: set[int] = set()
    for name, tensor in weights:
        if name in own:
            own[name].copy_(tensor)
            reached.add(id(own[name]))
        else:
            left[name] = tensor
    if left and getattr(model, "_weight_conversions", None):
        for name, parameter in own.items():
            if id(parameter) not in reached and _copy_parts(model, name, parameter, left):
                reached.add(id(parameter))
    missing = sorted(name for name, parameter in own.items() if id(parameter) not in reached)
    if left or missing:
        raise InfraFailure(f"weights do not fit the model: not sent {missing[:5]}, not in the model {sorted(left)[:5]}")


def _copy_parts(model: Any, name: str, parameter: Tensor, given: dict[str, Tensor]) -> bool:
    """Fill a parameter from what files hold of it, which is taken out of `given`; False if that is not all there.
    Which element goes where is asked of transformers, by the numbers of the elements in the place of their values."""
    from transformers.core_model_loading import revert_weight_conversion

    numbers = torch.arange(parameter.numel(), device=parameter.device).view(parameter.shape)
    parts = revert_weight_conversion(model, {name: numbers})
    if not parts.keys() <= given.keys():
        return False
    for part, places in parts.items():
        parameter.view(-1)[places.flatten()] = given.pop(part).to(parameter).flatten()
    return True

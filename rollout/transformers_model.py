"""A model of transformers in an engine's process, whose weights can be replaced."""

from __future__ import annotations

from collections import defaultdict
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

    Weights have the names of the model's files. Where transformers keeps several of these in one parameter, as of a
    layer's experts, they are kept until all of that parameter's are there: no more than those of one parameter, if they
    come one after the other."""
    own = dict(model.named_parameters(remove_duplicate=False))
    parts = _parts_in_files(model, own)
    wholes = {part: name for name, names in parts.items() for part in names}
    kept = defaultdict[str, dict[str, Tensor]](dict)  # by parameter
    strays: list[str] = []
    reached: set[int] = set()
    for name, tensor in weights:
        whole = name if name in own else wholes.get(name)
        if whole is None:
            strays.append(name)
        elif whole == name:
            own[name].copy_(tensor)
            reached.add(id(own[name]))
        else:
            kept[whole][name] = tensor
            if kept[whole].keys() == parts[whole]:
                _copy_parts(model, whole, own[whole], kept.pop(whole))
                reached.add(id(own[whole]))
    unreached = [name for name, parameter in own.items() if id(parameter) not in reached]
    missing = sorted(part for name in unreached for part in parts.get(name, {name}) - kept[name].keys())
    if strays or missing:
        raise InfraFailure(f"weights do not fit the model: not sent {missing[:5]}, not in the model {strays[:5]}")


def _parts_in_files(model: Any, own: Mapping[str, nn.Parameter]) -> dict[str, set[str]]:
    """Of each parameter that files hold under other names than the model: these names."""
    if not getattr(model, "_weight_conversions", None):
        return {}
    from transformers.core_model_loading import revert_weight_conversion

    names = {
        name: set(revert_weight_conversion(model, {name: torch.empty_like(parameter, device="meta")}))
        for name, parameter in own.items()
    }
    return {name: parts for name, parts in names.items() if parts != {name}}


def _copy_parts(model: Any, name: str, parameter: Tensor, given: Mapping[str, Tensor]) -> None:
    """Fill a parameter from all that files hold of it. Which element goes where is asked of transformers, by the
    numbers of the elements in the place of their values."""
    from transformers.core_model_loading import revert_weight_conversion

    dtype = torch.int32 if parameter.numel() < 2**31 else torch.int64
    numbers = torch.arange(parameter.numel(), dtype=dtype, device=parameter.device).view(parameter.shape)
    for part, places in revert_weight_conversion(model, {name: numbers}).items():
        parameter.view(-1)[places.flatten()] = given[part].to(parameter).flatten()

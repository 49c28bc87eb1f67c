"""Low-rank adapters (PEFT) inside a Hugging Face model, and the export of weights with adapters merged.

The adapters are injected: the model keeps its class, and its parameters keep their names except for the wrapped layers'
`.base_layer`, which the export removes."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from copy import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from actors.columns import Head
from actors.errors import ModelError
from actors.pretrained import SCORE, skeleton
from actors.specs import LoraSpec, WeightsForm

ADAPTER = "default"
TASKS = {  # PEFT's task type of a model with that head
    Head.VOCABULARY: "CAUSAL_LM",
    Head.TOKEN_SCALAR: "TOKEN_CLS",
    Head.STEP_SCALAR: "TOKEN_CLS",
    Head.ROW_SCALAR: "SEQ_CLS",
}
Gather = Callable[[list[nn.Parameter]], AbstractContextManager[Any]]


def attach(causal: Any, spec: LoraSpec, head: Head = Head.VOCABULARY) -> None:
    """Inject adapters into `causal` in place and freeze everything else. Draws from torch's random state. Raises
    ModelError for targets that do not exist, or that cannot have an adapter."""
    from peft import LoraConfig, inject_adapter_in_model

    path = causal.config._name_or_path
    config = LoraConfig(
        r=spec.r,
        lora_alpha=spec.alpha,  # pyright: ignore[reportArgumentType]  # PEFT divides by it; fractions work
        lora_dropout=spec.dropout,
        target_modules=spec.target_modules if isinstance(spec.target_modules, str) else list(spec.target_modules),
        use_rslora=spec.use_rslora,
        use_dora=spec.use_dora,
        task_type=TASKS[head],
        # A scalar head has no adapter: all its weights are trained, and saved beside the adapters.
        exclude_modules=None if head is Head.VOCABULARY else [SCORE],
        modules_to_save=None,
        base_model_name_or_path=str(Path(path).absolute()) if Path(path).is_dir() else path,
    )
    try:
        inject_adapter_in_model(config, causal, ADAPTER)
    except ValueError as error:
        raise ModelError(f"model.lora: {error}") from error
    if head is not Head.VOCABULARY:
        # PEFT reads it when it opens a saved folder. Set only now: the injection would copy the head.
        config.modules_to_save = [SCORE]
    _refuse_unread(causal, spec)


def check(path: str, spec: LoraSpec, trust_remote_code: bool, head: Head = Head.VOCABULARY) -> None:
    """Raises the ModelError that `attach` would raise. Reads only the configuration of the model at `path`, not its
    weights."""
    with torch.random.fork_rng(devices=[]):
        attach(skeleton(path, trust_remote_code, head), spec, head)


def _refuse_unread(causal: Any, spec: LoraSpec) -> None:
    """Raises ModelError if an adapter is on a weight that other code reads directly and so would miss the adapter: the
    projection to the vocabulary, whose weight `VocabularyHead` reads, or a weight that two modules share. It checks the
    layers that got an adapter, because the names in `target_modules` may be patterns."""
    where = f"model.lora.target_modules={spec.target_modules!r}"
    advice = "name other layers, or use 'all-linear', which leaves embeddings and output head out"
    head = causal.get_output_embeddings()
    readers: dict[int, list[str]] = {}
    for name, module in causal.named_modules():
        for parameter in module.parameters(recurse=False):
            readers.setdefault(id(parameter), []).append(name.removesuffix(".base_layer"))
    for name, layer in adapter_layers(causal).items():
        if layer is head:
            raise ModelError(f"{where}: {name} cannot have an adapter, because it is the output head; {advice}")
        others = [reader for reader in readers[id(layer.base_layer.weight)] if reader != name]
        if others:
            raise ModelError(
                f"{where}: {name} cannot have an adapter, because its weight is also that of {', '.join(others)}, "
                f"which would not see it (tied embeddings); {advice}"
            )


def has_adapters(model: nn.Module) -> bool:
    return bool(adapter_layers(model))


def adapter_layers(model: nn.Module) -> dict[str, Any]:
    """Qualified name -> layer, for every layer with an adapter. Layers are recognised by their attributes, not by
    class, because PEFT is slow to import."""
    return {
        name: module
        for name, module in model.named_modules()
        if hasattr(module, "base_layer") and hasattr(module, "lora_A")
    }


@contextmanager
def adapters_off(model: nn.Module) -> Generator[None]:
    """The base model without its adapters. Raises RuntimeError if it has none."""
    layers = list(adapter_layers(model).values())
    if not layers:
        raise RuntimeError("adapters_off: this model has no LoRA adapters")
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)


@dataclass(frozen=True)
class Entry:
    """One tensor of a model: its exported name, and the adapter layer whose base weight it is."""

    name: str
    tensor: Tensor
    layer: Any = None

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The parameters that must be gathered to compute the exported tensor."""
        own = list(self.layer.parameters()) if self.layer is not None else [self.tensor]
        return [parameter for parameter in own if isinstance(parameter, nn.Parameter)]

    @property
    def nbytes(self) -> int:
        # A partitioned parameter (DeepSpeed ZeRO-3) is empty outside of a gather; its true size is in `ds_numel`.
        numel = getattr(self.tensor, "ds_numel", self.tensor.numel())
        return numel * self.tensor.element_size()

    @torch.no_grad()
    def merged(self) -> Tensor:
        weight = self.tensor.detach()
        if self.layer is None:
            return weight
        variant = self.layer.lora_variant.get(ADAPTER)
        if variant is not None:
            return variant.merge_safe(self.layer, ADAPTER, weight.clone())
        return weight + self.layer.get_delta_weight(ADAPTER).to(weight.dtype)


def resident(parameters: list[nn.Parameter]) -> AbstractContextManager[Any]:
    """The `gather` of a model whose parameters are not partitioned: nothing needs to be gathered."""
    return nullcontext()


def merged_tensors(causal: Any, bucket_bytes: int, gather: Gather = resident) -> Iterator[tuple[str, Tensor]]:
    """(name in the model without adapters, full tensor with adapters merged); training weights are not touched.

    `gather` makes the given parameters whole while its context lasts; it is entered once per bucket of at most
    `bucket_bytes` (or of one larger tensor). Tied weights are yielded once. The order is fixed; a tensor is valid until
    the next one is asked for.
    """
    for bucket in buckets(entries(causal), bucket_bytes):
        with gather([parameter for entry in bucket for parameter in entry.parameters]):
            for entry in bucket:
                yield entry.name, entry.merged()


def full_tensors(causal: Any, bucket_bytes: int, gather: Gather = resident) -> Iterator[tuple[str, Tensor]]:
    """`merged_tensors` with the names that a saved Hugging Face folder has, which are those that an engine loads.

    They differ from the names in memory where transformers fuses weights that it saves one by one: a layer's experts.
    """
    converted = bool(getattr(causal, "_weight_conversions", None))
    for name, tensor in merged_tensors(causal, bucket_bytes, gather):
        if converted:
            from transformers.core_model_loading import revert_weight_conversion

            yield from revert_weight_conversion(causal, {name: tensor}).items()
        else:
            yield name, tensor


def adapter_parameters(causal: Any) -> dict[str, nn.Parameter]:
    """The adapters' own parameters in a fixed order, by their names in a PEFT folder."""

    def saved(name: str) -> str:
        layer, _, kind = name.removesuffix(f".{ADAPTER}.weight").rpartition(".")
        leaf = kind if kind == "lora_magnitude_vector" else f"{kind}.weight"
        return f"base_model.model.{layer}.{leaf}"

    return {saved(name): parameter for name, parameter in causal.named_parameters() if ".lora_" in name}


def adapter_tensors(causal: Any, bucket_bytes: int, gather: Gather = resident) -> Iterator[tuple[str, Tensor]]:
    """(name in a PEFT folder, full tensor) of the adapters alone; otherwise as `merged_tensors`."""
    own = [Entry(name, parameter) for name, parameter in adapter_parameters(causal).items()]
    for bucket in buckets(own, bucket_bytes):
        with gather([parameter for entry in bucket for parameter in entry.parameters]):
            for entry in bucket:
                yield entry.name, entry.tensor.detach()


EXPORTS: dict[WeightsForm, Callable[[Any, int, Gather], Iterator[tuple[str, Tensor]]]] = {
    "merged": full_tensors,
    "in_memory": merged_tensors,
    "adapters": adapter_tensors,
}


@torch.no_grad()
def set_adapters(causal: Any, weights: dict[str, Tensor]) -> None:
    """Copies what `adapter_tensors` gave elsewhere into the adapters of this model. Raises ModelError, before anything
    is copied, unless exactly its adapters are given, in their shapes."""
    own = adapter_parameters(causal)
    other = sorted(
        name
        for name in own.keys() | weights.keys()
        if name not in own or name not in weights or own[name].shape != weights[name].shape
    )
    if other:
        raise ModelError(f"these adapters do not fit the model's: {', '.join(other[:5])} (of {len(other)} that differ)")
    for name, parameter in own.items():
        parameter.copy_(weights[name])


def adapter_weights(causal: Any, gather: Gather = resident) -> dict[str, Tensor]:
    """Copies on the host of the adapters' tensors, and of a scalar head's that is trained with them. The names are
    those of a PEFT folder."""
    from peft import get_peft_model_state_dict

    named = dict(causal.named_parameters())
    heads = [name for name in named if name.startswith(f"{SCORE}.")]
    named = {name: parameter for name, parameter in named.items() if ".lora_" in name or name in heads}
    with gather(list(named.values())):
        whole = {name: parameter.detach().to("cpu", copy=True) for name, parameter in named.items()}
    score = {name: whole.pop(name) for name in heads}
    found = get_peft_model_state_dict(causal, whole, ADAPTER, save_embedding_layers=False) | score
    return {f"base_model.model.{name}": tensor.contiguous() for name, tensor in found.items()}


def write_adapter(causal: Any, folder: Path, weights: dict[str, Tensor]) -> None:
    """A PEFT folder, which `PeftModel.from_pretrained(base, folder)` opens. `weights` are `adapter_weights`."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    config = copy(causal.peft_config[ADAPTER])
    config.inference_mode = True
    config.save_pretrained(str(folder))
    save_file(weights, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def entries(causal: Any) -> list[Entry]:
    """Every weight of the model once, each with the adapter layer on it, if there is one; the order is fixed."""
    layers = adapter_layers(causal)
    found: dict[int, Entry] = {}
    for key, tensor in causal.state_dict(keep_vars=True).items():
        prefix, wrapped, leaf = key.rpartition(".base_layer.")
        if ".lora_" in key:
            continue
        layer = layers[prefix] if wrapped and leaf == "weight" else None
        found.setdefault(id(tensor), Entry(key.replace(".base_layer.", "."), tensor, layer))
    return list(found.values())


def buckets(of: list[Entry], bucket_bytes: int) -> Iterator[list[Entry]]:
    """Splits entries into runs of at most `bucket_bytes`; an entry that is larger is a bucket by itself."""
    bucket: list[Entry] = []
    for entry in of:
        if bucket and sum(other.nbytes for other in bucket) + entry.nbytes > bucket_bytes:
            yield bucket
            bucket = []
        bucket.append(entry)
    if bucket:
        yield bucket

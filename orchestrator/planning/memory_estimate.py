"""A rough estimate of a role's memory, which `troupe plan` shows before anything is loaded. Pure."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

GIB = 2**30
BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
PROCESS_GIB = 0.8  # an interpreter with torch, transformers and Ray
# Architectures all of whose layers get the kernel for gated activations of `actors/fused_kernels.py`, and activations
# that it has. That file tries a model's code out; a plan is made without that code, whose import takes seconds. Tests
# compare the two. Of an architecture that is missing here, the estimate is somewhat too high.
FUSED_LAYERS = frozenset([
    "cohere", "cohere2", "cwm", "diffllama", "ernie4_5", "exaone4", "gemma", "gemma2", "gemma3_text", "granite",
    "helium", "hunyuan_v1_dense", "hyperclovax", "llama", "minicpm3", "ministral", "ministral3", "mistral", "olmo",
    "olmo2", "olmo3", "qwen2", "qwen3", "smollm3", "stablelm", "vaultgemma", "youtu",
])  # fmt: skip
FUSED_ACTIVATIONS = frozenset([
    "gelu_accurate", "gelu_fast", "gelu_new", "gelu_python_tanh", "gelu_pytorch_tanh", "silu", "swish",
])  # fmt: skip
LORA_SHARE_PER_RANK = (
    1 / 1600
)  # adapters' share of all parameters for each unit of r, on every linear layer of a 7B model


@dataclass(frozen=True)
class Shape:
    """Widths of a decoder's layers: `queries` and `keys` of all heads together, `gated` inside the feed-forward, of all
    experts that a token passes through. `fusable`: on a GPU, a kernel computes the gated activations."""

    layers: int
    hidden: int
    queries: int
    keys: int
    gated: int
    fusable: bool = False

    @classmethod
    def of(cls, config: Any) -> Shape | None:
        """Read from a Hugging Face configuration; None where it has other names than the usual ones."""
        text = config.get_text_config()
        try:
            heads, size = text.num_attention_heads, getattr(text, "head_dim", None)
            size = size or text.hidden_size // heads
            experts = getattr(text, "num_experts_per_tok", None)
            gated = getattr(text, "moe_intermediate_size", None) if experts else None
            inside = (gated or text.intermediate_size) * (experts or 1)
            keys = (getattr(text, "num_key_value_heads", None) or heads) * size
            fusable = text.model_type in FUSED_LAYERS and _activations(text) <= FUSED_ACTIVATIONS
            return cls(text.num_hidden_layers, text.hidden_size, heads * size, keys, inside, fusable)
        except AttributeError:
            return None

    def stored(self, fused: bool) -> int:
        """Values of a token and layer that the backward pass reads: input and output of both norms; queries, keys,
        values and the output of attention; the gate, its activation, the other half and their product. The kernel,
        which takes the place of plain layers if `fused` and they are `fusable`, does not keep the activation."""
        gated = 3 if fused and self.fusable else 4
        return 4 * self.hidden + 2 * self.queries + 2 * self.keys + gated * self.gated


def _activations(text: Any) -> set[Any]:
    """What a configuration says of them, under either name."""
    return {getattr(text, name) for name in ("hidden_act", "hidden_activation") if getattr(text, name, None)}


@dataclass(frozen=True)
class Memory:
    """GiB of one process. On a GPU, `averages` and `process` stay on the host."""

    weights: float = 0.0
    gradients: float = 0.0
    optimizer: float = 0.0
    activations: float = 0.0
    kv_cache: float = 0.0
    averages: float = 0.0
    companion: float = 0.0
    process: float = PROCESS_GIB

    @property
    def total(self) -> float:
        return sum(getattr(self, part.name) for part in fields(self))

    @property
    def on_device(self) -> float:
        """Of that, what is on a GPU: given back while the process sleeps."""
        return self.total - self.averages - self.process


@dataclass(frozen=True)
class Training:
    """What a trained role's memory depends on, apart from its weights."""

    zero_stage: int  # 0 for a backend that shards nothing
    ranks: int
    lora_rank: int | None
    gradient_checkpointing: bool
    companion_bytes: float = 0.0  # of the frozen model in each rank, which is not sharded
    fused: bool = False  # layers have the kernels of `actors/fused_kernels.py`, where they can
    averaged: bool = False  # the trained weights are averaged: three float32 copies, an equal part of them on each rank


def estimate(
    parameters: int,
    dtype: str,
    *,
    tokens: int = 0,
    training: Training | None = None,
    kv_cache_gib: float = 0.0,
    shape: Shape | None = None,
) -> Memory:
    """One process that holds a model. `tokens`: of its largest micro-batch. Without a `shape`, a usual one.

    Gradients and Adam's two moments are float32, and so are the master weights of a half-precision model. ZeRO shards
    optimizer states from stage 1 on, gradients from 2, weights from 3."""
    width = BYTES[dtype]
    if training is None:
        activations = _activation_bytes(shape or _usual(parameters), width, tokens, layers_kept=1, fused=False)
        return Memory(parameters * width / GIB, activations=activations / GIB, kv_cache=kv_cache_gib)
    lora = training.lora_rank
    trained = parameters if lora is None else min(1.0, lora * LORA_SHARE_PER_RANK) * parameters
    layers_kept = 1 if training.gradient_checkpointing else None
    activations = _activation_bytes(shape or _usual(parameters), width, tokens, layers_kept, training.fused)
    return Memory(
        weights=parameters * width / GIB / _share(training, 3),
        gradients=trained * 4 / GIB / _share(training, 2),
        optimizer=trained * (8 if dtype == "float32" else 12) / GIB / _share(training, 1),
        activations=activations / GIB,
        companion=training.companion_bytes / GIB,
        averages=trained * 12 / GIB / training.ranks if training.averaged else 0.0,
    )


def _share(training: Training, from_stage: int) -> int:
    return training.ranks if training.zero_stage >= from_stage else 1


def _activation_bytes(shape: Shape, width: int, tokens: int, layers_kept: int | None, fused: bool) -> float:
    """What the backward pass reads of each layer, without the attention matrix, which no kernel of ours stores; plus an
    input per layer where layers are recomputed."""
    if layers_kept is None:
        return tokens * width * shape.layers * shape.stored(fused)
    return tokens * width * (layers_kept * shape.stored(fused) + shape.layers * shape.hidden)


def _usual(parameters: int) -> Shape:
    """12 h^2 parameters per layer, h / 128 layers, as many key heads as query heads, 8/3 h inside the feed-forward."""
    hidden = max(1, round((parameters * 128 / 12) ** (1 / 3)))
    return Shape(max(1, hidden // 128), hidden, hidden, hidden, hidden * 8 // 3)

"""LoRA adapters of a vLLM engine that are replaced while it runs.

vLLM takes adapters from a PEFT folder only, so each version is written to a temporary one, which is gone when all of
the engine's workers have read it. There is one adapter, always under the same id: requests in flight go on with the
newest one, as they do with new weights of the whole model.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from torch import Tensor

from actors.errors import InfraFailure
from actors.specs import LoraSpec

if TYPE_CHECKING:
    from vllm.lora.request import LoRARequest
    from vllm.v1.engine.llm_engine import LLMEngine

NAME, ID = "policy", 1
# Types of models (`model_type`) whose classes in vLLM take adapters.
KNOWN = frozenset({"gemma", "gemma2", "gemma3_text", "granite", "llama", "mistral", "phi3", "qwen2", "qwen3"})
RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # for which vLLM can be built; an adapter may have a lower one


class Adapters:
    """Used by the thread that owns the engine."""

    def __init__(self, spec: LoraSpec) -> None:
        self._spec = spec
        self.request: LoRARequest | None = None  # for `add_request`; None until adapters were loaded

    def arguments(self) -> dict[str, Any]:
        """`EngineArgs` of an engine that can hold them."""
        rank = next(rank for rank in RANKS if rank >= self._spec.r)
        return {"enable_lora": True, "max_loras": 1, "max_cpu_loras": 1, "max_lora_rank": rank}

    def load(self, llm: LLMEngine, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Raises InfraFailure if vLLM does not take them."""
        from safetensors.torch import save_file
        from vllm.lora.request import LoRARequest

        whole = {name: tensor.detach().cpu().contiguous() for name, tensor in weights}
        with TemporaryDirectory(prefix="troupe-adapters-") as folder:
            Path(folder, "adapter_config.json").write_text(json.dumps(self._peft_config(whole)))
            save_file(whole, Path(folder, "adapter_model.safetensors"))
            if not llm.add_lora(LoRARequest(NAME, ID, folder, load_inplace=True)):
                raise InfraFailure("vLLM did not load the adapters")
        # Without `load_inplace`, which would have every step of the request read the folder again.
        self.request = LoRARequest(NAME, ID, "already loaded")

    def _peft_config(self, weights: dict[str, Tensor]) -> dict[str, Any]:
        layers = {name.rpartition(".lora_")[0].rpartition(".")[2] for name in weights}
        return {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "r": self._spec.r,
            "lora_alpha": self._spec.alpha,
            "use_rslora": self._spec.use_rslora,
            "target_modules": sorted(layers),
        }


def refusal(spec: LoraSpec, config: Any) -> str | None:
    """Why vLLM cannot hold these adapters of a model with that configuration; None if no reason is known."""
    text = config.get_text_config()
    if spec.use_dora:
        return "vLLM does not compute weight-decomposed adapters (model.lora.use_dora)"
    if spec.r > RANKS[-1]:
        return f"vLLM computes adapters of rank {RANKS[-1]} at most, and model.lora.r={spec.r}"
    if any(getattr(text, key, None) for key in ("num_experts", "num_local_experts", "n_routed_experts")):
        return "vLLM computes the experts of a mixture in one layer, which has no place for adapters of single ones"
    return None

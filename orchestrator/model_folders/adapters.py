"""A LoRA adapter merged into the model that it was trained on, by PEFT."""

# pyright: basic
# (peft and transformers are typed in part only)

from __future__ import annotations

import json
from pathlib import Path
from textwrap import shorten
from typing import Any

from actors import pretrained
from actors.errors import ModelError
from actors.pretrained import ADAPTER_CONFIG
from orchestrator.model_folders.found import find_model

GENERATES = ("CAUSAL_LM", None)  # `task_type` of an adapter whose model generates


def merge_adapter(adapter: Path, base: str, target: Path, trust_remote_code: bool = False) -> None:
    """Write the base model with the adapter merged, and the base's tokenizer unless the adapter has one, to `target`.
    Each sum is computed in the type of the base's weights. Raises ModelError if the two do not belong together."""
    from peft import PeftModel

    task = json.loads((adapter / ADAPTER_CONFIG).read_text()).get("task_type")
    if task not in GENERATES:
        raise ModelError(
            f"{adapter} is an adapter of task_type {task}, with a head of its own; adapters are merged here into "
            "models that generate. The run that trained it has the merged model in its checkpoint: export that"
        )
    found = find_model(base)
    if found.adapter:
        raise ModelError(f"--base {base} is an adapter itself: name the model that it was trained on")
    causal = pretrained.load_pretrained(str(found.path), trust_remote_code, dtype="auto")
    try:
        merged = PeftModel.from_pretrained(causal, str(adapter))
    except (RuntimeError, ValueError, OSError) as error:
        said = shorten(str(error), 300, placeholder=" ...")
        raise ModelError(f"the adapter {adapter} does not fit {base}: {said}") from error
    _refuse_unused(merged, adapter, base)
    whole: Any = merged.merge_and_unload(safe_merge=True)
    whole.save_pretrained(target)
    owner = adapter if (adapter / "tokenizer_config.json").is_file() else found.path
    pretrained.load_tokenizer(str(owner), trust_remote_code).save_pretrained(target)


def _refuse_unused(merged: Any, adapter: Path, base: str) -> None:
    """Raises ModelError if tensors of the adapter found no place: PEFT leaves them out without an error."""
    from peft import get_peft_model_state_dict
    from safetensors import safe_open

    file = adapter / "adapter_model.safetensors"
    if not file.is_file():
        raise ModelError(f"{adapter} holds no {file.name}: only adapters in safetensors are read")
    with safe_open(file, "pt") as opened:
        given = set(opened.keys())
    used = set(get_peft_model_state_dict(merged, save_embedding_layers=False))
    if given != used:
        odd = sorted(given ^ used)
        raise ModelError(
            f"the adapter {adapter} and the model {base} do not belong together: {len(odd)} of {len(given | used)} "
            f"adapted weights are in one of them alone, e.g. {odd[0]}"
        )

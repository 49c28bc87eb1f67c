"""Opening what `save_pretrained` wrote, a folder or a name on the Hugging Face hub: the one place that calls
transformers for it.

Code that comes with a model is run if `trust_remote_code` says so and not otherwise; nobody is asked. transformers asks
whoever sits at the terminal, unless it is told yes or no: so every call tells it.
"""

from __future__ import annotations

import threading
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from textwrap import shorten
from typing import Any

from actors.errors import ModelError

# Transformers builds a model under a default device that holds for the whole process: of two roles that load in one
# process at once (`--local`), one would be left without data.
LOADING = threading.Lock()
ADAPTER_CONFIG = "adapter_config.json"
MERGE = (
    "merge it first: PeftModel.from_pretrained(base, adapter).merge_and_unload().save_pretrained(folder), and use that "
    "folder"
)


def check_folder(path: str, key: str = "model.path") -> None:
    """Raises ModelError unless a folder holds a model; a name that is no folder is taken for one of the hub's. `key`
    is where the path was set."""
    folder = Path(path)
    if not folder.is_dir():
        if folder.is_absolute() or path.startswith((".", "~")):
            raise ModelError(f"{key}: there is no folder {path}")
        return
    files = sorted(entry.name for entry in folder.iterdir())
    weights = [name for name in files if _holds_weights(name)]
    if ADAPTER_CONFIG in files and not weights:
        raise ModelError(f"{key}: {path} holds a LoRA adapter and no model; {MERGE}")
    if ADAPTER_CONFIG in files:
        # transformers would attach it unasked, and save it in the place of the weights
        raise ModelError(
            f"{key}: {path} holds a LoRA adapter ({ADAPTER_CONFIG}) beside the weights of a model\n"
            "  if the model is meant: move the adapter's files to another folder\n"
            f"  if the adapter is meant: {MERGE}"
        )
    if "config.json" not in files or not weights:
        raise ModelError(
            f"{key}: {path} is not a model folder\n"
            f"  it holds: {', '.join(files[:8]) or 'nothing'}{', ...' if len(files) > 8 else ''}\n"
            "  needed:   config.json and weights (model.safetensors), as `save_pretrained` writes them"
        )


def load_config(path: str, trust_remote_code: bool) -> Any:
    """The model's configuration. Raises ModelError."""
    from transformers import AutoConfig

    with _refusing("a configuration", path):
        return AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)


def load_tokenizer(path: str, trust_remote_code: bool, chat_template: str | None = None) -> Any:
    """The tokenizer, with another chat template (its text) if one is given. Raises ModelError."""
    from transformers import AutoTokenizer

    with _refusing("a tokenizer", path, "set model.tokenizer to a folder that holds one"):
        load: Any = AutoTokenizer.from_pretrained
        tokenizer = load(path, trust_remote_code=trust_remote_code)
    if chat_template is not None:
        tokenizer.chat_template = chat_template
    return tokenizer


def load_causal(path: str, trust_remote_code: bool, **options: Any) -> Any:
    """The causal language model, on the CPU; `options` are those of `from_pretrained`. Raises ModelError."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()  # its bars of reading and writing files would draw over the driver's console
    check_folder(path)
    with _refusing("a causal language model", path), LOADING:
        causal = AutoModelForCausalLM.from_pretrained(path, trust_remote_code=trust_remote_code, **options)
    if getattr(causal, "_hf_peft_config_loaded", False):  # of the hub: a folder was looked at before
        raise ModelError(f"{path} holds a LoRA adapter, which transformers loaded with its base model; {MERGE}")
    return causal


def skeleton(path: str, trust_remote_code: bool) -> Any:
    """The causal language model without its weights: every module, on torch's `meta` device. Raises ModelError."""
    import torch
    from transformers import AutoModelForCausalLM

    config = load_config(path, trust_remote_code)
    with _refusing("a causal language model", path), LOADING, torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)


@contextmanager
def _refusing(what: str, path: str, remedy: str | None = None) -> Generator[None]:
    """What transformers, or the model's own code, raises while something is loaded, as a ModelError."""
    try:
        yield
    except (OSError, ValueError, KeyError, RuntimeError, ImportError, AttributeError) as error:
        if "trust_remote_code" in str(error):
            raise ModelError(
                f"{path} comes with Python code of its own, which is not run: model.trust_remote_code is false\n"
                "  read the code, and if you trust it set model.trust_remote_code=true; it then runs in the driver and "
                "in every worker"
            ) from None
        said = shorten(str(error), 250, placeholder=" ...")  # it may list every model that there is
        raise ModelError(f"cannot load {what} from {path}: {said}{f'; {remedy}' if remedy else ''}") from error


def _holds_weights(name: str) -> bool:
    if name.startswith("adapter_"):
        return False
    return name.endswith((".safetensors", ".bin")) or ".index.json" in name

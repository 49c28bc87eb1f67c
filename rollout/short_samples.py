"""Which samples an engine of transformers decodes in passes of one shape (`fixed_rows.py`), and of which models.
Without torch, so that a plan can ask."""

from __future__ import annotations

from typing import Any

STRIDE = 8  # tokens: prompts are padded to a multiple of it
SHORTEST, LONGEST = 32, 128  # columns: beyond the longest, masked columns cost more than calls
PARAMETERS = 20_000_000  # of a larger model, the products of a pass with empty seats cost more than calls
OF_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")  # keys of configurations


def columns_of(prompt: int, budget: int) -> int | None:
    """Columns for a sample of up to `budget` tokens after a prompt of so many: a power of two; None: too many. A prefix
    that is read again after some tokens may be padded by one token less than a stride."""
    needed = prompt + budget + STRIDE - 1
    columns = max(SHORTEST, 1 << (needed - 1).bit_length())
    return columns if columns <= LONGEST else None


def model_refusal(config: Any, parameters: int) -> str | None:
    """Why a model of transformers with that configuration is not decoded so; None: it is. It must be small, attend to
    all earlier tokens in every layer, and send each token through the same products whatever the other tokens are."""
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer

    text = config.get_text_config()
    if parameters > PARAMETERS:
        return f"the model has {parameters / 1e6:.0f}M parameters"
    if any(getattr(text, key, None) for key in OF_EXPERTS):
        return "the model has experts"
    layers = DynamicCache(config=text).layers
    if not layers or any(type(layer) is not DynamicLayer for layer in layers):
        return "not all layers of the model attend to all earlier tokens"
    if getattr(text, "attn_logit_softcapping", None) is not None:
        return "the scores of the model's attention are capped"
    return None

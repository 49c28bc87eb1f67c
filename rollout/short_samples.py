"""Which samples an engine of transformers decodes in passes of one shape (`fixed_rows.py`), and of which models.
Without torch, so that a plan can ask."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Shape:
    """Of the passes in which a request's samples are decoded. It follows from the request alone: bits of a sample must
    not depend on what else is running."""

    columns: int  # tokens of a row, at most, with padding
    rows: int  # of a pass, whether there are as many or not


STRIDE = 8  # tokens: prompts are padded to a multiple of it
# Of longer rows few are left after a while, and a pass computes empty seats, too: 16 rows of up to 96 tokens took 0.9 s
# in passes of 16 rows, and vLLM, whose passes shrink, 0.75 (2.6M parameters, one thread).
SHAPES = (Shape(32, 128), Shape(64, 64))
PARAMETERS = 20_000_000  # of a larger model, the products of a pass with empty seats cost more than calls
OF_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")  # keys of configurations


def shape_of(prompt: int, budget: int) -> Shape | None:
    """For a sample of up to `budget` tokens after a prompt of so many; None: it is too long. A prefix that is read
    again after some tokens may be padded by one token less than a stride."""
    return next((shape for shape in SHAPES if prompt + budget + STRIDE - 1 <= shape.columns), None)


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

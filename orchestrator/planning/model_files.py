"""What the files of a model folder tell without loading its weights: shapes, parameters, lengths."""

# pyright: basic
# (tokenizers and model configurations are typed in part only)

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterator
from pathlib import Path

from actors import pretrained
from actors.columns import Head

VOCABULARY_HEAD = "lm_head."  # prefix of a scalar head's weights in transformers' classes
UNBOUNDED = 2**31  # assumed for a model that states no maximum length


def count_parameters(model: str, head: Head = Head.VOCABULARY) -> int | None:
    """Of a model with that head, from the headers of a folder's safetensors files; None where there are none to read.
    The numbers of a scalar head are not worth counting."""
    counted = (
        math.prod(shape)
        for name, shape in weight_shapes(model)
        if head is Head.VOCABULARY or not name.startswith(VOCABULARY_HEAD)
    )
    return sum(counted) or None


def weight_shapes(model: str) -> Iterator[tuple[str, list[int]]]:
    """(name, shape), as far as a folder's safetensors files say."""
    for file in Path(model).glob("*.safetensors"):
        with file.open("rb") as stream:
            header = json.loads(stream.read(struct.unpack("<Q", stream.read(8))[0]))
        yield from ((name, entry["shape"]) for name, entry in header.items() if name != "__metadata__")


def model_length(model: str, trust_remote_code: bool) -> int:
    """The largest number of tokens in a row that the model has positions for."""
    config = pretrained.load_config(model, trust_remote_code)
    return int(getattr(config.get_text_config(), "max_position_embeddings", UNBOUNDED))


def vocabulary_size(model: str, trust_remote_code: bool) -> int:
    """Number of entries in the model's vocabulary."""
    return int(pretrained.load_config(model, trust_remote_code).get_text_config().vocab_size)

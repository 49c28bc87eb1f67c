"""The weights of a Hugging Face folder, tensor by tensor: read, cast and written in shards, without building the model.

One shard is in memory at a time, so that a model of any size and any architecture passes, with code of its own, too.
"""

# pyright: basic
# (torch and safetensors are typed in part only)

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from actors.errors import ModelError

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}  # ours -> safetensors'
BYTES = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "BF16": 2, "F16": 2, "I16": 2}  # others have one
GIB = 2**30


@dataclass(frozen=True)
class Stored:
    """One tensor in a file; `dtype` in the words of safetensors."""

    file: Path
    shape: tuple[int, ...]
    dtype: str


def stored_tensors(folder: Path) -> dict[str, Stored]:
    """Every tensor of the model by name, in the order of the files. Raises ModelError if its weights are not
    safetensors."""
    from safetensors import safe_open

    found: dict[str, Stored] = {}
    for file in _files(folder):
        with safe_open(file, "pt") as opened:
            for name in opened.keys():  # noqa: SIM118  it is no mapping
                part = opened.get_slice(name)
                found[name] = Stored(file, tuple(part.get_shape()), str(part.get_dtype()))
    return found


def _files(folder: Path) -> list[Path]:
    """Those of the index if there is one: beside them some folders hold the same weights in another layout."""
    if (folder / INDEX).is_file():
        named: dict[str, str] = json.loads((folder / INDEX).read_text())["weight_map"]
        return [folder / name for name in sorted(set(named.values()))]
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    files = sorted(file.name for file in folder.iterdir())
    raise ModelError(
        f"{folder} holds no {SINGLE} and no {INDEX}, but {', '.join(files[:8])}: only weights in safetensors are read; "
        "AutoModelForCausalLM.from_pretrained(FOLDER).save_pretrained(OTHER) writes them"
    )


def held_in(tensors: Mapping[str, Stored]) -> str | None:
    """The type of most numbers, in our words; None if that is another than those a model can be trained in."""
    counted: Counter[str] = Counter()
    for tensor in tensors.values():
        counted[tensor.dtype] += math.prod(tensor.shape)
    most = counted.most_common(1)[0][0] if counted else ""
    return next((ours for ours, theirs in DTYPES.items() if theirs == most), None)


def write_weights(tensors: Mapping[str, Stored], target: Path, *, dtype: str | None, shard_gib: float) -> list[Path]:
    """The same tensors in files of at most `shard_gib` GiB (or one tensor), with an index if there are several.

    With `dtype`, those are cast that are held in the type of most numbers. The others are of another type on purpose:
    the biases of a router in float32, say."""
    from huggingface_hub import split_state_dict_into_shards_factory

    own = held_in(tensors)
    cast_from = DTYPES.get(own or "") if dtype is not None and dtype != own else None
    of_new = {
        name: Stored(each.file, each.shape, DTYPES[dtype] if dtype and each.dtype == cast_from else each.dtype)
        for name, each in tensors.items()
    }
    split = split_state_dict_into_shards_factory(
        dict(of_new),
        get_storage_size=lambda each: math.prod(each.shape) * BYTES.get(each.dtype, 1),
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=max(1, int(shard_gib * GIB)),
    )
    for file, names in split.filename_to_tensors.items():
        _write_shard({name: (tensors[name], of_new[name].dtype) for name in names}, target / file)
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (target / INDEX).write_text(json.dumps(index, indent=2))
    return [target / file for file in split.filename_to_tensors]


def _write_shard(of: Mapping[str, tuple[Stored, str]], file: Path) -> None:
    import torch
    from safetensors import safe_open
    from safetensors.torch import save_file

    types = {theirs: getattr(torch, ours) for ours, theirs in DTYPES.items()}
    shard: dict[str, Any] = {}
    for source in sorted({stored.file for stored, _ in of.values()}):
        with safe_open(source, "pt") as opened:
            for name, (stored, new) in of.items():
                if stored.file == source:
                    tensor = opened.get_tensor(name)
                    shard[name] = tensor if new == stored.dtype else tensor.to(types[new])
    save_file(shard, file, metadata={"format": "pt"})

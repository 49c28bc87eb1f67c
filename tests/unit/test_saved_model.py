"""A model's folder that several ranks write: whole, each weight once, and opened by transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from actors.lora import full_tensors
from actors.model import ModelSpec, load_model, tokenizer_of
from actors.saved_model import INDEX, SINGLE, ModelPiece
from tests.unit.tiny import tiny_model_folder


@pytest.mark.parametrize(("ranks", "files"), [(1, 1), (2, 2), (3, 3)])
def test_each_rank_writes_its_share_and_together_they_are_the_model(tmp_path: Path, ranks: int, files: int) -> None:
    spec = ModelSpec(str(tiny_model_folder(tmp_path / "base", hidden=32, tied=False)))
    causal: Any = load_model(spec, torch.device("cpu"), trainable=True).causal
    target = tmp_path / "model"
    written: list[list[Path]] = []
    for rank in range(ranks):
        weights = full_tensors(causal, 20_000)
        save_tokenizer = tokenizer_of(spec).save_pretrained
        piece = ModelPiece(target, causal, weights, save_tokenizer, rank=rank, ranks=ranks, smallest_file=1)
        with torch.no_grad():
            piece.copy()
            written.append(piece.write())
    everything = [file for own in written for file in own]
    assert len(everything) == len(set(everything)) == len([file for file in target.rglob("*") if file.is_file()])
    shards = [load_file(file) for file in everything if file.suffix == ".safetensors"]
    assert len(shards) == files
    if files > 1:
        sizes = [sum(tensor.nbytes for tensor in shard.values()) for shard in shards]
        assert max(sizes) < 2 * sum(sizes) / ranks, "one rank writes about as much as another"
        index = json.loads((target / INDEX).read_text())
        assert index["metadata"]["total_size"] == sum(sizes) and len(index["weight_map"]) == sum(map(len, shards))
    else:
        assert (target / SINGLE).is_file() and not (target / INDEX).exists()
    opened: Any = AutoModelForCausalLM.from_pretrained(target)
    found, expected = opened.state_dict(), causal.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_rank_says_nothing_of_files_that_another_one_writes_meanwhile(tmp_path: Path) -> None:
    """Weights have another name until they are whole: a rank that told of it looked for a file that was gone."""
    spec = ModelSpec(str(tiny_model_folder(tmp_path / "base", hidden=32, tied=False)))
    causal: Any = load_model(spec, torch.device("cpu"), trainable=True).causal
    target = tmp_path / "model"
    target.mkdir()
    others = [target / ".tmpAbCdEf", target / "model-00002-of-00002.safetensors"]
    for file in others:
        file.write_bytes(b"of another rank")
    save_tokenizer = tokenizer_of(spec).save_pretrained
    piece = ModelPiece(target, causal, full_tensors(causal, 20_000), save_tokenizer, rank=0, ranks=2, smallest_file=1)
    with torch.no_grad():
        piece.copy()
        written = piece.write()
    assert sorted([*written, *others]) == sorted(file for file in target.rglob("*") if file.is_file())
    assert {file.parent for file in written} == {target} and target / "config.json" in written

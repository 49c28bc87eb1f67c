"""Weights that leave a worker or enter it: saved models, exports, folders that are loaded."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from actors.errors import RunError
from actors.specs import LoraSpec
from tests.unit.model_worker_stage import assert_equal_bits, folder, train, trainable, weights
from tests.unit.tiny import tiny_model_folder

__all__ = ["folder"]  # a fixture


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    "model", [{}, {"dtype": "bfloat16"}, {"lora": LoraSpec(r=4)}], ids=["full", "bfloat16", "lora"]
)
def test_a_saved_model_opens_in_transformers_with_equal_weights(
    tmp_path: Path, tied: bool, model: dict[str, Any]
) -> None:
    target = trainable(tiny_model_folder(tmp_path, tied=tied), **model)
    train(target, range(2))
    target.save_model(str(tmp_path / "saved"))
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    held = dict(opened.named_parameters())
    assert_equal_bits(weights(target), {name: held[name].detach() for name in held})
    assert opened.generation_config.eos_token_id == 1
    assert AutoTokenizer.from_pretrained(tmp_path / "saved").encode("1 + 2=3") == [3, 12, 13, 12, 4, 17, 5]


def test_a_saved_model_has_the_configuration_of_its_base_and_the_chat_template_of_the_training(
    folder: Path, tmp_path: Path
) -> None:
    template = "{% for message in messages %}{{ message.content }}{% endfor %}"
    target = trainable(folder, chat_template=template, gradient_checkpointing=True)
    train(target, range(1))
    target.save_model(str(tmp_path / "saved"))
    base, saved = (json.loads((at / "config.json").read_text()) for at in (folder, tmp_path / "saved"))
    assert saved == base and saved["use_cache"] is True
    assert AutoTokenizer.from_pretrained(tmp_path / "saved").chat_template == template
    assert AutoTokenizer.from_pretrained(folder).chat_template is None


def test_export_yields_every_weight_under_its_hugging_face_name(folder: Path) -> None:
    target = trainable(folder, lora=LoraSpec(r=4))
    expected = dict(AutoModelForCausalLM.from_pretrained(folder).named_parameters())
    small, large = (target.export(lambda tensors: [name for name, _ in tensors], size) for size in (1, 1 << 30))
    assert small == large
    assert set(small) == set(expected)
    assert_equal_bits(
        weights(target), {name: expected[name].detach() for name in small}
    )  # a fresh adapter adds nothing


def test_an_export_completes_even_if_its_consumer_fails(folder: Path) -> None:
    target = trainable(folder)
    drawn = []

    def fail(tensors: Iterator[tuple[str, Tensor]]) -> None:
        drawn.append(tensors)
        next(tensors)
        raise ConnectionError("the receiver went away")

    with pytest.raises(ConnectionError):
        target.export(fail, 1)
    assert next(drawn[0], None) is None
    assert target.ping()["verb"] is None


def test_a_frozen_role_takes_the_weights_of_a_folder_and_a_trained_one_refuses(folder: Path, tmp_path: Path) -> None:
    policy, reference = trainable(folder), trainable(folder, optim=None)
    train(policy, range(1))
    policy.save_model(str(tmp_path / "kept"))
    reference.load_model(str(tmp_path / "kept"))
    assert_equal_bits(weights(reference), weights(policy))
    with pytest.raises(RunError, match="is trained"):
        policy.load_model(str(folder))

"""One role's weights mixed into another's: the formula, the way there, and what is refused."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import MixtralConfig, MixtralForCausalLM

from actors.errors import InfraFailure, RunError
from actors.model import ModelSpec
from actors.model_worker import ModelWorker
from actors.specs import BackendSpec, OptimSpec
from actors.weight_shares import cut, joined
from actors.worker import LocalGroup, LocalWorker
from orchestrator.publishing.transfer import mix_towards
from tests.unit.tiny import tiny_model_folder

OPTIM = OptimSpec(learning_rate=1e-2, total_steps=20)
BUCKET = 5000  # several of them


def trainable(folder: Path, *, optim: OptimSpec | None = None, **model: Any) -> ModelWorker:
    made = ModelWorker("role", ModelSpec(str(folder), **model), BackendSpec("single", optim), threads=1)
    made.ready()
    return made


def weights(target: ModelWorker) -> dict[str, Tensor]:
    return target.export(lambda tensors: {name: tensor.clone() for name, tensor in tensors}, BUCKET)


def mixed(source: ModelWorker, target: ModelWorker, share: float) -> dict[str, Tensor]:
    """The target's weights after it has moved, by the way that a run goes."""
    groups = [LocalGroup(role.name, LocalWorker(role.name, role)) for role in (source, target)]
    asyncio.run(mix_towards(groups[0], groups[1], share, timeout_s=30.0, task_name="mix"))
    return weights(target)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("share", [0.6, 0.01])
def test_each_weight_becomes_its_share_of_the_other_and_the_rest_of_its_own(
    tmp_path: Path, share: float, tied: bool
) -> None:
    source, target = (trainable(tiny_model_folder(tmp_path, tied=tied, seed=seed)) for seed in (1, 2))
    theirs, own = weights(source), weights(target)
    found = mixed(source, target, share)
    assert ("lm_head.weight" in found) is not tied
    for name, weight in found.items():
        torch.testing.assert_close(
            weight.double(), share * theirs[name].double() + (1 - share) * own[name].double(), atol=1e-7, rtol=1e-6
        )
    assert all(torch.equal(weight, theirs[name]) for name, weight in weights(source).items())


def test_tied_weights_stay_tied(tmp_path: Path) -> None:
    source, target = (trainable(tiny_model_folder(tmp_path, seed=seed)) for seed in (1, 2))
    mixed(source, target, 0.5)
    causal: Any = target.backend.model.causal
    assert causal.lm_head.weight is causal.model.embed_tokens.weight


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_share_of_one_is_a_copy_to_the_bit(tmp_path: Path, dtype: str) -> None:
    source, target = (trainable(tiny_model_folder(tmp_path, seed=seed), dtype=dtype) for seed in (1, 2))
    theirs = weights(source)
    assert all(torch.equal(weight, theirs[name]) for name, weight in mixed(source, target, 1.0).items())


def test_half_precision_is_rounded_once_after_the_sum(tmp_path: Path) -> None:
    source, target = (trainable(tiny_model_folder(tmp_path, seed=seed), dtype="bfloat16") for seed in (1, 2))
    theirs, own = weights(source), weights(target)
    for name, weight in mixed(source, target, 0.3).items():
        assert torch.equal(weight, own[name].float().mul(0.7).add(theirs[name].float(), alpha=0.3).bfloat16())


def test_a_reference_of_another_dtype_takes_the_weights_in(tmp_path: Path) -> None:
    folder = tiny_model_folder(tmp_path)
    source, target = trainable(folder, dtype="bfloat16"), trainable(folder)
    theirs = weights(source)
    for name, weight in mixed(source, target, 1.0).items():
        assert weight.dtype == torch.float32 and torch.equal(weight, theirs[name].float())


def test_experts_that_are_held_fused_are_mixed(tmp_path: Path) -> None:
    shape = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 16, "num_hidden_layers": 1}
    config = MixtralConfig(**shape, num_attention_heads=2, num_key_value_heads=1, num_local_experts=4)
    for seed in (1, 2):
        torch.manual_seed(seed)
        MixtralForCausalLM(config).save_pretrained(tmp_path / str(seed))
    source, target = (trainable(tmp_path / str(seed)) for seed in (1, 2))
    theirs, own = weights(source), weights(target)
    assert len([name for name in own if "experts" in name]) > 4, "they leave one by one"
    for name, weight in mixed(source, target, 0.5).items():
        torch.testing.assert_close(weight, (theirs[name] + own[name]) / 2)


def test_another_model_is_refused_by_the_weight_that_differs(tmp_path: Path) -> None:
    target = trainable(tiny_model_folder(tmp_path, layers=2))
    with pytest.raises(RunError, match=r"model\.embed_tokens\.weight \(64, 32\) is to be mixed into .* \(64, 64\)"):
        mixed(trainable(tiny_model_folder(tmp_path, hidden=32)), target, 0.5)
    with pytest.raises(RunError, match=r"model\.norm\.weight .* is to be mixed into model\.layers\.1\."):
        mixed(trainable(tiny_model_folder(tmp_path, layers=1)), target, 0.5)
    with pytest.raises(RunError, match=r"lm_head\.weight is to be mixed into a model that has no such weight"):
        mixed(trainable(tiny_model_folder(tmp_path, tied=False)), target, 0.5)


def test_mixing_into_a_trained_role_is_refused(tmp_path: Path) -> None:
    folder = tiny_model_folder(tmp_path)
    with pytest.raises(RunError, match="is trained"):
        mixed(trainable(folder), trainable(folder, optim=OPTIM), 0.5)


def test_slices_of_which_a_byte_has_changed_are_refused(tmp_path: Path) -> None:
    _, block = trainable(tiny_model_folder(tmp_path, seed=1)).shares(1, BUCKET)
    target = trainable(tiny_model_folder(tmp_path, seed=2))
    before = weights(target)
    block[-1].values[0] ^= 1
    with pytest.raises(InfraFailure, match=rf"{block[-1].name} arrived with other bytes than were sent"):
        target.mix(0.5, BUCKET, block)
    assert all(torch.equal(weight, before[name]) for name, weight in weights(target).items()), "none was used"
    block[-1].values[0] ^= 1
    target.mix(0.5, BUCKET, block)
    assert any(not torch.equal(weight, before[name]) for name, weight in weights(target).items())


@pytest.mark.parametrize(("senders", "receivers"), [(1, 1), (2, 3), (3, 2)])
def test_the_slices_of_all_receivers_are_the_weights_and_each_is_sent_once(senders: int, receivers: int) -> None:
    torch.manual_seed(0)
    weights = [(str(index), torch.randn(index + 1, 5).bfloat16()) for index in range(7)]
    total = sum(tensor.nbytes for _, tensor in weights)
    sent = [cut(iter(weights), total, rank=rank, ranks=senders, receivers=receivers) for rank in range(senders)]
    assert sum(each.values.nbytes for blocks in sent for block in blocks for each in block) == total
    assert all(blocks[0] for blocks in sent), "every sender has a share"
    arrived = [list(joined([blocks[receiver] for blocks in sent])) for receiver in range(receivers)]
    for index, (name, tensor) in enumerate(weights):
        names, shapes, parts = zip(*(slices[index] for slices in arrived), strict=True)
        assert set(names) == {name} and set(shapes) == {tensor.shape}
        assert torch.equal(torch.cat(parts).view(tensor.shape), tensor)

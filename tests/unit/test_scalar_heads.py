"""Models whose head is one number: made of any model folder, saved as folders that give transformers equal numbers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from torch import nn
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoModelForTokenClassification, AutoTokenizer

from actors import lora
from actors.batch import Batch
from actors.columns import Head
from actors.errors import ModelError
from actors.model import ModelSpec
from actors.model_worker import ModelWorker
from actors.pretrained import padding_token
from actors.sharding import shard
from actors.specs import BackendSpec, LoraSpec, OptimSpec
from orchestrator.losses.objective import LossObjective
from orchestrator.methods import build
from tests.unit.tiny import tiny_model_folder

OPTIM = OptimSpec(learning_rate=1e-2, total_steps=10)
LORA = LoraSpec(r=4, alpha=8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model_folder(tmp_path_factory.mktemp("model"), tied=False)


@pytest.fixture(scope="module")
def judge(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a reward model after a step."""
    made = worker(folder)
    learn(made)
    return saved(made, tmp_path_factory.mktemp("judge"))


def worker(folder: Path, head: Head = Head.ROW_SCALAR, *, seed: int = 0, trained: bool = True, **model: Any) -> Any:
    spec = ModelSpec(str(folder), head=head, **model)
    made = ModelWorker("judge", spec, BackendSpec("single", OPTIM if trained else None), threads=1, seed=seed)
    made.ready()
    return made


def rows() -> Batch:
    """Pairs of several lengths; every row ends with the end of sequence, which is 1."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(4, 12, 8)
    tokens = [np.append(rng.integers(2, 64, length - 1), 1) for length in lengths]
    mask = np.concatenate([np.arange(length) >= 2 for length in lengths])
    index = np.arange(len(lengths))
    step_label = np.where(mask, rng.integers(-1, 2, lengths.sum()), -1)
    of_row = {"group": index // 2, "preferred": index % 2 == 0}
    return Batch.build(lengths, tokens=np.concatenate(tokens), mask=mask, step_label=step_label, **of_row)


def learn(made: ModelWorker, steps: int = 1) -> None:
    objective = LossObjective.of(build("reward_model", {}).updates[0])
    for _ in range(steps):
        made.update(shard(rows(), 1, 40, keep_groups=True)[0][1], objective, 1.0, "judge.update")


def scores(made: ModelWorker) -> np.ndarray:
    order, part = shard(rows(), 1, 40)[0]
    found = made.infer(part, ("reward",), Head.ROW_SCALAR, 1.0, True)[1]["reward"]
    return found[np.argsort(order)]


def values(made: ModelWorker) -> list[np.ndarray]:
    """Of each row, at its completion's tokens."""
    order, part = shard(rows(), 1, 1000)[0]
    block, batch = made.infer(part, ("values",), Head.TOKEN_SCALAR, 1.0, True)[1], rows()
    split = np.split(block["values"], np.cumsum(batch.lengths[order])[:-1])
    return [split[list(order).index(row)][2:] for row in range(len(batch))]


def padded(folder: Path) -> dict[str, torch.Tensor]:
    batch, tokenizer = rows(), AutoTokenizer.from_pretrained(folder)
    each = np.split(batch["tokens"], np.cumsum(batch.lengths)[:-1])
    return tokenizer.pad({"input_ids": [row.tolist() for row in each]}, return_tensors="pt")


def saved(made: ModelWorker, folder: Path) -> Path:
    made.save_model(str(folder))
    return folder


@torch.no_grad()
def transformers_scores(folder: Path) -> np.ndarray:
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    return model(**padded(folder)).logits[:, 0].numpy()


def test_a_trained_reward_model_opens_as_a_sequence_classifier_with_equal_scores(folder: Path, tmp_path: Path) -> None:
    made = worker(folder)
    before = scores(made)
    learn(made)
    assert np.abs(scores(made) - before).max() > 1e-3
    np.testing.assert_allclose(transformers_scores(saved(made, tmp_path)), scores(made), rtol=1e-4, atol=1e-5)
    config = AutoModelForSequenceClassification.from_pretrained(tmp_path).config
    assert (config.num_labels, list(config.id2label), config.pad_token_id) == (1, [0], 0)


def test_a_new_head_is_the_same_for_a_seed_and_another_for_another(folder: Path) -> None:
    one, same, other = (scores(worker(folder, seed=seed)) for seed in (0, 0, 1))
    np.testing.assert_array_equal(one, same)
    assert np.abs(one - other).min() > 1e-6


def test_a_new_head_finds_next_to_no_difference_between_rows(folder: Path, tmp_path: Path) -> None:
    """A critic's first values are noise: far apart, they would take many updates to unlearn."""
    made = worker(folder)
    assert 0 < np.abs(scores(made)).max() < 0.3
    learn(made, steps=3)
    assert np.abs(scores(made)).max() > 0.3
    ranges = [AutoConfig.from_pretrained(place).initializer_range for place in (folder, saved(made, tmp_path))]
    assert ranges[0] == ranges[1]


def test_the_head_of_a_reward_model_is_kept_trained_or_frozen(judge: Path) -> None:
    expected = transformers_scores(judge)
    for trained in (True, False):
        np.testing.assert_allclose(scores(worker(judge, seed=5, trained=trained)), expected, rtol=1e-4, atol=1e-5)


def test_a_value_model_starts_from_a_reward_model_and_opens_as_a_token_classifier(judge: Path, tmp_path: Path) -> None:
    made = worker(judge, Head.TOKEN_SCALAR)
    saved(made, tmp_path)
    model = AutoModelForTokenClassification.from_pretrained(tmp_path).eval()
    assert (model.config.num_labels, model.config.pad_token_id) == (1, 0)
    with torch.no_grad():
        logits = model(**padded(tmp_path)).logits[..., 0].numpy()
    for row, (found, length) in enumerate(zip(values(made), rows().lengths, strict=True)):
        np.testing.assert_allclose(found, logits[row, 1 : length - 1], rtol=1e-4, atol=1e-5)  # the states before them
    last = logits[np.arange(8), rows().lengths - 1]
    np.testing.assert_allclose(last, transformers_scores(judge), rtol=1e-4, atol=1e-5)


def said_of_steps(made: ModelWorker, batch: Batch | None = None) -> list[np.ndarray]:
    """Of each row, at its completion's tokens."""
    batch = rows() if batch is None else batch
    order, part = shard(batch, 1, 1000)[0]
    block = made.infer(part, ("step_reward",), Head.STEP_SCALAR, 1.0, True)[1]
    split = np.split(block["step_reward"], np.cumsum(batch.lengths[order])[:-1])
    return [split[list(order).index(row)][2:] for row in range(len(batch))]


@torch.no_grad()
def transformers_logits(folder: Path) -> np.ndarray:
    return AutoModelForTokenClassification.from_pretrained(folder).eval()(**padded(folder)).logits.numpy()


def test_a_process_reward_model_opens_as_a_token_classifier_that_says_of_each_token_read_what_it_says(
    folder: Path, tmp_path: Path
) -> None:
    made = worker(folder, Head.STEP_SCALAR)
    before = said_of_steps(made)
    objective = LossObjective.of(build("process_reward_model", {}).updates[0])
    made.update(shard(rows(), 1, 40)[0][1], objective, 1.0, "judge.update")
    found, logits = said_of_steps(made), transformers_logits(saved(made, tmp_path))
    assert np.abs(np.concatenate(found) - np.concatenate(before)).max() > 1e-3 and logits.shape[-1] == 1
    for row, length in enumerate(rows().lengths):
        np.testing.assert_allclose(found[row], logits[row, 2:length, 0], rtol=1e-4, atol=1e-5)


def test_what_is_said_of_a_step_depends_on_no_label_and_on_no_later_step(folder: Path) -> None:
    made, batch = worker(folder, Head.STEP_SCALAR), rows()
    changed = batch["tokens"].copy()
    changed[batch.lengths.cumsum() - 1] = 7  # the last token of each row
    other = batch.with_columns(step_label=-batch["step_label"], tokens=changed)
    for now, then in zip(said_of_steps(made), said_of_steps(made, other), strict=True):
        np.testing.assert_allclose(now[:-1], then[:-1], rtol=1e-5, atol=1e-6)
        assert abs(now[-1] - then[-1]) > 1e-4


def test_of_a_process_reward_model_with_two_labels_the_difference_of_their_logits_is_read(
    folder: Path, tmp_path: Path
) -> None:
    """Label 1 is right; a value model is no such model, and starts with a new head."""
    torch.manual_seed(3)
    AutoModelForTokenClassification.from_pretrained(folder, num_labels=2, pad_token_id=0).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(folder).save_pretrained(tmp_path)
    made = worker(tmp_path, Head.STEP_SCALAR, trained=False)
    found, logits = said_of_steps(made), transformers_logits(tmp_path)
    for row, length in enumerate(rows().lengths):
        wrong, right = logits[row, 2:length].T
        np.testing.assert_allclose(found[row], right - wrong, rtol=1e-4, atol=1e-5)
    again = transformers_logits(saved(worker(tmp_path, Head.STEP_SCALAR), tmp_path / "again"))
    np.testing.assert_allclose(again[..., 0], logits[..., 1] - logits[..., 0], rtol=1e-4, atol=1e-5)


def test_adapters_are_saved_with_the_head_that_was_trained_beside_them(folder: Path, tmp_path: Path) -> None:
    made = worker(folder, lora=LORA)
    learn(made, 3)
    made.save_adapter(str(tmp_path / "adapter"))
    base = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1, pad_token_id=0)
    nn.init.zeros_(base.score.weight)
    opened: Any = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (config["modules_to_save"], config["task_type"]) == (["score"], "SEQ_CLS")
    with torch.no_grad():
        found = opened(**padded(folder)).logits[:, 0].numpy()
    np.testing.assert_allclose(found, scores(made), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(transformers_scores(saved(made, tmp_path / "model")), found, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("adapters", [None, LORA], ids=["whole", "lora"])
def test_a_resumed_reward_model_goes_on_to_the_bit(folder: Path, tmp_path: Path, adapters: LoraSpec | None) -> None:
    made, resumed = worker(folder, lora=adapters), worker(folder, lora=adapters, seed=9)
    learn(made, 2)
    made.save_state(str(tmp_path))
    resumed.load_state(str(tmp_path))
    np.testing.assert_array_equal(scores(resumed), scores(made))
    learn(made)
    learn(resumed)
    np.testing.assert_array_equal(scores(resumed), scores(made))


def test_only_adapters_and_the_head_are_trained_with_lora(folder: Path) -> None:
    made = worker(folder, lora=LORA)
    named = made.backend.model.causal.named_parameters()
    trained = {name for name, weight in named if weight.requires_grad}
    assert "score.weight" in trained
    assert all(".lora_" in name for name in trained - {"score.weight"})
    assert not any("score" in name for name in lora.adapter_layers(made.backend.model))


def test_a_frozen_model_without_a_head_is_refused(folder: Path) -> None:
    with pytest.raises(ModelError, match="holds no head that gives a number"):
        worker(folder, trained=False)


def test_a_reward_model_is_no_language_model(judge: Path) -> None:
    with pytest.raises(ModelError, match=r"lacks weights of a model with a vocabulary head: lm_head\.weight"):
        worker(judge, Head.VOCABULARY)


def test_a_value_models_head_is_not_taken_for_a_reward_models(judge: Path, tmp_path: Path) -> None:
    saved(worker(judge, Head.TOKEN_SCALAR), tmp_path)
    with pytest.raises(ModelError, match="head with a bias"):
        worker(tmp_path)


def test_rows_are_padded_with_a_token_that_does_not_end_them(folder: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token = tokenizer.eos_token  # as many tokenizers have it: the class would read the score before it
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    made = worker(folder, tokenizer=str(tmp_path / "tokenizer"))
    saved(made, tmp_path / "model")
    assert AutoTokenizer.from_pretrained(tmp_path / "model").pad_token == "<pad>"
    np.testing.assert_allclose(transformers_scores(tmp_path / "model"), scores(made), rtol=1e-4, atol=1e-5)


def test_a_tokenizer_with_nothing_to_pad_with_is_refused(folder: Path) -> None:
    class OnlyEnds:
        pad_token, eos_token_id, unk_token = "<eos>", 1, None

        def __init__(self) -> None:
            self.added_tokens_decoder: dict[int, Any] = {}

        def convert_tokens_to_ids(self, token: str) -> int:
            return 1

    with pytest.raises(ModelError, match="has no special token to pad with"):
        padding_token(OnlyEnds(), worker(folder).backend.model.causal.config)

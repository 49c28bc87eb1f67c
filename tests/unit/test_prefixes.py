"""Common beginnings of documents are found exactly, and computing them once changes nothing."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from actors.batch import Batch
from actors.forward import forward
from actors.model import LanguageModel
from actors.objective import MicroBatch
from actors.prefixes import shared_prefixes
from tests.unit.forward_stage import FLOAT32, language_model, plain_logps, tiny_mixtral
from tests.unit.tiny import tiny_model

PROMPTS = [[5, 9, 33, 7, 60, 61, 20], [5, 9, 12, 40], [8]]
documents = st.lists(st.lists(st.integers(0, 2), max_size=6), min_size=1, max_size=12)


def micro_batch(rows: list[list[int]]) -> MicroBatch:
    tokens = np.asarray([token for row in rows for token in row], np.int32)
    return MicroBatch.of(Batch.build([len(row) for row in rows], tokens=tokens))


def samples(seed: int = 0, per_prompt: int = 6) -> list[list[int]]:
    """Several samples of each prompt, some of them the same, in no order."""
    random = np.random.default_rng(seed)
    rows = [
        [*prompt, *random.integers(2, 6, random.integers(1, 9)).tolist()]
        for prompt in PROMPTS
        for _ in range(per_prompt)
    ]
    random.shuffle(rows)
    return [*rows, rows[0]]


def without_sharing(model: LanguageModel) -> LanguageModel:
    model._packs = False
    return model


@given(documents)
def test_a_token_shares_its_row_with_those_that_have_the_same_tokens_up_to_them(rows: list[list[int]]) -> None:
    history = [tuple(row[: end + 1]) for row in rows for end in range(len(row))]
    tokens = torch.tensor([token for row in rows for token in row], dtype=torch.int64)
    found = shared_prefixes(tokens.numpy(), [len(row) for row in rows])
    if found is None:
        assert len(set(history)) > 0.9 * len(history) or not history
        return
    assert len(found.kept) == len(set(history))
    assert found.kept.tolist() == sorted(found.kept.tolist())
    assert [history[found.kept[row]] for row in found.row_of_token] == history


def test_rows_with_little_in_common_are_not_merged() -> None:
    assert shared_prefixes(np.arange(40), [10, 10, 20]) is None


def test_tokens_are_compared_as_numbers_not_as_bytes_of_either_end() -> None:
    rows = [[256, 1, 7], [1, 7, 7], [256, 1, 9], [1, 7, 9]]
    found = shared_prefixes(np.asarray(rows).flatten(), [3] * 4)
    assert found is not None
    assert found.row_of_token.tolist() == [0, 1, 2, 3, 4, 5, 0, 1, 6, 3, 4, 7]


@pytest.mark.parametrize("tied", [True, False])
def test_logps_of_rows_with_a_shared_prefix_equal_those_of_each_row_alone(tied: bool) -> None:
    causal, micro = tiny_model(tied=tied), micro_batch(samples())
    assert shared_prefixes(micro["tokens"].numpy(), micro.row_lengths) is not None
    torch.testing.assert_close(forward(language_model(causal), micro).logps, plain_logps(causal, micro), **FLOAT32)


def test_the_gradient_is_what_it_is_without_sharing() -> None:
    micro = micro_batch(samples())
    weights = torch.randn(len(micro["tokens"]), generator=torch.Generator().manual_seed(3))
    gradients = []
    for prepared in (lambda model: model, without_sharing):
        model = prepared(language_model(tiny_model()))
        (forward(model, micro).logps * weights).sum().backward()
        gradients.append({name: p.grad for name, p in model.causal.named_parameters()})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], rtol=1e-3, atol=1e-5, msg=name)


def rows_computed(model: LanguageModel, micro: MicroBatch) -> int:
    """How many rows went through the model's first layer."""
    seen: list[int] = []
    hook = model.causal.model.layers[0].register_forward_hook(lambda *call: seen.append(call[1][0].shape[1]))
    forward(model, micro)
    hook.remove()
    return seen[0]


def test_a_shared_prefix_passes_through_the_model_once() -> None:
    model, rows = language_model(), [[5, 9, 33, 7, ending] for ending in (10, 11, 12, 10)]
    assert rows_computed(model, micro_batch(rows)) == 7
    assert rows_computed(without_sharing(model), micro_batch(rows)) == 20


@pytest.mark.parametrize("training", [True, False])
def test_noise_is_drawn_for_each_document_by_itself(training: bool) -> None:
    model = language_model(neftune_noise_alpha=5.0).train(training)
    assert rows_computed(model, micro_batch([[5, 9, 33, 7]] * 4)) == (16 if training else 4)


def test_dropout_is_drawn_for_each_document_by_itself() -> None:
    causal = tiny_model()
    causal.config.attention_dropout = 0.1
    model = language_model(causal)
    assert rows_computed(model, micro_batch([[5, 9, 33, 7]] * 4)) == 16
    assert rows_computed(model.eval(), micro_batch([[5, 9, 33, 7]] * 4)) == 4


def test_experts_are_balanced_over_every_token() -> None:
    rows = micro_batch([[5, 9, 33, 7]] * 4)
    model = language_model(tiny_mixtral())
    assert rows_computed(model, rows) == 16
    assert rows_computed(language_model(tiny_mixtral(), router_aux_loss_coef=0.0), rows) == 4

"""The vocabulary head by itself, against plain autograd."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from actors.forward import forward
from actors.heads import LogitScaling, VocabularyHead
from tests.unit.forward_stage import Largest, language_model, rows
from tests.unit.tiny import tiny_model


@pytest.mark.parametrize(
    "scaling", [LogitScaling(0.3), LogitScaling(softcap=2.0), LogitScaling(1.7, softcap=3.0)], ids=str
)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("chunk_rows", [None, 3])
def test_scaled_and_capped_logits_equal_plain_autograd(
    scaling: LogitScaling, bias: bool, chunk_rows: int | None
) -> None:
    torch.manual_seed(0)
    linear = torch.nn.Linear(8, 20, bias=bias)
    hidden = torch.randn(10, 8, requires_grad=True)
    targets = torch.randint(0, 20, (10,))
    weights = torch.linspace(-1, 1, 10)
    inputs = [hidden, *linear.parameters()]

    logits = scaling.multiplier * linear(hidden)
    if scaling.softcap is not None:
        logits = scaling.softcap * torch.tanh(logits / scaling.softcap)
    logps = torch.log_softmax(logits / 0.7, -1).gather(1, targets[:, None]).squeeze(1)
    expected = torch.autograd.grad((weights * logps).sum(), inputs)

    found = VocabularyHead(linear, scaling)(hidden, targets, 0.7, frozenset(), chunk_rows)["main"]
    torch.testing.assert_close(found, logps)
    torch.testing.assert_close(torch.autograd.grad((weights * found).sum(), inputs), expected)


@pytest.mark.parametrize("chunk_rows", [None, 3])
def test_a_distribution_over_the_admitted_tokens_alone_equals_plain_autograd(chunk_rows: int | None) -> None:
    """Log-probability, entropy and gradients; a row of -1 alone is restricted to nothing less than all tokens."""
    torch.manual_seed(0)
    linear = torch.nn.Linear(8, 20)
    hidden = torch.randn(10, 8, requires_grad=True)
    inside = torch.rand(10, 20).argsort(-1)[:, :6]
    admitted = inside.masked_fill(torch.rand(10, 6) < 0.4, -1)
    admitted[:, 0], admitted[4] = inside[:, 0], -1
    targets, inputs = inside[:, 0], [hidden, *linear.parameters()]

    said: list[Tensor] = []
    for row, ids in enumerate(admitted):
        kept = ids[ids >= 0] if (ids >= 0).any() else torch.arange(20)
        log_probs = torch.log_softmax(linear(hidden[row])[kept] / 0.7, -1)
        entropy = -(log_probs.exp() * log_probs).sum()
        said.append(log_probs[(kept == targets[row]).nonzero()[0, 0]] + 0.3 * entropy)
    expected = torch.stack(said)

    head, needs = VocabularyHead(linear, LogitScaling()), frozenset({"entropy", "entropy_grad"})
    found = head(hidden, targets, 0.7, needs, chunk_rows, None, admitted)
    values = found["main"] + 0.3 * found["entropy"]
    torch.testing.assert_close(values, expected)
    weights = torch.linspace(-1, 1, 10)
    of_plain, of_head = (torch.autograd.grad((weights * each).sum(), inputs) for each in (expected, values))
    torch.testing.assert_close(of_head, of_plain)
    whole = head(hidden, targets, 0.7, needs, chunk_rows)
    assert (whole["main"] < found["main"] - 0.1).sum() == 9, "of the tenth, all tokens are admitted"


@pytest.mark.parametrize("chunk_rows", [None, 3])
def test_a_head_in_float32_computes_with_states_and_weights_of_half_precision_as_if_they_had_more(
    chunk_rows: int | None,
) -> None:
    torch.manual_seed(0)
    linear, exact = torch.nn.Linear(64, 50).bfloat16(), torch.nn.Linear(64, 50)
    exact.load_state_dict(linear.state_dict())
    hidden, targets = (4 * torch.randn(10, 64)).bfloat16(), torch.randint(0, 50, (10,))

    def gradient(head: VocabularyHead, states: Tensor) -> tuple[Tensor, ...]:
        states = states.clone().requires_grad_()
        logps = head(states, targets, 1.0, frozenset(), chunk_rows)["main"]
        return logps, *torch.autograd.grad(logps.sum(), [states, *head.parameters()])

    expected = gradient(VocabularyHead(exact, LogitScaling()), hidden.float())
    found = gradient(VocabularyHead(linear, LogitScaling(float32=True)), hidden)
    rounded = gradient(VocabularyHead(linear, LogitScaling()), hidden)
    torch.testing.assert_close(found[0], expected[0])
    for mine, wanted in zip(found[1:], expected[1:], strict=True):
        assert mine.dtype is torch.bfloat16
        torch.testing.assert_close(mine.float(), wanted, rtol=1e-2, atol=1e-2)
    assert (rounded[0] - expected[0]).abs().max() > 1e-2 > 10 * (found[0] - expected[0]).abs().max()


def test_the_logits_of_all_tokens_never_exist_at_once() -> None:
    vocab, tokens, chunk = 4096, 256, 16
    model = language_model(tiny_model(vocab=vocab, hidden=16, layers=1))
    with Largest() as largest:
        forward(model, rows([tokens], vocab=vocab), chunk_rows=chunk).logps.sum().backward()
    assert largest.numel == vocab * chunk < vocab * tokens

"""Computes functions of whole distributions without ever holding the logits of all tokens.

    states [N, H] ──chunk──► logits [n, V] ─┐
                                            ├─ call(logits, *given) ──► [n]
    another model's states [N, H'] ──► its logits [n, V], columns per token [n, ...]

The caller passes the function of the logits: any differentiable one, such as a divergence from another model's
distribution. The backward pass recomputes each chunk.

The distribution of a model in other processes is represented by its k most likely tokens (`TopK`): their
log-probabilities, and that of all other tokens together.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from actors.logits import LogitScaling, Vocabulary, add_product, chunk_logits, chunks

TOP_K = ("topk_ids", "topk_logps", "tail_logps", "main")  # what `most_likely` finds, in the order of its columns
HELD = 8  # tensors of a chunk's size that a call with its gradient may hold at a time


@dataclass(frozen=True)
class Asked:
    """`call(logits [n, V], *given) -> [n]`, or [n, width], float32. `given` are, for the same n tokens: if there is one
    `beside`, with its states [N, H'], the other model's logits [n, V]; then the entries [n, ...] of `columns`.

    Of two models with padded vocabularies of different sizes, V is the smaller one: the rows beyond it stand for no
    token of their common tokenizer."""

    call: Callable[..., Tensor]
    columns: tuple[Tensor, ...] = ()
    beside: tuple[Vocabulary, Tensor] | None = None
    width: int = 1

    def vocabulary(self, weight: Tensor) -> int:
        """V."""
        own = weight.shape[0]
        return own if self.beside is None else min(own, self.beside[0].weight.shape[0])

    def given(self, part: slice, vocabulary: int) -> list[Tensor]:
        found = [column[part] for column in self.columns]
        if self.beside is not None:
            projection, hidden = self.beside
            found.insert(0, projection.logits(hidden[part], vocabulary))
        return found


@dataclass(frozen=True)
class TopK:
    """The `k` most likely tokens of each distribution at a temperature. The distribution is over the first `vocabulary`
    tokens (None: over all that the model has): entries of a padded vocabulary beyond the tokenizer's stand for none."""

    k: int
    temperature: float = 1.0
    vocabulary: int | None = None


def most_likely(
    projection: Vocabulary, hidden: Tensor, targets: Tensor, asked: TopK, chunk_rows: int | None
) -> dict[str, Tensor]:
    """Of the distributions of `hidden` [N, H], without gradient: `topk_ids` int32 [N, k], `topk_logps` [N, k] in
    descending order, and `tail_logps` [N, 1], the log-probability of all other tokens, -inf where k is all of them.
    `main` [N]: the log-probabilities of the `targets`. Each may become a column; the last one need not."""
    known = min(asked.vocabulary or projection.weight.shape[0], projection.weight.shape[0])
    found = {
        "main": hidden.new_empty(len(hidden), dtype=torch.float32),
        "topk_ids": hidden.new_empty((len(hidden), asked.k), dtype=torch.int32),
        "topk_logps": hidden.new_empty((len(hidden), asked.k), dtype=torch.float32),
        "tail_logps": hidden.new_empty((len(hidden), 1), dtype=torch.float32),
    }
    for part in chunks(len(hidden), _rows_at_once(projection, chunk_rows)):
        log_probs = torch.log_softmax(projection.logits(hidden[part], known) / asked.temperature, dim=-1)
        found["main"][part] = log_probs.gather(1, targets[part, None]).squeeze(1)
        logps, ids = log_probs.topk(asked.k, dim=-1)
        found["topk_ids"][part], found["topk_logps"][part] = ids.int(), logps
        found["tail_logps"][part] = log_probs.scatter_(1, ids, -torch.inf).logsumexp(-1, keepdim=True)
        del log_probs  # or it would stand beside the next chunk's
    return found


def of_logits(projection: Vocabulary, hidden: Tensor, asked: Asked, chunk_rows: int | None) -> Tensor:
    """[N], or [N, width]: what `asked.call` makes of the logits of `hidden` [N, H], with the gradient that its own
    operations have. Temperature is the call's: it is given what the model itself would put out."""
    rows = _rows_at_once(projection, chunk_rows)
    return _OfLogits.apply(hidden, projection.weight, projection.bias, asked, projection.scaling, rows)


def _rows_at_once(projection: Vocabulary, chunk_rows: int | None) -> int:
    return chunk_rows or max(1, chunk_logits(projection.weight.device) // (HELD * projection.weight.shape[0]))


class _OfLogits(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        asked: Asked,
        scaling: LogitScaling,
        chunk_rows: int,
    ) -> Tensor:
        ctx.asked, ctx.scaling, ctx.chunk_rows = asked, scaling, chunk_rows
        ctx.save_for_backward(hidden, weight, bias)
        several = (asked.width,) if asked.width > 1 else ()
        values = hidden.new_empty((len(hidden), *several), dtype=torch.float32)
        projection, vocabulary = Vocabulary(weight, bias, scaling), asked.vocabulary(weight)
        for part in chunks(len(hidden), chunk_rows):
            logits = projection.logits(hidden[part], vocabulary)
            values[part] = asked.call(logits, *asked.given(part, vocabulary))
            del logits  # or it would stand beside the next chunk's
        return values

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias = ctx.saved_tensors
        asked: Asked = ctx.asked
        projection, vocabulary = Vocabulary(weight, bias, ctx.scaling), asked.vocabulary(weight)
        factor = ctx.scaling.cast(weight[:vocabulary])
        hidden_grad = torch.zeros_like(hidden)
        weight_grad = torch.zeros_like(weight, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        bias_grad = torch.zeros_like(bias, dtype=torch.float32) if ctx.needs_input_grad[2] else None
        for part in chunks(len(hidden), ctx.chunk_rows):
            logits = projection.logits(hidden[part], vocabulary)
            given = asked.given(part, vocabulary)
            grad = ctx.scaling.backward_(_gradient(asked.call, logits, given, grads[0][part]), logits).to(factor.dtype)
            hidden_grad[part] = grad @ factor
            if weight_grad is not None:
                add_product(weight_grad[:vocabulary], grad.t(), hidden[part].to(grad.dtype))
            if bias_grad is not None:
                bias_grad[:vocabulary] += grad.sum(0, dtype=torch.float32)
            del logits, given, grad  # or they would stand beside the next chunk's
        of_weights = [
            None if found is None else found.to(like.dtype)
            for found, like in ((weight_grad, weight), (bias_grad, bias))
        ]
        return hidden_grad, *of_weights, None, None, None


def _gradient(call: Callable[..., Tensor], logits: Tensor, given: list[Tensor], grad: Tensor) -> Tensor:
    """[n, V], a tensor of our own: of the call's values with respect to the logits, times `grad`, which is of their
    shape."""
    with torch.enable_grad():
        leaf = logits.detach().requires_grad_()
        return torch.autograd.grad(call(leaf, *given), leaf, grad)[0].contiguous()

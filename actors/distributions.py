"""Computes functions of whole distributions without ever holding the logits of all tokens.

    states [N, H] ──chunk──► logits [n, V] ─┬─────────────────────────► log-probabilities of the tokens [n]
                                            ├─ call(logits, *given) ──► [n]
    another model's states [N, H'] ──► its logits [n, V], columns per token [n, ...]

The caller passes the function of the logits: any differentiable one, such as a divergence from another model's
distribution. The log-probabilities of the tokens themselves come from the same logits, because projecting onto a large
vocabulary is most of the work. The backward pass recomputes each chunk.

The distribution of a model in other processes is represented by its k most likely tokens (`TopK`): their
log-probabilities, and that of all other tokens together.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
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


def of_logits(
    projection: Vocabulary,
    hidden: Tensor,
    targets: Tensor,
    asked: Asked,
    temperature: float = 1.0,
    chunk_rows: int | None = None,
) -> tuple[Tensor, Tensor]:
    """([N], [N] or [N, width]), float32: the log-probabilities of the `targets` [N] at a temperature, and what
    `asked.call` makes of the logits of `hidden` [N, H], with the gradient that its own operations have. The call has a
    temperature of its own: it is given what the model itself would put out."""
    rows = _rows_at_once(projection, chunk_rows)
    given = hidden, projection.weight, projection.bias, targets, asked, projection.scaling, temperature, rows
    return _OfLogits.apply(*given)


def _rows_at_once(projection: Vocabulary, chunk_rows: int | None) -> int:
    return chunk_rows or max(1, chunk_logits(projection.weight.device) // (HELD * projection.weight.shape[0]))


class _OfLogits(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        asked: Asked,
        scaling: LogitScaling,
        temperature: float,
        chunk_rows: int,
    ) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)  # what the loss does not read needs no gradient
        ctx.asked, ctx.scaling, ctx.temperature, ctx.chunk_rows = asked, scaling, temperature, chunk_rows
        ctx.save_for_backward(hidden, weight, bias, targets)
        several = (asked.width,) if asked.width > 1 else ()
        logps, values = (hidden.new_empty((len(hidden), *shape), dtype=torch.float32) for shape in ((), several))
        projection, common = Vocabulary(weight, bias, scaling), asked.vocabulary(weight)
        for part in chunks(len(hidden), chunk_rows):
            logits = projection.logits(hidden[part], len(weight))
            log_probs = torch.log_softmax(_at(logits, temperature), dim=-1)
            logps[part] = log_probs.gather(1, targets[part, None]).squeeze(1)
            del log_probs
            values[part] = asked.call(logits[:, :common], *asked.given(part, common))
            del logits  # or it would stand beside the next chunk's
        return logps, values

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, targets = ctx.saved_tensors
        of_logps, of_values = grads
        asked: Asked = ctx.asked
        projection, common = Vocabulary(weight, bias, ctx.scaling), asked.vocabulary(weight)
        factor = ctx.scaling.cast(weight)
        hidden_grad = torch.zeros_like(hidden)
        weight_grad = torch.zeros_like(weight, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        bias_grad = torch.zeros_like(bias, dtype=torch.float32) if ctx.needs_input_grad[2] else None
        for part in chunks(len(hidden), ctx.chunk_rows):
            logits = projection.logits(hidden[part], len(weight))
            grad = None
            if of_values is not None:
                given = asked.given(part, common)
                grad = _gradient(asked.call, logits[:, :common], given, of_values[part])
                grad = F.pad(grad, (0, len(weight) - common)) if common < len(weight) else grad
                del given
            if of_logps is not None:
                own = _logps_gradient(_at(logits, ctx.temperature), targets[part], of_logps[part] / ctx.temperature)
                grad = own if grad is None else grad.add_(own)
            assert grad is not None, "autograd asks for the gradient of something"
            grad = ctx.scaling.backward_(grad, logits).to(factor.dtype)
            hidden_grad[part] = grad @ factor
            if weight_grad is not None:
                add_product(weight_grad, grad.t(), hidden[part].to(grad.dtype))
            if bias_grad is not None:
                bias_grad += grad.sum(0, dtype=torch.float32)
            del logits, grad  # or they would stand beside the next chunk's
        of_weights = [
            None if found is None else found.to(like.dtype)
            for found, like in ((weight_grad, weight), (bias_grad, bias))
        ]
        return hidden_grad, *of_weights, None, None, None, None, None


def _at(logits: Tensor, temperature: float) -> Tensor:
    return logits if temperature == 1.0 else logits / temperature


def _logps_gradient(scaled: Tensor, targets: Tensor, grad: Tensor) -> Tensor:
    """[n, V], a tensor of our own: of the log-probabilities of `targets` with respect to the logits at the temperature,
    times `grad` [n]."""
    own = torch.softmax(scaled, dim=-1).mul_(-grad[:, None])
    return own.scatter_add_(1, targets[:, None], grad[:, None])


def _gradient(call: Callable[..., Tensor], logits: Tensor, given: list[Tensor], grad: Tensor) -> Tensor:
    """[n, V], a tensor of our own: of the call's values with respect to the logits, times `grad`, which is of their
    shape."""
    with torch.enable_grad():
        leaf = logits.detach().requires_grad_()
        return torch.autograd.grad(call(leaf, *given), leaf, grad)[0].contiguous()

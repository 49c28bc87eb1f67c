"""From hidden states to token quantities, without ever holding the logits of all tokens.

The vocabulary projection is chunked over tokens: at its peak one chunk of logits exists. The gradient recomputes each
chunk's logits, except where a single chunk holds everything; then its log-probabilities are kept.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from actors.distributions import Asked, TopK, most_likely, of_logits
from actors.logits import LogitScaling, Vocabulary, add_product, chunk_logits, chunks
from actors.objective import DIVERGENCE, EXTRAS

OUTSIDE = -1e30  # a logit
NEEDS = frozenset({*EXTRAS, "entropy_grad"})


@dataclass(frozen=True)
class Projection:
    """What to compute from a projection onto the vocabulary, and in pieces of how many rows."""

    scaling: LogitScaling
    temperature: float
    needs: frozenset[str]
    chunk_rows: int
    fused: bool = False  # where kernels of our own can compute it, they do

    def __post_init__(self) -> None:
        if unknown := sorted(self.needs - NEEDS):
            raise ValueError(f"unknown token quantities {unknown}; there are {sorted(NEEDS)}")
        if self.temperature <= 0:
            raise ValueError(f"log-probabilities need a temperature above 0, got {self.temperature:g}")

    @property
    def extras(self) -> tuple[str, ...]:
        wanted = self.needs | {"entropy"} if "entropy_grad" in self.needs else self.needs
        return tuple(name for name in EXTRAS if name in wanted)

    @property
    def with_gradient(self) -> frozenset[str]:
        """Of the extras, those that carry a gradient."""
        return frozenset({"mean_logps", *(["entropy"] if "entropy_grad" in self.needs else [])})

    def chunks(self, rows: int) -> Iterator[slice]:
        return chunks(rows, self.chunk_rows)

    def by_kernels(self, hidden: Tensor) -> bool:
        """True if `actors/head_kernels.py` computes all that is needed."""
        return self.fused and hidden.is_cuda and not self.needs and self.scaling.changes_nothing

    def keeps_log_probs(self, rows: int) -> bool:
        """True if the gradient needs no second projection: one chunk holds all, and its log-probabilities suffice."""
        return rows <= self.chunk_rows and self.scaling.softcap is None

    def logits(self, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """[n, V]: what the model itself would put out, a tensor of our own; float32 if anything is made of it here,
        else as the product comes."""
        logits = self.scaling.product(hidden, weight, bias)
        return logits if self.scaling.changes_nothing else self.scaling.apply_(logits.float())

    def log_probs(self, logits: Tensor, admitted: Tensor | None) -> Tensor:
        """[n, V] float32."""
        return torch.log_softmax(self._limited(logits, admitted), dim=-1, dtype=torch.float32)

    def probs(self, logits: Tensor, admitted: Tensor | None) -> Tensor:
        """[n, V] float32."""
        return torch.softmax(self._limited(logits, admitted), dim=-1, dtype=torch.float32)

    def _limited(self, logits: Tensor, admitted: Tensor | None) -> Tensor:
        """At the temperature, and over the admitted tokens alone."""
        logits = logits if self.temperature == 1.0 else logits.float() / self.temperature
        return logits if admitted is None else restricted(logits.float(), admitted)


def restricted(logits: Tensor, admitted: Tensor) -> Tensor:
    """[n, V]: far below all others outside the `admitted` tokens [n, k] (-1 fills up), so that their probability is 0.
    A row of -1 alone admits all. Not minus infinity: times a probability of 0 that is no number."""
    vocabulary = logits.shape[1]
    ids = torch.where(admitted < 0, vocabulary, admitted).long()
    inside = torch.zeros(len(logits), vocabulary + 1, dtype=torch.bool, device=logits.device).scatter_(1, ids, True)
    return logits.masked_fill(~(inside[:, :vocabulary] | (admitted < 0).all(1, keepdim=True)), OUTSIDE)


class _LogProbs(torch.autograd.Function):
    """`logps` [N] float32 on a GPU. Of a single chunk the logits are kept, and become their gradient in place."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, projection: Projection
    ) -> Tensor:
        from actors.head_kernels import log_probs_of

        logps, normalisers = (hidden.new_empty(len(hidden), dtype=torch.float32) for _ in range(2))
        parts = list(projection.chunks(len(hidden)))
        ctx.logits = None
        for part in parts:
            logits = projection.logits(hidden[part], weight, bias)
            logps[part], normalisers[part] = log_probs_of(logits, targets[part], projection.temperature)
            ctx.logits = logits if len(parts) == 1 and any(ctx.needs_input_grad) else None
            del logits  # or it would stand beside the next chunk's
        ctx.projection = projection
        ctx.save_for_backward(hidden, weight, bias, targets, normalisers)
        return logps

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        from actors.head_kernels import gradient_of_logits_

        hidden, weight, bias, targets, normalisers = ctx.saved_tensors
        projection: Projection = ctx.projection
        sums = _Gradients(ctx.needs_input_grad, hidden, weight, bias, projection)
        for part in sums.parts:
            logits = projection.logits(hidden[part], sums.factor, bias) if ctx.logits is None else ctx.logits
            ctx.logits = None
            sums.add(
                part, gradient_of_logits_(logits, targets[part], grad[part], normalisers[part], projection.temperature)
            )
            del logits  # or it would stand beside the next chunk's
        return *sums.found(), None, None


class _TokenQuantities(torch.autograd.Function):
    """(logps, *extras), each [N] float32. Gradients for `logps` and, with `entropy_grad`, for the entropy."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        admitted: Tensor | None,
        projection: Projection,
    ) -> tuple[Tensor, ...]:
        outputs = [hidden.new_empty(len(hidden), dtype=torch.float32) for _ in ("logps", *projection.extras)]
        keeps = projection.keeps_log_probs(len(hidden)) and any(ctx.needs_input_grad)
        ctx.log_probs = None
        for part in projection.chunks(len(hidden)):
            chunk = hidden[part], weight, bias, targets[part], None if admitted is None else admitted[part]
            log_probs = _measure(*chunk, projection, [o[part] for o in outputs])
            ctx.log_probs = log_probs if keeps else None
            del log_probs  # or it would stand beside the next chunk's
        graded = projection.with_gradient
        ctx.mark_non_differentiable(*(o for o, name in zip(outputs[1:], projection.extras) if name not in graded))
        ctx.projection = projection
        ctx.save_for_backward(hidden, weight, bias, targets, admitted, outputs[1] if "entropy" in graded else None)
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, targets, admitted, entropy = ctx.saved_tensors
        projection: Projection = ctx.projection
        graded = {"logps", *projection.with_gradient}
        given = {name: grad for name, grad in zip(("logps", *projection.extras), grads, strict=True) if name in graded}
        sums = _Gradients(ctx.needs_input_grad, hidden, weight, bias, projection)
        for part in sums.parts:
            limit = None if admitted is None else admitted[part]
            spread = None if entropy is None else entropy[part]
            grads_here = {name: grad[part] for name, grad in given.items()}
            chunk = hidden[part], sums.factor, bias, targets[part], limit, spread
            grad = _logits_gradient(*chunk, grads_here, projection, ctx.log_probs)
            sums.add(part, grad)
            del grad  # or it would stand beside the next chunk's
        return *sums.found(), None, None, None


class _Gradients:
    """Gradients of states, weight and bias, from those of the logits chunk by chunk. The chunks' products are summed in
    float32; a single one is the weight's gradient already."""

    def __init__(
        self, needed: tuple[bool, ...], hidden: Tensor, weight: Tensor, bias: Tensor | None, projection: Projection
    ) -> None:
        factor = projection.scaling.cast(weight)
        assert factor is not None
        self.parts, self.factor = list(projection.chunks(len(hidden))), factor
        self._hidden, self._weight, self._bias = hidden, weight, bias
        self._of_hidden = torch.zeros_like(hidden)
        dtype = factor.dtype if len(self.parts) == 1 else torch.float32
        self._of_weight = torch.zeros_like(weight, dtype=dtype) if needed[1] else None
        self._of_bias = torch.zeros_like(bias, dtype=torch.float32) if bias is not None and needed[2] else None

    def add(self, part: slice, grad: Tensor) -> None:
        """`grad` [n, V], in the dtype of the factor."""
        self._of_hidden[part] = grad @ self.factor
        if self._of_weight is not None and len(self.parts) == 1:
            torch.mm(grad.t(), self._hidden.to(grad.dtype), out=self._of_weight)
        elif self._of_weight is not None:
            add_product(self._of_weight, grad.t(), self._hidden[part].to(grad.dtype))
        if self._of_bias is not None:
            self._of_bias += grad.sum(0, dtype=torch.float32)

    def found(self) -> tuple[Tensor | None, ...]:
        return self._of_hidden, _cast(self._of_weight, self._weight), _cast(self._of_bias, self._bias)


def _measure(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    admitted: Tensor | None,
    projection: Projection,
    outputs: list[Tensor],
) -> Tensor:
    """Fill the outputs of one chunk; its log-probabilities. Logits do not outlive the call."""
    logits = projection.logits(hidden, weight, bias)
    log_probs = projection.log_probs(logits, admitted)
    outputs[0].copy_(log_probs.gather(1, targets[:, None]).squeeze(1))
    for output, name in zip(outputs[1:], projection.extras, strict=True):
        output.copy_(_extra(name, log_probs, logits, outputs[0], projection))
    return log_probs


def _logits_gradient(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    admitted: Tensor | None,
    entropy: Tensor | None,
    grads: Mapping[str, Tensor],
    projection: Projection,
    log_probs: Tensor | None,
) -> Tensor:
    """[n, V] in the dtype of `weight`: the gradient of one chunk's logits, before scaling. `log_probs`: if kept."""
    logits = projection.logits(hidden, weight, bias) if log_probs is None else None
    if grads.keys() == {"logps"} and projection.scaling.changes_nothing:
        probs = projection.probs(logits, admitted) if log_probs is None else log_probs.exp()  # pyright: ignore[reportArgumentType]
        del logits  # not read any more: free the memory
        return _logps_gradient(probs, targets, grads["logps"] / projection.temperature, weight.dtype)
    if log_probs is None:
        assert logits is not None
        log_probs = projection.log_probs(logits, admitted)
        logits = logits if projection.scaling.softcap is not None else None
    grad = _logps_gradient(log_probs.exp(), targets, grads["logps"], torch.float32)
    if entropy is not None:
        grad -= log_probs.exp() * (log_probs + entropy[:, None]) * grads["entropy"][:, None]
    if "mean_logps" in grads:
        grad += grads["mean_logps"][:, None] * (1 / log_probs.shape[1] - log_probs.exp())
    return projection.scaling.backward_(grad.div_(projection.temperature), logits).to(weight.dtype)


def _extra(name: str, log_probs: Tensor, logits: Tensor, logps: Tensor, projection: Projection) -> Tensor:
    match name:
        case "entropy":
            return -(log_probs.exp() * log_probs).sum(-1)
        case "mean_logps":
            return log_probs.mean(-1)
        case "log_sum_sq_probs":
            return torch.logsumexp(2 * log_probs, dim=-1)
        case "mean_logits":
            return logits.mean(-1, dtype=torch.float32) / projection.temperature
        case "is_top1":
            return (logps >= log_probs.amax(-1)).float()
        case _:
            raise ValueError(f"no such token quantity: {name}")


def _logps_gradient(probs: Tensor, targets: Tensor, grad: Tensor, dtype: torch.dtype) -> Tensor:
    """d logps / d logits, times `grad`: grad * (onehot - softmax), rounded once to `dtype`. May overwrite `probs`."""
    at_target = grad * (1 - probs.gather(1, targets[:, None]).squeeze(1))
    logits_grad = probs if dtype == probs.dtype else torch.empty_like(probs, dtype=dtype)
    torch.mul(probs, -grad[:, None], out=logits_grad)
    return logits_grad.scatter_(1, targets[:, None], at_target.to(dtype)[:, None])


def _cast(grad: Tensor | None, like: Tensor | None) -> Tensor | None:
    return None if grad is None or like is None else grad.to(like.dtype)


class VocabularyHead(nn.Module):
    """The model's own vocabulary projection, asked for token quantities instead of logits.

    It holds the *same* parameters as the model's `lm_head` under its own name, so that a backend which partitions
    parameters gathers them around its forward and backward like any other module's.
    """

    def __init__(self, lm_head: Any, scaling: LogitScaling) -> None:
        super().__init__()
        self.weight: nn.Parameter = lm_head.weight
        self.bias: nn.Parameter | None = getattr(lm_head, "bias", None)
        self.scaling = scaling
        self.fused = False

    @property
    def projection(self) -> Vocabulary:
        return Vocabulary(self.weight, self.bias, self.scaling)

    def forward(
        self,
        hidden: Tensor,
        targets: Tensor,
        temperature: float,
        needs: frozenset[str],
        chunk_rows: int | None,
        asked: Asked | TopK | None = None,
        admitted: Tensor | None = None,
    ) -> Mapping[str, Tensor]:
        """`hidden` [N, H] and the tokens [N] that they are to predict -> `main`, their log-probabilities, what `needs`
        names, and as `divergence` what is `asked`, each [N]. Asked for a `TopK`: what `most_likely` finds. `admitted`
        [N, k]: of each distribution, the tokens that it is restricted to (`restricted`); not for what is `asked`."""
        if isinstance(asked, TopK):
            return most_likely(self.projection, hidden, targets, asked, chunk_rows)
        if asked is not None and not needs and admitted is None:  # all of it comes from the same logits
            logps, values = of_logits(self.projection, hidden, targets, asked, temperature, chunk_rows)
            return {"main": logps, DIVERGENCE: values}
        rows = chunk_rows or max(1, chunk_logits(self.weight.device) // self.weight.shape[0])
        projection = Projection(self.scaling, temperature, needs, rows, self.fused)
        if projection.by_kernels(hidden) and admitted is None:
            outputs = (_LogProbs.apply(hidden, self.weight, self.bias, targets, projection),)
        else:
            outputs = _TokenQuantities.apply(hidden, self.weight, self.bias, targets, admitted, projection)
        found = dict(zip(("main", *projection.extras), outputs, strict=True))
        if asked is not None:
            found[DIVERGENCE] = of_logits(self.projection, hidden, targets, asked, temperature, chunk_rows)[1]
        return found


class ScalarHead(nn.Module):
    """A model's own projection to one number (`score` of its Hugging Face classes), in float32."""

    def __init__(self, score: Any) -> None:
        super().__init__()
        self.weight: nn.Parameter = score.weight
        self.bias: nn.Parameter | None = getattr(score, "bias", None)

    def forward(self, hidden: Tensor) -> Tensor:
        """[N, H] -> [N]."""
        bias = None if self.bias is None else self.bias.float()
        return F.linear(hidden.float(), self.weight.float(), bias).squeeze(-1)

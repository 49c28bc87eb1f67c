"""Kernels for the vocabulary head on a GPU, in Triton: what torch does in several passes over float32 copies of the
logits, in one pass over the logits as the matrix product leaves them.

    forward    reads each logit once                  -> log-probability of the target, log of the normaliser
    backward   reads each logit once, overwrites it   -> gradient of the logit

Only for what most losses ask for: log-probabilities of given tokens. `actors/heads.py` has the rest, and the same
computation in torch's operations.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
import triton  # pyright: ignore[reportMissingImports]: it comes with a torch for CUDA
import triton.language as tl  # pyright: ignore[reportMissingImports]
from torch import Tensor

jit = cast(Callable[..., Any], triton.jit)  # what it makes is called with a grid in brackets
BLOCK = 8192  # logits that a program holds at a time


@jit
def _normalise(logits, stride, targets, logps, normalisers, vocabulary, scale, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    start = logits + row * stride
    largest = -float("inf")
    total = 0.0
    for first in range(0, vocabulary, BLOCK):
        index = first + tl.arange(0, BLOCK)
        values = tl.load(start + index, mask=index < vocabulary, other=-float("inf")).to(tl.float32) * scale
        above = tl.maximum(largest, tl.max(values, 0))
        total = total * tl.exp(largest - above) + tl.sum(tl.exp(values - above), 0)
        largest = above
    normaliser = largest + tl.log(total)
    target = tl.load(targets + row)
    tl.store(logps + row, tl.load(start + target).to(tl.float32) * scale - normaliser)
    tl.store(normalisers + row, normaliser)


@jit
def _differentiate(logits, stride, targets, grads, normalisers, vocabulary, scale, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    index = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    place = logits + row * stride + index
    values = tl.load(place, mask=index < vocabulary, other=0.0).to(tl.float32) * scale
    probs = tl.exp(values - tl.load(normalisers + row))
    hit = tl.where(index == tl.load(targets + row), 1.0, 0.0)
    grad = tl.load(grads + row) * scale * (hit - probs)
    tl.store(place, grad.to(logits.dtype.element_ty), mask=index < vocabulary)


def log_probs_of(logits: Tensor, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """`logits` [n, V], rows contiguous, and tokens [n] -> their log-probabilities [n] float32 at the temperature, and
    the logarithm of each row's normaliser [n] float32. Sums are in float32."""
    rows, vocabulary = logits.shape
    logps, normalisers = (logits.new_empty(rows, dtype=torch.float32) for _ in range(2))
    _normalise[(rows,)](
        logits, logits.stride(0), targets, logps, normalisers, vocabulary, 1 / temperature, BLOCK=BLOCK, num_warps=16
    )
    return logps, normalisers


def gradient_of_logits_(
    logits: Tensor, targets: Tensor, grads: Tensor, normalisers: Tensor, temperature: float
) -> Tensor:
    """In place: the gradient of `logits` [n, V], given that of the log-probabilities [n] float32. Rounded once."""
    rows, vocabulary = logits.shape
    _differentiate[(rows, triton.cdiv(vocabulary, BLOCK))](
        logits, logits.stride(0), targets, grads.contiguous(), normalisers, vocabulary, 1 / temperature, BLOCK=BLOCK,
        num_warps=16,
    )  # fmt: skip
    return logits

"""Kernels for a model's layers on a GPU, in Triton: rotary positions and gated activations, one launch each way.

A small micro-batch leaves a GPU waiting for launches, so what counts is their number and what Python does for each.
Everything is computed in float32 and rounded once. `actors/fused_kernels.py` puts them into models.

First derivatives only, and of a graph only once through an activation: all else is refused.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
import triton  # pyright: ignore[reportMissingImports]: it comes with a torch for CUDA
import triton.language as tl  # pyright: ignore[reportMissingImports]
from torch import Tensor

jit = cast(Callable[..., Any], triton.jit)  # what it makes is called with a grid in brackets
BLOCK = 2048  # values that a program of the activation computes
SILU, GELU_TANH = 0, 1  # both are x * sigmoid(z(x))


@jit
def _rotate_heads(
    source, token_stride, head_stride, target, heads, cos1, sin1, cos2, sin2,
    HALF: tl.constexpr, HALVES: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    """The heads of one token; `target` is [T, heads, 2 * HALF]. HALVES and HEADS: the next powers of two."""
    token = tl.program_id(0).to(tl.int64)
    head, index = tl.arange(0, HEADS)[:, None], tl.arange(0, HALVES)[None, :]
    inside = (head < heads) & (index < HALF)
    place = source + token * token_stride + head * head_stride + index
    first = tl.load(place, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(place + HALF, mask=inside, other=0.0).to(tl.float32)
    place = target + (token * heads + head) * (2 * HALF) + index
    tl.store(place, (first * cos1 - second * sin1).to(target.dtype.element_ty), mask=inside)
    tl.store(place + HALF, (second * cos2 + first * sin2).to(target.dtype.element_ty), mask=inside)


@jit
def _rotate(
    queries, query_token, query_head, rotated_queries, query_heads,
    keys, key_token, key_head, rotated_keys, key_heads, cosines, sines,
    BACKWARD: tl.constexpr, HALF: tl.constexpr, HALVES: tl.constexpr,
    QUERY_HEADS: tl.constexpr, KEY_HEADS: tl.constexpr,
):  # fmt: skip
    index = tl.arange(0, HALVES)[None, :]
    place = tl.program_id(0).to(tl.int64) * (2 * HALF) + index
    cos1 = tl.load(cosines + place, mask=index < HALF, other=0.0).to(tl.float32)
    cos2 = tl.load(cosines + place + HALF, mask=index < HALF, other=0.0).to(tl.float32)
    sin1 = tl.load(sines + place, mask=index < HALF, other=0.0).to(tl.float32)
    sin2 = tl.load(sines + place + HALF, mask=index < HALF, other=0.0).to(tl.float32)
    if BACKWARD:  # the transposed rotation
        sin1, sin2 = -sin2, -sin1
    _rotate_heads(
        queries, query_token, query_head, rotated_queries, query_heads, cos1, sin1, cos2, sin2,
        HALF, HALVES, QUERY_HEADS,
    )  # fmt: skip
    _rotate_heads(
        keys, key_token, key_head, rotated_keys, key_heads, cos1, sin1, cos2, sin2, HALF, HALVES, KEY_HEADS
    )  # fmt: skip


class _Rotation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(cos, sin)
        return _rotated(query, key, cos, sin, backward=False)

    @staticmethod
    def backward(ctx: Any, of_query: Tensor, of_key: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        _refuse_second_derivative("rotary positions")
        return *_rotated(of_query, of_key, *ctx.saved_tensors, backward=True), None, None


def rotate(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """`query` [1, heads, T, d] and `key` with its own heads, at the positions whose `cos` and `sin` are [1, T, d] ->
    x * cos + rotate_half(x) * sin of each, in the same shapes, where rotate_half((a, b)) is (-b, a)."""
    return cast(tuple[Tensor, Tensor], _Rotation.apply(query, key, cos, sin))


def _rotated(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, *, backward: bool) -> tuple[Tensor, Tensor]:
    query, key = (each if each.stride(3) == 1 else each.contiguous() for each in (query, key))
    _, query_heads, tokens, size = query.shape
    key_heads = key.shape[1]
    rotated_query, rotated_key = query.new_empty(tokens, query_heads, size), key.new_empty(tokens, key_heads, size)
    _rotate[(tokens,)](
        query, query.stride(2), query.stride(1), rotated_query, query_heads,
        key, key.stride(2), key.stride(1), rotated_key, key_heads, cos, sin,
        BACKWARD=backward, HALF=size // 2, HALVES=_power_of_two(size // 2),
        QUERY_HEADS=_power_of_two(query_heads), KEY_HEADS=_power_of_two(key_heads),
    )  # fmt: skip
    return rotated_query.transpose(0, 1)[None], rotated_key.transpose(0, 1)[None]


def _power_of_two(least: int) -> int:
    return 1 << (least - 1).bit_length()


def _refuse_second_derivative(kernel: str) -> None:
    """To be called in a backward pass. Autograd cannot differentiate what a kernel of ours computes there, and would
    take it for constant."""
    if torch.is_grad_enabled():  # only with create_graph=True
        raise RuntimeError(
            f"the kernel for {kernel} has no second derivative, and a backward pass was called with create_graph=True: "
            "call it without, or set model.fused_kernels to false"
        )


@jit
def _sigmoid_and_slope(x, ACTIVATION: tl.constexpr):
    """sigmoid(z(x)), and the derivative of z."""
    if ACTIVATION == 0:
        z = x
        slope = tl.full(x.shape, 1.0, tl.float32)
    else:  # gelu by tanh: 0.5 * (1 + tanh(y)) is sigmoid(2 * y)
        z = 1.5957691216057308 * (x + 0.044715 * x * x * x)
        slope = 1.5957691216057308 * (1 + 0.134145 * x * x)
    return 1 / (1 + tl.exp(-z)), slope


@jit
def _gate(gates, ups, outputs, count, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr):
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(gates + index, mask=index < count, other=0.0).to(tl.float32)
    up = tl.load(ups + index, mask=index < count, other=0.0).to(tl.float32)
    sigmoid, _ = _sigmoid_and_slope(x, ACTIVATION)
    tl.store(outputs + index, (x * sigmoid * up).to(outputs.dtype.element_ty), mask=index < count)


@jit
def _gate_backward_(grads, gates, ups, count, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr):
    """Overwrites `gates` and `ups` with their gradients."""
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    grad = tl.load(grads + index, mask=index < count, other=0.0).to(tl.float32)
    x = tl.load(gates + index, mask=index < count, other=0.0).to(tl.float32)
    up = tl.load(ups + index, mask=index < count, other=0.0).to(tl.float32)
    sigmoid, slope = _sigmoid_and_slope(x, ACTIVATION)
    of_gate = grad * up * sigmoid * (1 + x * (1 - sigmoid) * slope)
    tl.store(gates + index, of_gate.to(gates.dtype.element_ty), mask=index < count)
    tl.store(ups + index, (grad * x * sigmoid).to(ups.dtype.element_ty), mask=index < count)


class _Gated(torch.autograd.Function):
    """Nothing but this reads its inputs, which two matrix products have made, so their memory takes the gradients."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, activation: int) -> Tensor:
        gate, up = gate.contiguous(), up.contiguous()
        ctx.save_for_backward(gate, up)
        ctx.activation, ctx.overwritten = activation, False
        outputs = torch.empty_like(gate)
        _gate[_programs(gate)](gate, up, outputs, gate.numel(), ACTIVATION=activation, BLOCK=BLOCK)
        return outputs

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        _refuse_second_derivative("gated activations")
        if ctx.overwritten:
            raise RuntimeError(
                "a second backward pass through the same graph: the first wrote the gradients of a gated activation "
                "over its inputs. Compute the forward pass again, or set model.fused_kernels to false"
            )
        gate, up = ctx.saved_tensors
        ctx.overwritten = True
        arguments = (grad.contiguous(), gate, up, gate.numel())
        _gate_backward_[_programs(gate)](*arguments, ACTIVATION=ctx.activation, BLOCK=BLOCK)
        for changed in (gate, up):  # autograd does not see what a kernel writes; who else kept them now gets an error
            torch.autograd.graph.increment_version(changed)
        return gate, up, None


def _programs(values: Tensor) -> tuple[int]:
    return (-(-values.numel() // BLOCK),)


def gated(gate: Tensor, up: Tensor, activation: int) -> Tensor:
    """activation(gate) * up, all of one shape. The backward pass overwrites `gate` and `up`, so there can be only one:
    the second raises RuntimeError."""
    return cast(Tensor, _Gated.apply(gate, up, activation))

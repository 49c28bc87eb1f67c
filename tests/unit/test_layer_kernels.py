"""The kernels of `actors/layer_kernels.py` as parts of a graph: how often, and how deep, it can be differentiated. On a
CPU: triton is replaced, and each kernel by what it computes, in torch's operations; `tests/gpu` has the kernels."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint


def gate(gates: Tensor, ups: Tensor, outputs: Tensor, count: int, **_: Any) -> None:
    outputs.copy_(F.silu(gates) * ups)


def gate_backward_(grads: Tensor, gates: Tensor, ups: Tensor, count: int, **_: Any) -> None:
    """As a kernel writes: autograd's count of changes stays what it was."""
    with torch.enable_grad():
        given = gates.detach().clone().requires_grad_(), ups.detach().clone().requires_grad_()
        found = torch.autograd.grad(F.silu(given[0]) * given[1], given, grads)
    gates.data.copy_(found[0])
    ups.data.copy_(found[1])


def rotate(*arguments: Any, BACKWARD: bool, **_: Any) -> None:
    queries, _, _, rotated_queries, _, keys, _, _, rotated_keys, _, cos, sin = arguments
    for states, rotated in ((queries, rotated_queries), (keys, rotated_keys)):
        first, second = states.chunk(2, -1)
        cos1, cos2, sin1, sin2 = *cos[:, None].chunk(2, -1), *sin[:, None].chunk(2, -1)
        if BACKWARD:
            sin1, sin2 = -sin2, -sin1
        found = torch.cat((first * cos1 - second * sin1, second * cos2 + first * sin2), -1)
        rotated.copy_(found[0].transpose(0, 1))


COMPUTED = {"_gate": gate, "_gate_backward_": gate_backward_, "_rotate": rotate}


class Launched:
    """What `triton.jit` makes of a kernel: called with a grid in brackets."""

    def __init__(self, kernel: Callable[..., Any]) -> None:
        self.name = kernel.__name__

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return COMPUTED[self.name]


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    triton: Any = ModuleType("triton")
    triton.jit, triton.language = Launched, ModuleType("triton.language")
    monkeypatch.delitem(sys.modules, "actors.layer_kernels", raising=False)
    with monkeypatch.context() as during_import:  # torch, too, looks for triton
        during_import.setitem(sys.modules, "triton", triton)
        during_import.setitem(sys.modules, "triton.language", triton.language)
        found = importlib.import_module("actors.layer_kernels")
    yield found
    sys.modules.pop("actors.layer_kernels", None)


def products() -> tuple[list[Tensor], list[Tensor]]:
    """Two tensors, and two that are computed from them, which `gated` may overwrite."""
    generator = torch.Generator().manual_seed(0)
    own = [torch.randn(5, 8, generator=generator).requires_grad_() for _ in range(2)]
    return own, [each * 1 for each in own]


def test_a_gated_activation_has_its_gradient_once_and_the_second_backward_pass_is_refused(kernels: Any) -> None:
    own, (first, second) = products()
    given = torch.linspace(-1.0, 1.0, 40).view(5, 8)
    expected = torch.autograd.grad(F.silu(own[0]) * own[1], own, given)
    output = kernels.gated(first, second, kernels.SILU)
    for ours, theirs in zip(torch.autograd.grad(output, own, given, retain_graph=True), expected, strict=True):
        assert theirs.abs().max() > 0.1
        torch.testing.assert_close(ours, theirs)
    with pytest.raises(RuntimeError, match=r"(?s)a second backward pass.*Compute the forward pass again, or set model"):
        torch.autograd.grad(output, own, given)


def test_a_gated_activation_that_is_computed_again_for_the_backward_pass_has_the_same_gradient(kernels: Any) -> None:
    own, _ = products()

    def layer(first: Tensor, second: Tensor) -> Tensor:
        return kernels.gated(first * 1, second * 1, kernels.SILU)

    expected = torch.autograd.grad(layer(*own).square().sum(), own)
    found = torch.autograd.grad(checkpoint(layer, *own, use_reentrant=False).square().sum(), own)
    for ours, theirs in zip(found, expected, strict=True):
        assert theirs.abs().max() > 0.1
        torch.testing.assert_close(ours, theirs)


def test_who_else_kept_the_inputs_of_a_gated_activation_gets_an_error_and_not_their_gradients(kernels: Any) -> None:
    own, (first, second) = products()
    squared = first.square()  # keeps `first`
    kernels.gated(first, second, kernels.SILU).sum().backward()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        squared.sum().backward()
    assert own[1].grad is not None


def test_a_rotation_has_its_gradient_as_often_as_it_is_asked_for(kernels: Any) -> None:
    query, key = (torch.randn(1, heads, 3, 8, requires_grad=True) for heads in (4, 2))
    cos, sin = (torch.linspace(start, start + 1, 24).view(1, 3, 8) for start in (0.1, -0.8))

    def plain(states: Tensor) -> Tensor:
        first, second = states.chunk(2, -1)
        return states * cos[:, None] + torch.cat((-second, first), -1) * sin[:, None]

    rotated = kernels.rotate(query, key, cos, sin)
    expected = torch.autograd.grad(plain(query).square().sum() + plain(key).square().sum(), (query, key))
    loss = rotated[0].square().sum() + rotated[1].square().sum()
    for _ in range(2):
        for ours, theirs in zip(torch.autograd.grad(loss, (query, key), retain_graph=True), expected, strict=True):
            torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("kernel", ["gated activations", "rotary positions"])
def test_a_second_derivative_is_refused(kernels: Any, kernel: str) -> None:
    if kernel == "gated activations":
        inputs, arguments = products()
        output = kernels.gated(*arguments, kernels.SILU)
    else:
        inputs = [torch.randn(1, 2, 3, 8, requires_grad=True) for _ in range(2)]
        output = kernels.rotate(*inputs, *torch.randn(2, 1, 3, 8))[0]
    with pytest.raises(RuntimeError, match=rf"(?s){kernel} has no second derivative.*model\.fused_kernels to false"):
        torch.autograd.grad(output.sum(), inputs, create_graph=True)

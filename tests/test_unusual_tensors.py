"""Tensors whose memory does not hold their values, or that were changed between forward and backward."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import fastpeft
from fastpeft import four_bit, ops
from fastpeft.call import Weight
from fastpeft.functional import dora_linear, lora_linear

BACKENDS = ["cpu", "reference"]


def operands(N: int = 10) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``x [6, 16], W, A, B``, all but W learned."""
    x, W, A, B = torch.randn(6, 16), torch.randn(N, 16), torch.randn(3, 16), torch.randn(N, 3)
    return x.requires_grad_(), W, A.requires_grad_(), B.requires_grad_()


def plain(x: Tensor, W: Tensor, A: Tensor, B: Tensor) -> Tensor:
    return x @ W.t() + x @ A.t() @ B.t()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_gradient_that_is_zeros_without_memory(backend: str) -> None:
    x, W, A, B = operands()
    dy = torch._efficientzerotensor(6, 10)
    assert dy._is_zerotensor()
    grads = torch.autograd.grad(lora_linear(x, W, None, A, B, 1.0, backend=backend), (x, A, B), dy)
    assert all(torch.equal(grad, torch.zeros_like(grad)) for grad in grads)
    assert torch.equal(lora_linear(torch._efficientzerotensor(6, 16), W, None, A, B, 1.0), torch.zeros(6, 10))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("N", [1, 10])
def test_lazily_negated_tensors_have_their_sign(backend: str, N: int) -> None:
    def negated(t: Tensor) -> Tensor:
        lazy = torch._neg_view(-t.detach())
        assert lazy.is_neg() and torch.equal(lazy, t)
        return lazy

    x, W, A, B = operands(N)
    dy = torch.randn(6, N)
    y = lora_linear(x, W, None, A, B, 1.0, backend=backend)
    expected = [y, *torch.autograd.grad(y, (x, A, B), dy)]
    lazy = [negated(t).requires_grad_(t.requires_grad) for t in (x, W, A, B)]
    y = lora_linear(lazy[0], lazy[1], None, lazy[2], lazy[3], 1.0, backend=backend)
    found = [y, *torch.autograd.grad(y, (lazy[0], *lazy[2:]), negated(dy))]
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("which", range(4))
@pytest.mark.parametrize("learned", [(0, 2, 3), (2, 3)])
def test_data_replaced_by_less_raises(which: int, learned: tuple[int, ...]) -> None:
    tensors = operands()
    tensors[0].requires_grad_(0 in learned)
    x, W, A, B = tensors
    y = lora_linear(x, W, None, A, B, 1.0, backend="cpu")
    tensors[which].data = torch.zeros(1, 1)
    with pytest.raises(RuntimeError, match="must have"):
        torch.autograd.grad(y.sum(), [tensors[i] for i in learned])


def test_memory_that_was_freed_raises() -> None:
    x, W, A, B = operands()
    W.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match="its data was freed or replaced"):
        lora_linear(x, W, None, A, B, 1.0, backend="cpu")


@pytest.mark.parametrize("which", range(3))
def test_a_norm_of_memory_that_was_freed_raises(which: int) -> None:
    """Called by itself, and by a layer, which first looks whether anything changed."""
    W, A, B = tensors = torch.randn(64, 32), torch.randn(3, 32), torch.randn(64, 3)
    tensors[which].untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match="its data was freed or replaced"):
        ops.call_dora_norm(Weight.of(W), A, B, 1.0, torch.float32, "cpu")
    layer = fastpeft.nn.DoRALinear.from_linear(torch.nn.Linear(32, 64), r=3)
    (layer.weight, layer.lora_A, layer.lora_B)[which].untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match="its data was freed or replaced"):
        layer.weight_norm()


def test_a_norm_of_lazily_negated_tensors_has_their_sign() -> None:
    W, A, B = torch.randn(64, 32), torch.randn(3, 32), torch.randn(64, 3)
    lazy = [torch._neg_view(-t) for t in (W, A, B)]
    norms = [
        ops.call_dora_norm(Weight.of(w), a, b, 1.0, torch.float32, "cpu")
        for w, a, b in ((W, A, B), (lazy[0], A, lazy[2]))
    ]
    assert torch.equal(*norms)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_second_derivative_raises_where_unused_inputs_may_be_zeros(backend: str) -> None:
    x, W, A, B = operands()
    y = lora_linear(x, W, None, A, B, 1.0, backend=backend)
    (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    for t in (x, A, B):
        with pytest.raises(RuntimeError, match="once_differentiable"):
            torch.autograd.grad(dx.sum(), t, allow_unused=True, retain_graph=True)


@pytest.mark.parametrize("backend", BACKENDS)
def test_4_bit_statistics_changed_in_place_are_noticed(backend: str) -> None:
    x, _, A, B = operands()
    weight = four_bit.quantize(torch.randn(10, 16), nested=False)
    y = lora_linear(x, weight, None, A, B, 1.0, backend=backend)
    weight.absmax.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(y.sum(), x)


def test_a_tiny_dropout_takes_the_formula_of_dropout_everywhere() -> None:
    """Of several DoRA adapters, each adds to the base product where there is dropout, and follows the others where
    there is none."""
    x, W, *_ = operands()
    A, B = [torch.randn(3, 16) for _ in range(2)], [torch.randn(10, 3) for _ in range(2)]
    m = [torch.rand(10) + 1 for _ in range(2)]
    torch.manual_seed(1)
    by_cpu = dora_linear(x, W, None, A, B, m, 1.0, dropout_p=1e-7, backend="cpu")
    torch.manual_seed(1)
    torch.testing.assert_close(by_cpu, dora_linear(x, W, None, A, B, m, 1.0, dropout_p=1e-7, backend="reference"))

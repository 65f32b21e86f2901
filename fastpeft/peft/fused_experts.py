"""The forward of experts that PEFT adapts: tokens are sorted by expert once, go through both projections with the
adapters' factors as they are, and come back. No matrix of the adapted weights is made; experts in 4 bits are decoded
tile by tile."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from peft.tuners.lora.layer import ParamWrapper
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn.functional import one_hot
from transformers.integrations.moe import _grouped_linear

from ..checks import is_readable
from ..functional import dora_grouped_linear, lora_grouped_linear
from .experts import Experts, Projection, read_experts, wrappers_inside
from .experts_dora import GuardedParamWrapper, active_magnitudes
from .experts_four_bit import holds_four_bits
from .fused import Fused, is_plain_input
from .readers import dora_norm_of
from .stock import Stock

_STOCK = ("forward", "get_delta_weight", "get_delta_factors", "get_param")  # PEFT 0.18 has no factors


class FusedParamWrapper(Fused, GuardedParamWrapper):
    """``peft.tuners.lora.layer.ParamWrapper`` around experts of transformers', fused with the wrappers inside it."""

    fastpeft_dropout: float = 0.0
    peft_class = ParamWrapper
    stock = Stock(*((ParamWrapper, name) for name in _STOCK if hasattr(ParamWrapper, name)))

    @classmethod
    def read(cls, layer: Any) -> Experts | str:
        """What a call with the active adapters computes with, or why PEFT has to run it."""
        return read_experts(layer)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """What the experts make of ``x [T, K]`` with the indices and the weights of the chosen experts, ``[T, k]``
        each; from PEFT's own ``forward`` where the call cannot be fused."""
        experts = self.stock.replaced() or self.read(self)
        if isinstance(experts, str) or kwargs or not _are_tokens(experts, x, *args):
            return self._by_peft(x, *args, **kwargs)
        return self._run(experts, x, *args)

    def _by_peft(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        option = None if self.disable_adapters or self.merged else self._option()
        if option is not None:
            cannot = f"{option} cannot be: PEFT has to run a call"
        elif holds_four_bits(self.get_base_layer()) and any(map(_adapts, (self, *wrappers_inside(self)))):
            cannot = "PEFT cannot run LoRA on experts in 4 bits, and has to run a call"
        else:
            return super()._by_peft(x, *args, **kwargs)
        reason = self.operands_or_reason(self)
        raise RuntimeError(f"{cannot}, as {reason if isinstance(reason, str) else 'its arguments are others'}")

    def _option(self) -> str | None:
        """What is asked for that PEFT does not have."""
        if any(map(active_magnitudes, (self, *wrappers_inside(self)))):
            return "experts_dora"
        return f"experts_dropout={self.fastpeft_dropout}" if self.training and self.fastpeft_dropout else None

    def _run(self, experts: Experts, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        """A token's weights multiply what goes into the down projection, which is linear, and not what comes out: so
        neither that nor the gate's own tensors are kept for the backward pass."""
        module, up, down, as_grouped = experts
        count = up.weight.shape[0]
        if not is_readable(index):
            index, weights = _of_known_experts(index, weights, count)
        routing = _Routing.of(index, count)
        tokens = x.to(up.dtype) if as_grouped else x
        y = _ToExperts.apply(tokens, routing.order, routing.places)
        y = self._project(experts, up, y, routing)
        y = _weighted(module, y, weights.reshape(-1)[routing.order])
        y = self._project(experts, down._replace(bias=None), y, routing)
        result: Tensor = _ToTokens.apply(y, routing.order, routing.places)
        if down.bias is not None:
            chosen = one_hot(index, len(down.bias)).to(weights.dtype)
            shares = (weights.unsqueeze(1) @ chosen).squeeze(1)  # of each expert in each token, [T, E]
            result = result + shares @ down.bias.to(shares.dtype)
        return result.to(x.dtype)

    def _project(self, experts: Experts, projection: Projection, x: Tensor, routing: _Routing) -> Tensor:
        name, weight, _, bias, A, B, scaling, magnitude, adapters = projection
        if not experts.as_grouped:
            autocast: AbstractContextManager[Any] = nullcontext()
        else:
            autocast = torch.autocast(x.device.type, enabled=False)
        with autocast:
            if A:
                settings: dict[str, Any] = {"training": self.training, "backend": self.fastpeft_backend}
                settings["dropout_p"] = [self.fastpeft_dropout] * len(A)
                operands = x, routing.offsets, weight, bias, A, B
                if not magnitude:
                    return lora_grouped_linear(*operands, scaling, **settings)
                norm = [
                    dora_norm_of(self, f"{name}.{adapter}", weight, factors, len(x))
                    for adapter, factors in zip(adapters, zip(A, B, scaling, strict=True), strict=True)
                ]
                return dora_grouped_linear(*operands, magnitude, scaling, norm=norm, **settings)
            ends = routing.offsets[1:].to(torch.int32)
            biases = None if bias is None else bias[routing.experts]
            y: Tensor = _grouped_linear(x, weight.mT, offs=ends, bias=biases, is_transposed=True)
            return y


# PEFT finds its wrappers by this name when it adds an adapter; what is pickled goes by the qualified one.
FusedParamWrapper.__name__ = ParamWrapper.__name__


class _Routing(NamedTuple):
    """``S = T k`` choices of experts, sorted by expert.

    Attributes:
        experts: ``[S]``, ascending.
        order: ``[S]``, which choice each of these is: choice ``t k + j`` is the ``j``-th of token ``t``.
        places: ``[T, k]``, where each token's choices have come to be.
        offsets: ``[E + 1]``: expert ``e`` has the rows from ``offsets[e]`` on.
    """

    experts: Tensor
    order: Tensor
    places: Tensor
    offsets: Tensor

    @classmethod
    def of(cls, index: Tensor, count: int) -> _Routing:
        """Of ``index [T, k]`` into ``count`` experts. The same in each run: equal experts keep their order."""
        experts, order = index.reshape(-1).sort(stable=True)
        places = torch.empty_like(order)
        places[order] = torch.arange(order.numel(), device=order.device)
        bounds = torch.arange(count + 1, device=order.device, dtype=experts.dtype)
        return cls(experts, order, places.view(index.shape), torch.searchsorted(experts, bounds))


class _ToExperts(Function):
    """Each token's row once for each of its experts, ``[T, K]`` to ``[S, K]``. Its gradient adds up a token's rows in
    an order that does not change, which an index's own does not promise."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, places: Tensor) -> Tensor:
        ctx.save_for_backward(places)
        return x[order // places.shape[1]]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        (places,) = ctx.saved_tensors
        return dy[places].sum(1), None, None


class _ToTokens(Function):
    """The way back, the sum of each token's rows: ``[S, N]`` to ``[T, N]``."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, order: Tensor, places: Tensor) -> Tensor:
        ctx.save_for_backward(order)
        ctx.per_token = places.shape[1]
        return y[places].sum(1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dx: Tensor) -> tuple[Tensor, None, None]:
        (order,) = ctx.saved_tensors
        return dx[order // ctx.per_token], None, None


def _weighted(module: Any, y: Tensor, weights: Tensor) -> Tensor:
    """The activation of the first projection's ``y [S, N]``, its gate with it, times ``weights [S]``."""
    if torch.compiler.is_compiling():  # a compiler chooses by itself what it keeps
        return (_activated(module, y) * weights.unsqueeze(1)).to(y.dtype)
    weighted: Tensor = _Weighted.apply(y, weights, module)
    return weighted


class _Weighted(Function):
    """:func:`_weighted`, for which ``y`` and the weights alone are kept: the rest takes less time to compute again than
    a product of its size."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, weights: Tensor, module: Any) -> Tensor:
        ctx.save_for_backward(y, weights)
        kind = y.device.type
        ctx.module, ctx.autocast = module, (kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind))
        return (_activated(module, y) * weights.unsqueeze(1)).to(y.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dz: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        y, weights = ctx.saved_tensors
        y = y.detach().requires_grad_(ctx.needs_input_grad[0])
        with torch.enable_grad(), torch.autocast(*ctx.autocast):
            active = _activated(ctx.module, y)
        dy = dweights = None
        if ctx.needs_input_grad[1]:
            dweights = (dz * active.detach()).sum(1).to(weights.dtype)
        if ctx.needs_input_grad[0]:
            (dy,) = torch.autograd.grad(active, y, (dz * weights.unsqueeze(1)).to(active.dtype))
        return dy, dweights, None


def _activated(module: Any, y: Tensor) -> Tensor:
    active: Tensor = module._apply_gate(y) if getattr(module, "has_gate", True) else module.act_fn(y)
    return active


def _of_known_experts(index: Tensor, weights: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The same, but what chooses none of ``count`` experts weighs nothing: so transformers marks the experts of other
    processes. Where indices can be read, PEFT runs such calls."""
    known = index.clamp(0, count - 1)
    return known, weights.masked_fill(index != known, 0)


def _adapts(wrapper: Any) -> bool:
    """Whether PEFT's forward would add an adapter to the parameter."""
    active = any(name in wrapper.lora_A for name in wrapper.active_adapters)
    return active and not (wrapper.disable_adapters or wrapper.merged)


def _are_tokens(experts: Experts, x: Any, *rest: Any) -> bool:
    """Whether the arguments are tokens, indices and weights as transformers' grouped experts take them."""
    if len(rest) != 2 or not all(isinstance(each, Tensor) for each in rest):
        return False
    index, weights = rest
    if not is_plain_input(x, x if experts.as_grouped else experts.up.no_tokens) or x.dim() != 2:
        return False
    if index.dim() != 2 or len(index) != len(x) or index.shape != weights.shape or index.dtype != torch.int64:
        return False
    if index.numel() == 0 or not is_readable(index):
        return index.shape[1] > 0
    least, most = (int(bound) for bound in index.aminmax())
    return least >= 0 and most < experts.up.weight.shape[0]

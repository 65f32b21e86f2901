"""LoRA and DoRA on embeddings, which look up rows of W and columns of A where others multiply by them.

Their base layer is called as it is. What PEFT takes long for is DoRA's norm, of columns as long as the vocabulary: it
makes all of ``W + s B A`` in each call. Here it is the norm of any other layer's, of ``Wᵀ [D, V]``, and kept alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from peft.tuners.lora.dora import DoraEmbeddingLayer
from peft.tuners.lora.layer import Embedding
from peft.tuners.lora.variants import DoraEmbeddingVariant
from torch import Tensor, nn
from torch.nn.functional import embedding

from ..call import Adapters
from ..dispatch import named
from ..functional import input_dtype
from ..reference import wide_dtype
from ..verdicts import backend_refusals, runner
from . import variants
from .base_layers import dense_reason
from .fused import Fused
from .operands import state_reason
from .readers import Adapter, dora_factor, factors_reason, is_constant, read_magnitude
from .stock import Stock

_DORA = Stock(
    (DoraEmbeddingVariant, "forward"), (DoraEmbeddingLayer, "forward"), (DoraEmbeddingLayer, "get_weight_norm")
)


class Lookup(NamedTuple):
    """What one call computes with: the layer with the rows, the active adapters, in PEFT's order, and what that layer
    multiplies its rows by (``embed_scale``), if anything."""

    base: Any
    adapters: Sequence[Adapter]
    scale: Tensor | None
    weight: Tensor | None  # Wᵀ, where DoRA's norm is taken of it

    def refusal(self, backend: str) -> str | None:
        """Why the backend of this name cannot take DoRA's norm, the one part that is a backend's."""
        if self.weight is None:
            return None
        adapters = Adapters([each.A for each in self.adapters], [each.B for each in self.adapters], [], [], [])
        return backend_refusals(self.weight, adapters)[named(backend).name]

    def verdict(self, backend: str | None) -> str:
        """What runs it, in words."""
        rows = "torch looks rows up and adds the adapters' part"
        return rows if self.weight is None else f"{rows}; {runner(backend)} takes DoRA's norm"


class FusedEmbedding(Fused, Embedding):
    """``peft.tuners.lora.layer.Embedding``, fused."""

    peft_class = Embedding
    stock = Stock((Embedding, "forward"))

    @classmethod
    def read(cls, layer: Any) -> Lookup | str:
        """What a call with the active adapters computes with, or why PEFT has to run it."""
        return read_lookup(layer)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """PEFT's result, ``[...]`` to ``[..., D]``; from PEFT's own ``forward`` where the call cannot be fused."""
        if args or kwargs:
            return self._by_peft(x, *args, **kwargs)
        lookup = self.stock.replaced() or self.read(self)
        if isinstance(lookup, str):
            return self._by_peft(x)
        base = lookup.base
        result: Tensor = self._modules["base_layer"](x)
        y = result
        for A, B, scaling, _, _, c in lookup.adapters:
            columns = embedding(x, A.T, base.padding_idx, None, 2.0, base.scale_grad_by_freq, base.sparse)
            u = columns.to(wide_dtype(A.dtype)) * scaling  # [..., r]
            if lookup.scale is not None:
                u = u * lookup.scale.to(u.dtype)
            if c is not None:  # c (y + u Bᵀ), by way of c B, which is small
                B = B * c.unsqueeze(1)
            added = u.to(input_dtype(B)) @ B.t()
            y = y + added if c is None else torch.addcmul(added, c, y)
        return y.to(result.dtype)


def read_lookup(layer: Any) -> Lookup | str:
    """What a call of a layer of PEFT's computes with, or why PEFT has to run it."""
    reason = state_reason(layer)
    if reason is not None:
        return reason
    if layer.__dict__.get("tp_layer") is not None:  # not every PEFT has it
        return "a tensor-parallel plan shares its rows out"
    base = layer.get_base_layer()
    if getattr(base, "max_norm", None) is not None:
        return "its base layer has a max_norm, by which each call changes the weights"
    scale = layer._get_embed_scale() if hasattr(base, "embed_scale") else None
    if scale is not None and not is_constant(scale):
        return "its base layer has an embed_scale that is not one constant number"
    found: list[Adapter] = []
    for name in layer.active_adapters:
        adapter = _read_adapter(layer, name, base)
        if isinstance(adapter, str):
            return f"its adapter {name!r} {adapter}"
        if adapter is not None:
            found.append(adapter)
    if not found:
        return "none of the active adapters is in this layer"
    is_dora = any(adapter.c is not None for adapter in found)
    return Lookup(base, found, scale, base.weight.t() if is_dora else None)


def _read_adapter(layer: Any, name: str, base: Any) -> Adapter | str | None:
    """As a :data:`fastpeft.peft.readers.Reader` does. PEFT drops nothing out here."""
    As, Bs = layer._modules["lora_embedding_A"], layer._modules["lora_embedding_B"]
    if not type(As) is type(Bs) is nn.ParameterDict:
        return "lies in containers that are wrapped"
    if name not in As:
        return None
    A: Any = As._parameters.get(name)
    B: Any = Bs._parameters.get(name)
    variant, scaling = layer.lora_variant.get(name), layer.scaling.get(name)
    is_dora = type(variant) is DoraEmbeddingVariant
    if variant is not None and not is_dora and variants.maker_of(variant) is None:
        return f"is a {type(variant).__name__}, neither LoRA nor DoRA"
    reason = factors_reason(layer, (A, B), None)
    if reason is None and not is_constant(scaling):
        reason = "has a scaling that is not one constant number"
    if reason is not None:
        return reason
    adapter = Adapter(A, B, scaling, 0.0)
    if not is_dora:
        return adapter
    c = _dora_factor(layer, name, base, adapter)
    return c if isinstance(c, str) else adapter._replace(c=c)


def _dora_factor(layer: Any, name: str, base: Any, adapter: Adapter) -> Tensor | str:
    """``c = m / ‖Wᵀ + s B A‖`` in the dtype that W and A promote to, as PEFT's, or why PEFT has to run the adapter."""
    weight: Any = base._parameters.get("weight")
    reason = "its base layer's weight is no Parameter" if weight is None else dense_reason(weight)
    if reason is not None:
        return f"has DoRA, and {reason}"
    dtype = torch.promote_types(weight.dtype, adapter.A.dtype)
    if dtype == torch.float64 != weight.dtype:
        return f"has DoRA, and is {dtype} where the base weight is {weight.dtype}"
    replaced = _DORA.replaced()
    if replaced is not None:
        return f"has DoRA, and {replaced}"
    magnitude = read_magnitude(layer, name, weight.device, DoraEmbeddingLayer)
    if isinstance(magnitude, str):
        return magnitude
    # As for one token: the weight's size says nothing of how long a call takes, and watching it all may take longer.
    return dora_factor(layer, name, weight.t(), adapter, magnitude, 1, dtype=dtype)

"""The arguments of an op under names: a weight, adapters, what the forward pass keeps, which gradients are needed. They
go from functional.py to the backends, and as the tuples that they are to C++ (csrc/call.h).

Torch's dispatcher knows flat lists of tensors and numbers alone: :meth:`ForwardCall.flat` and :meth:`ForwardCall.of`
are the way there and back, and this file the only one that knows the order.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .four_bit import FourBit, dequantize

_WEIGHT = "Tensor weight, Tensor[] quant, int blocksize"
_ADAPTERS = (
    "Tensor[] A, Tensor[] B, Tensor[] c, float[] scaling, float[] dropout_p, Tensor? seed, Tensor? adapter_index"
)
LORA_LINEAR_SCHEMA = (
    f"lora_linear(Tensor x, {_WEIGHT}, Tensor? bias, {_ADAPTERS}, bool keep_z, str? backend) "
    "-> (Tensor, Tensor, Tensor[])"
)
LORA_LINEAR_BACKWARD_SCHEMA = (
    f"lora_linear_backward(Tensor dy, Tensor? x, {_WEIGHT}, {_ADAPTERS}, Tensor? u, Tensor[] z, bool[] needs, "
    "str? backend) -> Tensor[]"
)
LORA_GROUPED_LINEAR_SCHEMA = (
    f"lora_grouped_linear(Tensor x, Tensor offsets, {_WEIGHT}, Tensor? bias, {_ADAPTERS}, bool keep_z, str? backend) "
    "-> (Tensor, Tensor, Tensor[])"
)
LORA_GROUPED_LINEAR_BACKWARD_SCHEMA = (
    f"lora_grouped_linear_backward(Tensor dy, Tensor? x, Tensor offsets, {_WEIGHT}, {_ADAPTERS}, Tensor? u, "
    "Tensor[] z, bool[] needs, str? backend) -> Tensor[]"
)
DORA_NORM_SCHEMA = f"dora_norm({_WEIGHT}, Tensor A, Tensor B, float scaling, ScalarType dtype, str? backend) -> Tensor"

ABSENT = -1  # the blocksize of a weight that there is not


def _all(some: Sequence[Tensor] | None) -> Sequence[Tensor]:
    """A list, which AOTInductor hands over as None where it is empty."""
    return [] if some is None else some


class Weight(NamedTuple):
    """``W [N, K]``, dense, in 4 bits, or absent: then the adapters' low-rank part is all that is computed. Of experts a
    stack ``[E, N, K]``, dense or in 4 bits.

    Attributes:
        data: ``[N, K]`` or the stack, any strides; of 4 bits the packed bytes, flat, or ``[1, bytes]`` where experts
            lie as ``[K, N]`` each; of an absent weight an element nobody reads.
        quant: empty; of 4 bits what :attr:`fastpeft.four_bit.FourBit.quant` says.
        blocksize: of 4 bits, elements that share a scale; :data:`ABSENT` of an absent weight.
    """

    data: Tensor
    quant: Sequence[Tensor]
    blocksize: int

    @classmethod
    def of(cls, weight: Tensor | FourBit) -> Weight:
        """What users give, as the ops take it."""
        if isinstance(weight, FourBit):
            packed = weight.packed if weight.packed.dim() == 1 else weight.packed.flatten()
            return cls(packed.unsqueeze(0) if weight.transposed else packed, weight.quant, weight.blocksize)
        return cls(weight, [], 0)

    @classmethod
    def none(cls, x: Tensor) -> Weight:
        """An absent one, beside an input ``x``."""
        return cls(x.new_empty(1), [], ABSENT)

    @property
    def is_absent(self) -> bool:
        """Whether there is no product with ``x``."""
        return self.blocksize == ABSENT

    @property
    def lies_transposed(self) -> bool:
        """Of experts in 4 bits, whether each lies as ``[K, N]``."""
        return self.data.dim() == 2

    def expert(self, e: int, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
        """One expert's ``[N, K]`` of a stack, ``shape``; of 4 bits decoded in ``dtype``."""
        if not self.quant:
            return self.data[e]
        N, K = shape
        lies = (K, N) if self.lies_transposed else (N, K)
        decoded = dequantize(self.data, self.quant, self.blocksize, lies, dtype, e * N * K)
        return decoded.t() if self.lies_transposed else decoded


class Adapters(NamedTuple):
    """The adapters of a call, one entry each.

    Attributes:
        A, B: ``[r, K]`` and ``[N, r]``; of experts stacks, ``[E, r, K]`` and ``[E, N, r]``.
        c: DoRA's factors ``m / norm``, ``[N]`` in float32 (float64 for float64), of experts ``[E, N]``; empty for LoRA.
        scaling, dropout_p: numbers. Until functional.py has settled them, a scaling may be a tensor.
        seed: int64, one entry an adapter; None when nothing is dropped.
        adapter_index: integers ``[...]``, the adapter that serves each token, -1 for none; None: every one serves all.
    """

    A: Sequence[Tensor]
    B: Sequence[Tensor]
    c: Sequence[Tensor]
    scaling: Sequence[Any]
    dropout_p: Sequence[float]
    seed: Tensor | None = None
    adapter_index: Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """``(N, K)``."""
        return self.B[0].shape[-2], self.A[0].shape[-1]

    @property
    def ranks(self) -> list[int]:
        """One each."""
        return [a.shape[-2] for a in self.A]

    @property
    def factors(self) -> tuple[Tensor, ...]:
        """Every A and B."""
        return *self.A, *self.B


class Kept(NamedTuple):
    """What the forward pass keeps beside its operands: ``u [M, Σ r]`` and each ``z [M, N]``, see ops.py."""

    u: Tensor | None
    z: Sequence[Tensor]


class Needs(NamedTuple):
    """Which gradients are asked for."""

    x: bool
    weight: bool
    bias: bool
    A: Sequence[bool]
    B: Sequence[bool]
    c: Sequence[bool]

    @property
    def flat(self) -> list[bool]:
        """In the order of the gradients."""
        return [self.x, self.weight, self.bias, *self.A, *self.B, *self.c]

    @classmethod
    def of(cls, flat: Sequence[bool], count: int) -> Needs:
        """Of ``count`` adapters."""
        x, weight, bias, *rest = flat
        return cls(x, weight, bias, rest[:count], rest[count : 2 * count], rest[2 * count :])


class ForwardCall(NamedTuple):
    """The arguments of ``lora_linear`` but the backend."""

    x: Tensor
    weight: Weight
    bias: Tensor | None
    adapters: Adapters
    keep_z: bool

    @property
    def differentiable(self) -> tuple[Tensor | None, ...]:
        """What may ask for a gradient: ``x, weight, bias, *A, *B, *c``."""
        adapters = self.adapters
        return self.x, self.weight.data, self.bias, *adapters.A, *adapters.B, *adapters.c

    def flat(self) -> tuple[Any, ...]:
        """As torch's dispatcher takes it."""
        return self.x, *self.weight, self.bias, *self.adapters, self.keep_z

    @classmethod
    def of(cls, flat: Sequence[Any]) -> ForwardCall:
        """The way back from :meth:`flat`."""
        x, data, quant, blocksize, bias, A, B, c, *rest, keep_z = flat
        return cls(x, Weight(data, _all(quant), blocksize), bias, Adapters(A, B, _all(c), *rest), keep_z)


class NormCall(NamedTuple):
    """The arguments of ``dora_norm`` but the backend."""

    weight: Weight
    A: Tensor
    B: Tensor
    scaling: float
    dtype: torch.dtype

    @property
    def is_stacked(self) -> bool:
        """Whether it is of experts."""
        return bool(self.A.shape[:-2])

    def experts(self) -> Iterator[NormCall]:
        """Of stacked experts, each by itself; those in 4 bits are decoded one after the other."""
        shape = self.B.shape[-2], self.A.shape[-1]
        for e, (A, B) in enumerate(zip(self.A, self.B, strict=True)):
            yield self._replace(weight=Weight.of(self.weight.expert(e, shape, self.dtype)), A=A, B=B)

    def flat(self) -> tuple[Any, ...]:
        """As torch's dispatcher takes it."""
        return *self.weight, self.A, self.B, self.scaling, self.dtype

    @classmethod
    def of(cls, flat: Sequence[Any]) -> NormCall:
        """The way back from :meth:`flat`."""
        data, quant, blocksize, *rest = flat
        return cls(Weight(data, _all(quant), blocksize), *rest)


class BackwardCall(NamedTuple):
    """The arguments of ``lora_linear_backward`` but the backend."""

    dy: Tensor
    x: Tensor | None
    weight: Weight
    adapters: Adapters
    kept: Kept
    needs: Needs

    def flat(self) -> tuple[Any, ...]:
        """As torch's dispatcher takes it."""
        return self.dy, self.x, *self.weight, *self.adapters, *self.kept, self.needs.flat

    @classmethod
    def of(cls, flat: Sequence[Any]) -> BackwardCall:
        """The way back from :meth:`flat`."""
        dy, x, data, quant, blocksize, A, B, c, *rest, u, z, needs = flat
        call = Adapters(A, B, _all(c), *rest)
        return cls(dy, x, Weight(data, _all(quant), blocksize), call, Kept(u, _all(z)), Needs.of(needs, len(A)))


class GroupedCall(NamedTuple):
    """The arguments of ``lora_grouped_linear`` but the backend: expert ``e`` has rows ``offsets[e]:offsets[e + 1]``."""

    x: Tensor
    offsets: Tensor
    weight: Weight
    bias: Tensor | None
    adapters: Adapters
    keep_z: bool

    @property
    def differentiable(self) -> tuple[Tensor | None, ...]:
        """As :attr:`ForwardCall.differentiable`."""
        adapters = self.adapters
        return self.x, self.weight.data, self.bias, *adapters.A, *adapters.B, *adapters.c

    def flat(self) -> tuple[Any, ...]:
        """As torch's dispatcher takes it."""
        return self.x, self.offsets, *self.weight, self.bias, *self.adapters, self.keep_z

    @classmethod
    def of(cls, flat: Sequence[Any]) -> GroupedCall:
        """The way back from :meth:`flat`."""
        x, offsets, data, quant, blocksize, bias, A, B, c, *rest, keep_z = flat
        return cls(x, offsets, Weight(data, _all(quant), blocksize), bias, Adapters(A, B, _all(c), *rest), keep_z)


class GroupedBackwardCall(NamedTuple):
    """The arguments of ``lora_grouped_linear_backward`` but the backend."""

    dy: Tensor
    x: Tensor | None
    offsets: Tensor
    weight: Weight
    adapters: Adapters
    kept: Kept
    needs: Needs

    def flat(self) -> tuple[Any, ...]:
        """As torch's dispatcher takes it."""
        return self.dy, self.x, self.offsets, *self.weight, *self.adapters, *self.kept, self.needs.flat

    @classmethod
    def of(cls, flat: Sequence[Any]) -> GroupedBackwardCall:
        """The way back from :meth:`flat`."""
        dy, x, offsets, data, quant, blocksize, A, B, c, *rest, u, z, needs = flat
        weight, call = Weight(data, _all(quant), blocksize), Adapters(A, B, _all(c), *rest)
        return cls(dy, x, offsets, weight, call, Kept(u, _all(z)), Needs.of(needs, len(A)))

"""What the tests compare with: the float64 oracle, PEFT's eager computation, and the rule that judges a result."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from fastpeft import ops
from fastpeft.call import Adapters, BackwardCall, ForwardCall, Kept, Needs, Weight
from fastpeft.dropout import dropout_keep, dropout_scale, dropout_seeds
from fastpeft.four_bit import FourBit
from fastpeft.judge import allowed_error
from fastpeft.reference import Adapter, lora_linear_backward_reference, lora_linear_reference, wide_dtype

Results = dict[str, Tensor]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # where GPU backends are tested
POOL = 32  # independent rounding errors that the comparison of two errors is based on


def moved_to(device: str, value: Any) -> Any:
    """A tensor, a list of them or a 4-bit weight on ``device``, strides kept; anything else as it is."""
    if device == "cpu":
        return value
    if isinstance(value, torch.Tensor):
        span = 1 + sum((size - 1) * stride for size, stride in zip(value.shape, value.stride(), strict=True))
        if value.numel() == 0:
            return value.to(device)
        return value.as_strided((span,), (1,)).to(device).as_strided(value.shape, value.stride())
    if isinstance(value, (list, tuple)):
        return type(value)(moved_to(device, each) for each in value)
    if isinstance(value, FourBit):
        return FourBit(**{name: moved_to(device, each) for name, each in vars(value).items()})
    return value


@dataclass(frozen=True)
class LoraInputs:
    """One call of ``fastpeft::lora_linear`` (shapes and dtypes as there) and ``dy [..., N]``, what flows back."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    A: list[Tensor]
    B: list[Tensor]
    scaling: list[float]
    dropout_p: list[float]
    seed: Tensor | None
    adapter_index: Tensor | None
    dy: Tensor
    c: list[Tensor] = field(default_factory=list)
    packed: FourBit | None = None  # what the op is given in the place of weight
    alone: bool = False  # the op is given no weight; this one is 0

    def differentiable(self) -> dict[str, Tensor]:
        """The tensors that have a gradient, by the names that :func:`oracle` gives their gradients."""
        named = {"x": self.x, "weight": self.weight} if self.has_dense_weight else {"x": self.x}
        if self.bias is not None:
            named["bias"] = self.bias
        named |= {f"A[{i}]": a for i, a in enumerate(self.A)}
        named |= {f"B[{i}]": b for i, b in enumerate(self.B)}
        return named | {f"c[{i}]": c for i, c in enumerate(self.c)}

    @property
    def has_dense_weight(self) -> bool:
        """Whether the op is given ``weight`` itself."""
        return self.packed is None and not self.alone

    @property
    def adapters(self) -> Adapters:
        """As the ops take them."""
        return Adapters(self.A, self.B, self.c, self.scaling, self.dropout_p, self.seed, self.adapter_index)

    def call(self, keep_z: bool = True) -> ForwardCall:
        """The call itself."""
        weight = Weight.none(self.x) if self.alone else Weight.of(self.packed or self.weight)
        return ForwardCall(self.x, weight, self.bias, self.adapters, keep_z)

    def backward_call(self, u: Tensor | None, z: Sequence[Tensor], needs: Sequence[bool]) -> BackwardCall:
        """The call of the backward op with what the forward one kept; ``needs`` in the order of the gradients."""
        call = self.call()
        return BackwardCall(self.dy, self.x, call.weight, self.adapters, Kept(u, z), Needs.of(needs, len(self.A)))

    def contiguous(self) -> LoraInputs:
        """The same numbers without strides of their own."""
        return replace(self, x=self.x.contiguous(), weight=self.weight.contiguous(), dy=self.dy.contiguous())

    def to(self, device: str) -> LoraInputs:
        """The same numbers on a device, strides kept."""
        return LoraInputs(**{name: moved_to(device, value) for name, value in vars(self).items()})

    def keep(self) -> list[Tensor | None]:
        """Each adapter's boolean dropout mask ``[M, K]``, None where nothing is dropped."""
        if self.seed is None:
            return [None] * len(self.A)
        rows, columns = self.dy.shape[:-1].numel(), self.weight.shape[1]
        return [
            _keep(seed, rows, columns, p).to(self.dy.device) if p else None
            for seed, p in zip(self.seed.tolist(), self.dropout_p, strict=True)
        ]

    def select(self) -> list[Tensor | None]:
        """For each adapter, ``[M]``: true for the tokens it serves; None when it serves all."""
        if self.adapter_index is None:
            return [None] * len(self.A)
        return [self.adapter_index.reshape(-1) == i for i in range(len(self.A))]


def make_inputs(
    shape: Sequence[int],
    N: int,
    ranks: Sequence[int],
    dtype: torch.dtype,
    adapter_dtype: torch.dtype | None = None,
    *,
    bias: bool = True,
    dropout_p: float | Sequence[float] = 0.0,
    mixed: bool = False,
    dora: bool = False,
) -> LoraInputs:
    """Random inputs from torch's default generator, scaled so that base and adapters weigh alike in ``y``.

    Magnitudes are uniform in a factor of two and signs random: a product of normal variables has such long tails that
    the rounding of one element would decide the comparison of two errors over tiny outputs.

    Args:
        shape: ``[..., K]``, of ``x``.
        ranks: one for each adapter; every adapter gets another scaling.
        dtype: of ``x``, ``weight``, ``bias``, ``dy``; also of the adapters unless ``adapter_dtype`` is given.
        dropout_p: for each adapter, or one for all.
        mixed: whether each token is served by one adapter or by none, at random.
        dora: whether every adapter has a factor ``c``, about 1 as in training.
    """
    K, count = shape[-1], len(ranks)
    adapter_dtype = adapter_dtype or dtype
    ps = [dropout_p] * count if isinstance(dropout_p, float) else list(dropout_p)
    return LoraInputs(
        x=_random(shape).to(dtype),
        weight=(_random((N, K)) / math.sqrt(K)).to(dtype),
        bias=_random((N,)).to(dtype) if bias else None,
        A=[(_random((r, K)) / math.sqrt(K)).to(adapter_dtype) for r in ranks],
        B=[(_random((N, r)) / math.sqrt(r)).to(adapter_dtype) for r in ranks],
        scaling=[(1.5, -0.625, 2.0, 0.3)[i % 4] for i in range(count)],
        dropout_p=ps,
        seed=dropout_seeds(count, torch.device("cpu")) if any(ps) else None,
        adapter_index=torch.randint(-1, count, tuple(shape[:-1])) if mixed else None,
        dy=_random((*shape[:-1], N)).to(dtype),
        c=[1 + _random((N,)).to(wide_dtype(dtype)) / 4 for _ in ranks] if dora else [],
    )


def oracle(inputs: LoraInputs) -> Results:
    """``y`` and every gradient in float64, by the equations of reference.py and the formulas written there."""
    N, K = inputs.weight.shape
    rows = inputs.dy.shape[:-1].numel()
    x, dy = inputs.x.double().reshape(rows, K), inputs.dy.double().reshape(rows, N)
    weight = inputs.weight.double()
    bias = None if inputs.bias is None else inputs.bias.double()
    A, B = [a.double() for a in inputs.A], [b.double() for b in inputs.B]
    c = [c.double() for c in inputs.c]
    keep, select = inputs.keep(), inputs.select()
    factor = [1.0 if mask is None else dropout_scale(p) for p, mask in zip(inputs.dropout_p, keep, strict=True)]
    adapters = [
        Adapter(*each) for each in zip(A, B, inputs.scaling, c or [None] * len(A), keep, factor, select, strict=True)
    ]
    y, u, z = lora_linear_reference(x, weight, bias, adapters)
    needs = [True, inputs.has_dense_weight, bias is not None] + [True] * (2 * len(A) + len(c))
    grads = lora_linear_backward_reference(dy, x, weight, u, z, adapters, needs)
    grads[0] = grads[0].reshape(inputs.x.shape)
    return {"y": y.reshape(inputs.dy.shape)} | dict(zip(inputs.differentiable(), grads, strict=True))


def eager(inputs: LoraInputs) -> Results:
    """``y`` and every gradient as PEFT computes them (peft/tuners/lora/layer.py), everything in the dtype of ``x``.

    Adapters in a wider dtype are cast as autocast casts them. The mask is the oracle's, applied as by torch's dropout.
    """
    return run(peft_linear, inputs)


def fused(inputs: LoraInputs, backend: str | None) -> Results:
    """``y`` and every gradient through fastpeft's op."""

    return run(lambda i: ops.lora_linear(*i.call().flat(), backend)[0], inputs)


def run(function: Callable[[LoraInputs], Tensor], inputs: LoraInputs) -> Results:
    """``y = function(inputs)`` and, through autograd, the gradient of every tensor, named as by :func:`oracle`.

    Strides are kept: what ``function`` sees has the storage layout of ``inputs``.
    """
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in inputs.differentiable().items()}
    count = len(inputs.A)
    y = function(
        LoraInputs(
            x=leaves["x"],
            weight=leaves.get("weight", inputs.weight),
            bias=leaves.get("bias"),
            A=[leaves[f"A[{i}]"] for i in range(count)],
            B=[leaves[f"B[{i}]"] for i in range(count)],
            scaling=inputs.scaling,
            dropout_p=inputs.dropout_p,
            seed=inputs.seed,
            adapter_index=inputs.adapter_index,
            dy=inputs.dy,
            c=[leaves[f"c[{i}]"] for i in range(len(inputs.c))],
            packed=inputs.packed,
            alone=inputs.alone,
        )
    )
    grads = torch.autograd.grad(y, list(leaves.values()), inputs.dy)
    return {"y": y.detach()} | dict(zip(leaves, grads, strict=True))


def peft_linear(inputs: LoraInputs) -> Tensor:
    """``result + lora_B(lora_A(dropout(x))) * scaling`` for each adapter; in a mixed batch for the tokens it serves.

    DoRA (peft/tuners/lora/dora.py): ``result + (c - 1) * base_result + c * lora_B(lora_A(x)) * scaling``, ``c`` wide.
    """
    x, linear = inputs.x, torch.nn.functional.linear
    result = linear(x, inputs.weight, inputs.bias)
    settings = zip(inputs.A, inputs.B, inputs.scaling, inputs.dropout_p, inputs.keep(), inputs.select(), strict=True)
    for i, (A, B, scaling, p, keep, select) in enumerate(settings):
        dropped = x if keep is None else x * keep.view(x.shape) * dropout_scale(p)
        delta = linear(linear(dropped, A.to(x.dtype)), B.to(x.dtype)) * scaling
        if select is not None:
            delta = delta.where(select.view(*x.shape[:-1], 1), 0)
        if inputs.c:
            below = result if inputs.bias is None else result - inputs.bias
            base_result = below if keep is None else linear(dropped, inputs.weight)
            delta = (inputs.c[i] - 1) * base_result + inputs.c[i] * delta
        result = result + delta
    return result.to(x.dtype)


def assert_close_as_eager(
    actual: Tensor | Sequence[Tensor],
    oracle: Tensor | Sequence[Tensor],
    eager: Tensor | Sequence[Tensor],
    name: str = "",
) -> None:
    """``‖actual − oracle‖ ≤ 2 ‖eager − oracle‖ + eps/2 · ‖oracle‖``, in the maximum norm and in the root mean square.

    The last term is the rounding of the output itself: correctly rounded, each element is off by at most
    ``eps/2 · |oracle|``, so the norm of these errors is at most that multiple of the oracle's norm (``eps`` of the
    dtype of ``actual``). The maximum norm finds a single wrong element, the root mean square an error spread over all.

    Both errors are samples of a random variable: with few elements eager may be exact by luck, and twice nothing is
    nothing. Sequences of tensors (the same computation on independent inputs) are therefore pooled into one sample
    before the norms are taken; :class:`Expected` takes as many as tiny outputs need.
    """
    actuals, oracles, eagers = (list(t) if not isinstance(t, Tensor) else [t] for t in (actual, oracle, eager))
    for a, o, e in zip(actuals, oracles, eagers, strict=True):
        assert a.shape == o.shape == e.shape, f"{name}: shapes {a.shape}, oracle {o.shape}, eager {e.shape}"
        assert a.isfinite().all(), f"{name}: {int((~a.isfinite()).sum())} of {a.numel()} elements are not finite"
    flat_actual, flat_oracle, flat_eager = (
        torch.cat([t.detach().double().flatten() for t in tensors]) for tensors in (actuals, oracles, eagers)
    )
    if flat_oracle.numel() == 0:
        return
    for label, norm in (("maximum", _max_norm), ("root mean square", _rms)):
        error, eager_error = norm(flat_actual - flat_oracle), norm(flat_eager - flat_oracle)
        allowed = allowed_error(eager_error, norm(flat_oracle), actuals[0].dtype)
        assert error <= allowed, f"{name}: {label} error {error:.3e}, allowed {allowed:.3e} (eager's {eager_error:.3e})"


@dataclass(frozen=True)
class Expected:
    """Draws of the same kind of inputs, enough to judge by, with the oracle's and eager's results.

    Strides choose the vendor's algorithm, and with it the order of sums and the size of eager's error: eager runs on
    the inputs as they are and on contiguous ones, where there is a GPU on it, too, and each element counts where it is
    worse.
    """

    inputs: list[LoraInputs]
    oracle: list[Results]
    eager: list[Results]

    @classmethod
    def of(cls, make: Callable[[], LoraInputs]) -> Expected:
        """Draws by ``make()``."""
        inputs = [make()]
        inputs += [make() for _ in range(draws_needed(inputs[0]) - 1)]
        oracles = [oracle(i) for i in inputs]
        return cls(inputs, oracles, [worst(truth, _eagers(i)) for truth, i in zip(oracles, inputs, strict=True)])

    def assert_met_by(self, function: Callable[[LoraInputs], Results]) -> None:
        """Every entry of ``function(inputs)`` has eager's dtype and is as close to the oracle as eager's is."""
        actual = [function(i) for i in self.inputs]
        for name, like in self.eager[0].items():
            assert actual[0][name].dtype == like.dtype, f"{name}: {actual[0][name].dtype}, expected {like.dtype}"
            assert_close_as_eager(*([r[name] for r in results] for results in (actual, self.oracle, self.eager)), name)


def draws_needed(inputs: LoraInputs) -> int:
    """How many draws of ``inputs`` make ``POOL`` independent rounding errors in each output.

    A draw has as many as the output has elements, but an error of ``u`` or ``v [M, r]`` spreads over a whole row of
    ``dB`` or ``dA``: no more than ``r`` for each different token that an adapter serves.
    """
    sizes = [t.numel() for t in (inputs.dy, *inputs.differentiable().values())]
    if 0 in sizes:
        return 1
    tokens = min(len(t.reshape(-1, t.shape[-1]).float().unique(dim=0)) for t in (inputs.x, inputs.dy))
    if inputs.adapter_index is not None:
        tokens /= len(inputs.A) + 1
    return math.ceil(POOL / min(*sizes, tokens * min(a.shape[0] for a in inputs.A)))


@functools.lru_cache(maxsize=8)
def _keep(seed: int, rows: int, columns: int, p: float) -> Tensor:
    return dropout_keep(torch.tensor(seed), rows, columns, p)


def _random(shape: Sequence[int]) -> Tensor:
    return (torch.rand(*shape) / 2 + 0.5) * torch.randint(2, tuple(shape)).mul(2).sub(1)


def _eagers(inputs: LoraInputs) -> Iterator[Results]:
    for made in (inputs, inputs.contiguous()):
        yield eager(made)
        if DEVICE != "cpu":
            yield {name: result.cpu() for name, result in eager(made.to(DEVICE)).items()}


def worst(truth: Results, eagers: Iterable[Results]) -> Results:
    """Of each element the one that is furthest from the truth."""
    furthest = dict[str, Tensor]()
    for found in eagers:
        for name, exact in truth.items():
            a, b = furthest.get(name, found[name]), found[name]
            furthest[name] = a.where((a - exact).abs() >= (b - exact).abs(), b)
    return furthest


def _max_norm(error: Tensor) -> float:
    return error.abs().max().item()


def _rms(error: Tensor) -> float:
    return error.square().mean().sqrt().item()

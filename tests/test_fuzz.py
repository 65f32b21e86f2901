"""Public functions on arguments that nobody thought of: an error that names the argument, or the right number.

``make fuzz`` runs many times as many cases as the tests do.
"""

from __future__ import annotations

import math
import os
import re
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastpeft import dispatch, four_bit
from fastpeft.functional import dora_linear, dora_norm, lora_linear, lora_update

EXAMPLES = int(os.environ.get("FASTPEFT_FUZZ_EXAMPLES", "400"))
ERRORS = (TypeError, ValueError, dispatch.BackendRefusal)
NAMES = ("x", "weight", "bias", "A", "B", "scaling", "dropout_p", "adapter_index", "magnitude", "norm", "training")
NAMES += ("offsets", "backend", "shape", "quant_type", "blocksize", "packed", "absmax", "code")
FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
DTYPES = (*FLOATS, torch.int32, torch.bool, torch.complex64)
fuzzed = settings(
    max_examples=EXAMPLES, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
)

sizes = st.integers(0, 40)
odd_numbers = st.sampled_from(
    [0.0, -0.0, 1.0, -1.5, 1e-30, 1e30, math.inf, -math.inf, math.nan, 10**400, "1", None, True]
)
seeds = st.integers(0, 2**31)
mostly = st.integers(0, 9)


def drawn(seed: int, shape: tuple[int, ...], dtype: torch.dtype, layout: int = 0) -> Tensor:
    """Numbers about 1, in one of some layouts."""
    made = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
    if layout == 1 and made.dim() == 2:
        return made.t().contiguous().t()
    if layout == 2 and made.dim():
        return torch.stack((made, made), dim=-1)[..., 0]
    return made


@st.composite
def calls(draw: st.DrawFn) -> dict[str, Any]:
    """Arguments of lora_linear; most of them fit each other, some have one thing wrong or more."""
    K, N, r = (draw(st.integers(1, 40)) for _ in range(3))
    leading = tuple(draw(st.lists(st.integers(0, 5), max_size=3)))
    dtype, adapter_dtype = draw(st.sampled_from(FLOATS)), draw(st.sampled_from(FLOATS))
    layout = draw(st.integers(0, 2))
    shapes = {"x": (*leading, K), "weight": (N, K), "bias": (N,), "A": (r, K), "B": (N, r)}
    dtypes = {"x": dtype, "weight": dtype, "bias": dtype, "A": adapter_dtype, "B": adapter_dtype}
    if draw(mostly) == 0:
        shapes[draw(st.sampled_from(list(shapes)))] = tuple(draw(st.lists(sizes, max_size=3)))
    if draw(mostly) == 0:
        dtypes[draw(st.sampled_from(list(dtypes)))] = draw(st.sampled_from(DTYPES))
    made: dict[str, Any] = {name: drawn(draw(seeds), shape, dtypes[name], layout) for name, shape in shapes.items()}
    if draw(st.booleans()):
        made["bias"] = None
    made["scaling"] = draw(odd_numbers) if draw(mostly) == 0 else draw(st.floats(-4, 4, width=32))
    made["dropout_p"] = draw(odd_numbers) if draw(mostly) == 0 else draw(st.sampled_from([0.0, 0.25, 0.5]))
    made["training"] = draw(st.booleans())
    made["backend"] = draw(st.sampled_from([None, "cpu", "reference", "cuda"]))
    if draw(mostly) == 0:
        index = torch.randint(-2, 3, leading, generator=torch.Generator().manual_seed(draw(seeds)))
        made["adapter_index"] = index.to(draw(st.sampled_from([torch.int64, torch.int8, torch.float32])))
    if draw(mostly) == 0:
        made[draw(st.sampled_from(list(made)))] = draw(st.sampled_from([None, 3, "x", [], torch.empty(0)]))
    return made


def bound(call: dict[str, Any]) -> Tensor:
    """What sums in any order may be off by, element for element: (number of terms) eps (sum of magnitudes)."""
    x, weight, A, B = (call[name].double().abs() for name in ("x", "weight", "A", "B"))
    bias = 0.0 if call["bias"] is None else call["bias"].double().abs()
    low_rank = (x @ A.t()) @ B.t() * abs(float(call["scaling"]))
    terms = x.shape[-1] + A.shape[0] + 8
    eps = max(torch.finfo(call[name].dtype).eps for name in ("x", "weight"))
    magnitude = x @ weight.t() + low_rank + bias
    return terms * eps * magnitude + torch.finfo(call["weight"].dtype).tiny


def gradients_of(call: dict[str, Any], dy: Tensor, served: Tensor, of: Any) -> dict[str, Tensor]:
    """Of what lora_linear is given, by the formulas of docs/equations.md in float64, ``of`` applied to each factor."""
    x, weight, A, B = (of(call[name].detach().double()) for name in ("x", "weight", "A", "B"))
    dy, scaling = of(dy.double()), of(torch.tensor(float(call["scaling"]), dtype=torch.float64))
    rows, dy2 = x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1])
    own = scaling * dy2 * served.reshape(-1, 1)
    return {
        "x": (dy2 @ weight + own @ B @ A).reshape(x.shape),
        "weight": dy2.t() @ rows,
        "bias": dy2.sum(0),
        "A": (own @ B).t() @ rows,
        "B": own.t() @ (rows @ A.t()),
    }


def checked(function: Any, call: dict[str, Any]) -> Tensor | None:
    """The result; None where an error named an argument."""
    try:
        return function(**call)
    except ERRORS as error:
        assert_names_an_argument(error)
        return None


def assert_names_an_argument(error: Exception) -> None:
    """It begins with the argument's name."""
    assert re.match(rf"({'|'.join(NAMES)})\b", str(error)), error


@fuzzed
@given(calls())
def test_lora_linear(call: dict[str, Any]) -> None:
    y = checked(lora_linear, call)
    if y is None:
        return
    x, weight, bias, A, B = (call[name] for name in ("x", "weight", "bias", "A", "B"))
    assert y.shape == (*x.shape[:-1], weight.shape[0]) and y.dtype == weight.dtype
    if call["training"] and call["dropout_p"]:
        return  # test_dropout.py has the masks
    low_rank = (x.double() @ A.double().t()) @ B.double().t() * float(call["scaling"])
    if call.get("adapter_index") is not None:
        low_rank = low_rank * (call["adapter_index"] == 0).unsqueeze(-1)
    exact = x.double() @ weight.double().t() + low_rank + (0.0 if bias is None else bias.double())
    fits = exact.abs() < torch.finfo(y.dtype).max / 2
    off = (y.double() - exact).abs()
    assert (off <= bound(call))[fits].all()


@fuzzed
@given(calls())
def test_lora_update(call: dict[str, Any]) -> None:
    """As lora_linear with a weight of zeros."""
    del call["weight"]
    y = checked(lora_update, call)
    if y is None:
        return
    x, bias, A, B = (call[name] for name in ("x", "bias", "A", "B"))
    assert y.shape == (*x.shape[:-1], B.shape[0]) and y.dtype == x.dtype
    with_zeros = call | {"weight": torch.zeros(B.shape[0], A.shape[1], dtype=x.dtype), "bias": bias}
    if call["training"] and call["dropout_p"]:
        return
    low_rank = (x.double() @ A.double().t()) @ B.double().t() * float(call["scaling"])
    if call.get("adapter_index") is not None:
        low_rank = low_rank * (call["adapter_index"] == 0).unsqueeze(-1)
    exact = low_rank + (0.0 if bias is None else bias.double())
    fits = exact.abs() < torch.finfo(y.dtype).max / 2
    assert ((y.double() - exact).abs() <= bound(with_zeros))[fits].all()


@fuzzed
@given(calls(), st.data())
def test_gradients(call: dict[str, Any], data: st.DataObject) -> None:
    """In the shapes and dtypes of what they are of, each off by no more than its sums may be."""
    learned = [name for name in ("x", "weight", "bias", "A", "B") if isinstance(call[name], Tensor)]
    for name in learned:
        if call[name].is_floating_point():
            call[name].requires_grad_(data.draw(st.booleans()))
    y = checked(lora_linear, call)
    wanted = [call[name] for name in learned if call[name].requires_grad]
    if y is None or not wanted:
        return
    assume(y.isfinite().all())
    dy = drawn(data.draw(seeds), tuple(y.shape), y.dtype)
    grads = torch.autograd.grad(y, wanted, dy)
    masked = call["training"] and call["dropout_p"]  # test_dropout.py has the masks
    index = call.get("adapter_index")
    served = torch.ones(y.shape[:-1]) if index is None else (index == 0).double()
    exact, most = (gradients_of(call, dy, served, of) for of in (lambda t: t, torch.abs))
    terms = dy.numel() + call["x"].shape[-1] + call["A"].shape[0] + 8
    for name in (name for name in learned if call[name].requires_grad):
        grad, of = next((g, w) for g, w in zip(grads, wanted, strict=True) if w is call[name])
        assert (grad.shape, grad.dtype) == (of.shape, of.dtype)
        eps = max(torch.finfo(t.dtype).eps for t in (grad, y))
        allowed = terms * eps * most[name] + max(torch.finfo(t.dtype).tiny for t in (grad, y))
        fits = most[name] < torch.finfo(grad.dtype).max / 2
        assert masked or ((grad.double() - exact[name]).abs() <= allowed)[fits].all(), name


@fuzzed
@given(calls(), st.data())
def test_dora(call: dict[str, Any], data: st.DataObject) -> None:
    call.pop("adapter_index", None)
    N = call["B"].shape[0] if isinstance(call["B"], Tensor) and call["B"].dim() else 1
    magnitude = drawn(data.draw(seeds), (N,), data.draw(st.sampled_from(FLOATS)))
    y = checked(dora_linear, call | {"magnitude": magnitude})
    norm = checked(dora_norm, {name: call[name] for name in ("weight", "A", "B", "scaling", "backend")})
    if y is None or norm is None:
        return
    weight, A, B = (call[name].double() for name in ("weight", "A", "B"))
    exact = (weight + float(call["scaling"]) * B @ A).norm(dim=1)
    assert y.shape == (*call["x"].shape[:-1], N) and norm.shape == (N,)
    most = (weight.abs() + abs(float(call["scaling"])) * B.abs() @ A.abs()).norm(dim=1)
    terms, eps = sum(A.shape) + 8, torch.finfo(call["weight"].dtype).eps
    fits = most < torch.finfo(call["weight"].dtype).max
    assert ((norm.double() - exact).abs() <= terms * eps * most)[fits].all()


@fuzzed
@given(st.data())
def test_4_bits_of_random_bytes(data: st.DataObject) -> None:
    """Whatever the bytes are, they are refused or decoded as the formula says."""
    N, K = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 90))
    blocksize = data.draw(st.sampled_from([*four_bit.BLOCKSIZES[:3], 63, 0, -64]))
    count = (N * K + 1) // 2 + (data.draw(mostly) == 0)
    packed = torch.tensor(list(data.draw(st.binary(min_size=count, max_size=count))), dtype=torch.uint8)
    blocks = max(0, -(-N * K // blocksize)) if blocksize else 0
    absmax = drawn(data.draw(seeds), (blocks,), data.draw(st.sampled_from([torch.float32, torch.float64])))
    arguments = packed, four_bit.code_table("nf4"), absmax, None, (N, K), blocksize
    try:
        weight = four_bit.FourBit(*arguments)
    except (TypeError, ValueError) as error:
        assert_names_an_argument(error)
        return
    codes = torch.stack((packed >> 4, packed & 15), 1).flatten()[: N * K].long()
    dense = (weight.code[codes] * absmax.repeat_interleave(blocksize)[: N * K]).view(N, K)
    assert torch.equal(weight.dequantize(), dense)
    x, A, B = drawn(1, (3, K), torch.float32), drawn(2, (2, K), torch.float32), drawn(3, (N, 2), torch.float32)
    call = {"x": x, "weight": dense, "bias": None, "A": A, "B": B, "scaling": 0.5}
    exact = x.double() @ dense.double().t() + 0.5 * (x.double() @ A.double().t()) @ B.double().t()
    y = lora_linear(x, weight, None, A, B, 0.5)
    assert ((y.double() - exact).abs() <= bound(call)).all()


@fuzzed
@given(st.data())
def test_quantize(data: st.DataObject) -> None:
    shape = tuple(data.draw(st.lists(sizes, min_size=1, max_size=3)))
    weight = drawn(data.draw(seeds), shape, data.draw(st.sampled_from(DTYPES)))
    kind = data.draw(st.sampled_from(["nf4", "fp4", "nf5", None]))
    blocksize = data.draw(st.sampled_from([64, 32, 4096, 48, 0, "64"]))
    try:
        packed = four_bit.quantize(weight, kind, blocksize, data.draw(st.booleans()))
    except (TypeError, ValueError) as error:
        assert_names_an_argument(error)
        return
    decoded = packed.dequantize()
    assert decoded.shape == weight.shape
    largest = weight.float().abs().max().item() if weight.numel() else 0.0
    assert (decoded.abs() <= 1.1 * largest).all()  # nested statistics are rounded to 8 bits


def test_errors_that_name_nothing_are_noticed() -> None:
    def silent(**_: Any) -> Tensor:
        raise ValueError("an index is out of range")

    with pytest.raises(AssertionError):
        checked(silent, {})

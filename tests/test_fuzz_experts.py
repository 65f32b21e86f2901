"""Stacked experts on arguments that nobody thought of: an error that names the argument, or the right number.

``make fuzz`` runs many times as many cases as the tests do.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st
from test_fuzz import DTYPES, FLOATS, checked, drawn, fuzzed, odd_numbers, seeds, sizes
from torch import Tensor

from fastpeft.functional import lora_grouped_linear

seldom = st.integers(0, 19).map(lambda number: number == 13)  # hypothesis likes the bounds
LAYOUTS = ("contiguous", "columns", "experts innermost", "apart", "inside another", "one for all", "one row for all")


def laid_out(made: Tensor, layout: str) -> Tensor:
    """The numbers of ``made`` elsewhere in memory; of the last two layouts its first ones, again and again."""
    if made.dim() < 2 or layout == "contiguous":
        return made
    if layout == "columns":
        return made.transpose(-1, -2).contiguous().transpose(-1, -2)
    if layout == "experts innermost":
        return made.movedim(0, -1).contiguous().movedim(-1, 0)
    if layout == "apart":
        return torch.stack((made, made), dim=-1)[..., 0]
    if layout == "inside another":
        wide = torch.full([size + 2 for size in made.shape], torch.nan).to(made.dtype)
        inside = wide[(slice(1, -1),) * made.dim()]
        return inside.copy_(made)
    if layout == "one for all":
        return made[:1].expand(made.shape)
    return made[..., :1, :].expand(made.shape)


@st.composite
def offsets_of(draw: st.DrawFn, experts: int) -> Tensor:
    """Ascending as a rule, of few rows each or of many; in some layouts and dtypes."""
    rows = st.one_of(st.just(0), st.integers(0, 3), st.integers(0, 70))
    bounds = [0, *itertools.accumulate(draw(st.lists(rows, min_size=experts, max_size=experts)))]
    if draw(seldom):
        bounds[draw(st.integers(0, experts))] = draw(st.integers(-3, bounds[-1] + 3))
    made = torch.tensor(bounds, dtype=draw(st.sampled_from([torch.int64, torch.int32])))
    return torch.stack((made, made - 1), dim=-1)[..., 0] if draw(st.booleans()) else made


@st.composite
def grouped_calls(draw: st.DrawFn) -> dict[str, Any]:
    """Arguments of lora_grouped_linear; most of them fit each other, some have one thing wrong or more."""
    E, K, N = draw(st.integers(1, 6)), draw(st.integers(1, 40)), draw(st.integers(1, 40))
    ranks = draw(st.lists(st.integers(1, 20), min_size=1, max_size=3))
    offsets = draw(offsets_of(E))
    dtype, adapter_dtype = draw(st.sampled_from(FLOATS)), draw(st.sampled_from(FLOATS))
    shapes = {"x": (max(0, int(offsets[-1])), K), "weight": (E, N, K), "bias": (E, N)}
    for i, r in enumerate(ranks):
        shapes |= {f"A{i}": (E, r, K), f"B{i}": (E, N, r)}
    dtypes = {name: adapter_dtype if name[0] in "AB" else dtype for name in shapes}
    if draw(seldom):
        shapes[draw(st.sampled_from(list(shapes)))] = tuple(draw(st.lists(sizes, max_size=4)))
    if draw(seldom):
        dtypes[draw(st.sampled_from(list(dtypes)))] = draw(st.sampled_from(DTYPES))
    made: dict[str, Any] = {
        name: laid_out(drawn(draw(seeds), shape, dtypes[name]), draw(st.sampled_from(LAYOUTS)))
        for name, shape in shapes.items()
    }
    made |= {name: [made.pop(f"{name}{i}") for i in range(len(ranks))] for name in "AB"}
    made["offsets"] = offsets.to(draw(st.sampled_from(DTYPES))) if draw(seldom) else offsets
    if draw(st.booleans()):
        made["bias"] = None
    made["scaling"] = [draw(odd_numbers) if draw(seldom) else draw(st.floats(-4, 4, width=32)) for _ in ranks]
    made["dropout_p"] = draw(odd_numbers) if draw(seldom) else draw(st.sampled_from([0.0, 0.0, 0.25, 0.5]))
    made["training"] = draw(st.booleans())
    made["backend"] = draw(st.sampled_from([None, "cpu", "reference"]))
    if draw(seldom):
        made[draw(st.sampled_from(list(made)))] = draw(st.sampled_from([None, 3, "x", "cuda", [], torch.empty(0)]))
    return made


def learnable(call: dict[str, Any]) -> dict[str, Tensor]:
    """What a call may be asked for the gradient of, by name."""
    named: dict[str, Any] = {name: call[name] for name in ("x", "weight", "bias")}
    for name in "AB":
        given_ones = call[name] if isinstance(call[name], list) else []
        named |= {f"{name}[{i}]": each for i, each in enumerate(given_ones)}
    return {name: each for name, each in named.items() if isinstance(each, Tensor)}


def by_formula(call: dict[str, Any], dy: Tensor, of: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    """``y`` and all gradients by the formula of docs/equations.md in float64, ``of`` applied to each factor."""
    leaves = {name: of(each.detach().double()).requires_grad_() for name, each in learnable(call).items()}
    rows = [slice(*pair) for pair in itertools.pairwise(call["offsets"].tolist())]
    scaling = call["scaling"] if isinstance(call["scaling"], list) else [call["scaling"]] * len(call["A"])
    outputs = []
    for e, own in enumerate(rows):
        y = leaves["x"][own] @ leaves["weight"][e].t()
        if "bias" in leaves:
            y = y + leaves["bias"][e]
        for i, s in enumerate(scaling):
            u = leaves["x"][own] @ leaves[f"A[{i}]"][e].t()
            y = y + of(torch.tensor(float(s), dtype=torch.float64)) * (u @ leaves[f"B[{i}]"][e].t())
        outputs.append(y)
    y = torch.cat(outputs)
    return {"y": y.detach()} | dict(
        zip(leaves, torch.autograd.grad(y, list(leaves.values()), of(dy.double())), strict=True)
    )


@fuzzed
@given(grouped_calls(), st.data())
def test_lora_grouped_linear(call: dict[str, Any], data: st.DataObject) -> None:
    """The results in the shapes and dtypes of what they are of, each off by no more than its sums may be."""
    asked = {name: each for name, each in learnable(call).items() if each.is_floating_point()}
    for each in asked.values():
        each.requires_grad_(data.draw(st.booleans()))
    y = checked(lora_grouped_linear, call)
    if y is None:
        return
    x, weight = call["x"], call["weight"]
    assert y.shape == (len(x), weight.shape[1]) and y.dtype == x.dtype
    dy = laid_out(drawn(data.draw(seeds), tuple(y.shape), y.dtype), data.draw(st.sampled_from(LAYOUTS)))
    wanted = {name: each for name, each in asked.items() if each.requires_grad}
    found = {"y": y.detach()}
    if wanted:
        found |= dict(zip(wanted, torch.autograd.grad(y, list(wanted.values()), dy), strict=True))
    for name, each in wanted.items():
        assert (found[name].shape, found[name].dtype) == (each.shape, each.dtype), name
    if call["training"] and call["dropout_p"]:
        return  # test_grouped.py has the masks
    exact, most = (by_formula(call, dy, of) for of in (lambda t: t, torch.abs))
    terms = len(x) + sum(weight.shape[1:]) + sum(A.shape[1] for A in call["A"]) + 8
    for name, tensor in found.items():
        eps, tiny = (max(getattr(torch.finfo(t.dtype), which) for t in (tensor, y)) for which in ("eps", "tiny"))
        fits = most[name] < min(torch.finfo(t.dtype).max for t in (tensor, y)) / 2
        off = (tensor.double() - exact[name]).abs()
        assert (off <= terms * eps * most[name] + tiny)[fits].all(), name

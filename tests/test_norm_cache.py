"""The norm is kept while nothing it depends on changes, and never longer, however the change is made."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from fastpeft import dispatch, four_bit, ops
from fastpeft.backends.base import PARTS
from fastpeft.call import Weight
from fastpeft.norm_cache import NormCache

N, K, R = 40, 72, 4


class Adapted(nn.Module):
    """W, A and B as parameters of a module, as a layer holds them."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(N, K))
        self.A = nn.Parameter(torch.randn(R, K))
        self.B = nn.Parameter(torch.randn(N, R))
        self.scaling = 1.5
        self.cache = NormCache()

    def norm(self) -> torch.Tensor:
        return self.cache.get(self.weight, self.A, self.B, self.scaling, torch.float32, None)

    def fresh(self) -> torch.Tensor:
        W, A, B = self.weight.detach(), self.A.detach(), self.B.detach()
        return ops.dora_norm(*Weight.of(W), A, B, self.scaling, torch.float32, None)


def test_is_kept_while_nothing_changes(norms: list[None]) -> None:
    torch.manual_seed(0)
    layer = Adapted()
    first = layer.norm()
    with torch.no_grad():
        assert layer.norm() is first
    assert layer.norm() is first
    assert len(norms) == 1
    assert torch.equal(first, layer.fresh())
    assert not first.requires_grad


def optimizer_step(layer: Adapted, optimizer: Callable[..., torch.optim.Optimizer]) -> None:
    (layer.A.square().sum() + layer.B.square().sum()).backward()
    optimizer([layer.A, layer.B], lr=0.1).step()


def in_place(layer: Adapted, name: str) -> None:
    with torch.no_grad():
        getattr(layer, name).mul_(2)


def through_data(layer: Adapted, name: str) -> None:
    getattr(layer, name).data.mul_(2)


def one_row_through_data(layer: Adapted) -> None:
    layer.weight.data[7] += 1


def one_element_through_data(layer: Adapted) -> None:
    layer.weight.data[9, 1] += 3


def outliers_through_data(layer: Adapted) -> None:
    weight = layer.weight.data
    weight[weight.abs() >= weight.abs().flatten().topk(16).values[-1]] = 0


def half_a_row_through_data(layer: Adapted) -> None:
    layer.weight.data[20, K // 2 :].mul_(3)


def columns_through_data(layer: Adapted) -> None:
    layer.weight.data[:, 3:5] *= 2


def swapped_rows_through_data(layer: Adapted) -> None:
    layer.B.data.copy_(layer.B.detach().flip(0))


def assigned_data(layer: Adapted, name: str) -> None:
    """Twice, so that the allocator may give the second tensor the first one's address."""
    for _ in range(2):
        parameter = getattr(layer, name)
        parameter.data = torch.randn_like(parameter)


def through_another_view(layer: Adapted) -> None:
    """Parameters that are pieces of one flat buffer, as sharding optimizers keep them."""
    flat = torch.cat([layer.A.detach().flatten(), layer.B.detach().flatten()])
    layer.A.data, layer.B.data = flat[: R * K].view(R, K), flat[R * K :].view(N, R)
    layer.norm()
    flat.mul_(2)


def new_parameter(layer: Adapted) -> None:
    layer.B = nn.Parameter(torch.randn(N, R))


def load_state_dict(layer: Adapted, assign: bool) -> None:
    layer.load_state_dict(Adapted().state_dict(), assign=assign)


def merge_as_peft_does(layer: Adapted) -> None:
    layer.weight.data += layer.scaling * layer.B.detach() @ layer.A.detach()


CHANGES: dict[str, Callable[[Adapted], object]] = {
    "weight in place": lambda layer: in_place(layer, "weight"),
    "A in place": lambda layer: in_place(layer, "A"),
    "B in place": lambda layer: in_place(layer, "B"),
    "weight.data in place": lambda layer: through_data(layer, "weight"),
    "A.data in place": lambda layer: through_data(layer, "A"),
    "B.data in place": lambda layer: through_data(layer, "B"),
    "a row of weight.data": one_row_through_data,
    "an element of weight.data": one_element_through_data,
    "outliers of weight.data": outliers_through_data,
    "half a row of weight.data": half_a_row_through_data,
    "columns of weight.data": columns_through_data,
    "rows of B.data swapped": swapped_rows_through_data,
    "weight.data assigned": lambda layer: assigned_data(layer, "weight"),
    "A.data assigned": lambda layer: assigned_data(layer, "A"),
    "B.data assigned": lambda layer: assigned_data(layer, "B"),
    "another view of A and B": through_another_view,
    "a new parameter": new_parameter,
    "SGD": lambda layer: optimizer_step(layer, torch.optim.SGD),
    "AdamW": lambda layer: optimizer_step(layer, torch.optim.AdamW),
    "fused AdamW": lambda layer: optimizer_step(layer, lambda p, lr: torch.optim.AdamW(p, lr=lr, fused=True)),
    "load_state_dict": lambda layer: load_state_dict(layer, False),
    "load_state_dict(assign=True)": lambda layer: load_state_dict(layer, True),
    "to": lambda layer: layer.to(torch.bfloat16),
    "double": lambda layer: layer.double(),
    "merged": merge_as_peft_does,
    "scaling": lambda layer: setattr(layer, "scaling", 0.5),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_any_change_is_seen(change: Callable[[Adapted], object]) -> None:
    torch.manual_seed(0)
    layer = Adapted()
    before = layer.norm().clone()
    change(layer)
    after = layer.norm()
    assert torch.equal(after, layer.fresh())
    assert after.dtype != before.dtype or not torch.equal(after, before)


def test_a_transposed_weight_is_watched_too(norms: list[None]) -> None:
    torch.manual_seed(0)
    stored = torch.randn(K, N)
    A, B, cache = torch.randn(R, K), torch.randn(N, R), NormCache()
    first = cache.get(stored.t(), A, B, 1.0, torch.float32, None)
    assert cache.get(stored.t(), A, B, 1.0, torch.float32, None) is first
    stored.data[3] *= 2
    assert torch.equal(
        cache.get(stored.t(), A, B, 1.0, torch.float32, None),
        ops.dora_norm(*Weight.of(stored.t()), A, B, 1.0, torch.float32, None),
    )
    assert len(norms) == 2


def test_another_dtype_is_another_norm(norms: list[None]) -> None:
    layer = Adapted().to(torch.bfloat16)
    for dtype in (torch.bfloat16, torch.float16, torch.float16):
        layer.cache.get(layer.weight, layer.A, layer.B, 1.0, dtype, None)
    assert len(norms) == 2


def test_what_cannot_be_watched_is_computed_anew(norms: list[None]) -> None:
    torch.manual_seed(0)
    cache = NormCache()
    with torch.inference_mode():
        operands = torch.randn(N, K), torch.randn(R, K), torch.randn(N, R)
        for _ in range(2):
            cache.get(*operands, 1.0, torch.float32, None)
    strided = torch.randn(N, K, 2)[..., 0], torch.randn(R, K), torch.randn(N, R)
    for _ in range(2):
        cache.get(*strided, 1.0, torch.float32, None)
    assert len(norms) == 4


def test_copies_and_pickles_start_empty(norms: list[None]) -> None:
    torch.manual_seed(0)
    layer = Adapted()
    layer.norm()
    for copied in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        copied.norm()
    assert len(norms) == 3


def test_an_error_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    layer = Adapted()
    layer.norm()
    in_place(layer, "A")

    def breaks(*args: Any) -> torch.Tensor:
        raise RuntimeError("no luck")

    with monkeypatch.context() as patch:
        patch.setattr(ops, "call_dora_norm", breaks)
        with pytest.raises(RuntimeError, match="no luck"):
            layer.norm()
    assert torch.equal(layer.norm(), layer.fresh())


def large_layer() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """So large that a call of one token reads a part of W alone."""
    torch.manual_seed(0)
    return torch.randn(512, 256), torch.randn(R, 256), torch.randn(512, R)


@pytest.mark.parametrize("place", [(0, 0), (3, 17), (255, 128), (511, 255)])
def test_a_call_of_many_tokens_sees_one_element_of_a_large_weight_at_once(place: tuple[int, int]) -> None:
    W, A, B = large_layer()
    cache = NormCache()
    before = cache.get(W, A, B, 1.0, torch.float32, None, tokens=8192)
    assert cache.get(W, A, B, 1.0, torch.float32, None, tokens=8192) is before
    W.data[place] += 3
    after = cache.get(W, A, B, 1.0, torch.float32, None, tokens=8192)
    assert torch.equal(after, ops.dora_norm(*Weight.of(W), A, B, 1.0, torch.float32, None))
    assert not torch.equal(after, before)


@pytest.mark.parametrize("place", [(0, 0), (3, 17), (255, 128), (511, 255)])
def test_calls_of_one_token_see_it_within_a_round_of_parts(place: tuple[int, int]) -> None:
    W, A, B = large_layer()
    cache = NormCache()
    before = cache.get(W, A, B, 1.0, torch.float32, None)
    W.data[place] += 3
    found = [cache.get(W, A, B, 1.0, torch.float32, None) for _ in range(PARTS)]
    assert all(norm is before or norm is found[-1] for norm in found)
    assert torch.equal(found[-1], ops.dora_norm(*Weight.of(W), A, B, 1.0, torch.float32, None))


@pytest.mark.parametrize("part", ["packed", "code", "absmax", "code2", "absmax2", "offset"])
def test_every_part_of_a_4_bit_weight_is_watched(part: str) -> None:
    W, A, B = large_layer()
    weight, cache = four_bit.quantize(W), NormCache()
    before = cache.get(weight, A, B, 1.0, torch.float32, None, tokens=8192)
    nested = dict(zip(("code2", "absmax2", "offset"), weight.nested or (), strict=True))
    tensor = nested[part] if part in nested else getattr(weight, part)
    tensor.data.flatten()[-1:].add_(1)
    after = cache.get(weight, A, B, 1.0, torch.float32, None, tokens=8192)
    assert after is not before
    assert torch.equal(after, ops.dora_norm(*Weight.of(weight), A, B, 1.0, torch.float32, None))


def test_a_thread_gets_the_norm_of_its_own_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another thread's call with other settings, in the middle of this one's, leaves this one's norm alone."""
    torch.manual_seed(0)
    layer = Adapted()
    compute, inside = ops.call_dora_norm, []

    def interrupted(*args: Any) -> torch.Tensor:
        found = compute(*args)
        if not inside:
            inside.append(None)
            inside[0] = layer.cache.get(layer.weight, layer.A, layer.B, 3.0, torch.float32, None)
        return found

    monkeypatch.setattr(ops, "call_dora_norm", interrupted)
    assert torch.equal(layer.norm(), layer.fresh())
    assert torch.equal(
        inside[0],
        ops.dora_norm(*Weight.of(layer.weight.detach()), layer.A.detach(), layer.B.detach(), 3.0, torch.float32, None),
    )
    assert torch.equal(layer.norm(), layer.fresh())


def test_what_an_evaluation_left_serves_training() -> None:
    torch.manual_seed(0)
    layer = Adapted()
    with torch.inference_mode():
        kept = layer.norm()
    assert not kept.is_inference()
    assert layer.norm() is kept


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.uint8])
@pytest.mark.parametrize("size", [1, 7, 8, 9, 1000, 5000])
@pytest.mark.parametrize("large", [False, True])
def test_a_fingerprint_depends_on_every_element_and_its_place(large: bool, size: int, dtype: torch.dtype) -> None:
    def taken(values: torch.Tensor) -> bytes:
        return dispatch.named("cpu").fingerprint(*(([], [values]) if large else ([values], [])))

    values = torch.arange(size).to(dtype)
    prints = {taken(values)}
    places = {0, size // 2, size - 1}
    for place in places:
        changed = values.clone()
        changed[place] = 3 - changed[place]
        prints.add(taken(changed))
    prints.add(taken(torch.cat([values, values[:1]])))
    assert len(prints) == 2 + len(places)
    if size > 1:
        assert taken(values.flip(0)) not in prints


def test_the_prints_of_the_parts_are_those_of_the_whole() -> None:
    cpu, values, other = dispatch.named("cpu"), torch.randn(20_000), torch.randn(30)
    whole = cpu.fingerprint([other], [values, other])
    assert len(whole) == 8 * (1 + 2 * PARTS)
    first = [whole[8 * i : 8 * i + 8] for i in range(1, 1 + PARTS)]
    assert len(set(first)) == PARTS
    for at, count in ((0, 1), (31, 1), (5, 7), (0, PARTS)):
        some = cpu.fingerprint([other], [values, other], at, count)
        assert some[:8] == whole[:8] and some[8 : 8 + 8 * count] == b"".join(first[at : at + count])
    changed = values.clone()
    changed[12_345] += 1
    assert sum(a != b for a, b in zip(whole, cpu.fingerprint([other], [changed, other]), strict=True)) <= 8
    with pytest.raises(ValueError, match="there are 32 parts, got first 30 and count 4"):
        cpu.fingerprint([], [values], 30, 4)

"""The norm is kept while nothing it depends on changes, and never longer, however the change is made."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from fastpeft import ops
from fastpeft.backends import native
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
        return ops.dora_norm(
            self.weight.detach(), [], 0, self.A.detach(), self.B.detach(), self.scaling, torch.float32, None
        )


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[None]:
    """One entry for each norm that is computed by a cache."""
    calls: list[None] = []
    compute = ops.call_dora_norm

    def counted(*args: Any) -> torch.Tensor:
        calls.append(None)
        return compute(*args)

    monkeypatch.setattr("fastpeft.norm_cache.ops", type("ops", (), {"call_dora_norm": staticmethod(counted)}))
    return calls


def test_is_kept_while_nothing_changes(computed: list[None]) -> None:
    torch.manual_seed(0)
    layer = Adapted()
    first = layer.norm()
    with torch.no_grad():
        assert layer.norm() is first
    assert layer.norm() is first
    assert len(computed) == 1
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


def test_a_transposed_weight_is_watched_too(computed: list[None]) -> None:
    torch.manual_seed(0)
    stored = torch.randn(K, N)
    A, B, cache = torch.randn(R, K), torch.randn(N, R), NormCache()
    first = cache.get(stored.t(), A, B, 1.0, torch.float32, None)
    assert cache.get(stored.t(), A, B, 1.0, torch.float32, None) is first
    stored.data[3] *= 2
    assert torch.equal(
        cache.get(stored.t(), A, B, 1.0, torch.float32, None),
        ops.dora_norm(stored.t(), [], 0, A, B, 1.0, torch.float32, None),
    )
    assert len(computed) == 2


def test_another_dtype_is_another_norm(computed: list[None]) -> None:
    layer = Adapted().to(torch.bfloat16)
    for dtype in (torch.bfloat16, torch.float16, torch.float16):
        layer.cache.get(layer.weight, layer.A, layer.B, 1.0, dtype, None)
    assert len(computed) == 2


def test_what_cannot_be_watched_is_computed_anew(computed: list[None]) -> None:
    torch.manual_seed(0)
    cache = NormCache()
    with torch.inference_mode():
        operands = torch.randn(N, K), torch.randn(R, K), torch.randn(N, R)
        for _ in range(2):
            cache.get(*operands, 1.0, torch.float32, None)
    strided = torch.randn(N, K, 2)[..., 0], torch.randn(R, K), torch.randn(N, R)
    for _ in range(2):
        cache.get(*strided, 1.0, torch.float32, None)
    assert len(computed) == 4


def test_copies_and_pickles_start_empty(computed: list[None]) -> None:
    torch.manual_seed(0)
    layer = Adapted()
    layer.norm()
    for copied in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        copied.norm()
    assert len(computed) == 3


def test_an_error_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    layer = Adapted()
    layer.norm()
    in_place(layer, "A")

    def breaks(*args: Any) -> torch.Tensor:
        raise RuntimeError("no luck")

    with monkeypatch.context() as patch:
        patch.setattr("fastpeft.norm_cache.ops", type("ops", (), {"call_dora_norm": staticmethod(breaks)}))
        with pytest.raises(RuntimeError, match="no luck"):
            layer.norm()
    assert torch.equal(layer.norm(), layer.fresh())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.uint8])
@pytest.mark.parametrize("size", [1, 7, 8, 9, 1000])
def test_a_fingerprint_depends_on_every_element_and_its_place(dtype: torch.dtype, size: int) -> None:
    values = torch.arange(size).to(dtype)
    prints = {native.fingerprint(values)}
    for place in {0, size // 2, size - 1}:
        changed = values.clone()
        changed[place] += 3
        prints.add(native.fingerprint(changed))
    prints.add(native.fingerprint(torch.cat([values, values[:1]])))
    assert len(prints) == 2 + len({0, size // 2, size - 1})
    if size > 1:
        assert native.fingerprint(values.flip(0)) not in prints

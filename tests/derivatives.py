"""Every derivative and transform of a function that torch offers besides the backward pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad


def differentiated(f: Callable[[Tensor, Tensor], Tensor], x: Tensor, A: Tensor) -> dict[str, Any]:
    """What torch.func makes of a scalar function, and forward-mode differentiation without it."""
    func = torch.func
    with forward_ad.dual_level():
        dual = forward_ad.unpack_dual(f(forward_ad.make_dual(x, x.cos()), A)).tangent
    return {
        "grad": func.grad(f, argnums=(0, 1))(x, A),
        "vmap": func.vmap(f, in_dims=(0, None))(x, A),
        "vmap over A": func.vmap(f, in_dims=(None, 0))(x, torch.stack([A, A + 1])),
        "jvp": func.jvp(f, (x, A), (x.cos(), A.sin())),
        "jacfwd": func.jacfwd(f, argnums=1)(x, A),
        "hessian": func.hessian(lambda x: f(x, A))(x[:1]),
        "forward_ad": dual,
    }

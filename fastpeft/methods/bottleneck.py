"""The bottleneck of Houlsby's and Pfeiffer's adapters, and its forward and backward pass in five products."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from .method import Hooked, place_beside, to_own_dtype

INIT_STD = 1e-2  # section 3.6 of Houlsby et al.


class Bottleneck(Hooked):
    """``h + act(h Dᵀ + c) Uᵀ + e``, with ``down`` holding ``D [r, d]``, ``c [r]`` and ``up`` ``U [d, r]``, ``e [d]``.

    It starts near the identity, as in the paper: ``D`` and ``U`` normal with a standard deviation of 0.01, cut off at
    two of them, the biases zero.
    """

    def __init__(self, width: int, rank: int, activation: str, beside: nn.Module) -> None:
        super().__init__()
        self.activation = activation
        self.down = nn.Linear(width, rank)
        self.up = nn.Linear(rank, width)
        place_beside(self, beside)
        for linear in (self.down, self.up):
            nn.init.trunc_normal_(linear.weight, std=INIT_STD, a=-2 * INIT_STD, b=2 * INIT_STD)
            nn.init.zeros_(linear.bias)

    def forward(self, h: Tensor) -> Tensor:
        x = to_own_dtype(h, self.down.weight)
        return (x + self.up(ACTIVATIONS[self.activation](self.down(x)))).to(h.dtype)

    def extra_repr(self) -> str:
        return f"activation={self.activation}"


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": functional.gelu,
    "relu": functional.relu,
    "silu": functional.silu,
    "tanh": torch.tanh,
}

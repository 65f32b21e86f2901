"""When a computed result is right: the one rule of the self-check, the bench and the tests."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor

EAGERS = 2.0  # so many times the error of plain eager PyTorch in the same dtype

Norm = TypeVar("Norm", float, Tensor)


def allowed_error(eager_error: Norm, truth: Norm, dtype: torch.dtype) -> Norm:
    """The largest error that a right result has: twice eager's, plus the rounding of the result itself.

    Args:
        eager_error: a norm of what plain eager PyTorch, in the same dtype, is off the truth by.
        truth: the same norm of the truth, computed in float64.
        dtype: the result's.
    """
    return EAGERS * eager_error + torch.finfo(dtype).eps / 2 * truth

"""Whether fastpeft computes what PEFT computes; checked before a shape is timed.

The oracle is PEFT in float64. The largest error of each output and gradient is judged by fastpeft/judge.py; eager is
PEFT in the same compute dtype, under autocast where the base is in a low precision. Under dropout all of them drop the
same elements: PEFT's dropout modules are replaced by one that draws its mask as fastpeft does.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastpeft.dropout import dropout_keep, dropout_scale, dropout_seeds
from fastpeft.judge import allowed_error

from .cases import SEED, Case
from .contestants import FASTPEFT, Runner, with_peft


def check(case: Case) -> dict[str, Any]:
    """``{"passed": bool, "failed": [result], "errors": {result: {"fastpeft", "peft", "allowed"}}}``.

    The results are the output ``y`` and the gradients of the layer's input, of all A, of all B, of all singular values
    and of all magnitudes; the errors are the largest absolute ones.
    """
    low_precision = case.dtype != "fp32"
    oracle = results(
        Runner(case, _with_shared_dropout(with_peft(case.base(), case, dense=True)).double(), dtype=torch.float64)
    )
    eager = results(Runner(case, _with_shared_dropout(with_peft(case.base(), case)), autocast=low_precision))
    ours = results(FASTPEFT.setup(case))
    return judge(oracle, eager, ours)


def judge(oracle: dict[str, Tensor], eager: dict[str, Tensor], ours: dict[str, Tensor]) -> dict[str, Any]:
    """The verdict of :func:`check` on results by name."""
    errors, failed = {}, []
    for name, want in oracle.items():
        error, eager_error = _largest_error(ours[name], want), _largest_error(eager[name], want)
        allowed = allowed_error(eager_error, want.abs().max().item(), ours[name].dtype)
        errors[name] = {"fastpeft": error, "peft": eager_error, "allowed": allowed}
        if not error <= allowed:  # NaN fails
            failed.append(name)
    return {"passed": not failed, "failed": failed, "errors": errors}


def results(runner: Runner) -> dict[str, Tensor]:
    """Output and gradients in training mode. The seed is set before each pass, so that equal draws give equal masks."""
    runner.model.train()
    torch.manual_seed(SEED)
    with torch.no_grad():
        found = {"y": runner.predict(runner.x)}
    torch.manual_seed(SEED)
    runner.step()
    if runner.x.grad is not None:
        found["dx"] = runner.x.grad
    for result, kind in (("dA", "lora_A"), ("dB", "lora_B"), ("dE", "lora_E"), ("dm", "lora_magnitude_vector")):
        grads = [p.grad.flatten() for name, p in runner.adapters.items() if kind in name and p.grad is not None]
        if grads:
            found[result] = torch.cat(grads)
    return found


class CounterDropout(nn.Module):
    """fastpeft's mask as a module: draws a seed at each call, in the order in which the layers run."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        seed = dropout_seeds(1, x.device)[0]
        keep = dropout_keep(seed, x.shape[:-1].numel(), x.shape[-1], self.p).view(x.shape)
        return x.masked_fill(~keep, 0) * dropout_scale(self.p)


def _with_shared_dropout(model: nn.Module) -> nn.Module:
    for parent in list(model.modules()):
        if isinstance(parent, nn.ModuleDict):
            for name, module in parent.items():
                if isinstance(module, nn.Dropout):
                    parent[name] = CounterDropout(module.p)
    return model


def _largest_error(got: Tensor, want: Tensor) -> float:
    return (got.double() - want).abs().max().item()

"""LoRA beside layers of torchao and HQQ: run by test_peft_other_bases.py, where these libraries can be found."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torchao.quantization as torchao
from hqq.core.quantize import BaseQuantizeConfig, HQQLinear
from peft_layers import layer_of, signed
from test_peft_other_bases import MODELS, K, N, assert_as_peft
from torch import nn


def torchao_int8(bias: bool) -> nn.Module:
    return quantized_by_torchao(bias, torchao.Int8WeightOnlyConfig())


def torchao_int8_activations(bias: bool) -> nn.Module:
    return quantized_by_torchao(bias, torchao.Int8DynamicActivationInt8WeightConfig())


def quantized_by_torchao(bias: bool, config: object) -> nn.Module:
    holder = nn.Sequential(nn.Linear(K, N, bias=bias))
    torchao.quantize_(holder, config)
    return holder[0]


def hqq_4_bits(bias: bool) -> nn.Module:
    config = BaseQuantizeConfig(nbits=4, group_size=64)
    return HQQLinear(nn.Linear(K, N, bias=bias), config, compute_dtype=torch.float32, device="cpu")


BASES = {
    "TorchaoLoraLinear": torchao_int8,
    "of dynamic activations": torchao_int8_activations,
    "HqqLoraLinear": hqq_4_bits,
}
CASES = [(name, method) for name in BASES for method in ("lora", "dropout", "dora")]
CASES += [(name, "two adapters") for name in ("TorchaoLoraLinear", "HqqLoraLinear")]


@pytest.mark.parametrize(("name", "method"), CASES)
def test_the_adapters_part_is_fused(name: str, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    make: Callable[[bool], nn.Module] = BASES[name]
    model = MODELS[method](make(method == "lora"))
    if name.endswith("Linear"):
        assert type(layer_of(model)).__name__ == name
    assert_as_peft(model, monkeypatch, signed(3, 7, K))

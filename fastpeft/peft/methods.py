"""PEFT's methods that are fused, one row each: the class of its layers, how an adapter is read, the model that makes
them."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from importlib import import_module
from typing import Any, NamedTuple

from peft.tuners.adalora.model import AdaLoraModel
from peft.tuners.lora.model import LoraModel
from peft.tuners.vera.model import VeraModel

from .readers import Reader, read_adalora, read_lora, read_vera
from .reparametrised import read_delora, read_tinylora, read_unilora, read_vblora
from .stock import Stock


class Method(NamedTuple):
    """One class of PEFT's layers.

    Attributes:
        fused_name: what its fused class is called in layers.py.
        module, qualname: where PEFT has the class; the module may need bitsandbytes and is not imported for it.
        model: the tuner whose ``_create_new_module`` makes the layers.
        read: see :data:`fastpeft.peft.readers.Reader`.
        mixes_batches: whether PEFT's forward takes ``adapter_names``.
        base_multiplies: whether the base layer multiplies by itself, with a weight in a form of another library's.
        features: the dimension of its input and of its result that it mixes.
        may_be_plain: whether :mod:`fastpeft.peft.plain` knows its layers.
    """

    fused_name: str
    module: str
    qualname: str
    model: type[Any]
    read: Reader
    mixes_batches: bool = False
    base_multiplies: bool = False
    features: int = -1
    may_be_plain: bool = False

    def peft_class(self) -> type[Any] | None:
        """None where its module was not imported: then there is no such layer."""
        module = sys.modules.get(self.module)
        return None if module is None else getattr(module, self.qualname, None)


def _rows(package: str, qualname: str, model: str, read: Reader) -> tuple[Method, ...]:
    """Of a method that not every PEFT has: one row, or none."""
    try:
        found = import_module(f"peft.tuners.{package}.model")
    except ImportError:
        return ()
    fused_name = f"Fused{package.capitalize()}Linear"
    return (Method(fused_name, f"peft.tuners.{package}.layer", qualname, getattr(found, model), read),)


_LORA, _ADALORA = "peft.tuners.lora", "peft.tuners.adalora"
METHODS = (
    Method("FusedLinear", f"{_LORA}.layer", "Linear", LoraModel, read_lora, mixes_batches=True, may_be_plain=True),
    Method("FusedLinear4bit", f"{_LORA}.bnb", "Linear4bit", LoraModel, read_lora, mixes_batches=True),
    *(
        Method(f"Fused{name}", f"{_LORA}.{file}", name, LoraModel, read_lora, mixes_batches, base_multiplies=True)
        for file, name, mixes_batches in (
            ("bnb", "Linear8bitLt", True),
            ("torchao", "TorchaoLoraLinear", True),
            ("hqq", "HqqLoraLinear", True),
            ("gptq", "GPTQLoraLinear", False),
            ("awq", "AwqLoraLinear", False),
        )
    ),
    *(
        Method(f"Fused{name}", f"{_LORA}.layer", name, LoraModel, read_lora, base_multiplies=True, features=features)
        for name, features in (("Conv1d", -2), ("Conv2d", -3), ("Conv3d", -4))
    ),
    Method("FusedSVDLinear", f"{_ADALORA}.layer", "SVDLinear", AdaLoraModel, read_adalora, may_be_plain=True),
    Method("FusedSVDLinear4bit", f"{_ADALORA}.bnb", "SVDLinear4bit", AdaLoraModel, read_adalora),
    Method(
        "FusedSVDLinear8bitLt", f"{_ADALORA}.bnb", "SVDLinear8bitLt", AdaLoraModel, read_adalora, base_multiplies=True
    ),
    Method("FusedVeraLinear", "peft.tuners.vera.layer", "Linear", VeraModel, read_vera),
    *_rows("delora", "DeloraLinear", "DeloraModel", read_delora),
    *_rows("tinylora", "Linear", "TinyLoraModel", read_tinylora),
    *_rows("unilora", "Linear", "UniLoraModel", read_unilora),
    *_rows("vblora", "Linear", "VBLoRAModel", read_vblora),
)


def method_of(peft_class: type[Any]) -> Method | None:
    """The row of exactly this class."""
    return next((method for method in _rows_at(peft_class) if method.peft_class() is peft_class), None)


def stock_of(method: Method) -> Stock:
    """PEFT's forward, which the fused one stands in for."""
    peft_class = method.peft_class()
    assert peft_class is not None
    return Stock((peft_class, "forward"))


def _rows_at(peft_class: type[Any]) -> Iterator[Method]:
    place = peft_class.__module__, peft_class.__qualname__
    return (method for method in METHODS if (method.module, method.qualname) == place)

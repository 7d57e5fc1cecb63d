"""Which method each layer of a quantized checkpoint has."""

from __future__ import annotations

from sglang.quantization.base import LinearMethod, Quantization
from sglang.quantization.grouped import METHODS
from sglang.quantization.schemes import Scheme
from sglang.quantization.unquantized import Unquantized
from sglang.quantization.w8a8 import W8A8Linear


class QuantizedCheckpoint(Quantization):
    def __init__(self, scheme: Scheme) -> None:
        self.scheme = scheme
        self._method: LinearMethod
        if scheme.kind == "weights":
            self._method = METHODS[scheme.format](scheme)
        else:
            self._method = W8A8Linear(scheme)
        self._unquantized = Unquantized()

    def linear(self, name: str) -> LinearMethod:
        return self._method if self.scheme.covers(name) else self._unquantized

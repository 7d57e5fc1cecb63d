"""What a checkpoint's quantization_config says, in the words of this project. No torch here: with a
scheme that cannot be served, a start ends before any process is started.

    AutoAWQ              quant_method "awq"
    AutoGPTQ, GPTQModel  quant_method "gptq"
    compressed-tensors   quant_method "compressed-tensors"; formats pack-, int- and float-quantized
    AutoFP8              quant_method "fp8"
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

AT_LOAD = ("fp8", "int8")
"""What --quantization can make of a checkpoint in floating point."""
_SUPPORTED = (
    "supported: awq (4 bits, gemm), gptq (4 and 8 bits), fp8 (per tensor), compressed-tensors "
    "(4-bit pack-quantized, 8-bit int-quantized and float-quantized)"
)


@dataclass(frozen=True)
class Scheme:
    format: str
    """Whose names and packing: "awq", "gptq", "compressed-tensors" or "fp8"."""
    kind: str
    """"weights" (integers with scales for groups of inputs), "int8" or "fp8" (activations too)."""
    bits: int = 8
    group_size: int = -1
    """Inputs that share a scale; -1: all."""
    symmetric: bool = True
    """No zero points are stored."""
    act_order: bool = False
    """A tensor says which input is in which group."""
    zero_offset: int = 0
    """To be added to the zero points that are stored."""
    per_tensor: bool = False
    """One scale for all outputs."""
    ignored: tuple[str, ...] = ()
    """Layers in floating point: names, parts of names, or "re:" and a pattern."""

    def covers(self, name: str) -> bool:
        """Whether the layer of this name is quantized."""
        if name == "lm_head":
            return False
        for each in self.ignored:
            if each.startswith("re:"):
                if re.match(each[3:], name):
                    return False
            elif each == name or f".{each}." in f".{name}.":
                return False
        return True


def parse_scheme(config: dict[str, Any]) -> Scheme:
    """config.json's quantization_config -> Scheme. Raises ValueError for what cannot be served."""
    readers = {
        "awq": _awq, "gptq": _gptq, "compressed-tensors": _compressed_tensors, "fp8": _fp8
    }  # fmt: skip
    method = str(config.get("quant_method") or config.get("quantization_method")).lower()
    if method not in readers:
        raise _unsupported(f"the method {method}")
    scheme = readers[method](config)
    if scheme.group_size != -1 and scheme.group_size % 32:
        raise _unsupported(f"{method} with groups of {scheme.group_size}")
    return scheme


def _unsupported(what: str) -> ValueError:
    return ValueError(f"weights are quantized by {what}, which is not supported; {_SUPPORTED}")


def _awq(config: dict[str, Any]) -> Scheme:
    bits, version = config.get("bits", 4), str(config.get("version", "gemm")).lower()
    if bits != 4:
        raise _unsupported(f"awq with {bits} bits")
    if version != "gemm":
        raise _unsupported(f"awq in the layout {version}")
    if not config.get("zero_point", True):
        raise _unsupported("awq without zero points")
    return Scheme(
        "awq", "weights", 4, config.get("group_size", 128), symmetric=False,
        ignored=tuple(config.get("modules_to_not_convert") or ()),
    )  # fmt: skip


def _gptq(config: dict[str, Any]) -> Scheme:
    bits, layout = config.get("bits", 4), config.get("checkpoint_format", "gptq")
    if bits not in (4, 8):
        raise _unsupported(f"gptq with {bits} bits")
    if layout not in ("gptq", "gptq_v2"):
        raise _unsupported(f"gptq in the layout {layout}")
    if config.get("lm_head"):
        raise _unsupported("gptq, the output head too")
    if config.get("dynamic"):
        raise _unsupported("gptq with settings that differ between layers (dynamic)")
    # The first version stores a zero point less one, of symmetric weights too.
    return Scheme(
        "gptq", "weights", bits, config.get("group_size", 128), symmetric=False,
        act_order=bool(config.get("desc_act")), zero_offset=int(layout == "gptq"),
        ignored=tuple(config.get("modules_in_block_to_exclude") or ()),
    )  # fmt: skip


def _fp8(config: dict[str, Any]) -> Scheme:
    if config.get("weight_block_size"):
        raise _unsupported("fp8 with scales for blocks")
    ignored = config.get("ignored_layers") or config.get("modules_to_not_convert") or ()
    return Scheme("fp8", "fp8", per_tensor=True, ignored=tuple(ignored))


def _compressed_tensors(config: dict[str, Any]) -> Scheme:
    groups = list((config.get("config_groups") or {}).values())
    if len(groups) != 1:
        raise _unsupported(f"compressed-tensors with {len(groups)} groups of layers")
    if (targets := groups[0].get("targets")) != ["Linear"]:
        raise _unsupported(f"compressed-tensors for the layers {targets}")
    weights, inputs = groups[0].get("weights") or {}, groups[0].get("input_activations")
    bits, type = weights.get("num_bits"), weights.get("type", "int")
    strategy = weights.get("strategy") or ("group" if weights.get("group_size") else "tensor")
    layout = groups[0].get("format") or config.get("format")
    ignored = tuple(config.get("ignore") or ())
    found = f"compressed-tensors {layout}, {bits}-bit {type} weights by {strategy}"
    if groups[0].get("output_activations") or config.get("kv_cache_scheme"):
        raise _unsupported(f"{found}, with quantized outputs or KV cache")
    if layout == "pack-quantized":
        if (bits, type) != (4, "int") or inputs or strategy not in ("group", "channel"):
            raise _unsupported(found + (" and quantized activations" if inputs else ""))
        return Scheme(
            "compressed-tensors", "weights", 4,
            weights["group_size"] if strategy == "group" else -1,
            symmetric=weights.get("symmetric", True),
            act_order=weights.get("actorder") in ("group", True),
            ignored=ignored,
        )  # fmt: skip
    kinds = {("int-quantized", "int"): "int8", ("float-quantized", "float"): "fp8"}
    kind = kinds.get((layout, type))
    if kind is None or bits != 8 or strategy not in ("channel", "tensor"):
        raise _unsupported(found)
    if not inputs or inputs.get("num_bits") != 8 or inputs.get("type", "int") != type:
        raise _unsupported(f"{found}, with activations {inputs and inputs.get('type')}")
    if not weights.get("symmetric", True) or not inputs.get("symmetric", True):
        raise _unsupported(f"{found}, asymmetric")
    per_tensor = strategy == "tensor"
    return Scheme("compressed-tensors", kind, per_tensor=per_tensor, ignored=ignored)

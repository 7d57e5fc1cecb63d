"""What a checkpoint's quantization_config says, in the words of this project. No torch here: with a
scheme that cannot be served, a start ends before any process is started.

    AutoAWQ              quant_method "awq"
    AutoGPTQ, GPTQModel  quant_method "gptq"
    compressed-tensors   quant_method "compressed-tensors"; formats pack-, int- and float-quantized
    AutoFP8              quant_method "fp8"
    FBGEMM               quant_method "fbgemm_fp8"
    NVIDIA's ModelOpt    quant_method "modelopt"; FP8 with a scale for a tensor or for each output

Scales for a KV cache in 8 bits, which some bring along, are not used.
"""

from __future__ import annotations

import fnmatch
import re
from dataclasses import dataclass
from typing import Any

AT_LOAD = ("fp8", "int8")
"""What --quantization can make of a checkpoint in floating point."""
_SUPPORTED = (
    "supported: awq (4 bits, gemm), gptq (4 and 8 bits), fp8, fbgemm_fp8, modelopt (FP8), "
    "compressed-tensors (4-bit pack-quantized, 8-bit int-quantized and float-quantized)"
)


@dataclass(frozen=True)
class Scheme:
    format: str
    """Whose names and packing: a quant_method."""
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
    block: tuple[int, int] | None = None
    """Outputs and inputs that share a scale."""
    targets: tuple[str, ...] = ("re:",)
    """Layers that are quantized, all but..."""
    ignored: tuple[str, ...] = ()
    """...these: names, parts of names, or "re:" and how a name begins."""

    def covers(self, name: str) -> bool:
        """Whether the layer of this name is quantized."""
        if name == "lm_head" or any(_is_meant(name, each) for each in self.ignored):
            return False
        return any(_is_meant(name, each) for each in self.targets)


def _is_meant(name: str, by: str) -> bool:
    if by.startswith("re:"):
        return re.match(by[3:], name) is not None
    return f".{by}." in f".{name}."


def parse_scheme(config: dict[str, Any]) -> Scheme:
    """config.json's quantization_config -> Scheme. Raises ValueError for what cannot be served."""
    readers = {
        "awq": _awq, "gptq": _gptq, "compressed-tensors": _compressed_tensors, "fp8": _fp8,
        "fbgemm_fp8": _fbgemm, "modelopt": _modelopt,
    }  # fmt: skip
    try:
        method = _method(config)
        if method not in readers:
            raise _unsupported(f"the method {method}")
        scheme = readers[method](config)
        for each in (*scheme.targets, *scheme.ignored):
            _is_meant("", each)  # raises what is wrong with a pattern
    except (AttributeError, KeyError, TypeError, re.error, OverflowError, RecursionError) as error:
        raise ValueError(
            f"cannot read the checkpoint's quantization_config: {type(error).__name__}: {error}"
        ) from None
    size = scheme.group_size
    if not isinstance(size, int) or (size != -1 and (size <= 0 or size % 32)):
        raise _unsupported(f"{method} with groups of {size}")
    return scheme


def _method(config: dict[str, Any]) -> str:
    if method := config.get("quant_method") or config.get("quantization_method"):
        return str(method).lower()
    if config.get("load_in_4bit") or config.get("load_in_8bit"):
        return "bitsandbytes"
    # Some tools do not say it in files of their own.
    told_by = {"w_bit": "awq", "desc_act": "gptq", "quantization": "modelopt"}
    return next((method for key, method in told_by.items() if key in config), "none")


def _names(given: Any) -> list[str]:
    """Of layers. Raises TypeError if it is no list of names."""
    names = given or []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise TypeError(f"{names!r} is no list of names")
    return names


def _unsupported(what: str) -> ValueError:
    return ValueError(f"weights are quantized by {what}, which is not supported; {_SUPPORTED}")


def _awq(config: dict[str, Any]) -> Scheme:
    bits, version = config.get("bits", config.get("w_bit", 4)), config.get("version") or "gemm"
    if bits != 4:
        raise _unsupported(f"awq with {bits!r} bits")
    if str(version).lower() != "gemm":
        raise _unsupported(f"awq in the layout {version}")
    return Scheme(
        "awq", "weights", 4, _group_size(config, "group_size", "q_group_size"), symmetric=False,
        # AutoAWQ looks for them anywhere in a name.
        ignored=tuple(f"re:.*{re.escape(n)}" for n in _names(config.get("modules_to_not_convert"))),
    )  # fmt: skip


def _group_size(config: dict[str, Any], *names: str) -> int:
    size = next((config[name] for name in names if name in config), 128)
    return -1 if size is None else size


def _gptq(config: dict[str, Any]) -> Scheme:
    bits = config.get("bits", 4)
    layout = config.get("checkpoint_format") or config.get("format") or "gptq"
    layout = "marlin" if config.get("is_marlin_format") else layout
    if not isinstance(bits, int) or bits not in (4, 8):
        raise _unsupported(f"gptq with {bits!r} bits")
    if layout not in ("gptq", "gptq_v2"):
        raise _unsupported(f"gptq in the layout {layout}")
    if config.get("lm_head"):
        raise _unsupported("gptq, the output head too")
    dynamic = config.get("dynamic") or {}
    if any(not pattern.startswith("-:") for pattern in dynamic):
        raise _unsupported("gptq with settings that differ between layers (dynamic)")
    names = ("modules_in_block_to_exclude", "modules_to_not_convert")
    ignored = [each for name in names for each in _names(config.get(name))]
    # The first version stores a zero point less one, of symmetric weights too.
    return Scheme(
        "gptq", "weights", bits, _group_size(config, "group_size"), symmetric=False,
        act_order=bool(config.get("desc_act")), zero_offset=int(layout == "gptq"),
        ignored=(*ignored, *(f"re:{pattern[2:]}" for pattern in dynamic)),
    )  # fmt: skip


def _fp8(config: dict[str, Any]) -> Scheme:
    ignored = _names(config.get("ignored_layers") or config.get("modules_to_not_convert"))
    block = _block(config.get("weight_block_size"))
    return Scheme("fp8", "fp8", per_tensor=not block, block=block, ignored=tuple(ignored))


def _fbgemm(config: dict[str, Any]) -> Scheme:
    return Scheme("fbgemm_fp8", "fp8", ignored=tuple(_names(config.get("modules_to_not_convert"))))


def _modelopt(config: dict[str, Any]) -> Scheme:
    settings = config.get("quantization") or config
    if settings.get("quant_algo") is None:  # nothing but a KV cache
        return Scheme("modelopt", "fp8", targets=())
    algorithm = str(settings["quant_algo"]).upper()
    if algorithm not in ("FP8", "FP8_PER_CHANNEL_PER_TOKEN"):
        raise _unsupported(f"modelopt's {algorithm}")
    names = _names(settings.get("exclude_modules") or settings.get("ignore"))
    ignored = (f"re:{fnmatch.translate(n)}" if set("*?[") & set(n) else n for n in names)
    return Scheme("modelopt", "fp8", per_tensor=algorithm == "FP8", ignored=tuple(ignored))


def _block(size: list[int] | None) -> tuple[int, int] | None:
    if not size:
        return None
    if len(size) != 2 or not all(isinstance(each, int) and each > 0 for each in size):
        raise _unsupported(f"fp8 with scales for blocks of {size}")
    return size[0], size[1]


def _compressed_tensors(config: dict[str, Any]) -> Scheme:
    groups = [
        {key: value for key, value in group.items() if value is not None}
        for group in (config.get("config_groups") or {}).values()
    ]
    targets = [target for group in groups for target in _names(group.pop("targets", None))]
    if not groups or any(group != groups[0] for group in groups):
        raise _unsupported(f"compressed-tensors with {len(groups)} groups of layers")
    weights, inputs = groups[0].get("weights") or {}, groups[0].get("input_activations")
    bits, type = weights.get("num_bits"), weights.get("type", "int")
    strategy = weights.get("strategy") or ("group" if weights.get("group_size") else "tensor")
    layout = groups[0].get("format") or config.get("format")
    layers: dict[str, Any] = {"ignored": tuple(_names(config.get("ignore")))}
    if "Linear" not in targets:
        layers["targets"] = tuple(targets)
    found = f"compressed-tensors {layout}, {bits}-bit {type} weights by {strategy}"
    if groups[0].get("output_activations"):
        raise _unsupported(f"{found}, with quantized outputs")
    transforms = ((config.get("transform_config") or {}).get("config_groups") or {}).values()
    places = {each["location"] for group in transforms for each in group["apply"]}
    if online := places - {"weight_input", "weight_output"}:
        raise _unsupported(f"{found}, transformed as it runs ({sorted(online)[0]})")
    if layout == "pack-quantized":
        if (bits, type) != (4, "int") or inputs or strategy not in ("group", "channel"):
            raise _unsupported(found + (" and quantized activations" if inputs else ""))
        return Scheme(
            "compressed-tensors", "weights", 4,
            weights.get("group_size") if strategy == "group" else -1,
            symmetric=weights.get("symmetric", True),
            act_order=weights.get("actorder") in ("group", "dynamic", True),
            **layers,
        )  # fmt: skip
    kind = {"int": "int8", "float": "fp8"}.get(type)
    if kind is None or layout not in (f"{type}-quantized", "naive-quantized"):
        raise _unsupported(found)
    strategies = ("channel", "tensor", "block") if kind == "fp8" else ("channel", "tensor")
    if bits != 8 or strategy not in strategies:
        raise _unsupported(found)
    if not inputs or inputs.get("num_bits") != 8 or inputs.get("type", "int") != type:
        raise _unsupported(f"{found}, with activations {inputs and inputs.get('type')}")
    if not weights.get("symmetric", True) or not inputs.get("symmetric", True):
        raise _unsupported(f"{found}, asymmetric")
    if strategy == "block":
        layers["block"] = _block(weights["block_structure"])
    per_tensor = strategy == "tensor"
    return Scheme("compressed-tensors", kind, per_tensor=per_tensor, **layers)

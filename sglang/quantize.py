"""Make a quantized checkpoint: python -m sglang.quantize --method awq|gptq|int8|fp8 IN OUT

IN is a folder, a .gguf file or a hub id; "" is the demo model. Weights are rounded as
`sglang.calibration` says; without calibration, each to the nearest number.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from sglang import calibration
from sglang.calibration import EightBits, FourBits, Int4, Rounded, round_to_8_bits, round_to_int4
from sglang.model_config import ModelConfig, _read_gguf
from sglang.models.checkpoint import open_checkpoint
from sglang.quantization.grouped import AWQLinear
from sglang.quantization.w8a8 import DTYPES
from sglang.rotation import RotatedCheckpoint
from sglang.server_args import ServerArgs
from sglang.tokenizer import Tokenizer

METHODS = ("awq", "gptq", "int8", "fp8")
_TOKENIZER_FILES = ("token*", "special_tokens*", "vocab*", "merges*", "*.jinja", "generation_c*")
_MODEL_TYPES = {"Llama": "llama", "Mistral": "mistral", "Qwen2": "qwen2", "Qwen3": "qwen3"}


def quantize(
    method: str, source: str, target: str, group_size: int = 0, text: str | None = None
) -> None:
    """group_size 0: the largest of 128, 64 and 32 that divides every layer's inputs, if it can be
    into 16 groups. text: to calibrate with; without it, or if it is short, each weight is rounded
    to the nearest number."""
    args = ServerArgs(model_path=source, device="cpu", dtype="float32")
    config = ModelConfig.load(args)
    if config.quantization_config is not None:
        raise ValueError(f"{config.path} is quantized already")
    checkpoint = open_checkpoint(config)
    widths = (config.hidden_size, config.intermediate_size, config.num_heads * config.head_dim)
    sizes = [size for size in (128, 64, 32) if all(width % size == 0 for width in widths)]
    if method in ("awq", "gptq") and not (group_size or sizes):
        raise ValueError(f"no group size divides the layers' inputs, {widths}")
    fits = group_size >= 0 and group_size % 32 == 0
    if group_size and not (fits and all(width % group_size == 0 for width in widths)):
        raise ValueError(f"--group-size must be a multiple of 32 that divides {widths}")
    many = (size for size in sizes if 16 * size <= min(widths))
    group_size = group_size or next(many, (sizes or [0])[-1])

    folder = Path(target)
    folder.mkdir(parents=True, exist_ok=True)
    if folder.samefile(config.path):
        raise ValueError(f"{target} is where the model comes from: its weights would be lost")
    weights = "model.safetensors"
    if others := sorted({path.name for path in folder.glob("*.safetensors")} - {weights}):
        raise ValueError(f"{target} holds another model's weights: {others[0]}")

    eight_bits = DTYPES.get(method)
    dtype = torch.bfloat16 if eight_bits else torch.float16
    changed: dict[str, torch.Tensor] = {}
    rounded: dict[str, Rounded] = {}
    if text is not None:
        ids = Tokenizer.load(config, args).encode(text)
        if len(ids) < calibration.MIN_TOKENS:
            print(f"{len(ids)} tokens are too few to calibrate with: rounding to nearest")
        else:
            # Not for fp8: what it loses is a share of each number, whatever the others are.
            rotated = method == "int8"
            if rotated:
                checkpoint = RotatedCheckpoint(config, checkpoint)
                config = dataclasses.replace(config, tie_word_embeddings=False)
            format = EightBits(eight_bits, rotated) if eight_bits else FourBits(group_size)
            changed, rounded = calibration.calibrate(config, checkpoint, ids, format)
    tensors: dict[str, torch.Tensor] = {}
    for name in sorted(checkpoint.names):
        layer = name.removesuffix(".weight")
        if layer in rounded:
            tensors |= pack(method, layer, rounded[layer])
            continue
        weight = changed.get(name)
        if weight is None:
            weight = torch.empty(checkpoint.shape(name))
            checkpoint.load(weight, name)
        if not name.endswith("_proj.weight"):
            tensors[name] = weight.to(dtype)
        elif eight_bits:
            tensors |= pack(method, layer, round_to_8_bits(weight, eight_bits))
        else:
            tensors |= pack(method, layer, round_to_int4(weight, group_size))
    (folder / "model.safetensors.index.json").unlink(missing_ok=True)  # of what was there before
    save_file(tensors, folder / weights, metadata={"format": "pt"})
    (folder / weights).chmod(0o644)  # its maker lets nobody else read it
    values, held_in = _copy_the_rest(config, folder), str(dtype).removeprefix("torch.")
    values |= {
        "dtype": held_in,
        "torch_dtype": held_in,  # its older name
        "tie_word_embeddings": config.tie_word_embeddings,
        "quantization_config": quantization_config(method, group_size),
    }
    (folder / "config.json").write_text(json.dumps(values, indent=1))


def pack(method: str, name: str, weight: Rounded) -> dict[str, torch.Tensor]:
    """The tensors of a linear layer."""
    if isinstance(weight, Int4):
        return pack_int4(method, name, weight)
    return {
        f"{name}.weight": weight.q.contiguous(),
        f"{name}.weight_scale": weight.scales[:, None].contiguous(),
    }


def pack_int4(method: str, name: str, weight: Int4) -> dict[str, torch.Tensor]:
    """The tensors of a linear layer, as AWQ or GPTQ has them."""
    q, scales, zeros = weight.q, weight.scales, weight.zeros
    if method == "awq":
        pack = [AWQLinear.ORDER.index(nibble) for nibble in range(8)]
        words = {"qweight": q.t(), "qzeros": zeros}
        packed = {
            key: _words(value.unflatten(1, (-1, 8))[:, :, pack].flatten(1), 1)
            for key, value in words.items()
        }
    else:  # the first version's zero points are stored less one, word by word
        packed = {"qweight": _words(q.t(), 0), "qzeros": _words(zeros, 1) - 0x11111111}
        packed["g_idx"] = (torch.arange(q.shape[1]) * len(scales) // q.shape[1]).int()
    packed["scales"] = scales.half()
    return {f"{name}.{key}": value.contiguous() for key, value in packed.items()}


def _words(numbers: torch.Tensor, dim: int) -> torch.Tensor:
    """4-bit numbers -> int32, eight along `dim` in each, the first one lowest."""
    eights = numbers.int().unflatten(dim, (-1, 8))
    words = torch.zeros_like(eights.select(dim + 1, 0))
    for i in range(8):
        words |= eights.select(dim + 1, i) << 4 * i
    return words


def quantization_config(method: str, group_size: int) -> dict[str, Any]:
    common = {"quant_method": method, "bits": 4, "group_size": group_size}
    if method == "awq":
        return common | {"version": "gemm", "zero_point": True}
    if method == "gptq":
        return common | {"desc_act": False, "sym": False, "checkpoint_format": "gptq"}
    eight = {"num_bits": 8, "type": "int" if method == "int8" else "float", "symmetric": True}
    group = {
        "targets": ["Linear"],
        "weights": eight | {"strategy": "channel", "dynamic": False},
        "input_activations": eight | {"strategy": "token", "dynamic": True},
    }
    return {
        "quant_method": "compressed-tensors",
        "format": "int-quantized" if method == "int8" else "float-quantized",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
        "quantization_status": "compressed",
    }


def _copy_the_rest(config: ModelConfig, folder: Path) -> dict[str, Any]:
    """Tokenizer and the like go to `folder`; returns the contents of config.json."""
    source = Path(config.path)
    if source.suffix != ".gguf":
        for pattern in _TOKENIZER_FILES:
            for file in source.glob(pattern):
                shutil.copy(file, folder / file.name)
        return json.loads((source / "config.json").read_text(encoding="utf-8"))
    from sglang.models import gguf_tokenizer
    from sglang.models.gguf import GGUFFile

    metadata = GGUFFile(source).metadata
    gguf_tokenizer.build_tokenizer(metadata).save(str(folder / "tokenizer.json"))
    settings: dict[str, Any] = gguf_tokenizer.special_tokens(metadata)
    if template := metadata.get("tokenizer.chat_template"):
        settings["chat_template"] = template
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=1))
    family = config.architecture.removesuffix("ForCausalLM")
    return _read_gguf(source) | {"model_type": _MODEL_TYPES[family]}


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m sglang.quantize",
        description="Write a quantized checkpoint.",
    )
    parser.add_argument("source", metavar="IN", help='folder, .gguf file or hub id; "": the demo')
    parser.add_argument("target", metavar="OUT", help="folder to write")
    parser.add_argument("--method", required=True, choices=METHODS)
    parser.add_argument("--group-size", type=int, default=0, help="of awq and gptq")
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--calibration", metavar="FILE", type=Path, default=calibration.TEXT)
    how.add_argument("--no-calibration", action="store_true", help="round to nearest")
    args = parser.parse_args()
    if not args.target:
        parser.error("OUT must name a folder")
    try:
        text = None if args.no_calibration else args.calibration.read_text(encoding="utf-8")
        quantize(args.method, args.source, args.target, args.group_size, text)
    except (ValueError, OSError, SafetensorError) as error:  # the last: a full disk, say
        parser.error(str(error))


if __name__ == "__main__":
    main()

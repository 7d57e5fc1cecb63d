"""Checkpoints as people have uploaded them: keys of older versions and of other tools, tensors that
say nothing, and what looks right and would be read wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from sglang.quantization.schemes import parse_scheme
from sglang.quantize import quantize
from tests.models import tiny
from tests.quantization.test_formats import K_SIZES, Integers, blocks_layer, check, words, write

GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 64, "desc_act": False}


def gptq_layer(rng, order_rng, n, k):
    w = Integers(rng, n, k, 4, 64, np.arange(k) // 64)
    order = torch.arange(k, dtype=torch.int32) // 64
    stored = {"qweight": words(w.q, 4).t(), "qzeros": words(w.zeros - 1, 4), "g_idx": order}
    return stored | {"scales": w.scales}, w.weight


def packed_layer(rng, order_rng, n, k):
    w = Integers(rng, n, k, 4, 64, np.arange(k) // 64)
    w.weight = torch.from_numpy(w.q - 8).float() * w.scales.float().t().repeat_interleave(64, 1)
    return {"weight_packed": words(w.q, 4), "weight_scale": w.scales.t()}, w.weight


def eight_bit_layer(rng, order_rng, n, k):
    """Of numbers, tokens too, that rounding leaves as they are: the scales are powers of two."""
    q = torch.from_numpy(rng.integers(-127, 128, (n, k))).to(torch.int8)
    scales = torch.full((n, 1), 2.0**-9)
    return {"weight": q, "weight_scale": scales}, q.float() * scales


def packed(**weights: Any) -> dict[str, Any]:
    weights = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 64} | weights
    groups = {"group_0": {"weights": weights, "targets": ["Linear"], "input_activations": None}}
    return {
        "quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": groups
    }  # fmt: skip


def eight_bits(type: str = "int", layout: str = "int-quantized") -> dict[str, Any]:
    eight = {"num_bits": 8, "type": type, "symmetric": True}
    group = {"weights": eight | {"strategy": "channel"}, "input_activations": eight}
    return {
        "quant_method": "compressed-tensors",
        "format": layout,
        "config_groups": {"group_0": group | {"targets": ["Linear"]}},
    }


def change(folder: Path, edit) -> None:
    """edit: what it is to do with the tensors."""
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(tensors, folder / "model.safetensors")


# --- settings ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "config, expected",
    [
        ({"quant_method": "awq", "zero_point": False, "version": None}, {"group_size": 128}),
        ({"zero_point": True, "q_group_size": 64, "w_bit": 4, "version": "GEMM"},
         {"format": "awq", "group_size": 64}),
        ({"bits": 4, "desc_act": True}, {"format": "gptq", "act_order": True}),
        ({"quant_method": "gptq", "group_size": None}, {"group_size": -1}),
        ({"quant_method": "gptq", "format": "gptq_v2"}, {"zero_offset": 0}),
        ({"quant_method": "gptq", "checkpoint_format": None}, {"zero_offset": 1}),
        ({"quant_method": "fp8", "kv_cache_scheme": "static"}, {"per_tensor": True}),
        (packed(actorder="dynamic"), {"act_order": True}),
        (packed() | {"kv_cache_scheme": {"num_bits": 8}}, {"group_size": 64}),
        (eight_bits("float", "naive-quantized"), {"kind": "fp8"}),
        ({"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0}, {"per_tensor": False}),
        ({"quant_method": "modelopt", "quant_algo": "FP8", "config_groups": {}},
         {"kind": "fp8", "per_tensor": True}),
        ({"quant_method": "modelopt", "quantization": {"quant_algo": "fp8_per_channel_per_token"}},
         {"kind": "fp8", "per_tensor": False}),
    ],
)  # fmt: skip
def test_settings_of_other_versions_and_tools(config, expected):
    scheme = parse_scheme(config)
    assert {name: getattr(scheme, name) for name in expected} == expected


@pytest.mark.parametrize(
    "config, covered, not_covered",
    [
        ({"quant_method": "awq", "modules_to_not_convert": ["layers.0.", "mlp.d"]},
         "layers.1.mlp.up_proj", "layers.1.mlp.down_proj layers.0.mlp.up_proj lm_head"),
        (GPTQ | {"dynamic": {"-:.*down_proj": {}}}, "a.up_proj", "a.down_proj"),
        (GPTQ | {"modules_to_not_convert": ["down_proj"]}, "a.up_proj", "a.down_proj"),
        (packed() | {"ignore": ["re:.*mlp.*"]}, "a.q_proj", "a.mlp.up_proj lm_head"),
        ({"quant_method": "modelopt", "quant_algo": "FP8", "ignore": ["a.1*", "a.2.up_proj"]},
         "a.2.down_proj b.a.1.up_proj", "a.1.up_proj a.2.up_proj lm_head"),
        ({"quant_method": "fbgemm_fp8", "modules_to_not_convert": ["a.1.up_proj"]},
         "a.1.down_proj", "a.1.up_proj"),
        ({"quant_method": "modelopt", "quant_algo": "FP8", "ignore": ["a.[1-3].up"]},
         "a.4.up", "a.2.up"),
        ({"quant_method": "modelopt", "quantization": {"kv_cache_quant_algo": "FP8"}},
         "", "a.up_proj"),
    ],
)  # fmt: skip
def test_layers_that_are_left_out(config, covered, not_covered):
    scheme = parse_scheme(config)
    assert all(scheme.covers(name) for name in covered.split())
    assert not any(scheme.covers(name) for name in not_covered.split())


@pytest.mark.parametrize(
    "config",
    [
        {"quant_method": "awq", "modules_to_not_convert": "lm_head"},
        GPTQ | {"modules_in_block_to_exclude": [["up_proj"]]},
        {"quant_method": "modelopt", "quant_algo": "FP8", "exclude_modules": "*lm_head*"},
        {"quant_method": "fbgemm_fp8", "modules_to_not_convert": {"lm_head": True}},
        packed() | {"ignore": "lm_head"},
        packed() | {"ignore": ["re:a{99999999999}"]},
        packed() | {"ignore": ["re:" + "(" * 1500 + ")" * 1500]},
    ],
)
def test_what_is_no_list_of_names_is_refused(config):
    with pytest.raises(ValueError, match="cannot read the checkpoint's quantization_config"):
        parse_scheme(config)


def test_layers_that_are_meant_by_pattern_and_by_several_equal_groups():
    config = packed()
    group = config["config_groups"].pop("group_0")
    config["config_groups"]["a"] = group | {"targets": ["re:.*self_attn.*"]}
    del group["input_activations"]
    config["config_groups"]["b"] = group | {"targets": ["re:.*down_proj"]}
    scheme = parse_scheme(config)
    assert scheme.covers("model.layers.0.self_attn.q_proj")
    assert scheme.covers("model.layers.0.mlp.down_proj")
    assert not scheme.covers("model.layers.0.mlp.up_proj")
    config["config_groups"]["b"] = group | {"weights": {"num_bits": 8}, "targets": ["re:.*"]}
    with pytest.raises(ValueError, match="2 groups of layers"):
        parse_scheme(config)


@pytest.mark.parametrize("location, works", [("weight_output", True), ("input", False)])
def test_a_transform_that_is_not_in_the_weights_is_refused(location, works):
    apply = [{"location": location, "targets": ["Linear"]}]
    config = packed() | {"transform_config": {"config_groups": {"u": {"apply": apply}}}}
    if works:
        assert parse_scheme(config)
    else:
        with pytest.raises(ValueError, match=r"transformed as it runs \(input\)"):
            parse_scheme(config)


@pytest.mark.parametrize("where", ["quantize_config.json", "compression_config"])
def test_settings_that_stand_elsewhere(where, tmp_path):
    theirs, folder = tiny.make("Llama", **K_SIZES), tmp_path / "model"
    config, layer = (GPTQ, gptq_layer) if "json" in where else (packed(), packed_layer)
    write(folder, theirs, config, layer)
    values = json.loads((folder / "config.json").read_text())
    if "json" in where:
        del values["quantization_config"]["quant_method"]
        (folder / where).write_text(json.dumps(values.pop("quantization_config")))
    else:
        values[where] = values.pop("quantization_config")
    (folder / "config.json").write_text(json.dumps(values))
    check(folder, theirs)
    with pytest.raises(ValueError, match="is quantized already"):
        quantize("int8", str(folder), str(tmp_path / "out"))


@pytest.mark.parametrize("tool", ["fbgemm_fp8", "modelopt", "modelopt in a file of its own"])
def test_fp8_of_other_tools(tool, tmp_path):
    def edit(tensors):
        for name in [name for name in tensors if name.endswith("weight_scale")]:
            tensors[name] = tensors[name].view(())
            tensors[name.replace("weight_scale", "input_scale")] = torch.ones(())
        tensors["model.layers.0.self_attn.k_proj.k_scale"] = torch.ones(())

    theirs, folder = tiny.make("Llama", **K_SIZES), tmp_path / "model"
    outputs = 1 if tool == "fbgemm_fp8" else 512  # all, and all inputs
    write(folder, theirs, {"quant_method": tool}, blocks_layer(outputs, 512, "weight_scale"))
    if tool != "fbgemm_fp8":
        change(folder, edit)
        settings = {"quantization": {"quant_algo": "FP8", "exclude_modules": ["lm_head"]}}
        values = json.loads((folder / "config.json").read_text())
        values["quantization_config"] |= settings
        if tool != "modelopt":
            del values["quantization_config"]
            (folder / "hf_quant_config.json").write_text(json.dumps(settings))
        (folder / "config.json").write_text(json.dumps(values))
    ours, _ = tiny.load(folder, dtype="float32")
    for mine, their in zip(ours.layers, theirs.model.layers, strict=True):
        for fused, parts in (
            (mine.self_attn.qkv_proj, [getattr(their.self_attn, f"{x}_proj") for x in "qkv"]),
            (mine.self_attn.o_proj, [their.self_attn.o_proj]),
            (mine.mlp.gate_up_proj, [their.mlp.gate_proj, their.mlp.up_proj]),
        ):
            weight = fused.weight.float() * fused.scales[:, None]
            torch.testing.assert_close(weight, torch.cat([part.weight for part in parts]))


def test_settings_of_a_tool_that_is_not_supported(tmp_path):
    tiny.make("Llama", **K_SIZES).save_pretrained(tmp_path)
    (tmp_path / "hf_quant_config.json").write_text('{"quantization": {"quant_algo": "NVFP4"}}')
    with pytest.raises(ValueError, match="modelopt's NVFP4, which is not supported"):
        tiny.load(tmp_path)


# --- tensors -------------------------------------------------------------------------------------


def test_tensors_that_say_nothing(tmp_path):
    """A KV cache's scales, zero points of symmetric numbers; and scales of another shape."""

    def edit(tensors):
        for name in [name for name in tensors if name.endswith("weight_scale")]:
            layer = name.removesuffix(".weight_scale")
            n = len(tensors[name])
            tensors[name] = tensors[name].flatten()
            tensors[f"{layer}.input_scale"] = torch.ones(1)
            tensors[f"{layer}.input_zero_point"] = torch.zeros(1, dtype=torch.int8)
            tensors[f"{layer}.weight_zero_point"] = torch.zeros(n, 1, dtype=torch.int8)
            if layer.endswith("k_proj"):
                tensors[f"{layer}.output_scale"] = torch.ones(1)
                tensors[f"{layer.removesuffix('.k_proj')}.v_scale"] = torch.ones(1)

    theirs, folder = tiny.make("Llama", **K_SIZES), tmp_path / "model"
    write(folder, theirs, eight_bits(), eight_bit_layer)
    before, _ = tiny.load(folder, dtype="float32")
    change(folder, edit)
    after, _ = tiny.load(folder, dtype="float32")
    ids = list(range(40))
    assert torch.equal(tiny.our_logits(before, ids), tiny.our_logits(after, ids))
    name = "model.layers.0.mlp.up_proj.input_zero_point"
    change(folder, lambda tensors: tensors[name].add_(3))
    with pytest.raises(ValueError, match=f"{name} is not zero"):
        tiny.load(folder)


def test_zero_points_of_gptqs_first_version_borrow_from_the_next(tmp_path):
    """As GPTQModel writes them: 0x11111111 less in each word."""

    def layer(rng, order_rng, n, k):
        w = Integers(rng, n, k, 4, 64, np.arange(k) // 64)
        w.zeros[:, ::3] = 0
        zeros, scales = w.zeros[w.group_of].T, w.scales.float().numpy()[w.group_of].T
        stored = {"qweight": words(w.q, 4).t(), "qzeros": words(w.zeros, 4) - 0x11111111}
        return stored | {"scales": w.scales}, torch.from_numpy((w.q - zeros) * scales).float()

    theirs = tiny.make("Llama", **K_SIZES)
    write(tmp_path / "model", theirs, GPTQ, layer)
    check(tmp_path / "model", theirs)


@pytest.mark.parametrize("group_of", [-1, 7])
def test_groups_of_inputs_that_are_not_said(group_of, tmp_path):
    """-1: in order, as compressed-tensors has it."""

    def layer(rng, order_rng, n, k):
        stored, weight = packed_layer(rng, order_rng, n, k)
        return stored | {"weight_g_idx": torch.full((k,), group_of, dtype=torch.int32)}, weight

    theirs = tiny.make("Llama", **K_SIZES)
    write(tmp_path / "model", theirs, packed(actorder="group"), layer)
    if group_of == -1:
        check(tmp_path / "model", theirs)
    else:
        with pytest.raises(ValueError, match="q_proj has inputs of groups that there are not"):
            tiny.load(tmp_path / "model")


def test_an_order_that_the_settings_do_not_say_is_refused(tmp_path):
    folder = tmp_path / "model"
    write(folder, tiny.make("Llama", **K_SIZES), GPTQ, gptq_layer)
    name = "model.layers.1.mlp.down_proj.g_idx"
    change(folder, lambda tensors: tensors.update({name: tensors[name].flip(0)}))
    with pytest.raises(ValueError, match=f"{name} has another order than desc_act says"):
        tiny.load(folder)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn, torch.int32])
def test_numbers_of_another_kind_are_refused(dtype, tmp_path):
    folder, name = tmp_path / "model", "model.layers.0.self_attn.k_proj.weight"
    write(folder, tiny.make("Llama", **K_SIZES), eight_bits(), eight_bit_layer)
    change(folder, lambda tensors: tensors.update({name: tensors[name].to(dtype)}))
    with pytest.raises(ValueError, match=rf"{name} is {str(dtype)[6:]} in .* makes it int8$"):
        tiny.load(folder)


def test_a_layer_that_is_quantized_in_part_is_refused(tmp_path):
    folder = tmp_path / "model"
    write(folder, tiny.make("Llama", **K_SIZES), GPTQ, gptq_layer)
    tiny.rewrite_config(folder, quantization_config=GPTQ | {"modules_to_not_convert": ["k_proj"]})
    with pytest.raises(ValueError, match=r"k_proj, .*v_proj: some are quantized and some are not"):
        tiny.load(folder)


def test_weights_that_are_quantized_though_nothing_says_so(tmp_path):
    folder = tmp_path / "model"
    write(folder, tiny.make("Llama", **K_SIZES), GPTQ, gptq_layer)
    tiny.rewrite_config(folder, quantization_config=None)
    with pytest.raises(ValueError, match=r"q_proj.weight, but .*q_proj.scales: is it quantized"):
        tiny.load(folder)
    with pytest.raises(ValueError, match=r"\w+ is int32 in the checkpoint"):
        quantize("int8", str(folder), str(tmp_path / "out"))


# --- files ---------------------------------------------------------------------------------------


def test_one_whole_file_goes_before_an_index_and_others(tmp_path):
    theirs = tiny.make("Llama")
    theirs.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "gone"}}')
    save_file({"model.norm.weight": torch.zeros(64)}, tmp_path / "other.safetensors")
    check(tmp_path, theirs)


def test_a_tensor_that_is_in_two_files_is_refused(tmp_path):
    tiny.make("Llama").save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "a.safetensors")
    save_file({"model.norm.weight": torch.zeros(64)}, tmp_path / "b.safetensors")
    with pytest.raises(ValueError, match=r"norm.weight is in both .*a.safetensors and .*b.safet"):
        tiny.load(tmp_path)
